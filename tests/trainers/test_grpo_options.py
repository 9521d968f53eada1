"""GRPOTrainer's options that TRL has not: further objectives and advantages, dynamic sampling, punished length."""

import math
import random

import pytest
import torch

import rlkernels
from rlkernels.trainers import GRPOConfig, GRPOTrainer, Rollout, grpo

PROMPTS = [{"prompt": "ab" + "c" * (i % 5) + "d", "index": i} for i in range(13)]
TAUGHT = (1, 4, 8)  # the prompts whose rewards differ


def some_teach(index, completion_ids, **kwargs):
    """Within a group of four, rewards differ by the place in it, if the prompt is one of some."""
    return [float(row % 4) if i in TAUGHT else 1.0 for row, i in enumerate(index)]


def by_place(completions, **kwargs):
    return [float(row % 4) for row in range(len(completions))]


@pytest.fixture
def make_trainer(make_model, tokenizer, run_options):
    def make(reward_funcs=some_teach, rollout=None, **options):
        options = {
            **run_options,
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_completion_length": 6,
            "learning_rate": 3e-3,
            "max_steps": 3,
        } | options
        return GRPOTrainer(
            make_model(), reward_funcs, GRPOConfig(**options), PROMPTS, processing_class=tokenizer, rollout=rollout
        )

    return make


def history(trainer) -> list[dict]:
    timings = ("runtime", "per_second", "total_flos", "train_loss")
    logs = [{k: v for k, v in log.items() if not k.endswith(timings)} for log in trainer.state.log_history]
    return [log for log in logs if "loss" in log]


def weights(trainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def add_noise(model) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)


def dense_logprobs(model, rollout: Rollout) -> torch.Tensor:
    """Log-probabilities of the completion's tokens, from the model's logits for this sequence alone."""
    ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids])
    logprobs = model(ids).logits[0, :-1].log_softmax(-1)
    return logprobs.gather(1, ids[0, 1:, None]).squeeze(1)[len(rollout.prompt_ids) - 1 :]


