from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlkernels._codes import POLICY_METRICS, SAMPLER_CORRECTIONS, PolicyOptions
from rlkernels.triton import _config
from rlkernels.triton._launch import implements
from rlkernels.triton._math import clamp, exp_of_double, expm1_minus_x
from rlkernels.triton._policy_formulas import (
    CISPO,
    DPPO_KL,
    DPPO_TV,
    GMPO,
    GSPO,
    LEAST_LOG,
    PPO,
    REINFORCE,
    SAPO,
    VESPO,
    between,
    clamp_log,
    clipped_surrogate,
    dppo_divergences,
    gmpo_slope,
    numbers_of,
    one_where,
    policy_gradient,
    sampler_log_weight,
    sapo,
    within_size,
    zero_where_clamped,
)
from rlkernels.triton._sequences import bounds, valid_sequences
from rlkernels.triton._token_losses import (
    BLOCK,
    FINISH_WARPS,
    PROGRAMS,
    SEQ_MEAN_TOKEN_MEAN,
    Denominator,
    aligned_span,
    four_packed,
    four_padded,
    four_tokens,
    load_scored,
    number_of,
    of_four,
    one_over_denominator,
    padded_sequence,
    pick,
    programs_for,
    sequence_lengths,
    shape_of,
    step_on,
    store_sum,
    sums_of_all,
)
from rlkernels.triton.kl import kl_estimate, kl_estimate_derivative

BY_SEQUENCE = (GSPO.value, GMPO.value, VESPO.value)

TOKEN_MASK = tl.constexpr(SAMPLER_CORRECTIONS.index("token_mask"))
SEQUENCE_TRUNCATE = tl.constexpr(SAMPLER_CORRECTIONS.index("sequence_truncate"))
SEQUENCE_MASK = tl.constexpr(SAMPLER_CORRECTIONS.index("sequence_mask"))

# Sums over tokens, in the order of policy_loss.metrics, then the loss.
NUM_TOKENS = tl.constexpr(POLICY_METRICS.index("num_tokens"))
LOSS = tl.constexpr(len(POLICY_METRICS))
SUMS = tl.constexpr(len(POLICY_METRICS) + 1)

# What each token of a sequence takes of the whole of it, next to each other.
GAIN = tl.constexpr(0)  # gmpo: that of each token, the sampler's weight included
RATIO_POS = tl.constexpr(1)  # gspo, gmpo: the ratio; vespo: phi where the advantage is not negative
RATIO_NEG = tl.constexpr(2)  # vespo: phi where it is
UNCLAMPED = tl.constexpr(3)  # 1, or 0 where log_ratio_clamp took effect
WEIGHT = tl.constexpr(4)  # the sampler's, where it is one a sequence
CAPPED = tl.constexpr(5)
FACTORS = tl.constexpr(8)  # a sector of memory per sequence


class Tokens(NamedTuple):
    """What the kernels read, one number per token (advantages may be one per sequence); None where not given."""

    logprobs: Any
    old_logprobs: Any
    advantages: Any
    mask: Any
    ref_logprobs: Any
    sampler_logprobs: Any
    entropy: Any


