import torch
import triton
import triton.language as tl
from torch import Tensor

from rlkernels._codes import VALUE_METRICS
from rlkernels.triton import _config
from rlkernels.triton._launch import implements
from rlkernels.triton._sequences import valid_sequences
from rlkernels.triton._token_losses import (
    BLOCK,
    FINISH_WARPS,
    PROGRAMS,
    SEQ_MEAN_TOKEN_MEAN,
    Denominator,
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

# Sums over tokens.
CLIPPED = tl.constexpr(0)
VALUES = tl.constexpr(1)
RETURNS = tl.constexpr(2)
ERRORS = tl.constexpr(3)
ERROR_SQUARES = tl.constexpr(4)
RETURN_SQUARES = tl.constexpr(5)
TOKENS = tl.constexpr(6)
LOSS = tl.constexpr(7)
SUMS = tl.constexpr(8)

# The spread, relative to their mean, that rounding alone can make of returns that are all the same.
NOISE = tl.constexpr(4 * 2.0**-23)


@triton.jit(do_not_specialize=["count", "sequence_length", "sequences"])
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
    clip,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Loss and gradient of each token, before the division by the denominator, and their sums over a program. The sums
    for variances are in double, where the squares of floats are exact: a variance is the mean of squares less the
    square of the mean."""
    none = tl.zeros((BLOCK // 4,), tl.float32)
    wide_none = tl.zeros((BLOCK // 4,), tl.float64)
    clips, value_sums, tokens, losses = none, none, none, none
    return_sums, errors, error_squares, return_squares = wide_none, wide_none, wide_none, wide_none
    if lengths is not None and cu_seqlens is None:
        begin = tl.program_id(0).to(tl.int64) * BLOCK
        stride = tl.num_programs(0).to(tl.int64) * BLOCK
        sequence, within = padded_sequence(four_tokens(begin, count, ALIGNED, BLOCK)[0], sequence_length)
    for step in range(tl.program_id(0), tl.cdiv(count, BLOCK).to(tl.int32), tl.num_programs(0)):
        start = (tl.zeros((), tl.int64) + step) * BLOCK
        first, token, inside = four_tokens(start, count, ALIGNED, BLOCK)
        scored = inside
        if mask is not None:
            scored = scored & (tl.load(mask + token, mask=inside, other=0) != 0)
        value = load_scored(values, token, scored, inside)
        target = load_scored(returns, token, scored, inside)
        error = value - target
        loss = 0.5 * error * error
        derivative = error
        if old_values is not None:
            old = load_scored(old_values, token, scored, inside)
            low = old - clip
            high = old + clip
            bounded = tl.where(value < low, low, tl.where(value > high, high, value)) - target
            bounded_loss = 0.5 * bounded * bounded
            clipped = bounded_loss > loss
            clips += tl.sum(tl.where(clipped, 1.0, 0.0), 1)
            derivative = tl.where(clipped, 0.0, error)
            loss = tl.where(clipped, bounded_loss, loss)
        if lengths is not None:
            if cu_seqlens is not None:
                places = four_packed(first, cu_seqlens, sequences, start, BLOCK)
            else:
                places = four_padded(sequence, within, sequence_length, sequences)
                sequence, within = step_on(sequence, within, stride, sequence_length)
            length = of_four(lengths, places)
            loss = tl.where(scored, loss / length, 0.0)
            derivative = tl.where(scored, derivative / length, 0.0)
        if grad is not None:
            tl.store(grad + token, derivative, mask=inside)
        # Where nothing is scored, all are 0.
        wide_error = error.to(tl.float64)
        wide_target = target.to(tl.float64)
        value_sums += tl.sum(value, 1)
        return_sums += tl.sum(wide_target, 1)
        errors += tl.sum(wide_error, 1)
        error_squares += tl.sum(wide_error * wide_error, 1)
        return_squares += tl.sum(wide_target * wide_target, 1)
        tokens += number_of(scored, mask, first, count)
        losses += tl.sum(loss, 1)

    store_sum(sums, CLIPPED, clips)
    store_sum(sums, VALUES, value_sums)
    store_sum(sums, RETURNS, return_sums)
    store_sum(sums, ERRORS, errors)
    store_sum(sums, ERROR_SQUARES, error_squares)
    store_sum(sums, RETURN_SQUARES, return_squares)
    store_sum(sums, TOKENS, tokens)
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
    tokens = pick(totals, row, TOKENS)
    factor = one_over_denominator(
        tokens.to(tl.float32), lengths, normalizer, normalizer_value, valid, sequences, PROGRAMS
    )
    tl.store(scale, factor)
    tl.store(loss, (pick(totals, row, LOSS) * factor).to(tl.float32))
    means = totals / tl.where(tokens > 0.0, tokens, 1.0)
    error = pick(means, row, ERRORS)
    squared_error = pick(means, row, ERROR_SQUARES)
    mean = pick(means, row, RETURNS)
    variance = pick(means, row, RETURN_SQUARES) - mean * mean
    noise = mean * NOISE
    undefined = variance <= noise * noise
    explained = 1.0 - (squared_error - error * error) / tl.where(undefined, 1.0, variance)
    explained = tl.where(undefined, float("nan"), explained)
    tl.store(metrics, pick(means, row, CLIPPED).to(tl.float32))
    tl.store(metrics + 1, pick(means, row, VALUES).to(tl.float32))
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
    programs = programs_for(count, sequences)
    grad, loss, metrics, scale = (
        values.new_empty(shape, dtype=torch.float32)
        for shape in (values.shape if need_grad else (0,), (), (len(VALUE_METRICS),), ())
    )
    sums = values.new_empty((SUMS.value, programs), dtype=torch.float64)

    denominator = Denominator(normalizer, normalizer_value, aggregation)
    lengths = sequence_lengths(values, mask, cu_seqlens) if denominator.needs_lengths else None
    if programs:
        _token_kernel[(programs,)](
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
            clip,
            ALIGNED=count % 16 == 0,
            BLOCK=BLOCK,
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
    return loss, metrics, grad, scale
