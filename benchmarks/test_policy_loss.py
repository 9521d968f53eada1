"""policy_loss and value_loss with their gradients and metrics, at the batch of one optimizer step."""

import torch

import peer_modules
import rlkernels
from eager_policy_loss import BETA, HIGH, LOW, trl_policy_loss
from suite import Case, Peer, response_mask

SHAPE = (64, 1024)
SIZE = 4 * SHAPE[0] * SHAPE[1]
CLIP = 0.2
TRL_METRICS = ("ratio_mean", "clip_fraction_low", "clip_fraction_high", "approx_kl", "ref_kl", "num_tokens")


def policy_inputs():
    logprobs = -3 * torch.rand(SHAPE)
    old = logprobs + 0.2 * torch.randn(SHAPE)
    reference = logprobs + 0.3 * torch.randn(SHAPE)
    return logprobs, old, 1 + torch.randn(SHAPE[0]), response_mask(SHAPE), reference


def our_policy_loss(logprobs, old_logprobs, advantages, mask, ref_logprobs):
    options = dict(ref_logprobs=ref_logprobs, clip_low=LOW, clip_high=HIGH, kl_coef=BETA, kl_estimator="k3")
    return rlkernels.policy_loss(logprobs, old_logprobs, advantages, mask, **options)


def metrics_of_trl(outputs):
    """Ours measures more than TRL's arithmetic does."""
    loss, metrics, gradient = outputs
    if len(metrics) > len(TRL_METRICS):
        metrics = metrics[[rlkernels.policy_loss.metrics.index(name) for name in TRL_METRICS]]
    return loss, metrics, gradient


def value_inputs():
    values = torch.randn(SHAPE)
    return values, values + 0.2 * torch.randn(SHAPE), values + torch.randn(SHAPE), response_mask(SHAPE)


def eager_value_loss(values, old_values, returns, mask):
    clipped = torch.clamp(values, old_values - CLIP, old_values + CLIP)
    loss = torch.max((values - returns).square(), (clipped - returns).square())
    return 0.5 * (loss * mask).sum() / mask.sum()


def verl_value_loss():
    function = peer_modules.verl().compute_value_loss
    return lambda *inputs: function(*inputs, cliprange_value=CLIP)[0]


def verl_layout(values, old_values, returns, mask):
    return values, returns, old_values, mask.float()


CASES = [
    Case(
        "policy_loss",
        SHAPE,
        policy_inputs,
        ours=our_policy_loss,
        eager=trl_policy_loss,
        label="forward+backward, metrics, float32",
        gradient=True,
        compared=metrics_of_trl,
        # Three inputs, a mask and the gradient; the backward pass scales the gradient.
        moved=6 * SIZE + SIZE // 4,
        wanted={"eager": 6, "torch.compile": 2},
    ),
    Case(
        "value_loss",
        SHAPE,
        value_inputs,
        ours=lambda *inputs: rlkernels.value_loss(*inputs, clip=CLIP)[0],
        eager=eager_value_loss,
        peers={
            "verl": Peer(verl_value_loss, verl_layout),
        },
        label="forward+backward, float32",
        gradient=True,
        moved=6 * SIZE + SIZE // 4,
    ),
]


def test_policy_loss(case, implementation, measure):
    measure(case, implementation)
