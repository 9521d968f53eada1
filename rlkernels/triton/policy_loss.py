import torch
import triton
import triton.language as tl
from torch import Tensor

from rlkernels.triton._launch import implements
from rlkernels.triton._math import clamp, expm1_minus_x
from rlkernels.triton._sequences import bounds, sequence_of
from rlkernels.triton.kl import kl_estimate, kl_estimate_derivative

PPO = tl.constexpr(0)
SEQ_MEAN_TOKEN_MEAN = 1
SEQ_MEAN_TOKEN_SUM = 2
TOKEN_SUM = 3

# Sums over a block of tokens, in the order of policy_loss.metrics, then the loss.
REF_KL = tl.constexpr(4)
NUM_TOKENS = tl.constexpr(5)
LOSS = tl.constexpr(6)
SUMS = 7
BLOCK = 1024


@triton.jit(do_not_specialize=["sequence_length"])
def _lengths_kernel(mask, cu_seqlens, lengths, count: tl.int64, sequence_length: tl.int64, BLOCK: tl.constexpr):
    """Scored tokens of each sequence."""
    sequence = tl.program_id(0).to(tl.int64)
    begin, end = bounds(sequence, cu_seqlens, count, sequence_length)
    if mask is not None:
        scored = tl.zeros((BLOCK,), tl.int32)
        for start in range(begin, end, BLOCK):
            token = start + tl.arange(0, BLOCK).to(tl.int64)
            scored += tl.load(mask + token, mask=token < end, other=0).to(tl.int32)
        length = tl.sum(scored, 0)
    else:
        length = end - begin
    tl.store(lengths + sequence, length.to(tl.float32))


