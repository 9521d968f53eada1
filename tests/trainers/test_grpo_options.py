"""GRPOTrainer's options that TRL has not: further objectives, and corrections for the sampler."""

import math
import random

import pytest
import torch

import rlkernels
from rlkernels.trainers import GRPOConfig, GRPOTrainer, Rollout

PROMPTS = [{"prompt": "ab" + "c" * (i % 5) + "d", "index": i} for i in range(13)]


def by_place(completions, **kwargs):
    return [float(row % 4) for row in range(len(completions))]


@pytest.fixture
def make_trainer(make_model, tokenizer, tmp_path):
    def make(reward_funcs=by_place, rollout=None, **options):
        options = {
            "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_completion_length": 6,
            "learning_rate": 3e-3,
            "logging_steps": 1,
            "max_steps": 3,
            "bf16": False,
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "activation_checkpointing": False,
            "disable_tqdm": True,
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
    """Of the completion's tokens, by the model's logits for this sequence alone."""
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
    """Of completions that are used again, against policy_loss of a dense forward pass in a padded batch."""
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
        torch.tensor(trainer.rollouts.advantages),
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
    with pytest.raises(ValueError, match=r"row 0: logprobs is None, where options\.logprobs asks for them"):
        trainer.train()


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
