"""Sampling from the distribution that is trained. The padding token is the end-of-sequence token throughout."""

import pytest
import torch

from rlkernels.trainers import rollout, scoring
from rlkernels.trainers.packing import Sequence, lay_out

CPU = torch.device("cpu")


@pytest.fixture
def engine(make_model, tokenizer):
    return rollout.TransformersEngine(make_model(), tokenizer)


def options(max_completion_length: int = 5, temperature: float = 1.0) -> rollout.SamplingOptions:
    return rollout.SamplingOptions(temperature=temperature, max_completion_length=max_completion_length)


def test_pad_left():
    ids, real = rollout.pad_left([[1, 0], [2], [3, 4, 0]], 0, CPU)
    assert ids.tolist() == [[0, 1, 0], [0, 0, 2], [3, 4, 0]]
    assert real.tolist() == [[False, True, True], [False, False, True], [True, True, True]]


def test_sequence_of_a_rollout():
    """Token 0, the padding token, is in the loss where the model wrote it; a tool's tokens are not."""
    done = rollout.Rollout([5, 0], [7, 8, 9, 0], ended=True)
    assert done.sequence() == Sequence([5, 0, 7, 8, 9, 0], [-100, -100, 7, 8, 9, 0])
    done.mask = [True, False, False, True]
    assert done.sequence().labels == [-100, -100, 7, -100, -100, 0]


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
    torch.manual_seed(0)
    count, vocabulary = 4000, model.config.vocab_size
    prompts = [[3, 4, 5, 6], [7]]
    rollouts = engine.complete([prompt for prompt in prompts for _ in range(count)], options(1, temperature))
    samples = torch.tensor([each.completion_ids for each in rollouts]).view(2, count)
    for prompt, drawn in zip(prompts, samples, strict=True):
        every = [rollout.Rollout(prompt, [token], ended=False).sequence() for token in range(vocabulary)]
        batch = lay_out(every, CPU, padding_free=False)
        with torch.no_grad():
            logprobs = scoring.token_logprobs(model, batch, fused=fused, temperature=temperature)
        p = logprobs[batch["mask"]].exp()
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


def test_prompts_read_once_give_the_same_samples(engine, monkeypatch):
    prompts = [[3, 4, 5, 6]] * 8 + [[7]] * 8 + [[8, 9]] + [[7]]
    shared, alone = [], []
    for samples in (shared, alone):
        torch.manual_seed(0)
        samples += [each.completion_ids for each in engine.complete(prompts, options())]
        monkeypatch.setattr(rollout.TransformersEngine, "_read_prompts", lambda *args: None)
    assert shared == alone
    assert len(set(map(tuple, shared))) > 8


def test_sampled_lengths(engine):
    torch.manual_seed(0)
    rollouts = engine.complete([[3, 4], [5]] * 100, options())
    assert all(1 <= len(each.completion_ids) <= 5 and 0 not in each.completion_ids[:-1] for each in rollouts)
    assert all(each.ended == (each.completion_ids[-1] == 0) for each in rollouts)
    assert {each.ended for each in rollouts} == {True, False}


def test_encode(tokenizer):
    assert rollout.encode(tokenizer, ["ab", "c"], {}) == [[1, 2], [3]]
    chat = [[{"role": "user", "content": "ab"}]]
    (ids,) = rollout.encode(tokenizer, chat, {})
    assert tokenizer.decode(ids).replace(" ", "") == "u:aba:"
    with pytest.raises(ValueError, match="prompt '' has no tokens"):
        rollout.encode(tokenizer, ["ab", ""], {})


def test_end_tokens(make_model, tokenizer):
    model = make_model()
    assert rollout.end_tokens(model, tokenizer) == [0]
    model.generation_config.eos_token_id = [4, 0]
    assert rollout.end_tokens(model, tokenizer) == [0, 4]
