import torch
import triton
import triton.language as tl
from torch import Tensor

from rlkernels._codes import BASELINES, SCALES
from rlkernels.triton._config import num_warps
from rlkernels.triton._launch import implements

MEAN = tl.constexpr(BASELINES.index("mean"))
LEAVE_ONE_OUT = tl.constexpr(BASELINES.index("leave_one_out"))
NO_BASELINE = tl.constexpr(BASELINES.index("none"))
GROUP = tl.constexpr(SCALES.index("group"))
BATCH = tl.constexpr(SCALES.index("batch"))
NO_SCALE = tl.constexpr(SCALES.index("none"))

# Groups have tens of rows: up to BLOCK they are read once and held by one warp; longer ones are read twice, for the
# statistics and for the advantages. One block for all, so that equal groups by size and by ids give the same bits.
BLOCK = 64
# The whole batch is one long group.
BATCH_BLOCK = 1024
# Numbers that one launch takes by value.
ARGUMENTS = 16


@triton.jit
def _load(rewards, inside):
    return tl.load(rewards, mask=inside, other=float("nan")).to(tl.float32)


@triton.jit
def _score(rewards, weights, row, inside, columns):
    """Weighted sum of a row's rewards that are not NaN; NaN if all are."""
    score = tl.zeros(row.shape, tl.float32)
    known = row < 0
    for column in range(columns):
        reward = _load(rewards + row * columns + column, inside)
        if weights is not None:
            # Rounded as a product, however the sum is compiled: rows whose scores are equal must be so wherever read.
            weighted = tl.fma(reward, tl.load(weights + column).to(tl.float32) + tl.zeros(row.shape, tl.float32), 0.0)
        else:
            weighted = reward
        score += tl.where(weighted == weighted, weighted, 0.0)
        known = known | (reward == reward)
    return tl.where(known, score, float("nan"))


@triton.jit
def _rows(order, position, end):
    inside = position < end
    if order is not None:
        return tl.load(order + position, mask=inside, other=0), inside
    else:
        return position, inside


@triton.jit
def _merge(size, mean, squares, low, high, score):
    """The statistics of some scores (their number, mean, sum of squared deviations, least and greatest) and of those of
    one more block that are not NaN. Chan et al. 1983: no sum of squares that cancels. In double, in which the square of
    no float overflows or is 0, as is all that comes of them."""
    known = score == score
    block_size = tl.sum(tl.where(known, 1.0, 0.0), 0)
    block_low = tl.min(tl.where(known, score, float("inf")), 0)
    block_high = tl.max(tl.where(known, score, float("-inf")), 0)
    # Where scores do not differ the mean is that score itself, so that score - mean is 0, not a rounding error.
    block_mean = tl.sum(tl.where(known, score, 0.0).to(tl.float64), 0) / tl.maximum(block_size, 1.0)
    block_mean = tl.where(block_high > block_low, block_mean, block_low)
    deviation = tl.where(known, score - block_mean, 0.0)
    block_squares = tl.sum(deviation * deviation, 0)

    # The mean of nothing is infinite.
    both = (size > 0.0) & (block_size > 0.0)
    distance = tl.where(both, block_mean - mean, 0.0)
    share = block_size / tl.maximum(size + block_size, 1.0)
    mean = tl.where(size > 0.0, mean + distance * share, block_mean)
    squares += block_squares + distance * distance * size * share
    return size + block_size, mean, squares, tl.minimum(low, block_low), tl.maximum(high, block_high)


@triton.jit
def _nothing():
    zero = tl.full((), 0.0, tl.float64)
    return (
        tl.full((), 0.0, tl.float32),
        zero,
        zero,
        tl.full((), float("inf"), tl.float32),
        tl.full((), float("-inf"), tl.float32),
    )


@triton.jit
def _finish(size, mean, squares, low, high):
    """Size, mean, sample standard deviation, and whether the scores differ."""
    differs = high > low
    std = tl.where(differs, tl.sqrt(squares / tl.maximum(size - 1.0, 1.0)), 0.0)
    return size, mean, std, differs


@triton.jit
def _divisor(size, std, eps):
    """One score has no standard deviation: it is scaled as if it were 1."""
    return tl.where(size > 1.0, std, 1.0) + eps


@triton.jit
def _advantage(score, size, mean, divisor, BASELINE: tl.constexpr, SCALE: tl.constexpr, KEEP_SINGLETON: tl.constexpr):
    advantage = score.to(tl.float64)
    if BASELINE != NO_BASELINE:
        advantage -= mean
        if BASELINE == LEAVE_ONE_OUT:
            # score - mean of the others = (score - mean of all) * n / (n - 1)
            advantage *= size / tl.maximum(size - 1.0, 1.0)
        advantage = tl.where(size == 1.0, score if KEEP_SINGLETON else 0.0, advantage)
    if SCALE != NO_SCALE:
        advantage /= divisor
    return tl.where(advantage == advantage, advantage, 0.0).to(tl.float32)


@triton.jit
def _bounds(group, offsets, group_size):
    if offsets is not None:
        return tl.load(offsets + group), tl.load(offsets + group + 1)
    else:
        return group * group_size, (group + 1) * group_size


