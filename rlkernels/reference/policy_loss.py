import torch
from torch import Tensor

from rlkernels.reference._sequences import sequence_of_token
from rlkernels.reference.kl import kl_penalty


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    ref_logprobs: Tensor | None,
    normalizer: Tensor | float | None,
    *,
    objective: str,
    aggregation: str,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    log_ratio_clamp: float,
    kl_coef: float,
    kl_estimator: str,
    kl_straight_through: bool,
) -> tuple[Tensor, Tensor]:
    """Loss (0-d) and metrics [6] of padded [B, T] or, with cu_seqlens, packed [N] log-probabilities."""
    scored = torch.ones_like(logprobs, dtype=torch.bool) if mask is None else mask
    sequence, count = sequence_of_token(logprobs, cu_seqlens)
    if advantages.shape != logprobs.shape:
        advantages = advantages[sequence]

    # Unscored tokens may hold anything: they are replaced before any arithmetic.
    logprobs = logprobs.masked_fill(~scored, 0.0)
    old = logprobs.detach() if old_logprobs is None else old_logprobs.masked_fill(~scored, 0.0)
    advantages = advantages.masked_fill(~scored, 0.0)

    raw = logprobs - old
    log_ratio = raw.detach().clamp(-log_ratio_clamp, log_ratio_clamp)
    ratio = log_ratio.exp()
    if objective == "ppo":
        free, bound = ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
        gain = torch.minimum(free, bound)
        constant = (bound < free) | (raw.abs() > log_ratio_clamp)
        if dual_clip < float("inf"):
            least = dual_clip * advantages
            bounded = (advantages < 0) & (gain < least)
            gain, constant = torch.where(bounded, least, gain), constant | bounded
        # A clipped ratio may have overflowed, and is kept out of the differentiation: 0 * inf is NaN.
        gain = torch.where(constant, gain, raw.masked_fill(constant, 0.0).exp() * advantages)
        clipped_low = (ratio < 1 - clip_low) & (advantages < 0)
        clipped_high = (ratio > 1 + clip_high) & (advantages > 0)
    else:
        gain = logprobs * advantages
        clipped_low = clipped_high = torch.zeros_like(scored)
    loss = -gain
    kl = torch.zeros_like(loss)
    if ref_logprobs is not None:
        kl = kl_penalty(
            logprobs,
            ref_logprobs.masked_fill(~scored, 0.0),
            estimator=kl_estimator,
            straight_through=kl_straight_through,
            log_ratio_clamp=float("inf"),
            value_clamp=float("inf"),
        )
        if kl_coef != 0.0:
            loss = loss + kl_coef * kl

    num_tokens = scored.sum().to(loss.dtype)

    def token_mean(value: Tensor) -> Tensor:
        return value.to(loss.dtype).masked_fill(~scored, 0.0).sum() / num_tokens.clamp(min=1)

    loss = loss.masked_fill(~scored, 0.0)
    lengths = torch.zeros(count, dtype=loss.dtype, device=loss.device)
    lengths = lengths.scatter_add(0, sequence.reshape(-1), scored.to(loss.dtype).reshape(-1))
    if aggregation == "seq_mean_token_mean":
        loss = loss / lengths.clamp(min=1)[sequence]
    if normalizer is not None:
        denominator = torch.ones_like(num_tokens) * normalizer
    elif aggregation == "token_mean":
        denominator = num_tokens
    elif aggregation == "token_sum":
        denominator = torch.ones_like(num_tokens)
    else:
        denominator = (lengths > 0).sum().to(loss.dtype)
    scale = torch.where(num_tokens > 0, 1 / denominator, torch.zeros_like(num_tokens))
    metrics = torch.stack(
        [
            token_mean(ratio),
            token_mean(clipped_low),
            token_mean(clipped_high),
            token_mean(torch.expm1(log_ratio) - log_ratio),
            token_mean(kl),
            num_tokens,
        ]
    )
    return loss.sum() * scale, metrics.detach()