@triton.jit(do_not_specialize=["count", "sequence_length"])
def _sequences_kernel(
    x,
    o,
    cu_seqlens,
    lengths,
    factors,
    count: tl.int64,
    sequence_length: tl.int64,
    OBJECTIVE: tl.constexpr,
    CORRECTION: tl.constexpr,
    PER_SEQUENCE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums over each sequence, in double: exp makes a relative error of an absolute one."""
    sequence = tl.program_id(0).to(tl.int64)
    begin, end = bounds(sequence, cu_seqlens, count, sequence_length)
    scored_tokens = tl.zeros((BLOCK,), tl.int32)
    log_ratios = tl.zeros((BLOCK,), tl.float64)
    log_weights = tl.zeros((BLOCK,), tl.float64)
    advantage_sums = tl.zeros((BLOCK,), tl.float64)
    first, size = aligned_span(begin, end, count, ALIGNED)
    for start in range(0, size, BLOCK):
        place = start + tl.arange(0, BLOCK)
        token = first + place
        inside = place < size
        scored = (place >= (begin - first).to(tl.int32)) & (place < (end - first).to(tl.int32))
        if x.mask is not None:
            scored = scored & (tl.load(x.mask + token, mask=inside, other=0) != 0)
        scored_tokens += scored.to(tl.int32)
        logprob = tl.zeros((BLOCK,), tl.float32)
        if OBJECTIVE == GSPO or OBJECTIVE == GMPO or OBJECTIVE == VESPO or x.old_logprobs is None:
            logprob = load_scored(x.logprobs, token, scored, inside)
        old_logprob = logprob
        if x.old_logprobs is not None:
            old_logprob = load_scored(x.old_logprobs, token, scored, inside)
        raw = logprob - old_logprob
        if OBJECTIVE == GSPO:
            log_ratios += raw.to(tl.float64)
        elif OBJECTIVE == VESPO:
            log_ratios += clamp(raw, 20.0).to(tl.float64)
        elif OBJECTIVE == GMPO:
            if PER_SEQUENCE:
                advantage = tl.load(x.advantages + sequence).to(tl.float32) + tl.zeros((BLOCK,), tl.float32)
                advantage = tl.where(scored, advantage, 0.0)
            else:
                advantage = load_scored(x.advantages, token, scored, inside)
            advantage_sums += advantage.to(tl.float64)
            bounded = tl.where(advantage > 0.0, tl.where(raw > o.clip_high, o.clip_high, raw), 0.0)
            bounded = tl.where(advantage < 0.0, tl.where(raw < -o.clip_low, -o.clip_low, raw), bounded)
            log_ratios += bounded.to(tl.float64)
        if x.sampler_logprobs is not None:
            log_weight = sampler_log_weight(old_logprob, load_scored(x.sampler_logprobs, token, scored, inside))
            if CORRECTION < SEQUENCE_TRUNCATE:
                beyond = LEAST_LOG if CORRECTION == TOKEN_MASK else o.log_sampler_cap
                log_weight = clamp_log(tl.where(log_weight > o.log_sampler_cap, beyond, log_weight))
            log_weights += tl.where(scored, log_weight, 0.0).to(tl.float64)

    length = tl.sum(scored_tokens, 0).to(tl.float64)
    n = tl.where(length > 0.0, length, 1.0)
    log_ratio = tl.sum(log_ratios, 0)
    weight = tl.full((), 1.0, tl.float32)
    log_total = tl.sum(log_weights, 0)  # of all the weights of the sequence, as they are applied
    tl.store(lengths + sequence, length.to(tl.float32))
    factors += sequence * FACTORS
    if x.sampler_logprobs is not None:
        if CORRECTION >= SEQUENCE_TRUNCATE:
            capped = log_total > o.log_sampler_cap
            weight = exp_of_double(log_total)
            if CORRECTION == SEQUENCE_MASK:
                weight = tl.where(capped, 0.0, weight)
                log_total = tl.where(capped, LEAST_LOG, clamp_log(log_total))
            else:
                weight = tl.where(capped, o.sampler_cap, weight)
                log_total = clamp_log(tl.where(capped, o.log_sampler_cap, log_total))
            tl.store(factors + WEIGHT, weight)
            tl.store(factors + CAPPED, capped.to(tl.float32))
        elif OBJECTIVE == GMPO:
            weight = exp_of_double(log_total / n)
    if OBJECTIVE == VESPO:
        log_w = clamp_log(log_ratio + log_total)
        w = exp_of_double(log_w).to(tl.float64)
        tl.store(factors + RATIO_POS, exp_of_double(o.rate_pos + o.k_pos * log_w - o.rate_pos * w))
        tl.store(factors + RATIO_NEG, exp_of_double(o.rate_neg + o.k_neg * log_w - o.rate_neg * w))
    elif OBJECTIVE == GSPO or OBJECTIVE == GMPO:
        mean = log_ratio / n
        bounded = within_size(mean, o.log_ratio_clamp)
        ratio = exp_of_double(bounded)
        tl.store(factors + RATIO_POS, ratio)
        tl.store(factors + UNCLAMPED, (mean == bounded).to(tl.float32))
        if OBJECTIVE == GMPO:
            gain = ratio * (tl.sum(advantage_sums, 0) / n).to(tl.float32)
            # What is dropped leaves no trace, also where it is infinite.
            tl.store(factors + GAIN, tl.where(weight == 0.0, 0.0, weight * gain))


@triton.jit(do_not_specialize=["count", "sequence_length", "sequences"])
def _token_kernel(
    x,
    o,
    cu_seqlens,
    lengths,
    factors,
    grad,
    entropy_grad,
    sums,
    count: tl.int64,
    sequence_length: tl.int32,
    sequences: tl.int32,
    OBJECTIVE: tl.constexpr,
    KL_ESTIMATOR: tl.constexpr,
    STRAIGHT_THROUGH: tl.constexpr,
    CORRECTION: tl.constexpr,
    PER_SEQUENCE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Loss and gradients of each token, before the division by the denominator, and their sums over a program."""
    none = tl.zeros((BLOCK // 4,), tl.float32)
    ratios, lows, highs, approx_kls, ref_kls = none, none, none, none, none
    bonuses, weights, cappeds, tokens, losses = none, none, none, none, none
    if (PER_SEQUENCE or lengths is not None or factors is not None) and cu_seqlens is None:
        begin = tl.program_id(0).to(tl.int64) * BLOCK
        stride = tl.num_programs(0).to(tl.int64) * BLOCK
        sequence, within = padded_sequence(four_tokens(begin, count, ALIGNED, BLOCK)[0], sequence_length)
    for step in range(tl.program_id(0), tl.cdiv(count, BLOCK).to(tl.int32), tl.num_programs(0)):
        start = (tl.zeros((), tl.int64) + step) * BLOCK
        first, token, inside = four_tokens(start, count, ALIGNED, BLOCK)
        scored = inside
        if x.mask is not None:
            scored = scored & (tl.load(x.mask + token, mask=inside, other=0) != 0)
        if PER_SEQUENCE or lengths is not None or factors is not None:
            if cu_seqlens is not None:
                places = four_packed(first, cu_seqlens, sequences, start, BLOCK)
            else:
                places = four_padded(sequence, within, sequence_length, sequences)
                sequence, within = step_on(sequence, within, stride, sequence_length)
        if PER_SEQUENCE:
            advantage = tl.where(scored, of_four(x.advantages, places), 0.0)
        else:
            advantage = load_scored(x.advantages, token, scored, inside)
        logprob = load_scored(x.logprobs, token, scored, inside)
        old_logprob = logprob
        if x.old_logprobs is not None:
            old_logprob = load_scored(x.old_logprobs, token, scored, inside)

        raw = logprob - old_logprob
        d = within_size(raw, o.log_ratio_clamp)
        ratio = tl.exp(d)
        if OBJECTIVE == PPO:
            gain, slope = clipped_surrogate(ratio, advantage, o)
            slope = zero_where_clamped(slope, raw, o.log_ratio_clamp)
        elif OBJECTIVE == SAPO:
            gain, slope = sapo(ratio, advantage, o)
            slope = zero_where_clamped(slope, raw, o.log_ratio_clamp)
        elif OBJECTIVE == GSPO or OBJECTIVE == GMPO:
            ratio = of_four(factors + RATIO_POS, places, FACTORS)
            unclamped = of_four(factors + UNCLAMPED, places, FACTORS)
            if OBJECTIVE == GSPO:
                gain, slope = clipped_surrogate(ratio, advantage, o)
                slope *= unclamped
            else:
                low = one_where((raw < -o.clip_low) & (advantage < 0.0))
                high = one_where((raw > o.clip_high) & (advantage > 0.0))
                gain = of_four(factors + GAIN, places, FACTORS)
                slope = gmpo_slope(gain, advantage, unclamped, low + high > 0.0)
        else:
            factor = tl.full(token.shape, 1.0, tl.float32)
            if OBJECTIVE == CISPO:
                factor = between(ratio, o.ratio_min, o.ratio_max)
                low = one_where(ratio < o.ratio_min)
                high = one_where(ratio > o.ratio_max)
            elif OBJECTIVE == DPPO_TV or OBJECTIVE == DPPO_KL:
                up, down = dppo_divergences(logprob, old_logprob, raw, OBJECTIVE)
                high = one_where((advantage > 0.0) & ((up <= o.clip_high) == 0))
                low = one_where((advantage < 0.0) & ((down <= o.clip_low) == 0))
                factor = ratio
                if o.delta is not None:
                    factor = tl.where(ratio > o.delta, o.delta, ratio)
                factor = tl.where(low + high > 0.0, 0.0, factor)
            elif OBJECTIVE == VESPO:
                positive = of_four(factors + RATIO_POS, places, FACTORS)
                negative = of_four(factors + RATIO_NEG, places, FACTORS)
                ratio = tl.where(advantage < 0.0, negative, positive)
                factor = ratio
            gain, slope = policy_gradient(factor, advantage, logprob)
        if OBJECTIVE == PPO or OBJECTIVE == GSPO:
            low = one_where((ratio < o.ratio_min) & (advantage < 0.0))
            high = one_where((ratio > o.ratio_max) & (advantage > 0.0))

        # Where nothing is scored, both log-probabilities and the advantage count as 0.
        ratios += tl.sum(tl.where(scored, ratio, 0.0), 1)
        if OBJECTIVE != REINFORCE and OBJECTIVE != SAPO and OBJECTIVE != VESPO:
            lows += tl.sum(low, 1)
            highs += tl.sum(high, 1)
        approx_kls += tl.sum(expm1_minus_x(d), 1)
        tokens += number_of(scored, x.mask, first, count)

        if x.sampler_logprobs is not None:
            if CORRECTION >= SEQUENCE_TRUNCATE:
                weight = of_four(factors + WEIGHT, places, FACTORS)
                capped = of_four(factors + CAPPED, places, FACTORS)
            else:
                log_weight = sampler_log_weight(old_logprob, load_scored(x.sampler_logprobs, token, scored, inside))
                beyond = 0.0 if CORRECTION == TOKEN_MASK else o.sampler_cap
                capped = one_where(log_weight > o.log_sampler_cap)
                weight = tl.where(log_weight > o.log_sampler_cap, beyond, tl.exp(log_weight))
            weights += tl.sum(tl.where(scored, weight, 0.0), 1)
            cappeds += tl.sum(tl.where(scored, capped, 0.0), 1)
            if OBJECTIVE != GMPO and OBJECTIVE != VESPO:
                # What is dropped leaves no trace, also where it is infinite.
                gain = tl.where(weight == 0.0, 0.0, weight * gain)
                slope = tl.where(weight == 0.0, 0.0, weight * slope)

        loss = -gain
        derivative = -slope
        if x.ref_logprobs is not None:
            d_ref = logprob - load_scored(x.ref_logprobs, token, scored, inside)
            kl = kl_estimate(d_ref, KL_ESTIMATOR)
            ref_kls += tl.sum(kl, 1)
            if o.kl_coef is not None:
                loss += o.kl_coef * kl
                derivative += o.kl_coef * kl_estimate_derivative(d_ref, KL_ESTIMATOR, STRAIGHT_THROUGH)
        if x.entropy is not None:
            bonus = load_scored(x.entropy, token, scored, inside)
            bonuses += tl.sum(bonus, 1)
            if o.entropy_coef is not None:
                loss -= o.entropy_coef * bonus
        if lengths is not None:
            length = of_four(lengths, places)
            loss /= length
            derivative /= length
        if grad is not None:
            tl.store(grad + token, tl.where(scored, derivative, 0.0), mask=inside)
        if entropy_grad is not None:
            entropy_derivative = tl.zeros(token.shape, tl.float32) - o.entropy_coef
            if lengths is not None:
                entropy_derivative /= length
            tl.store(entropy_grad + token, tl.where(scored, entropy_derivative, 0.0), mask=inside)
        losses += tl.sum(tl.where(scored, loss, 0.0), 1)

    if x.sampler_logprobs is None:
        weights = tokens
    store_sum(sums, 0, ratios)
    store_sum(sums, 1, lows)
    store_sum(sums, 2, highs)
    store_sum(sums, 3, approx_kls)
    store_sum(sums, 4, ref_kls)
    store_sum(sums, 5, bonuses)
    store_sum(sums, 6, weights)
    store_sum(sums, 7, cappeds)
    store_sum(sums, NUM_TOKENS, tokens)
    store_sum(sums, LOSS, losses)


@triton.jit(do_not_specialize=["programs", "sequences"])
def _finish_kernel(
    sums,
    lengths,
    normalizer,
    normalizer_value,
    valid,
    loss,
    metrics,
    scale,
    programs: tl.int32,
    sequences: tl.int32,
    PROGRAMS: tl.constexpr,
):
    """Adds up what the programs left, in a fixed order, and divides by the denominator."""
    row, totals = sums_of_all(sums, programs, SUMS, PROGRAMS)
    tokens = pick(totals, row, NUM_TOKENS)
    factor = one_over_denominator(tokens, lengths, normalizer, normalizer_value, valid, sequences, PROGRAMS)
    tl.store(scale, factor)
    tl.store(loss, pick(totals, row, LOSS) * factor)
    means = tl.where(row == NUM_TOKENS, totals, totals / tl.maximum(tokens, 1.0))
    tl.store(metrics + row, means, mask=row <= NUM_TOKENS)


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
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *numbers, need_grad, need_entropy_grad = rest
    options = PolicyOptions(*numbers)
    tokens = Tokens(logprobs, old_logprobs, advantages, mask, ref_logprobs, sampler_logprobs, entropy)
    count = logprobs.numel()
    sequences, sequence_length = shape_of(logprobs, cu_seqlens)
    programs = programs_for(count, sequences)
    grad, entropy_grad = (
        logprobs.new_empty(logprobs.shape if needed else (0,), dtype=torch.float32)
        for needed in (need_grad, need_entropy_grad)
    )
    sums, loss, metrics, scale = (
        logprobs.new_empty(shape, dtype=torch.float32)
        for shape in ((SUMS.value, programs), (), (len(POLICY_METRICS),), ())
    )

    denominator = Denominator(normalizer, normalizer_value, options.aggregation)
    choices: dict[str, Any] = dict(
        OBJECTIVE=options.objective,
        CORRECTION=options.sampler_correction,
        PER_SEQUENCE=advantages.shape != logprobs.shape,
        ALIGNED=count % 16 == 0,
        BLOCK=BLOCK,
    )
    weight_of_sequence = sampler_logprobs is not None and options.sampler_correction >= SEQUENCE_TRUNCATE.value
    lengths, factors = None, None
    if weight_of_sequence or options.objective in BY_SEQUENCE:
        lengths, factors = (
            logprobs.new_empty(shape, dtype=torch.float32) for shape in ((sequences,), (sequences, FACTORS.value))
        )
        if sequences:
            _sequences_kernel[(sequences,)](
                tokens, numbers_of(options), cu_seqlens, lengths, factors, count, sequence_length, **choices
            )
    elif denominator.needs_lengths:
        lengths = sequence_lengths(logprobs, mask, cu_seqlens)
    if programs:
        _token_kernel[(programs,)](
            tokens,
            numbers_of(options),
            cu_seqlens,
            lengths if options.aggregation == SEQ_MEAN_TOKEN_MEAN else None,
            factors,
            grad if need_grad else None,
            entropy_grad if need_entropy_grad else None,
            sums,
            count,
            sequence_length,
            sequences,
            KL_ESTIMATOR=options.kl_estimator,
            STRAIGHT_THROUGH=options.kl_straight_through,
            **choices,
            num_warps=_config.num_warps("losses"),
        )
    _finish_kernel[(1,)](
        sums,
        lengths if denominator.counts_sequences else None,
        denominator.tensor,
        denominator.value,
        valid_sequences(cu_seqlens, count),
        loss,
        metrics,
        scale,
        programs,
        sequences,
        PROGRAMS=PROGRAMS,
        num_warps=FINISH_WARPS,
    )
    return loss, metrics, grad, entropy_grad, scale
