import torch
from torch import Tensor

from rlkernels.reference._sequences import sequence_of_token


def kl_penalty(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    *,
    estimator: str,
    straight_through: bool,
    log_ratio_clamp: float,
    value_clamp: float,
) -> Tensor:
    """Per-token estimate of KL(policy || reference); any shape. `estimator` without its "+"."""
    log_ratio = logprobs - ref_logprobs
    with torch.no_grad():
        unclamped = estimate(log_ratio.clamp(-log_ratio_clamp, log_ratio_clamp), estimator)
        clamped = (log_ratio.abs() > log_ratio_clamp) | (unclamped.abs() > value_clamp)
        value = unclamped.clamp(-value_clamp, value_clamp)
    # Where clamped the value is a constant, and what would overflow is kept out of the differentiation: 0 * inf is NaN.
    log_ratio = log_ratio.masked_fill(clamped, 0.0)
    if not straight_through:
        return torch.where(clamped, value, estimate(log_ratio, estimator))
    k2 = 0.5 * log_ratio.square()
    return value + (k2 - k2.detach()).nan_to_num(nan=0.0)  # an infinite log-ratio makes inf - inf


def estimate(log_ratio: Tensor, estimator: str) -> Tensor:
    """k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d, abs = |d|, for d = log policy - log reference."""
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio.square()
    if estimator == "k3":
        return torch.expm1(-log_ratio) + log_ratio
    return log_ratio.abs()


def shaped_rewards(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    kl_coef: float,
    estimator: str,
    after_last: bool,
) -> Tensor:
    """Rewards of padded [B, T] or, with cu_seqlens, packed [N] tokens; scores, one a sequence."""
    scored = torch.ones_like(logprobs, dtype=torch.bool) if mask is None else mask
    rewards = torch.zeros_like(logprobs)
    if kl_coef != 0.0:
        rewards = (-kl_coef * estimate(logprobs - ref_logprobs, estimator)).masked_fill(~scored, 0.0)
    tokens = logprobs.numel()
    sequence, count = sequence_of_token(logprobs, cu_seqlens)
    if tokens == 0 or count == 0:
        return rewards
    position = torch.arange(tokens, device=logprobs.device)
    last = torch.full((count,), -1, device=logprobs.device)
    last = last.scatter_reduce(0, sequence.reshape(-1), position.where(scored.reshape(-1), -1), "amax")
    at = last
    if after_last:
        starts = position[:: logprobs.shape[1]] if cu_seqlens is None else cu_seqlens[:-1].long()
        ends = torch.cat([starts[1:], position[-1:] + 1])
        at = torch.minimum(last + 1, ends - 1)
    scores = scores.masked_fill(last < 0, 0.0)
    return rewards.reshape(-1).scatter_add(0, at.clamp(0, tokens - 1), scores).view_as(logprobs)
