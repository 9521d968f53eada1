import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlkernels._codes import OBJECTIVES, POLICY_METRICS, SAMPLER_CORRECTIONS
from rlkernels.triton._launch import implements, multiple_of_16
from rlkernels.triton._math import clamp, exp_of_double, expm1, expm1_minus_x
from rlkernels.triton._sequences import aligned_bounds, bounds, valid_sequences
from rlkernels.triton._token_losses import (
    BLOCK,
    SEQ_MEAN_TOKEN_MEAN,
    Denominator,
    one_over_denominator,
    sequence_lengths,
    sequence_of_block,
    shape_of,
    sum_of,
)
from rlkernels.triton.kl import kl_estimate, kl_estimate_derivative

PPO = tl.constexpr(OBJECTIVES.index("ppo"))
REINFORCE = tl.constexpr(OBJECTIVES.index("reinforce"))
GSPO = tl.constexpr(OBJECTIVES.index("gspo"))
CISPO = tl.constexpr(OBJECTIVES.index("cispo"))
SAPO = tl.constexpr(OBJECTIVES.index("sapo"))
GMPO = tl.constexpr(OBJECTIVES.index("gmpo"))
DPPO_TV = tl.constexpr(OBJECTIVES.index("dppo_tv"))
DPPO_KL = tl.constexpr(OBJECTIVES.index("dppo_kl"))
VESPO = tl.constexpr(OBJECTIVES.index("vespo"))

TOKEN_MASK = tl.constexpr(SAMPLER_CORRECTIONS.index("token_mask"))
SEQUENCE_TRUNCATE = tl.constexpr(SAMPLER_CORRECTIONS.index("sequence_truncate"))
SEQUENCE_MASK = tl.constexpr(SAMPLER_CORRECTIONS.index("sequence_mask"))

# Sums over a block of tokens, in the order of policy_loss.metrics, then the loss.
NUM_TOKENS = tl.constexpr(POLICY_METRICS.index("num_tokens"))
LOSS = tl.constexpr(len(POLICY_METRICS))
SUMS = len(POLICY_METRICS) + 1

# What each token of a sequence takes of the whole of it.
LENGTH = tl.constexpr(0)  # the number of scored tokens
ADVANTAGE = tl.constexpr(1)  # gmpo: the mean
RATIO_POS = tl.constexpr(2)  # gspo, gmpo: the ratio; vespo: phi where the advantage is not negative
RATIO_NEG = tl.constexpr(3)  # vespo: phi where it is
UNCLAMPED = tl.constexpr(4)  # 1, or 0 where log_ratio_clamp took effect
WEIGHT = tl.constexpr(5)  # the sampler's, where it is one a sequence (gmpo: always)
CAPPED = tl.constexpr(6)
FACTORS = 7

# Weights whose logarithms are added up are at least 1e-8 and at most exp(20).
LEAST_LOG = tl.constexpr(math.log(1e-8))
LARGEST_LOG = tl.constexpr(20.0)


@triton.jit
def _clamp_log(x):
    return tl.where(x < LEAST_LOG, LEAST_LOG, tl.where(x > LARGEST_LOG, LARGEST_LOG, x))


@triton.jit
def _load_scored(values, token, scored, inside):
    """Unscored tokens may hold anything: they are replaced before any arithmetic."""
    return tl.where(scored, tl.load(values + token, mask=inside, other=0.0).to(tl.float32), 0.0)


@triton.jit
def _log_weight(old_logprob, sampler_logprob):
    difference = old_logprob - sampler_logprob
    return tl.where(
        difference == difference, difference, 0.0
    )  # without a number of the sampler's a token counts as it is