@triton.jit(do_not_specialize=["count", "columns"])
def _batch_divisor_kernel(
    rewards, weights, divisors, count: tl.int64, columns, eps, PER_COLUMN: tl.constexpr, BLOCK: tl.constexpr
):
    """The divisor of the weighted sum of the rewards, or of every reward on its own, by one program each."""
    column = tl.program_id(0)
    size, mean, squares, low, high = _nothing()
    for start in range(0, count, BLOCK):
        row = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = row < count
        if PER_COLUMN:
            score = _load(rewards + row * columns + column, inside)
        else:
            score = _score(rewards, weights, row, inside, columns)
        size, mean, squares, low, high = _merge(size, mean, squares, low, high, score)
    size, mean, std, _ = _finish(size, mean, squares, low, high)
    tl.store(divisors + column, _divisor(size, std, eps))


@triton.jit(do_not_specialize=["group_size", "columns"])
def _group_kernel(
    rewards,
    weights,
    order,
    offsets,
    divisors,
    advantages,
    signal,
    group_size: tl.int64,
    columns,
    eps,
    BASELINE: tl.constexpr,
    SCALE: tl.constexpr,
    KEEP_SINGLETON: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Advantages of the weighted sum of the rewards. `signal` may be None."""
    begin, end = _bounds(tl.program_id(0).to(tl.int64), offsets, group_size)
    if begin == end:
        return
    size, mean, squares, low, high = _nothing()
    first_row, first_inside = _rows(order, begin + tl.arange(0, BLOCK).to(tl.int64), end)
    first_score = _score(rewards, weights, first_row, first_inside, columns)
    size, mean, squares, low, high = _merge(size, mean, squares, low, high, first_score)
    for start in range(begin + BLOCK, end, BLOCK):
        row, inside = _rows(order, start + tl.arange(0, BLOCK).to(tl.int64), end)
        score = _score(rewards, weights, row, inside, columns)
        size, mean, squares, low, high = _merge(size, mean, squares, low, high, score)
    size, mean, std, differs = _finish(size, mean, squares, low, high)
    if SCALE == BATCH:
        divisor = tl.load(divisors)
    else:
        divisor = _divisor(size, std, eps)

    for start in range(begin, end, BLOCK):
        row, inside, score = first_row, first_inside, first_score
        if start > begin:
            row, inside = _rows(order, start + tl.arange(0, BLOCK).to(tl.int64), end)
            score = _score(rewards, weights, row, inside, columns)
        known = score == score
        advantage = _advantage(score, size, mean, divisor, BASELINE, SCALE, KEEP_SINGLETON)
        tl.store(advantages + row, tl.where(known, advantage, 0.0), mask=inside)
        if signal is not None:
            tl.store(signal + row, tl.where(differs, known, False), mask=inside)


@triton.jit(do_not_specialize=["group_size", "columns"])
def _column_kernel(
    rewards,
    weights,
    order,
    offsets,
    divisors,
    totals,
    signal,
    group_size: tl.int64,
    columns,
    eps,
    BASELINE: tl.constexpr,
    SCALE: tl.constexpr,
    KEEP_SINGLETON: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The weighted sum of the advantages of each reward on its own, NaN where a row has no reward; and whether any of
    them has a signal."""
    begin, end = _bounds(tl.program_id(0).to(tl.int64), offsets, group_size)
    for start in range(begin, end, BLOCK):
        row, inside = _rows(order, start + tl.arange(0, BLOCK).to(tl.int64), end)
        total = tl.zeros((BLOCK,), tl.float32)
        known = row < 0
        any_differs = begin < 0
        for column in range(columns):
            # Each block of a group that is longer than a block finds the statistics again. A second kind of kernel, for
            # groups of that size and several rewards, would be run by nobody.
            size, mean, squares, low, high = _nothing()
            score = _load(rewards + row * columns + column, inside)
            if end - begin <= BLOCK:
                size, mean, squares, low, high = _merge(size, mean, squares, low, high, score)
            else:
                for other in range(begin, end, BLOCK):
                    other_row, other_inside = _rows(order, other + tl.arange(0, BLOCK).to(tl.int64), end)
                    others = _load(rewards + other_row * columns + column, other_inside)
                    size, mean, squares, low, high = _merge(size, mean, squares, low, high, others)
            size, mean, std, differs = _finish(size, mean, squares, low, high)
            if SCALE == BATCH:
                divisor = tl.load(divisors + column)
            else:
                divisor = _divisor(size, std, eps)
            weighted = _advantage(score, size, mean, divisor, BASELINE, SCALE, KEEP_SINGLETON)
            if weights is not None:
                weighted *= tl.load(weights + column).to(tl.float32)
            total += tl.where((score == score) & (weighted == weighted), weighted, 0.0)
            known = known | (score == score)
            any_differs = any_differs | differs
        tl.store(totals + row, tl.where(known, total, float("nan")), mask=inside)
        tl.store(signal + row, tl.where(any_differs, known, False), mask=inside)


@triton.jit(do_not_specialize=["count"])
def _places_kernel(group_ids, order, starts, count: tl.int32, BLOCK: tl.constexpr, OTHERS: tl.constexpr):
    """Where rows are once sorted by group: behind those of smaller ids, and behind the earlier ones of the same."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    own = tl.load(group_ids + row, mask=row < count, other=0)
    less = tl.zeros((BLOCK,), tl.int32)
    before = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, count, OTHERS):
        other = first + tl.arange(0, OTHERS)
        theirs = tl.load(group_ids + other, mask=other < count, other=0)[None, :]
        there = (other < count)[None, :]
        less += tl.sum(((theirs < own[:, None]) & there).to(tl.int32), 1)
        before += tl.sum(((theirs == own[:, None]) & (other[None, :] < row[:, None]) & there).to(tl.int32), 1)
    tl.store(order + less + before, row.to(tl.int64), mask=row < count)
    tl.store(starts + less + before, (before == 0).to(tl.int8), mask=row < count)


@triton.jit(do_not_specialize=["count"])
def _offsets_kernel(starts, offsets, count: tl.int32, BLOCK: tl.constexpr):
    """The places where groups start, one after the other, and then `count`, for groups without rows."""
    groups = tl.zeros((), tl.int32)
    for first in range(0, count, BLOCK):
        place = first + tl.arange(0, BLOCK)
        start = tl.load(starts + place, mask=place < count, other=0).to(tl.int32)
        tl.store(offsets + groups + tl.cumsum(start, 0) - 1, place.to(tl.int64), mask=start != 0)
        groups += tl.sum(start, 0)
    for first in range(0, count + 1, BLOCK):
        group = first + tl.arange(0, BLOCK)
        end = tl.zeros((BLOCK,), tl.int64) + count
        tl.store(offsets + group, end, mask=(group >= groups) & (group <= count))


@implements("group_segments")
def group_segments(group_ids: Tensor) -> tuple[Tensor, Tensor]:
    count = group_ids.shape[0]
    order, offsets = (group_ids.new_empty(size, dtype=torch.int64) for size in (count, count + 1))
    starts = group_ids.new_empty(count, dtype=torch.int8)
    _places_kernel[(triton.cdiv(count, BLOCK),)](
        group_ids, order, starts, count, BLOCK=BLOCK, OTHERS=BLOCK, num_warps=num_warps("tokens")
    )
    _offsets_kernel[(1,)](starts, offsets, count, BLOCK=BATCH_BLOCK, num_warps=num_warps("tokens"))
    return order, offsets


@triton.jit
def _numbers_kernel(numbers, result):
    for index in tl.static_range(len(numbers)):
        tl.store(result + index, numbers[index])


@implements("numbers_on_device")
def numbers_on_device(numbers: list[float], like: Tensor) -> Tensor:
    result = like.new_empty(len(numbers), dtype=torch.float32)
    for first in range(0, len(numbers), ARGUMENTS):
        some = tuple(numbers[first : first + ARGUMENTS])
        _numbers_kernel[(1,)](some, result[first:], num_warps=num_warps("group"))
    return result


@implements("group_advantages")
def group_advantages(
    rewards: Tensor,
    weights: Tensor | None,
    order: Tensor | None,
    offsets: Tensor | None,
    group_size: int,
    baseline: int,
    scale: int,
    eps: float,
    normalize_before_sum: bool,
    keep_singleton: bool,
) -> tuple[Tensor, Tensor]:
    count, columns = rewards.shape
    advantages = rewards.new_empty(count, dtype=torch.float32)
    signal = rewards.new_empty(count, dtype=torch.bool)
    if not count:
        return advantages, signal

    divisors = None
    if scale == BATCH.value:
        results = columns if normalize_before_sum else 1
        divisors = rewards.new_empty(results, dtype=torch.float64)
        _batch_divisor_kernel[(results,)](
            rewards,
            weights,
            divisors,
            count,
            columns,
            eps,
            PER_COLUMN=normalize_before_sum,
            BLOCK=BATCH_BLOCK,
            num_warps=num_warps("tokens"),
        )
    # The sizes of ragged groups are known to the device alone.
    grid = (count if offsets is not None else count // group_size,)
    options = dict(BASELINE=baseline, SCALE=scale, KEEP_SINGLETON=keep_singleton)
    tile = dict(BLOCK=BLOCK, num_warps=num_warps("group"))
    inputs = (rewards, weights, order, offsets, divisors)
    if not normalize_before_sum:
        _group_kernel[grid](*inputs, advantages, signal, group_size, columns, eps, **options, **tile)
        return advantages, signal
    totals = rewards.new_empty(count, dtype=torch.float32)
    _column_kernel[grid](*inputs, totals, signal, group_size, columns, eps, **options, **tile)
    options = dict(BASELINE=MEAN.value, SCALE=GROUP.value, KEEP_SINGLETON=keep_singleton)
    whole = (totals, None, None, None, None)
    _group_kernel[(1,)](
        *whole, advantages, None, count, 1, eps, **options, BLOCK=BATCH_BLOCK, num_warps=num_warps("tokens")
    )
    return advantages, signal
