import math

import torch
from torch import Tensor

from rlkernels._codes import AGGREGATIONS, KL_ESTIMATORS, OBJECTIVES, SAMPLER_CORRECTIONS, PolicyOptions
from rlkernels.reference._aggregation import aggregate, token_mean
from rlkernels.reference._sequences import sequence_of_token, sum_by_sequence
from rlkernels.reference.kl import kl_penalty

LEAST_WEIGHT = 1e-8
LARGEST_LOG = 20.0
"""Weights whose logarithms are added up are at least the first and at most exp of the second."""


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    ref_logprobs: Tensor | None,
    sampler_logprobs: Tensor | None,
    entropy: Tensor | None,
    normalizer: Tensor | float | None,
    options: PolicyOptions,
) -> tuple[Tensor, Tensor]:
    """Loss (0-d) and metrics [9] of padded [B, T] or, with cu_seqlens, packed [N] log-probabilities."""
    o = options
    objective, correction = OBJECTIVES[o.objective], SAMPLER_CORRECTIONS[o.sampler_correction]
    scored = torch.ones_like(logprobs, dtype=torch.bool) if mask is None else mask
    sequence, count = sequence_of_token(logprobs, cu_seqlens)
    if advantages.shape != logprobs.shape:
        advantages = advantages[sequence]

    # Unscored tokens may hold anything: they are replaced before any arithmetic.
    def scored_only(value: Tensor) -> Tensor:
        return value.masked_fill(~scored, 0.0)

    logprobs, advantages = scored_only(logprobs), scored_only(advantages)
    old = logprobs.detach() if old_logprobs is None else scored_only(old_logprobs)
    lengths = sum_by_sequence(scored.to(logprobs.dtype), sequence, count).clamp(min=1)

    def sequence_sum(value: Tensor) -> Tensor:
        return sum_by_sequence(value, sequence, count)[sequence]

    def sequence_mean(value: Tensor) -> Tensor:
        return (sum_by_sequence(value, sequence, count) / lengths)[sequence]

    # The sampler's weight of each token, whether it was capped, and the logarithms that a sequence's product takes.
    weight, capped = torch.ones_like(logprobs), torch.zeros_like(scored)
    log_weights = torch.zeros_like(logprobs)
    by_sequence = correction.startswith("sequence")
    if sampler_logprobs is not None:
        log_weight = (old - scored_only(sampler_logprobs)).detach()
        log_weight = log_weight.masked_fill(log_weight.isnan(), 0.0)
        if by_sequence:
            log_weight = sequence_sum(log_weight)
        capped = log_weight > math.log(o.sampler_cap)
        weight = torch.where(capped, 0.0 if correction.endswith("mask") else o.sampler_cap, log_weight.exp())
        log_weights = scored_only(weight.clamp(min=LEAST_WEIGHT).log().clamp(max=LARGEST_LOG))
        if by_sequence:
            log_weights = log_weights / lengths[sequence]
    applied = weight
    if objective == "gmpo" and not by_sequence:
        applied = sequence_mean(log_weights).exp()
    elif objective == "vespo":
        applied = torch.ones_like(weight)
    dropped = applied == 0

    raw = logprobs - old
    log_ratio = raw.detach().clamp(-o.log_ratio_clamp, o.log_ratio_clamp)
    ratio = log_ratio.exp()
    clipped_low = clipped_high = torch.zeros_like(scored)
    # Everywhere below, what is constant is kept out of the differentiation, where it may overflow: 0 * inf is NaN.
    if objective in ("ppo", "gspo"):
        if objective == "gspo":
            # The value is the sequence's, the gradient that of the token's own ratio.
            raw = sequence_mean(raw.detach()) + (logprobs - logprobs.detach()).nan_to_num(nan=0.0)
            ratio = raw.detach().clamp(-o.log_ratio_clamp, o.log_ratio_clamp).exp()
        free, bound = ratio.clamp(max=o.delta) * advantages, ratio.clamp(1 - o.clip_low, 1 + o.clip_high) * advantages
        gain = torch.minimum(free, bound)
        outside = (ratio < 1 - o.clip_low) | (ratio > 1 + o.clip_high)
        constant = torch.where(bound < free, outside, ratio > o.delta) | (raw.abs() > o.log_ratio_clamp) | dropped
        if o.dual_clip < float("inf"):
            least = o.dual_clip * advantages
            bounded = (advantages < 0) & (gain < least)
            gain, constant = torch.where(bounded, least, gain), constant | bounded
        gain = torch.where(constant, gain, raw.masked_fill(constant, 0.0).exp() * advantages)
        clipped_low = (ratio < 1 - o.clip_low) & (advantages < 0)
        clipped_high = (ratio > 1 + o.clip_high) & (advantages > 0)
    elif objective == "sapo":
        temperature = torch.full_like(ratio, o.rate_neg).masked_fill(advantages > 0, o.rate_pos)
        exponent = temperature * (ratio - 1)
        constant = (exponent > 1000) | (raw.abs() > o.log_ratio_clamp) | dropped
        moving = temperature * torch.expm1(raw.masked_fill(constant, 0.0))
        # Either has a derivative that is exact where it is near 0, for there the function itself is.
        moving = torch.where(moving > 0, 1 - torch.sigmoid(-moving), torch.sigmoid(moving))
        gain = torch.where(constant, torch.sigmoid(exponent), moving) * (4 / temperature) * advantages
    elif objective == "gmpo":
        clipped_low = (raw < -o.clip_low) & (advantages < 0)
        clipped_high = (raw > o.clip_high) & (advantages > 0)
        bounded = raw.masked_fill(advantages == 0, 0.0)
        bounded = bounded.masked_fill(clipped_low, -o.clip_low).masked_fill(clipped_high, o.clip_high)
        mean = sequence_mean(bounded).clamp(-o.log_ratio_clamp, o.log_ratio_clamp)
        ratio = mean.detach().exp()
        gain = mean.masked_fill(dropped, 0.0).exp() * sequence_mean(advantages)
    else:
        factor = torch.ones_like(ratio)
        if objective == "cispo":
            factor = ratio.clamp(1 - o.clip_low, 1 + o.clip_high)
            clipped_low, clipped_high = ratio < 1 - o.clip_low, ratio > 1 + o.clip_high
        elif objective in ("dppo_tv", "dppo_kl"):
            up, down = _divergences(objective, logprobs.detach(), old)
            clipped_high = (advantages > 0) & ~(up <= o.clip_high)
            clipped_low = (advantages < 0) & ~(down <= o.clip_low)
            factor = ratio.clamp(max=o.delta).masked_fill(clipped_low | clipped_high, 0.0)
        elif objective == "vespo":
            log_w = sequence_sum(raw.detach().clamp(-LARGEST_LOG, LARGEST_LOG)) + sequence_sum(log_weights)
            log_w = log_w.clamp(math.log(LEAST_WEIGHT), LARGEST_LOG)
            k = torch.full_like(ratio, o.k_pos).masked_fill(advantages < 0, o.k_neg)
            rate = torch.full_like(ratio, o.rate_pos).masked_fill(advantages < 0, o.rate_neg)
            factor = ratio = torch.exp(rate + k * log_w - rate * log_w.exp())
        gain = factor.masked_fill(dropped, 0.0) * advantages * logprobs
    loss = -(applied * gain).masked_fill(dropped, 0.0)

    kl = torch.zeros_like(loss)
    if ref_logprobs is not None:
        kl = kl_penalty(
            logprobs,
            scored_only(ref_logprobs),
            estimator=KL_ESTIMATORS[o.kl_estimator],
            straight_through=o.kl_straight_through,
            log_ratio_clamp=float("inf"),
            value_clamp=float("inf"),
        )
        if o.kl_coef != 0.0:
            loss = loss + o.kl_coef * kl
    entropy = torch.zeros_like(loss) if entropy is None else scored_only(entropy)
    if o.entropy_coef != 0.0:
        loss = loss - o.entropy_coef * entropy

    means = (ratio, clipped_low, clipped_high, torch.expm1(log_ratio) - log_ratio, kl, entropy, weight, capped)
    metrics = torch.stack([*(token_mean(value, scored, loss.dtype) for value in means), scored.sum().to(loss.dtype)])
    return aggregate(loss, scored, sequence, count, AGGREGATIONS[o.aggregation], normalizer), metrics.detach()


def _divergences(objective: str, logprobs: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
    """How far each token's probability has gone up, and down, from what it was."""
    p, q = logprobs.exp(), old.exp()
    if objective == "dppo_tv":
        return p - q, q - p
    # There are two outcomes: this token, and any other.
    not_p, not_q = 1e-8 - torch.expm1(logprobs), 1e-8 - torch.expm1(old)
    divergence = q * (old - logprobs) + (1 - q) * (not_q / not_p).log()
    return divergence.masked_fill(p <= q, 0.0), divergence.masked_fill(p >= q, 0.0)