@triton.jit(do_not_specialize=["count", "sequence_length", "sequences"])
def _sequences_kernel(
    logprobs,
    old_logprobs,
    advantages,
    mask,
    cu_seqlens,
    sampler_logprobs,
    factors,
    count: tl.int64,
    sequence_length: tl.int64,
    sequences: tl.int64,
    clip_low,
    clip_high,
    log_ratio_clamp,
    k_pos,
    k_neg,
    rate_pos,
    rate_neg,
    sampler_cap,
    log_sampler_cap,
    OBJECTIVE: tl.constexpr,
    CORRECTION: tl.constexpr,
    PER_SEQUENCE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums over each sequence, in double: exp makes a relative error of an absolute one."""
    sequence = tl.program_id(0).to(tl.int64)
    begin, end = bounds(sequence, cu_seqlens, count, sequence_length)
    lengths = tl.zeros((BLOCK,), tl.int32)
    log_ratios = tl.zeros((BLOCK,), tl.float64)
    log_weights = tl.zeros((BLOCK,), tl.float64)
    advantage_sums = tl.zeros((BLOCK,), tl.float64)
    first, last = aligned_bounds(begin, end)
    for start in range(first, last, BLOCK):
        token = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = (token < last) & (token < multiple_of_16(count, ALIGNED))
        scored = inside & (token >= begin) & (token < end)
        if mask is not None:
            scored = scored & (tl.load(mask + token, mask=inside, other=0) != 0)
        lengths += scored.to(tl.int32)
        logprob = tl.zeros((BLOCK,), tl.float32)
        if OBJECTIVE == GSPO or OBJECTIVE == GMPO or OBJECTIVE == VESPO or old_logprobs is None:
            logprob = _load_scored(logprobs, token, scored, inside)
        old_logprob = logprob
        if old_logprobs is not None:
            old_logprob = _load_scored(old_logprobs, token, scored, inside)
        raw = logprob - old_logprob
        if OBJECTIVE == GSPO:
            log_ratios += raw.to(tl.float64)
        elif OBJECTIVE == VESPO:
            log_ratios += clamp(raw, 20.0).to(tl.float64)
        elif OBJECTIVE == GMPO:
            if PER_SEQUENCE:
                advantage = tl.load(advantages + sequence).to(tl.float32) + tl.zeros((BLOCK,), tl.float32)
                advantage = tl.where(scored, advantage, 0.0)
            else:
                advantage = _load_scored(advantages, token, scored, inside)
            advantage_sums += advantage.to(tl.float64)
            bounded = tl.where(advantage > 0.0, tl.where(raw > clip_high, clip_high, raw), 0.0)
            bounded = tl.where(advantage < 0.0, tl.where(raw < -clip_low, -clip_low, raw), bounded)
            log_ratios += bounded.to(tl.float64)
        if sampler_logprobs is not None:
            log_weight = _log_weight(old_logprob, _load_scored(sampler_logprobs, token, scored, inside))
            if CORRECTION < SEQUENCE_TRUNCATE:
                beyond = LEAST_LOG if CORRECTION == TOKEN_MASK else log_sampler_cap
                log_weight = _clamp_log(tl.where(log_weight > log_sampler_cap, beyond, log_weight))
            log_weights += tl.where(scored, log_weight, 0.0).to(tl.float64)

    length = tl.sum(lengths, 0).to(tl.float64)
    n = tl.where(length > 0.0, length, 1.0)
    log_ratio = tl.sum(log_ratios, 0)
    log_total = tl.sum(log_weights, 0)  # of all the weights of the sequence, as they are applied
    factors += sequence
    tl.store(factors + LENGTH * sequences, length.to(tl.float32))
    if sampler_logprobs is not None:
        if CORRECTION >= SEQUENCE_TRUNCATE:
            capped = log_total > log_sampler_cap
            weight = exp_of_double(log_total)
            if CORRECTION == SEQUENCE_MASK:
                weight = tl.where(capped, 0.0, weight)
                log_total = tl.where(capped, LEAST_LOG, _clamp_log(log_total))
            else:
                weight = tl.where(capped, sampler_cap, weight)
                log_total = _clamp_log(tl.where(capped, log_sampler_cap, log_total))
            tl.store(factors + WEIGHT * sequences, weight)
            tl.store(factors + CAPPED * sequences, capped.to(tl.float32))
        elif OBJECTIVE == GMPO:
            tl.store(factors + WEIGHT * sequences, exp_of_double(log_total / n))
    if OBJECTIVE == VESPO:
        log_w = _clamp_log(log_ratio + log_total)
        w = exp_of_double(log_w).to(tl.float64)
        tl.store(factors + RATIO_POS * sequences, exp_of_double(rate_pos + k_pos * log_w - rate_pos * w))
        tl.store(factors + RATIO_NEG * sequences, exp_of_double(rate_neg + k_neg * log_w - rate_neg * w))
    elif OBJECTIVE == GSPO or OBJECTIVE == GMPO:
        mean = log_ratio / n
        bounded = clamp(mean, log_ratio_clamp)
        tl.store(factors + RATIO_POS * sequences, exp_of_double(bounded))
        tl.store(factors + UNCLAMPED * sequences, (mean == bounded).to(tl.float32))
        if OBJECTIVE == GMPO:
            tl.store(factors + ADVANTAGE * sequences, (tl.sum(advantage_sums, 0) / n).to(tl.float32))


@triton.jit(do_not_specialize=["count", "sequence_length", "sequences", "steps"])
def _token_kernel(
    logprobs,
    old_logprobs,
    advantages,
    mask,
    cu_seqlens,
    ref_logprobs,
    sampler_logprobs,
    entropy,
    factors,
    grad,
    entropy_grad,
    sums,
    count: tl.int64,
    sequence_length: tl.int32,
    sequences: tl.int32,
    steps: tl.int32,
    clip_low,
    clip_high,
    ratio_min,
    ratio_max,
    dual_clip,
    delta,
    log_ratio_clamp,
    rate_pos,
    rate_neg,
    kl_coef,
    entropy_coef,
    sampler_cap,
    log_sampler_cap,
    OBJECTIVE: tl.constexpr,
    KL_ESTIMATOR: tl.constexpr,
    STRAIGHT_THROUGH: tl.constexpr,
    CORRECTION: tl.constexpr,
    PER_SEQUENCE: tl.constexpr,
    MEAN_OVER_SEQUENCE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Loss and gradients of each token, before the division by the denominator, and their sums over a block."""
    block = tl.program_id(0).to(tl.int64)
    token = block * BLOCK + tl.arange(0, BLOCK)
    inside = token < multiple_of_16(count, ALIGNED)
    scored = inside
    if mask is not None:
        scored = scored & (tl.load(mask + token, mask=inside, other=0) != 0)

    if PER_SEQUENCE or factors is not None:
        sequence = sequence_of_block(block, cu_seqlens, sequences, steps, sequence_length, BLOCK)
        known = scored & (sequence < sequences)
        wide = sequences.to(tl.int64)
    if PER_SEQUENCE:
        advantage = tl.load(advantages + sequence, mask=known, other=float("nan")).to(tl.float32)
        advantage = tl.where(scored, advantage, 0.0)
    else:
        advantage = _load_scored(advantages, token, scored, inside)

    logprob = _load_scored(logprobs, token, scored, inside)
    old_logprob = logprob
    if old_logprobs is not None:
        old_logprob = _load_scored(old_logprobs, token, scored, inside)
    raw = logprob - old_logprob
    d = clamp(raw, log_ratio_clamp)
    ratio = tl.exp(d)
    clip_fraction_low = token < 0
    clip_fraction_high = token < 0
    if OBJECTIVE == GSPO or OBJECTIVE == GMPO:
        ratio = tl.load(factors + RATIO_POS * wide + sequence, mask=known, other=float("nan"))
        unclamped = tl.load(factors + UNCLAMPED * wide + sequence, mask=known, other=float("nan"))
    if OBJECTIVE == PPO or OBJECTIVE == GSPO:
        clipped_ratio = tl.where(ratio < ratio_min, ratio_min, tl.where(ratio > ratio_max, ratio_max, ratio))
        clipped = clipped_ratio * advantage
        free = tl.where(ratio > delta, delta * advantage, ratio * advantage)
        gain = tl.where(clipped < free, clipped, free)
        # Above delta the clipped term can be the smaller within the clips, too.
        constant = tl.where(clipped < free, clipped_ratio != ratio, ratio > delta)
        bounded = (advantage < 0.0) & (gain < dual_clip * advantage)
        gain = tl.where(bounded, dual_clip * advantage, gain)
        slope = tl.where(constant | bounded, 0.0, ratio * advantage)
        if OBJECTIVE == GSPO:
            slope *= unclamped
        else:
            slope = tl.where(tl.abs(raw) > log_ratio_clamp, 0.0, slope)
        clip_fraction_low = (ratio < ratio_min) & (advantage < 0.0)
        clip_fraction_high = (ratio > ratio_max) & (advantage > 0.0)
    elif OBJECTIVE == SAPO:
        temperature = tl.where(advantage > 0.0, rate_pos, rate_neg)
        z = temperature * (ratio - 1.0)
        e = tl.exp(-tl.abs(z))
        larger = 1.0 / (1.0 + e)
        gain = tl.where(z < 0.0, e * larger, larger) * (4.0 / temperature) * advantage
        # Where exp(-z) is 0 in float32, the ratio may be infinite.
        moves = (z <= 110.0) & (tl.abs(raw) <= log_ratio_clamp)
        slope = tl.where(moves, 4.0 * e * larger * larger * ratio * advantage, 0.0)
    elif OBJECTIVE == GMPO:
        gain = ratio * tl.load(factors + ADVANTAGE * wide + sequence, mask=known, other=float("nan"))
        clip_fraction_low = (raw < -clip_low) & (advantage < 0.0)
        clip_fraction_high = (raw > clip_high) & (advantage > 0.0)
        slope = tl.where(clip_fraction_low | clip_fraction_high | (advantage == 0.0), 0.0, gain * unclamped)
    else:
        factor = tl.full((BLOCK,), 1.0, tl.float32)  # of a plain policy gradient
        if OBJECTIVE == CISPO:
            factor = tl.where(ratio < ratio_min, ratio_min, tl.where(ratio > ratio_max, ratio_max, ratio))
            clip_fraction_low = scored & (ratio < ratio_min)
            clip_fraction_high = scored & (ratio > ratio_max)
        elif OBJECTIVE == DPPO_TV or OBJECTIVE == DPPO_KL:
            p = tl.exp(logprob)
            q = tl.exp(old_logprob)
            up = p - q  # how far the probability has gone up, or down; trusted while <= its clip
            down = q - p
            if OBJECTIVE == DPPO_KL:
                not_p = 1e-8 - expm1(logprob)
                not_q = 1e-8 - expm1(old_logprob)
                divergence = (1.0 - q) * tl.log(not_q / not_p) - q * raw
                up = tl.where(p <= q, 0.0, divergence)
                down = tl.where(p >= q, 0.0, divergence)
            clip_fraction_high = (advantage > 0.0) & ((up <= clip_high) == 0)
            clip_fraction_low = (advantage < 0.0) & ((down <= clip_low) == 0)
            factor = tl.where(ratio > delta, delta, ratio)
            factor = tl.where(clip_fraction_low | clip_fraction_high, 0.0, factor)
        elif OBJECTIVE == VESPO:
            positive = tl.load(factors + RATIO_POS * wide + sequence, mask=known, other=float("nan"))
            negative = tl.load(factors + RATIO_NEG * wide + sequence, mask=known, other=float("nan"))
            ratio = tl.where(advantage < 0.0, negative, positive)
            factor = ratio
        slope = factor * advantage
        gain = slope * logprob

    weight = tl.full((BLOCK,), 1.0, tl.float32)
    capped = tl.zeros((BLOCK,), tl.float32)
    if sampler_logprobs is not None:
        if CORRECTION >= SEQUENCE_TRUNCATE:
            weight = tl.load(factors + WEIGHT * wide + sequence, mask=known, other=float("nan"))
            capped = tl.load(factors + CAPPED * wide + sequence, mask=known, other=float("nan"))
        else:
            log_weight = _log_weight(old_logprob, _load_scored(sampler_logprobs, token, scored, inside))
            beyond = 0.0 if CORRECTION == TOKEN_MASK else sampler_cap
            capped = (log_weight > log_sampler_cap).to(tl.float32)
            weight = tl.where(log_weight > log_sampler_cap, beyond, tl.exp(log_weight))
        if OBJECTIVE != VESPO:
            applied = weight
            if OBJECTIVE == GMPO:
                applied = tl.load(factors + WEIGHT * wide + sequence, mask=known, other=float("nan"))
            # What is dropped leaves no trace, also where it is infinite.
            gain = tl.where(applied == 0.0, 0.0, applied * gain)
            slope = tl.where(applied == 0.0, 0.0, applied * slope)

    loss = -gain
    derivative = -slope
    kl = tl.zeros((BLOCK,), tl.float32)
    if ref_logprobs is not None:
        d_ref = logprob - _load_scored(ref_logprobs, token, scored, inside)
        kl = kl_estimate(d_ref, KL_ESTIMATOR)
        # A coefficient of 0 leaves the loss alone, also where the estimate overflows.
        loss += tl.where(kl_coef != 0.0, kl_coef * kl, 0.0)
        kl_slope = kl_estimate_derivative(d_ref, KL_ESTIMATOR, STRAIGHT_THROUGH)
        derivative += tl.where(kl_coef != 0.0, kl_coef * kl_slope, 0.0)
    bonus = tl.zeros((BLOCK,), tl.float32)
    if entropy is not None:
        bonus = _load_scored(entropy, token, scored, inside)
        loss -= tl.where(entropy_coef != 0.0, entropy_coef * bonus, 0.0)
    entropy_derivative = tl.zeros((BLOCK,), tl.float32) - entropy_coef
    if MEAN_OVER_SEQUENCE:
        length = tl.load(factors + LENGTH * wide + sequence, mask=known, other=float("nan"))
        loss /= length
        derivative /= length
        entropy_derivative /= length

    if grad is not None:
        tl.store(grad + token, tl.where(scored, derivative, 0.0), mask=inside)
    if entropy_grad is not None:
        tl.store(entropy_grad + token, tl.where(scored, entropy_derivative, 0.0), mask=inside)
    sums += block
    blocks = tl.num_programs(0).to(tl.int64)
    tl.store(sums, tl.sum(tl.where(scored, ratio, 0.0), 0))
    tl.store(sums + blocks, tl.sum(tl.where(clip_fraction_low, 1.0, 0.0), 0))
    tl.store(sums + 2 * blocks, tl.sum(tl.where(clip_fraction_high, 1.0, 0.0), 0))
    tl.store(sums + 3 * blocks, tl.sum(tl.where(scored, expm1_minus_x(d), 0.0), 0))
    tl.store(sums + 4 * blocks, tl.sum(tl.where(scored, kl, 0.0), 0))
    tl.store(sums + 5 * blocks, tl.sum(bonus, 0))
    tl.store(sums + 6 * blocks, tl.sum(tl.where(scored, weight, 0.0), 0))
    tl.store(sums + 7 * blocks, tl.sum(tl.where(scored, capped, 0.0), 0))
    tl.store(sums + NUM_TOKENS * blocks, tl.sum(tl.where(scored, 1.0, 0.0), 0))
    tl.store(sums + LOSS * blocks, tl.sum(tl.where(scored, loss, 0.0), 0))


@triton.jit(do_not_specialize=["blocks", "sequences"])
def _finish_kernel(
    sums,
    lengths,
    normalizer,
    normalizer_value,
    valid,
    loss,
    metrics,
    scale,
    blocks: tl.int64,
    sequences: tl.int32,
    BLOCK: tl.constexpr,
):
    """Adds up all blocks, in a fixed order, and divides by the denominator."""
    tokens = sum_of(sums + NUM_TOKENS * blocks, blocks, BLOCK)
    factor = one_over_denominator(tokens, lengths, normalizer, normalizer_value, sequences, BLOCK)
    if valid is not None:
        factor *= tl.load(valid)
    tl.store(scale, factor)
    tl.store(loss, sum_of(sums + LOSS * blocks, blocks, BLOCK) * factor)
    for metric in tl.static_range(NUM_TOKENS):
        tl.store(metrics + metric, sum_of(sums + metric * blocks, blocks, BLOCK) / tl.maximum(tokens, 1.0))
    tl.store(metrics + NUM_TOKENS, tokens)


@implements("policy_loss_forward")
def policy_loss_forward(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    ref_logprobs: Tensor | None,
    sampler_logprobs: Tensor | None,
    entropy: Tensor | None,
    normalizer: Tensor | None,
    normalizer_value: float,
    aggregation: int,
    objective: int,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    delta: float,
    log_ratio_clamp: float,
    k_pos: float,
    k_neg: float,
    rate_pos: float,
    rate_neg: float,
    kl_coef: float,
    kl_estimator: int,
    kl_straight_through: bool,
    entropy_coef: float,
    sampler_correction: int,
    sampler_cap: float,
    need_grad: bool,
    need_entropy_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    count = logprobs.numel()
    sequences, sequence_length = shape_of(logprobs, cu_seqlens)
    blocks = triton.cdiv(count, BLOCK)
    grad, entropy_grad = (
        logprobs.new_empty(logprobs.shape if needed else (0,), dtype=torch.float32)
        for needed in (need_grad, need_entropy_grad)
    )
    sums, loss, metrics, scale = (
        logprobs.new_empty(shape, dtype=torch.float32) for shape in ((SUMS, blocks), (), (NUM_TOKENS.value + 1,), ())
    )
    valid = valid_sequences(cu_seqlens, count)

    denominator = Denominator(normalizer, normalizer_value, aggregation)
    per_sequence = advantages.shape != logprobs.shape
    log_sampler_cap = math.log(sampler_cap)
    by_sequence = sampler_logprobs is not None and sampler_correction >= SEQUENCE_TRUNCATE.value
    factors, used = None, None
    if by_sequence or objective in (GSPO.value, GMPO.value, VESPO.value):
        used = factors = logprobs.new_empty((FACTORS, sequences), dtype=torch.float32)
        if sequences:
            _sequences_kernel[(sequences,)](
                logprobs,
                old_logprobs,
                advantages,
                mask,
                cu_seqlens,
                sampler_logprobs,
                factors,
                count,
                sequence_length,
                sequences,
                clip_low,
                clip_high,
                log_ratio_clamp,
                k_pos,
                k_neg,
                rate_pos,
                rate_neg,
                sampler_cap,
                log_sampler_cap,
                OBJECTIVE=objective,
                CORRECTION=sampler_correction,
                PER_SEQUENCE=per_sequence,
                ALIGNED=count % 16 == 0,
                BLOCK=BLOCK,
            )
    elif denominator.needs_lengths:
        factors = sequence_lengths(logprobs, mask, cu_seqlens)
        used = factors if aggregation == SEQ_MEAN_TOKEN_MEAN else None
    if count:
        _token_kernel[(blocks,)](
            logprobs,
            old_logprobs,
            advantages,
            mask,
            cu_seqlens,
            ref_logprobs,
            sampler_logprobs,
            entropy,
            used,
            grad if need_grad else None,
            entropy_grad if need_entropy_grad else None,
            sums,
            count,
            sequence_length,
            sequences,
            sequences.bit_length(),
            clip_low,
            clip_high,
            1.0 - clip_low,
            1.0 + clip_high,
            dual_clip,
            delta,
            log_ratio_clamp,
            rate_pos,
            rate_neg,
            kl_coef,
            entropy_coef,
            sampler_cap,
            log_sampler_cap,
            OBJECTIVE=objective,
            KL_ESTIMATOR=kl_estimator,
            STRAIGHT_THROUGH=kl_straight_through,
            CORRECTION=sampler_correction,
            PER_SEQUENCE=per_sequence,
            MEAN_OVER_SEQUENCE=aggregation == SEQ_MEAN_TOKEN_MEAN,
            ALIGNED=count % 16 == 0,
            BLOCK=BLOCK,
        )
    _finish_kernel[(1,)](
        sums,
        factors if denominator.counts_sequences else None,
        denominator.tensor,
        denominator.value,
        valid,
        loss,
        metrics,
        scale,
        blocks,
        sequences,
        BLOCK=BLOCK,
    )
    return loss, metrics, grad, entropy_grad, scale
