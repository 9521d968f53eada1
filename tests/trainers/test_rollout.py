"""Sampling from the distribution that is trained. The padding token is the end-of-sequence token throughout."""

import copy
import dataclasses
import json
import math
from functools import partial

import peft
import pytest
import torch

from rlkernels.trainers import GRPOConfig, GRPOTrainer, Rollout, RolloutError
from rlkernels.trainers.batch import scoring
from rlkernels.trainers.batch.batch import Batch, Sequence
from rlkernels.trainers.rollouts import generate, sampling
from rlkernels.trainers.rollouts.engine import SamplingOptions, check_rollouts, encode, end_tokens

CPU = torch.device("cpu")


@pytest.fixture
def engine(make_model, tokenizer):
    return generate.TransformersEngine(make_model(), tokenizer)


def options(max_completion_length: int = 5, temperature: float = 1.0, **others) -> SamplingOptions:
    return SamplingOptions(temperature=temperature, max_completion_length=max_completion_length, **others)


def test_pad_left():
    ids, real = generate.pad_left([[1, 0], [2], [3, 4, 0]], 0, CPU)
    assert ids.tolist() == [[0, 1, 0], [0, 0, 2], [3, 4, 0]]
    assert real.tolist() == [[False, True, True], [False, False, True], [True, True, True]]


def test_sequence_of_a_rollout():
    """Token 0, the padding token, is in the loss where the model wrote it; a tool's tokens are not."""
    done = Rollout([5, 0], [7, 8, 9, 0], ended=True)
    assert done.sequence() == Sequence([5, 0, 7, 8, 9, 0], [-100, -100, 7, 8, 9, 0])
    done.mask = [True, False, False, True]
    assert done.sequence().labels == [-100, -100, 7, -100, -100, 0]


def test_further_turns_of_a_rollout():
    done = Rollout([5], [7, 0], ended=True, logprobs=[-0.5, -1.0])
    done.extend([8, 9], own=False)
    done.extend([7], [-2.0], own=True)
    assert done.completion_ids == [7, 0, 8, 9, 7] and done.mask == [True, True, False, False, True]
    assert done.logprobs[:2] == [-0.5, -1.0] and all(map(math.isnan, done.logprobs[2:4])) and done.logprobs[4] == -2.0
    without = Rollout([5], [7], ended=True)
    without.extend([8], own=False)
    assert without.logprobs is None and without.sequence().labels == [-100, 7, -100]


def test_completions_end_at_the_first_end(engine):
    assert engine._until_end([5, 0, 0, 0]) == [5, 0]
    assert engine._until_end([0, 7, 0, 0]) == [0]
    assert engine._until_end([5, 6, 7, 8]) == [5, 6, 7, 8]


@pytest.mark.parametrize("temperature", [0.8, 8.0], ids=["steep", "flat"])
@pytest.mark.parametrize("fused", [True, False], ids=["no logits", "logits"])
def test_samples_follow_the_trained_distribution(engine, fused, temperature):
    """Frequencies of the first token against its log-probabilities, in two prompts of different lengths."""
    model = engine.model
    assert not fused or scoring.needs_no_logits(model)
    count, vocabulary = 4000, model.config.vocab_size
    prompts = [[3, 4, 5, 6], [7]]
    rollouts = engine.complete([prompt for prompt in prompts for _ in range(count)], options(1, temperature))
    samples = torch.tensor([each.completion_ids for each in rollouts]).view(2, count)
    for prompt, drawn in zip(prompts, samples, strict=True):
        every = [Rollout(prompt, [token], ended=False).sequence() for token in range(vocabulary)]
        batch = Batch.lay_out(every, CPU, padding_free=False)
        with torch.no_grad():
            logprobs = scoring.token_logprobs(model, batch, fused=fused, temperature=temperature)
        p = logprobs[batch.mask].exp()
        assert p.sum().item() == pytest.approx(1.0, abs=1e-4)
        seen = torch.bincount(drawn, minlength=vocabulary) / count
        # Each frequency is binomial; five standard deviations, and a count of one for the rarest tokens.
        assert ((seen - p).abs() <= 5 * (p / count).sqrt() + 1 / count).all()