@pytest.fixture
def fixed():
    """An engine that gives the same completions at each call; of one a token in the middle is a tool's."""
    rng = random.Random(0)
    completions = [[rng.randrange(1, 38) for _ in range(rng.randrange(2, 6))] + [0] for _ in range(8)]
    rollouts = [Rollout([1 + row // 4, 5, 6], ids, ended=True) for row, ids in enumerate(completions)]
    rollouts[3].mask = [step != 1 for step in range(len(completions[3]))]
    return lambda prompts, sampling: rollouts


@pytest.mark.parametrize(
    "loss_type, objective, aggregation, normalizer",
    [
        ("gmpo", "gmpo", "seq_mean_token_mean", 8),
        ("dppo_tv", "dppo_tv", "token_mean", None),
        ("dppo_kl", "dppo_kl", "token_mean", None),
        ("reinforce", "reinforce", "token_mean", None),
    ],
)
def test_objectives(make_trainer, fixed, loss_type, objective, aggregation, normalizer):
    """The loss on completions that are used again equals policy_loss of a dense forward pass in a padded batch."""
    trainer = make_trainer(
        lambda **_: [0.0, 1.0, 2.0, 4.0] * 2, fixed, loss_type=loss_type, num_iterations=2, epsilon=0.01, delta=1.1
    )
    inputs = [PROMPTS[row // 4] for row in range(8)]
    rows = fixed(None, None)
    with torch.no_grad():
        old = [dense_logprobs(trainer.model, row) for row in rows]
    trainer.training_step(trainer.model, inputs)
    add_noise(trainer.model)
    trainer.model.zero_grad()
    trainer.state.global_step = 1
    loss = trainer.training_step(trainer.model, inputs)
    got = torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters()])

    trainer.model.zero_grad()
    new = [dense_logprobs(trainer.model, row) for row in rows]
    pad = torch.nn.utils.rnn.pad_sequence
    own = [torch.tensor(row.mask or [True] * len(row.completion_ids)) for row in rows]
    wanted, _ = rlkernels.policy_loss(
        pad(new, batch_first=True),
        pad(old, batch_first=True),
        torch.tensor(trainer.collector.buffer.experience.advantages),
        pad(own, batch_first=True),
        objective=objective,
        aggregation=aggregation,
        normalizer=normalizer,
        clip_low=0.01,
        clip_high=0.01,
        delta=1.1,
    )
    wanted.backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters()])
    torch.testing.assert_close(loss, wanted.detach(), rtol=1e-5, atol=1e-6)
    assert gradient.norm() > 1e-3
    assert (got - gradient).norm() <= 1e-5 * gradient.norm()


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_reinforce_plus_plus(make_trainer, fixed, beta):
    """Returns by the equation, whitened over the model's own tokens; the loss itself has no KL penalty."""
    rewards = [0.0, 1.0, 2.0, None, 3.0, -1.0, 0.5, 0.5]
    trainer = make_trainer(
        lambda **_: rewards, fixed, advantage="reinforce_plus_plus", beta=beta, num_generations=1, epsilon=0.01
    )
    add_noise(trainer.model)
    rows = fixed(None, None)
    returns, places = [], []
    with torch.no_grad():
        for place, (row, reward) in enumerate(zip(rows, rewards, strict=True)):
            kl = torch.zeros(len(row.completion_ids))
            if beta:
                kl = dense_logprobs(trainer.model, row) - dense_logprobs(trainer.reference_model, row)
            own = [step for step in range(len(kl)) if row.mask is None or row.mask[step]]
            for step in own if reward is not None else []:
                returns.append(reward - beta * sum(kl[s].item() for s in own if s >= step))
                places.append((place, len(row.prompt_ids) - 1 + step))
    returns = torch.tensor(returns)
    expected = (returns - returns.mean()) / returns.std(correction=0)

    trainer.training_step(trainer.model, [PROMPTS[row] for row in range(8)])
    experience = trainer.collector.buffer.experience
    got = experience.token_advantages
    found = torch.stack([got[row][step - experience.sequences[row].prefix] for row, step in places])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert sum(int((values != 0).sum()) for values in got) == len(places)
    assert experience.ref_logprobs is None
    assert ("kl" in trainer.metrics.sums) == (beta > 0)


def test_advantages_of_tokens_that_cancel_have_a_gradient():
    tokens = torch.tensor([0.0, 1.0, -1.0])
    rollouts = grpo.Experience([], [0.0, 0.0], [True] * 2, 2.0, [tokens, torch.zeros(3)])
    assert rollouts.has_gradient(0) and not rollouts.has_gradient(1)


def test_kl_in_the_reward_of_rloo_is_measured(make_trainer):
    trainer = make_trainer(by_place, advantage="rloo", loss_type="luspo", beta=0.5)
    trainer.train()
    kl = [log["kl"] for log in history(trainer)]
    assert kl[0] == pytest.approx(0, abs=1e-6) and abs(kl[-1]) > 1e-4


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_sampler_correction(make_trainer, fixed, level):
    """A sampler that agrees changes nothing; where it held one token for half as likely, the weight 2 is capped."""
    rows = fixed(None, None)
    options = {"importance_sampling_mode": f"{level}_truncate", "importance_sampling_cap": 1.5}
    rewards = [0.0, 1.0, 2.0, 4.0] * 2
    plain = make_trainer(lambda **_: rewards, fixed, max_steps=1)
    with torch.no_grad():
        for row in rows:
            row.logprobs = dense_logprobs(plain.model, row).tolist()
    plain.train()
    corrected = make_trainer(lambda **_: rewards, fixed, importance_sampling_correction=True, max_steps=1, **options)
    corrected.train()
    torch.testing.assert_close(weights(corrected), weights(plain), rtol=1e-3, atol=1e-5)
    assert history(corrected)[0]["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-5)
    rows[5].logprobs[0] -= math.log(2)
    doubled = make_trainer(lambda **_: rewards, fixed, importance_sampling_correction=True, max_steps=1, **options)
    doubled.train()
    tokens = sum(len(row.completion_ids) for row in rows) - 1
    capped = 1 if level == "token" else len(rows[5].completion_ids)
    assert history(doubled)[0]["sampling/importance_sampling_ratio/capped"] == pytest.approx(capped / tokens)


def test_own_engine_samples_from_the_trained_model(make_trainer):
    """Each token's weight is 1, at any temperature."""
    options = {"importance_sampling_correction": True, "importance_sampling_mode": "token_mask", "temperature": 0.7}
    trainer = make_trainer(by_place, importance_sampling_cap=1.001, **options)
    trainer.train()
    assert all(log["sampling/importance_sampling_ratio/capped"] == 0 for log in history(trainer))


def test_engine_without_logprobs(make_trainer, fixed):
    trainer = make_trainer(lambda **_: [0.0, 1.0] * 4, fixed, importance_sampling_correction=True)
    with pytest.raises(ValueError, match=r"row 0: logprobs is None, but options\.logprobs asks"):
        trainer.train()


def test_dynamic_sampling_finds_signal(make_trainer):
    """Every group teaches in the end; other prompts are drawn, none twice, and only in the place of idle groups."""
    sizes = []

    def note(index, log_extra, **kwargs):
        sizes.append((trainer.state.global_step, index))
        log_extra("row", index)
        return some_teach(index, **kwargs)

    trainer = make_trainer(note, dynamic_sampling_max_rounds=10, max_steps=4, num_iterations=2)
    trainer.train()
    logs = history(trainer)
    assert [log["frac_reward_zero_std"] for log in logs if "frac_reward_zero_std" in log] == [0.0, 0.0]
    rounds = [log["dynamic_sampling/rounds"] for log in logs if "dynamic_sampling/rounds" in log]
    assert min(rounds) > 0 and sum(rounds) == len(sizes) - 2
    assert {row["row"] for row in trainer.completions} <= {*TAUGHT}
    assert all(row["prompt"] == PROMPTS[row["row"]]["prompt"] for row in trainer.completions)
    for step in (0, 2):
        calls = [index[::4] for at, index in sizes if at == step]
        idle = 2
        for index in calls:
            assert len(index) == idle
            idle = sum(i not in TAUGHT for i in index)
        drawn = [i for index in calls for i in index]
        assert idle == 0 and len(set(drawn)) == len(drawn)
    assert logs[-1]["num_tokens"] > sum(len(row["prompt"]) for row in trainer.completions) * 2
    assert all(log["grad_norm"] > 0 for log in logs)


def test_dynamic_sampling_counts_what_it_drew(make_trainer):
    seen = []

    def count(prompts, completion_ids, **kwargs):
        seen.append(sum(map(len, prompts)) + sum(map(len, completion_ids)))
        return some_teach(completion_ids=completion_ids, **kwargs)

    trainer = make_trainer(count, dynamic_sampling_max_rounds=10, max_steps=2)
    trainer.train()
    assert history(trainer)[-1]["num_tokens"] == sum(seen)


def test_dynamic_sampling_stops_at_its_cap(make_trainer):
    """What is left without signal contributes nothing, as without dynamic sampling."""
    calls = []

    def never(index, **kwargs):
        calls.append(index)
        return [1.0] * len(index)

    trainer = make_trainer(never, dynamic_sampling_max_rounds=2, max_steps=2)
    before = weights(trainer)
    trainer.train()
    assert [len(index) for index in calls] == [8] * 6
    assert [log["dynamic_sampling/rounds"] for log in history(trainer)] == [2, 2]
    assert [log["frac_reward_zero_std"] for log in history(trainer)] == [1, 1]
    assert torch.equal(weights(trainer), before)


def test_dynamic_sampling_ends_with_the_prompts(make_trainer):
    """Of 13 prompts 2 are the batch's, and 11 are left: a sixth round finds one, a seventh none."""
    calls = []

    def never(index, **kwargs):
        calls.append(index[::4])
        return [1.0] * len(index)

    make_trainer(never, dynamic_sampling_max_rounds=20, max_steps=1).train()
    assert [len(index) for index in calls] == [2, 2, 2, 2, 2, 2, 1]
    assert sorted(i for index in calls for i in index) == list(range(13))


def test_dynamic_sampling_draws_no_prompt_of_another_process(make_trainer, monkeypatch):
    trainer = make_trainer(dynamic_sampling_max_rounds=20)
    monkeypatch.setattr(grpo, "gather_object", lambda rows: [*rows, *range(2, 11)])
    assert sorted(trainer._other_prompts([{"_row_id": 0}, {"_row_id": 1}])) == [11, 12]


@pytest.mark.parametrize(
    "options",
    [
        {"dynamic_sampling_max_rounds": 3, "remove_unused_columns": False},
        {"advantage": "reinforce_plus_plus", "beta": 0.1, "overlong_buffer_length": 3},
        {"advantage": "rloo", "beta": 0.1, "top_entropy_quantile": 0.5},
    ],
    ids=["dynamic_sampling", "reinforce_plus_plus", "rloo"],
)
def test_resumes_exactly(make_trainer, options, tmp_path):
    """Step 3 lies within a generation batch, and the next batch draws prompts again."""
    options = {"max_steps": 6, "num_iterations": 2, "save_strategy": "steps", "save_steps": 3, **options}
    whole = make_trainer(output_dir=str(tmp_path / "whole"), **options)
    whole.train()
    resumed = make_trainer(output_dir=str(tmp_path / "resumed"), **options)
    torch.manual_seed(12345)
    random.seed(12345)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert history(resumed) == history(whole)
    assert torch.equal(weights(resumed), weights(whole))
    assert resumed.completions == whole.completions


def test_overlong_completions_are_punished(make_trainer, fixed):
    """One token short of a buffer of 4 in 6 costs nothing, each further one a quarter; without a reward, no advantage.

    The other reward is the same for all of the first group, which so learns to be short."""
    rewards = [1.0, 1.0, 1.0, 1.0, 0.0, 1.0, None, 2.0]
    trainer = make_trainer(
        lambda **_: rewards, fixed, overlong_buffer_length=4, overlong_penalty=2.0, scale_rewards="none", max_steps=1
    )
    trainer.train()
    lengths = [len(row.completion_ids) - (row.mask is not None) for row in fixed(None, None)]  # without the tool's
    assert len(set(lengths)) > 2
    punishment = [-2.0 * max(0, length - 2) / 4 for length in lengths]
    totals = torch.tensor([math.nan if r is None else r + p for r, p in zip(rewards, punishment, strict=True)])
    expected = (totals.view(2, 4) - totals.view(2, 4).nanmean(1, keepdim=True)).flatten().nan_to_num(0.0)
    got = torch.tensor([row["advantage"] for row in trainer.completions])
    torch.testing.assert_close(got, expected)
    log = history(trainer)[0]
    assert log["rewards/overlong/mean"] == pytest.approx(sum(punishment[:6] + punishment[7:]) / 2 / 7)
    assert log["reward"] == pytest.approx(1.0)
    assert log["frac_reward_zero_std"] == pytest.approx(1 / 8)


def test_tokens_of_tools_leave_no_trace(make_trainer, fixed):
    """What the sampler said of a tool's token changes nothing; that the token is masked does."""
    learned = []
    for says, masked in ((-1.0, True), (math.nan, True), (-9.0, True), (-1.0, False)):
        rows = fixed(None, None)
        for row in rows:
            row.logprobs = [-1.0] * len(row.completion_ids)
        rows[3].logprobs[1] = says
        rows[3].mask = [not masked or step != 1 for step in range(len(rows[3].completion_ids))]
        trainer = make_trainer(
            lambda **_: [0.0, 1.0, 2.0, 4.0] * 2,
            fixed,
            importance_sampling_correction=True,
            importance_sampling_mode="sequence_truncate",
            beta=0.1,
            num_iterations=2,
            max_steps=2,
        )
        trainer.train()
        learned.append(weights(trainer))
    assert torch.equal(learned[0], learned[1]) and torch.equal(learned[0], learned[2])
    assert not torch.equal(learned[0], learned[3])
