import torch
import triton
import triton.language as tl
from torch import Tensor

from rlkernels._codes import VALUE_METRICS
from rlkernels.triton._launch import implements, multiple_of_16
from rlkernels.triton._sequences import valid_sequences
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

# Sums over a block of tokens.
CLIPPED = tl.constexpr(0)
VALUES = tl.constexpr(1)
RETURNS = tl.constexpr(2)
ERRORS = tl.constexpr(3)
ERROR_SQUARES = tl.constexpr(4)
RETURN_SQUARES = tl.constexpr(5)
TOKENS = tl.constexpr(6)
LOSS = tl.constexpr(7)
SUMS = 8

# The spread, relative to their mean, that rounding alone can make of returns that are all the same.
NOISE = tl.constexpr(4 * 2.0**-23)


@triton.jit(do_not_specialize=["count", "sequence_length", "sequences", "steps"])
def _token_kernel(
    values,
    old_values,
    returns,
    mask,
    cu_seqlens,
    lengths,
    grad,
    sums,
    count: tl.int64,
    sequence_length: tl.int32,
    sequences: tl.int32,
    steps: tl.int32,
    clip,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Loss and gradient of each token, before the division by the denominator, and their sums over a block: in double,
    where the squares of floats are exact, so that a variance is the mean of squares less the square of the mean."""
    block = tl.program_id(0).to(tl.int64)
    token = block * BLOCK + tl.arange(0, BLOCK)
    inside = token < multiple_of_16(count, ALIGNED)
    scored = inside
    if mask is not None:
        scored = scored & (tl.load(mask + token, mask=inside, other=0) != 0)
    # Unscored tokens may hold anything: they are replaced before any arithmetic.
    value = tl.where(scored, tl.load(values + token, mask=inside, other=0.0).to(tl.float32), 0.0)
    target = tl.where(scored, tl.load(returns + token, mask=inside, other=0.0).to(tl.float32), 0.0)
    error = value - target
    loss = 0.5 * error * error
    derivative = error
    clipped = tl.zeros((BLOCK,), tl.float32)
    if old_values is not None:
        old = tl.where(scored, tl.load(old_values + token, mask=inside, other=0.0).to(tl.float32), 0.0)
        low = old - clip
        high = old + clip
        bounded = tl.where(value < low, low, tl.where(value > high, high, value)) - target
        bounded_loss = 0.5 * bounded * bounded
        clipped = tl.where(bounded_loss > loss, 1.0, 0.0)
        derivative = tl.where(bounded_loss > loss, 0.0, error)
        loss = tl.where(bounded_loss > loss, bounded_loss, loss)
    if lengths is not None:
        sequence = sequence_of_block(block, cu_seqlens, sequences, steps, sequence_length, BLOCK)
        length = tl.load(lengths + sequence, mask=scored & (sequence < sequences), other=float("nan"))
        loss = tl.where(scored, loss / length, 0.0)
        derivative = tl.where(scored, derivative / length, 0.0)

    if grad is not None:
        tl.store(grad + token, derivative, mask=inside)
    sums += block
    blocks = tl.num_programs(0).to(tl.int64)
    wide_error = error.to(tl.float64)
    wide_target = target.to(tl.float64)
    tl.store(sums + CLIPPED * blocks, tl.sum(clipped.to(tl.float64), 0))
    tl.store(sums + VALUES * blocks, tl.sum(value.to(tl.float64), 0))
    tl.store(sums + RETURNS * blocks, tl.sum(wide_target, 0))
    tl.store(sums + ERRORS * blocks, tl.sum(wide_error, 0))
    tl.store(sums + ERROR_SQUARES * blocks, tl.sum(wide_error * wide_error, 0))
    tl.store(sums + RETURN_SQUARES * blocks, tl.sum(wide_target * wide_target, 0))
    tl.store(sums + TOKENS * blocks, tl.sum(tl.where(scored, 1.0, 0.0).to(tl.float64), 0))
    tl.store(sums + LOSS * blocks, tl.sum(loss.to(tl.float64), 0))


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
    tokens = sum_of(sums + TOKENS * blocks, blocks, BLOCK)
    factor = one_over_denominator(tokens.to(tl.float32), lengths, normalizer, normalizer_value, sequences, BLOCK)
    if valid is not None:
        factor *= tl.load(valid)
    tl.store(scale, factor)
    tl.store(loss, (sum_of(sums + LOSS * blocks, blocks, BLOCK) * factor).to(tl.float32))
    n = tl.where(tokens > 0.0, tokens, 1.0)
    error = sum_of(sums + ERRORS * blocks, blocks, BLOCK) / n
    squared_error = sum_of(sums + ERROR_SQUARES * blocks, blocks, BLOCK) / n
    mean = sum_of(sums + RETURNS * blocks, blocks, BLOCK) / n
    variance = sum_of(sums + RETURN_SQUARES * blocks, blocks, BLOCK) / n - mean * mean
    noise = mean * NOISE
    undefined = variance <= noise * noise
    explained = 1.0 - (squared_error - error * error) / tl.where(undefined, 1.0, variance)
    explained = tl.where(undefined, float("nan"), explained)
    tl.store(metrics, (sum_of(sums + CLIPPED * blocks, blocks, BLOCK) / n).to(tl.float32))
    tl.store(metrics + 1, (sum_of(sums + VALUES * blocks, blocks, BLOCK) / n).to(tl.float32))
    tl.store(metrics + 2, mean.to(tl.float32))
    tl.store(metrics + 3, squared_error.to(tl.float32))
    tl.store(metrics + 4, tl.where(tokens > 0.0, explained, 0.0).to(tl.float32))
    tl.store(metrics + 5, tokens.to(tl.float32))


@implements("value_loss_forward")
def value_loss_forward(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    normalizer: Tensor | None,
    normalizer_value: float,
    aggregation: int,
    clip: float,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    count = values.numel()
    sequences, sequence_length = shape_of(values, cu_seqlens)
    blocks = triton.cdiv(count, BLOCK)
    grad = torch.empty_like(values, dtype=torch.float32) if need_grad else values.new_empty(0, dtype=torch.float32)
    sums = values.new_empty(SUMS, blocks, dtype=torch.float64)
    loss, metrics, scale = (values.new_empty(shape, dtype=torch.float32) for shape in ((), (len(VALUE_METRICS),), ()))
    valid = valid_sequences(cu_seqlens, count)

    denominator = Denominator(normalizer, normalizer_value, aggregation)
    lengths = sequence_lengths(values, mask, cu_seqlens) if denominator.needs_lengths else None
    if count:
        _token_kernel[(blocks,)](
            values,
            old_values,
            returns,
            mask,
            cu_seqlens,
            lengths if aggregation == SEQ_MEAN_TOKEN_MEAN else None,
            grad if need_grad else None,
            sums,
            count,
            sequence_length,
            sequences,
            sequences.bit_length(),
            clip,
            ALIGNED=count % 16 == 0,
            BLOCK=BLOCK,
        )
    _finish_kernel[(1,)](
        sums,
        lengths if denominator.counts_sequences else None,
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
    return loss, metrics, grad, scale