@triton.jit(do_not_specialize=["sequence_length", "sequences", "steps"])
def _token_kernel(
    logprobs,
    old_logprobs,
    advantages,
    mask,
    cu_seqlens,
    ref_logprobs,
    lengths,
    grad,
    sums,
    count,
    sequence_length: tl.int32,
    sequences: tl.int32,
    steps: tl.int32,
    ratio_min,
    ratio_max,
    dual_clip,
    log_ratio_clamp,
    kl_coef,
    OBJECTIVE: tl.constexpr,
    KL_ESTIMATOR: tl.constexpr,
    STRAIGHT_THROUGH: tl.constexpr,
    PER_SEQUENCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Loss and gradient of each token, before the division by the denominator, and their sums over a block."""
    block = tl.program_id(0).to(tl.int64)
    token = block * BLOCK + tl.arange(0, BLOCK)
    inside = token < count
    scored = inside
    if mask is not None:
        scored = scored & (tl.load(mask + token, mask=inside, other=0) != 0)

    if PER_SEQUENCE or lengths is not None:
        if cu_seqlens is not None:
            sequence = sequence_of(token, cu_seqlens, sequences, steps)
        else:
            # 64-bit division once a block, 32-bit division once a token.
            first = block * BLOCK
            within = (first % sequence_length).to(tl.int32) + tl.arange(0, BLOCK)
            sequence = first // sequence_length + within // sequence_length
        known = scored & (sequence < sequences)
    if PER_SEQUENCE:
        advantage = tl.load(advantages + sequence, mask=known, other=float("nan"))
    else:
        advantage = tl.load(advantages + token, mask=inside, other=0.0)

    # Unscored tokens may hold anything: they are replaced before any arithmetic.
    advantage = tl.where(scored, advantage, 0.0)
    logprob = tl.where(scored, tl.load(logprobs + token, mask=inside, other=0.0), 0.0)
    log_ratio = logprob - logprob
    if old_logprobs is not None:
        log_ratio = logprob - tl.where(scored, tl.load(old_logprobs + token, mask=inside, other=0.0), 0.0)
    d = clamp(log_ratio, log_ratio_clamp)
    ratio = tl.exp(d)
    if OBJECTIVE == PPO:
        free = ratio * advantage
        clipped = tl.where(ratio < ratio_min, ratio_min, tl.where(ratio > ratio_max, ratio_max, ratio)) * advantage
        gain = tl.where(clipped < free, clipped, free)
        slope = tl.where(clipped < free, 0.0, free)
        bounded = (advantage < 0.0) & (gain < dual_clip * advantage)
        gain = tl.where(bounded, dual_clip * advantage, gain)
        slope = tl.where(bounded | (tl.abs(log_ratio) > log_ratio_clamp), 0.0, slope)
        clip_low = (ratio < ratio_min) & (advantage < 0.0)
        clip_high = (ratio > ratio_max) & (advantage > 0.0)
    else:
        gain = logprob * advantage
        slope = advantage
        clip_low = token < 0
        clip_high = token < 0
    loss = -gain
    derivative = -slope
    kl = tl.zeros((BLOCK,), tl.float32)
    if ref_logprobs is not None:
        d_ref = logprob - tl.where(scored, tl.load(ref_logprobs + token, mask=inside, other=0.0), 0.0)
        kl = kl_estimate(d_ref, KL_ESTIMATOR)
        # A coefficient of 0 leaves the loss alone, also where the estimate overflows.
        loss += tl.where(kl_coef != 0.0, kl_coef * kl, 0.0)
        kl_slope = kl_estimate_derivative(d_ref, KL_ESTIMATOR, STRAIGHT_THROUGH)
        derivative += tl.where(kl_coef != 0.0, kl_coef * kl_slope, 0.0)
    if lengths is not None:
        length = tl.load(lengths + sequence, mask=known, other=float("nan"))
        loss /= length
        derivative /= length

    tl.store(grad + token, tl.where(scored, derivative, 0.0), mask=inside)
    sums += block
    blocks = tl.num_programs(0).to(tl.int64)
    tl.store(sums, tl.sum(tl.where(scored, ratio, 0.0), 0))
    tl.store(sums + blocks, tl.sum(tl.where(scored & clip_low, 1.0, 0.0), 0))
    tl.store(sums + 2 * blocks, tl.sum(tl.where(scored & clip_high, 1.0, 0.0), 0))
    tl.store(sums + 3 * blocks, tl.sum(tl.where(scored, expm1_minus_x(d), 0.0), 0))
    tl.store(sums + REF_KL * blocks, tl.sum(tl.where(scored, kl, 0.0), 0))
    tl.store(sums + NUM_TOKENS * blocks, tl.sum(tl.where(scored, 1.0, 0.0), 0))
    tl.store(sums + LOSS * blocks, tl.sum(tl.where(scored, loss, 0.0), 0))


@triton.jit
def _sum(values, count, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        index = start + tl.arange(0, BLOCK)
        total += tl.load(values + index, mask=index < count, other=0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["blocks", "sequences"])
def _finish_kernel(
    sums,
    lengths,
    normalizer,
    normalizer_value,
    loss,
    metrics,
    scale,
    blocks: tl.int64,
    sequences: tl.int32,
    BLOCK: tl.constexpr,
):
    """Adds up all blocks, in a fixed order, and divides by the denominator."""
    tokens = _sum(sums + NUM_TOKENS * blocks, blocks, BLOCK)
    if normalizer is not None:
        denominator = tl.load(normalizer)
    elif normalizer_value is not None:
        denominator = normalizer_value
    elif lengths is not None:
        scored = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, sequences, BLOCK):
            sequence = start + tl.arange(0, BLOCK)
            length = tl.load(lengths + sequence, mask=sequence < sequences, other=0.0)
            scored += (length > 0.0).to(tl.int32)
        denominator = tl.sum(scored, 0).to(tl.float32)
    else:
        denominator = tokens
    factor = tl.where(tokens > 0.0, 1.0 / denominator, 0.0)
    tl.store(scale, factor)
    tl.store(loss, _sum(sums + LOSS * blocks, blocks, BLOCK) * factor)
    for metric in tl.static_range(NUM_TOKENS):
        tl.store(metrics + metric, _sum(sums + metric * blocks, blocks, BLOCK) / tl.maximum(tokens, 1.0))
    tl.store(metrics + NUM_TOKENS, tokens)


@implements("policy_loss_forward")
def policy_loss_forward(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    ref_logprobs: Tensor | None,
    normalizer: Tensor | None,
    normalizer_value: float,
    objective: int,
    aggregation: int,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    log_ratio_clamp: float,
    kl_coef: float,
    kl_estimator: int,
    kl_straight_through: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    count = logprobs.numel()
    if cu_seqlens is None:
        sequences, sequence_length = logprobs.shape
    else:
        sequences, sequence_length = cu_seqlens.shape[0] - 1, 0
    blocks = triton.cdiv(count, BLOCK)
    grad = torch.empty_like(logprobs)
    sums = logprobs.new_empty(SUMS, blocks)
    loss, metrics, scale = logprobs.new_empty(()), logprobs.new_empty(NUM_TOKENS.value + 1), logprobs.new_empty(())

    denominator = normalizer_value if normalizer_value > 0 else 1.0 if aggregation == TOKEN_SUM else None
    by_sequence = aggregation in (SEQ_MEAN_TOKEN_MEAN, SEQ_MEAN_TOKEN_SUM)
    count_sequences = by_sequence and normalizer is None and denominator is None
    lengths = None
    if aggregation == SEQ_MEAN_TOKEN_MEAN or count_sequences:
        lengths = logprobs.new_empty(sequences)
        if sequences:
            _lengths_kernel[(sequences,)](mask, cu_seqlens, lengths, count, sequence_length, BLOCK=BLOCK)
    if count:
        _token_kernel[(blocks,)](
            logprobs,
            old_logprobs,
            advantages,
            mask,
            cu_seqlens,
            ref_logprobs,
            lengths if aggregation == SEQ_MEAN_TOKEN_MEAN else None,
            grad,
            sums,
            count,
            sequence_length,
            sequences,
            sequences.bit_length(),
            1.0 - clip_low,
            1.0 + clip_high,
            dual_clip,
            log_ratio_clamp,
            kl_coef,
            OBJECTIVE=objective,
            KL_ESTIMATOR=kl_estimator,
            STRAIGHT_THROUGH=kl_straight_through,
            PER_SEQUENCE=advantages.shape != logprobs.shape,
            BLOCK=BLOCK,
        )
    _finish_kernel[(1,)](
        sums,
        lengths if count_sequences else None,
        normalizer,
        denominator,
        loss,
        metrics,
        scale,
        blocks,
        sequences,
        BLOCK=BLOCK,
    )
    return loss, metrics, grad, scale
