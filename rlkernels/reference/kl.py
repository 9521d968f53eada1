import torch
from torch import Tensor


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
    return value + (k2 - k2.detach()).nan_to_num(nan=0.0)  # inf - inf beside an infinite log-ratio


def estimate(log_ratio: Tensor, estimator: str) -> Tensor:
    """k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d, abs = |d|, for d = log policy - log reference."""
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio.square()
    if estimator == "k3":
        return torch.expm1(-log_ratio) + log_ratio
    return log_ratio.abs()