def test_sampling_leaves_the_model_as_it_was(engine):
    model = engine.model
    config = model.generation_config
    model.train()
    engine.complete([[3, 4], [5]], options())
    assert model.training and model.generation_config is config


class Wrapper(torch.nn.Module):
    """Passes its generation config on to the model within, as PEFT's models do."""

    def __init__(self, model):
        super().__init__()
        self.within = model

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.within, name)

    def forward(self, *args, **kwargs):
        return self.within(*args, **kwargs)

    def generate(self, *args, **kwargs):
        self.within.generation_config = self.generation_config
        return self.within.generate(*args, **kwargs)


@pytest.mark.parametrize("kind", ["adapters", "a wrapper", "a wrapper of adapters"])
def test_sampling_leaves_the_model_within_a_wrapper_as_it_was(kind, make_model, tokenizer, tmp_path):
    model = make_model()
    model.generation_config.eos_token_id = [2, 4]
    model.save_pretrained(tmp_path / "before")
    config = model.generation_config
    wrapped = model
    if "adapters" in kind:
        wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
    if "wrapper" in kind:
        wrapped = Wrapper(wrapped)
    engine = generate.TransformersEngine(wrapped, tokenizer)
    engine.complete([[3, 4], [5]], options())
    with pytest.raises(IndexError):  # no sampling goes on to its end
        engine.complete([[3, 4], [5_000]], options())
    assert model.generation_config is config
    assert [each for each in wrapped.modules() if "generation_config" in vars(each)] == [model]
    (wrapped.merge_and_unload() if "adapters" in kind else model).save_pretrained(tmp_path / "after")
    before, after = (
        json.loads((tmp_path / name / "generation_config.json").read_text()) for name in ("before", "after")
    )
    assert after == before and after["eos_token_id"] == [2, 4]


def test_sampling_leaves_each_part_its_attention(make_model, tokenizer):
    model = make_model()
    model.model.config = copy.deepcopy(model.config)
    model.model.config._attn_implementation = "eager"
    generate.TransformersEngine(model, tokenizer).complete([[3, 4], [5]], options())
    assert (model.config._attn_implementation, model.model.config._attn_implementation) == ("sdpa", "eager")


def test_prompts_read_once_give_the_same_samples(engine, monkeypatch):
    prompts = [[3, 4, 5, 6]] * 8 + [[7]] * 8 + [[8, 9]] + [[7]]
    shared, alone = [], []
    for samples in (shared, alone):
        samples += [each.completion_ids for each in engine.complete(prompts, options())]
        monkeypatch.setattr(generate.TransformersEngine, "_read_prompts", lambda *args: None)
    assert shared == alone
    assert len(set(map(tuple, shared))) > 8


def test_sampled_lengths(engine):
    rollouts = engine.complete([[3, 4], [5]] * 100, options())
    assert all(1 <= len(each.completion_ids) <= 5 and 0 not in each.completion_ids[:-1] for each in rollouts)
    assert all(each.ended == (each.completion_ids[-1] == 0) for each in rollouts)
    assert {each.ended for each in rollouts} == {True, False}


def test_encode(tokenizer):
    assert encode(tokenizer, ["ab", "c"], {}) == [[1, 2], [3]]
    chat = [[{"role": "user", "content": "ab"}]]
    (ids,) = encode(tokenizer, chat, {})
    assert tokenizer.decode(ids).replace(" ", "") == "u:aba:"
    with pytest.raises(ValueError, match="prompt '' has no tokens"):
        encode(tokenizer, ["ab", ""], {})


def test_end_tokens(make_model, tokenizer):
    model = make_model()
    assert end_tokens(model, tokenizer) == [0]
    model.generation_config.eos_token_id = [4, 0]
    assert end_tokens(model, tokenizer) == [0, 4]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("repeated", [True, False], ids=["prompts read once", "prompts all different"])
