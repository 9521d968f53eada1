"""The arithmetic in the middle of TRL's GRPOTrainer, written out: its method needs a model."""

import torch

LOW, HIGH, BETA = 0.2, 0.28, 0.04
WITHOUT_ENTROPY_AND_SAMPLER = (torch.zeros(()), torch.ones(()), torch.zeros(()))
"""Those of our metrics that the case does not ask for."""


def trl_policy_loss(logprobs, old_logprobs, advantages, mask, ref_logprobs):
    """The arithmetic of GRPOTrainer with beta > 0: k3, two-sided clipping, the mean over tokens, and its metrics."""
    advantages = advantages.unsqueeze(1)
    log_ratio = logprobs - old_logprobs
    ratio = torch.exp(log_ratio)
    kl = torch.exp(ref_logprobs - logprobs) - (ref_logprobs - logprobs) - 1
    loss = -torch.min(ratio * advantages, ratio.clamp(1 - LOW, 1 + HIGH) * advantages) + BETA * kl
    tokens = mask.sum()

    def mean(values):
        return (values * mask).sum() / tokens

    with torch.no_grad():
        metrics = [
            mean(ratio),
            mean((ratio < 1 - LOW) & (advantages < 0)),
            mean((ratio > 1 + HIGH) & (advantages > 0)),
            mean(ratio - 1 - log_ratio),
            mean(kl),
            *WITHOUT_ENTROPY_AND_SAMPLER,
            tokens,
        ]
    return mean(loss), torch.stack([metric.float() for metric in metrics])
