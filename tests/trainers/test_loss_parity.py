"""policy_loss against the loss code of TRL's GRPOTrainer on the same log-probabilities, value and gradient."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from rlkernels import policy_loss

trl = pytest.importorskip("trl")

ROWS, WIDTH, MAX_LENGTH, ITEMS = 6, 9, 12, 37
# TRL's loss_type and level: our objective and options. What it divides by, where that is not the default, is a number.
LOSSES = {
    "grpo": ("token", dict(aggregation="seq_mean_token_mean", normalizer=ROWS)),
    "bnpo": ("token", dict(aggregation="token_mean")),
    "dr_grpo": ("token", dict(aggregation="token_sum", normalizer=ROWS * MAX_LENGTH)),
    "dapo": ("token", dict(aggregation="token_sum", normalizer=ITEMS)),
    "cispo": (
        "token",
        dict(objective="cispo", aggregation="token_sum", normalizer=ITEMS, clip_low=1.0, clip_high=0.28),
    ),
    "sapo": ("token", dict(objective="sapo", aggregation="seq_mean_token_mean", normalizer=ROWS)),
    "vespo": ("token", dict(objective="vespo", aggregation="token_sum", normalizer=ITEMS)),
    "gspo": ("sequence", dict(objective="gspo", aggregation="seq_mean_token_mean", normalizer=ROWS)),
    "luspo": ("sequence", dict(objective="gspo", aggregation="seq_mean_token_sum", normalizer=ROWS)),
}


@pytest.fixture
def batch():
    torch.manual_seed(0)
    logprobs = -3 * torch.rand(ROWS, WIDTH)
    mask = (torch.arange(WIDTH) < torch.tensor([9, 5, 7, 1, 9, 3]).view(-1, 1)) & (torch.rand(ROWS, WIDTH) < 0.9)
    mask[:, 0] = True
    return SimpleNamespace(
        logprobs=logprobs.requires_grad_(),
        old=-(logprobs + 0.3 * torch.randn(ROWS, WIDTH)).abs().detach(),
        ref=-(logprobs + 0.3 * torch.randn(ROWS, WIDTH)).abs().detach(),
        sampler=None,
        entropy=(2 * torch.rand(ROWS, WIDTH)).requires_grad_(),
        advantages=torch.randn(ROWS),
        mask=mask,
    )


def sampler_ratio(batch, correction, cap):
    """As its _generate_and_score_completions does, which does more than can be run here."""
    difference = torch.nan_to_num((batch.old - batch.sampler) * batch.mask, nan=0.0)
    if correction.startswith("sequence"):
        difference = difference.sum(-1, keepdim=True)
    ratio = torch.exp(difference)
    return ratio.clamp(max=cap) if correction.endswith("truncate") else ratio.masked_fill(ratio > cap, 0.0)


def trl_loss(batch, name, level, beta=0.0, delta=None, entropy_coef=0.0, ratio=None):
    """GRPOTrainer._compute_loss on a trainer that has no more than that method looks at."""
    cispo = name == "cispo"
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (batch.logprobs, batch.entropy, None),
        get_gamma_weights=trl.GRPOTrainer.get_gamma_weights,
        accelerator=SimpleNamespace(
            num_processes=1, sync_gradients=True, gather=lambda x: x, reduce=lambda x, reduction: x
        ),
        args=SimpleNamespace(
            delta=delta,
            use_bias_correction_kl=False,
            steps_per_generation=1,
            sapo_temperature_pos=1.0,
            sapo_temperature_neg=1.05,
            vespo_k_pos=2.0,
            vespo_lambda_pos=3.0,
            vespo_k_neg=3.0,
            vespo_lambda_neg=2.0,
        ),
        model=SimpleNamespace(training=True),
        loss_type="grpo" if name == "gspo" else name,
        importance_sampling_level=level,
        beta=beta,
        epsilon_low=0.2,
        epsilon_high=1.28 if cispo else 0.28,
        use_vllm=ratio is not None,
        vllm_importance_sampling_correction=True,
        max_completion_length=MAX_LENGTH,
        current_gradient_accumulation_steps=1,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        _entropy_bonus_enabled=entropy_coef != 0.0,
        use_adaptive_entropy=False,
        entropy_coef=entropy_coef,
        _metrics={"train": defaultdict(list)},
    )
    tokens = torch.zeros(ROWS, WIDTH, dtype=torch.int64)
    inputs = {
        "prompt_ids": tokens[:, :1],
        "prompt_mask": tokens[:, :1],
        "completion_ids": tokens,
        "completion_mask": batch.mask.long(),
        "advantages": batch.advantages,
        "num_items_in_batch": torch.tensor(float(ITEMS)),
        "old_per_token_logps": batch.old,
        "ref_per_token_logps": batch.ref,
    }
    if ratio is not None:
        inputs["importance_sampling_ratio"] = ratio
    loss = trl.GRPOTrainer._compute_loss(trainer, trainer.model, inputs)
    return loss, {key: values[-1] for key, values in trainer._metrics["train"].items()}


def assert_equal(batch, ours, theirs, *leaves):
    leaves = leaves or (batch.logprobs,)
    got, wanted = (torch.autograd.grad(loss, leaves) for loss in (ours, theirs))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for one, other in zip(got, wanted, strict=True):
        assert other.any()
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("beta", [0.0, 0.3], ids=["no_kl", "kl"])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_types(backend, batch, name, beta):
    level, options = LOSSES[name]
    theirs, metrics = trl_loss(batch, name, level, beta)
    options = dict(clip_high=0.28) | options
    ours, values = policy_loss(
        batch.logprobs, batch.old, batch.advantages, batch.mask, ref_logprobs=batch.ref, kl_coef=beta, **options
    )
    assert_equal(batch, ours, theirs)
    named = dict(zip(policy_loss.metrics, values.tolist(), strict=True))
    if beta:
        assert named["ref_kl"] == pytest.approx(metrics["kl"], rel=1e-5)
    if level == "token" and "clip_ratio/low_mean" in metrics:
        assert named["clip_fraction_low"] == pytest.approx(metrics["clip_ratio/low_mean"])
        assert named["clip_fraction_high"] == pytest.approx(metrics["clip_ratio/high_mean"])
        assert named["clip_fraction_low"] > 0 < named["clip_fraction_high"]


@pytest.mark.parametrize("delta", [0.9, 1.5])
@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo", "luspo"])
def test_delta(backend, batch, name, delta):
    level, options = LOSSES[name]
    batch.old = batch.old - 0.3  # some ratios of sequences are beyond it too
    theirs, _ = trl_loss(batch, name, level, delta=delta)
    ours, _ = policy_loss(
        batch.logprobs, batch.old, batch.advantages, batch.mask, clip_high=0.28, delta=delta, **options
    )
    assert_equal(batch, ours, theirs)


CORRECTIONS = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
# gspo's gradient is TRL's where the weight is one a sequence; of vespo TRL refuses those.
REFUSED = {"gspo": "token", "luspo": "token", "vespo": "sequence"}


@pytest.mark.parametrize(
    ("name", "correction"),
    [(name, c) for name in LOSSES for c in CORRECTIONS if c.split("_")[0] != REFUSED.get(name)],
)
def test_sampler(backend, batch, name, correction):
    level, options = LOSSES[name]
    batch.sampler = batch.old + 0.2 * torch.randn(ROWS, WIDTH)
    batch.sampler[torch.rand(ROWS, WIDTH) < 0.1] = float("nan")
    ratio = sampler_ratio(batch, correction, 1.1)
    theirs, _ = trl_loss(batch, name, level, 0.3, ratio=ratio)
    options = dict(clip_high=0.28) | options | dict(sampler_correction=correction, sampler_cap=1.1)
    ours, values = policy_loss(
        batch.logprobs,
        batch.old,
        batch.advantages,
        batch.mask,
        ref_logprobs=batch.ref,
        kl_coef=0.3,
        sampler_logprobs=batch.sampler,
        **options,
    )
    assert_equal(batch, ours, theirs)
    mean = ratio.expand_as(batch.mask)[batch.mask].mean().item()
    assert values[policy_loss.metrics.index("sampler_weight")].item() == pytest.approx(mean, rel=1e-5)


def test_entropy_bonus(backend, batch):
    """TRL's is a mean over tokens for every loss_type: that of token_mean."""
    theirs, metrics = trl_loss(batch, "bnpo", "token", entropy_coef=0.02)
    ours, values = policy_loss(
        batch.logprobs,
        batch.old,
        batch.advantages,
        batch.mask,
        clip_high=0.28,
        entropy=batch.entropy,
        entropy_coef=0.02,
    )
    assert_equal(batch, ours, theirs, batch.logprobs, batch.entropy)
    assert values[policy_loss.metrics.index("entropy")].item() == pytest.approx(metrics["entropy"], rel=1e-5)