def test_logprobs_are_those_that_are_trained(engine, temperature, repeated):
    """After prompts that differ in length, of rows that end early beside such as are cut off."""
    assert scoring.needs_no_logits(engine.model)
    engine.end_token_ids = list(range(0, engine.model.config.vocab_size, 8))
    prompts = [[3, 4, 5, 6]] * 8 + [[7]] * 8 if repeated else [[3, 4, 5 + row][row % 3 :] for row in range(16)]
    rollouts = engine.complete(prompts, options(12, temperature, logprobs=True))
    lengths = [len(each.completion_ids) for each in rollouts]
    assert min(lengths) <= 2 and max(lengths) == 12 and len(set(lengths)) > 3
    batch = Batch.lay_out([each.sequence() for each in rollouts], CPU, padding_free=False)
    with torch.no_grad():
        trained = batch.split(scoring.token_logprobs(engine.model, batch, fused=True, temperature=temperature))
    for each, values in zip(rollouts, trained, strict=True):
        own = values[len(each.prompt_ids) - 1 : -1]
        torch.testing.assert_close(torch.tensor(each.logprobs), own, rtol=1e-4, atol=1e-5)


def test_logprobs_do_not_change_what_is_sampled(engine):
    drawn = []
    for logprobs in (False, True):
        rollouts = engine.complete([[3, 4], [5]] * 4, options(logprobs=logprobs))
        assert all((each.logprobs is not None) == logprobs for each in rollouts)
        drawn.append([each.completion_ids for each in rollouts])
    assert drawn[0] == drawn[1]


def test_sampling_stores_no_scores(engine, monkeypatch):
    """No tensor [B, V] that sampling makes outlives its step."""
    import weakref

    alive, scores = [], []

    def count(logits, *args, choose):
        alive.append(sum(each() is not None for each in scores))
        scores.append(weakref.ref(logits))
        return choose(logits, *args)

    monkeypatch.setattr(sampling, "choose", partial(count, choose=sampling.choose))
    engine.complete([[3, 4], [5]] * 8, options(12, 0.7, logprobs=True))
    assert len(alive) == 12 and max(alive) == 0


def test_sampling_ends_with_the_last_row(engine, monkeypatch):
    """Rows that end with their first or second token take no more than two steps."""
    steps = []
    own = engine.model.forward
    monkeypatch.setattr(engine.model, "forward", lambda *args, **kwargs: steps.append(1) or own(*args, **kwargs))
    monkeypatch.setattr(engine, "end_token_ids", list(range(1, engine.model.config.vocab_size)))
    rollouts = engine.complete([[3, 4], [5]] * 8, options(50))
    assert all(each.ended for each in rollouts) and 1 <= len(steps) <= 2


SOUND = Rollout([3, 4], [5, 6, 0], ended=True, logprobs=[-1.0, math.nan, 0.0], mask=[True, False, True])


def check(*rollouts, prompts=("ab",), logprobs=False):
    return check_rollouts(list(rollouts), list(prompts), options(logprobs=logprobs), vocab_size=10)


def test_sound_rollouts_pass():
    assert check(SOUND, logprobs=True) == [SOUND]
    nothing_own = dataclasses.replace(SOUND, mask=[False] * 3)
    assert check(nothing_own) == [nothing_own]
    tensors = dataclasses.replace(
        SOUND, prompt_ids=torch.tensor([3, 4]), completion_ids=torch.tensor([5, 6, 0]).numpy()
    )
    assert check(tensors) == [SOUND]
    assert all(type(token) is int for token in check(tensors)[0].completion_ids)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_ids": []}, "row 1: prompt_ids is empty"),
        ({"completion_ids": []}, "row 1: completion_ids is empty"),
        ({"completion_ids": [5, 10, 0]}, "completion_ids holds 10, but the model's token ids are 0 to 9"),
        ({"completion_ids": [5, -1, 0]}, "completion_ids holds -1"),
        ({"completion_ids": "abc"}, "completion_ids must be a list of token ids; got 'abc'"),
        ({"completion_ids": [5.0, 6.0, 0.0]}, "completion_ids must be a list of token ids"),
        ({"completion_ids": None}, "completion_ids must be a list of token ids; got None"),
        ({"ended": None}, "ended must be a bool; got None"),
        ({"logprobs": None}, "logprobs is None, but options.logprobs asks for"),
        ({"logprobs": [-1.0]}, "logprobs must be a list of one value for each of the 3 completion tokens; got 1"),
        ({"logprobs": [-1.0, -math.inf, 0.0]}, "logprobs must be finite numbers, .*; got -inf"),
        ({"logprobs": [-1.0, None, 0.0]}, "logprobs must be finite numbers, .*; got None"),
        ({"mask": [True, False]}, "mask must be a list of one value for each of the 3 completion tokens; got 2"),
        ({"mask": torch.ones(3)}, "mask must be a list .*; got Tensor"),
        ({"mask": [True, False, 2]}, "mask must hold bools; got 2"),
    ],
)
def test_unsound_rollouts_are_named(changes, message):
    with pytest.raises(RolloutError, match=message):
        check(SOUND, dataclasses.replace(SOUND, **changes), prompts=("ab", "c"), logprobs=True)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([], "must return one Rollout for each of the 1 prompts; got 0"),
        ([SOUND, SOUND], "must return one Rollout for each of the 1 prompts; got 2"),
        ({"completion_ids": [[1]]}, "must return a list of Rollout; got dict"),
        (None, "must return a list of Rollout; got NoneType"),
        ([([3], [4])], "must return a list of Rollout; got tuple at row 0"),
    ],
)
def test_what_is_no_list_of_rollouts_is_named(returned, message):
    with pytest.raises(RolloutError, match=message):
        check_rollouts(returned, ["ab"], options(), vocab_size=10)


# Several turns

TOOL = [40, 41]


def two_turns(engine):
    """An engine in which a tool answers each first turn."""

    def complete(prompts, options):
        turn = dataclasses.replace(options, max_completion_length=3, logprobs=True)
        rollouts = engine(prompts, turn)
        for each in rollouts:
            each.extend(TOOL, own=False)
        further = engine.complete([each.prompt_ids + each.completion_ids for each in rollouts], turn)
        for each, said in zip(rollouts, further, strict=True):
            each.extend(said.completion_ids, said.logprobs, own=True)
            each.ended = said.ended
        return rollouts

    return complete


def dense_logprobs(model, each: Rollout) -> torch.Tensor:
    """Log-probabilities of the completion's tokens, from the model's logits for this sequence alone."""
    ids = torch.tensor([each.prompt_ids + each.completion_ids])
    logprobs = model(ids).logits[0, :-1].log_softmax(-1)
    return logprobs.gather(1, ids[0, 1:, None]).squeeze(1)[len(each.prompt_ids) - 1 :]


def test_logprobs_of_several_turns(engine):
    """Those of the second turn are given the first and what the tool said."""
    torch.manual_seed(0)
    for each in two_turns(engine)(["abc", "d"] * 4, options()):
        own = torch.tensor(each.mask)
        assert [token for token, mine in zip(each.completion_ids, each.mask, strict=True) if not mine] == TOOL
        with torch.no_grad():
            expected = dense_logprobs(engine.model, each)
        logprobs = torch.tensor(each.logprobs)
        torch.testing.assert_close(logprobs[own], expected[own], rtol=1e-4, atol=1e-5)
        assert logprobs[~own].isnan().all()


def test_the_model_learns_from_its_own_turns(make_model, tokenizer, tmp_path):
    """The gradient of a GRPO step is that of -advantage x log-probability over all tokens but the tool's."""
    model = make_model()
    seen = []

    def engine(prompts, sampling):
        seen.extend(two_turns(generate.TransformersEngine(model, tokenizer))(prompts, sampling))
        return seen

    config = GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=8,
        bf16=False,
        use_cpu=True,
        report_to="none",
        activation_checkpointing=False,
    )
    rows = [{"prompt": "abc"}, {"prompt": "d"}]
    rewards = [0.0, 1.0, 2.0, 4.0] * 2
    trainer = GRPOTrainer(model, lambda **_: rewards, config, rows, processing_class=tokenizer, rollout=engine)
    trainer.training_step(model, [rows[row // 4] for row in range(8)])
    got = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    lengths = [sum(each.mask) for each in seen]
    assert trainer.metrics.flush(trainer.accelerator)["completions/mean_length"] == pytest.approx(sum(lengths) / 8)

    model.zero_grad()
    advantages = (torch.tensor(rewards) - 1.75) / (torch.tensor(rewards[:4]).std() + 1e-4)
    own = [torch.tensor(each.mask) for each in seen]
    losses = [
        -advantage * dense_logprobs(model, each)[mine].sum()
        for advantage, each, mine in zip(advantages, seen, own, strict=True)
    ]
    (torch.stack(losses).sum() / torch.cat(own).sum()).backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    assert (got - expected).norm() <= 1e-5 * expected.norm()
