import torch
import triton
import triton.language as tl
from torch import Tensor

from rlkernels.triton._launch import implements

MEAN = tl.constexpr(0)
LEAVE_ONE_OUT = tl.constexpr(1)
NO_BASELINE = tl.constexpr(2)
GROUP = tl.constexpr(0)
BATCH = tl.constexpr(1)
NO_SCALE = tl.constexpr(2)

# Groups have tens of rows: one warp each. Longer ones, the whole batch among them, go in a loop.
BLOCK = 64


@triton.jit
def _score(rewards, weights, row, inside, columns, first_column, last_column):
    """Weighted sum of a row's rewards that are not NaN; NaN if all are."""
    score = tl.zeros(row.shape, tl.float32)
    known = row < 0
    for column in range(first_column, last_column):
        reward = tl.load(rewards + row * columns + column, mask=inside, other=float("nan"))
        if weights is not None:
            weighted = reward * tl.load(weights + column)
        else:
            weighted = reward
        score += tl.where(weighted == weighted, weighted, 0.0)
        known = known | (reward == reward)
    return tl.where(known, score, float("nan"))


@triton.jit
def _row(order, position, inside):
    if order is not None:
        return tl.load(order + position, mask=inside, other=0)
    else:
        return position


@triton.jit
def _statistics(rewards, weights, order, begin, end, columns, first_column, last_column, BLOCK: tl.constexpr):
    """Of a group's scores that are not NaN: size, mean, sample standard deviation, and whether they differ. Where they
    do not, the mean is that score itself, so that score - mean is 0, not a rounding error."""
    size = tl.zeros((BLOCK,), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    low = tl.full((BLOCK,), float("inf"), tl.float32)
    high = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(begin, end, BLOCK):
        position = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = position < end
        score = _score(rewards, weights, _row(order, position, inside), inside, columns, first_column, last_column)
        known = score == score
        size += tl.where(known, 1.0, 0.0)
        total += tl.where(known, score, 0.0)
        low = tl.minimum(low, tl.where(known, score, float("inf")))
        high = tl.maximum(high, tl.where(known, score, float("-inf")))
    size = tl.sum(size, 0)
    low = tl.min(low, 0)
    differs = tl.max(high, 0) > low
    mean = tl.where(differs, tl.sum(total, 0) / tl.maximum(size, 1.0), low)

    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(begin, end, BLOCK):
        position = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = position < end
        score = _score(rewards, weights, _row(order, position, inside), inside, columns, first_column, last_column)
        deviation = tl.where(score == score, score - mean, 0.0)
        squares += deviation * deviation
    std = tl.where(differs, tl.sqrt(tl.sum(squares, 0) / tl.maximum(size - 1.0, 1.0)), 0.0)
    return size, mean, std, differs


@triton.jit
def _divisor(size, std, eps):
    """One score has no standard deviation: it is scaled as if it were 1."""
    return tl.where(size > 1.0, std, 1.0) + eps


@triton.jit(do_not_specialize=["count", "columns"])
def _batch_divisor_kernel(
    rewards, weights, divisors, count: tl.int64, columns, eps, PER_COLUMN: tl.constexpr, BLOCK: tl.constexpr
):
    result = tl.program_id(0)
    first_column = result if PER_COLUMN else 0
    last_column = result + 1 if PER_COLUMN else columns
    begin = tl.zeros((), tl.int64)
    size, _, std, _ = _statistics(rewards, weights, None, begin, count, columns, first_column, last_column, BLOCK)
    tl.store(divisors + result, _divisor(size, std, eps))


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
    PER_COLUMN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    result = tl.program_id(1)
    first_column = result if PER_COLUMN else 0
    last_column = result + 1 if PER_COLUMN else columns
    if offsets is not None:
        begin = tl.load(offsets + group)
        end = tl.load(offsets + group + 1)
        if begin == end:
            return
    else:
        begin = group * group_size
        end = begin + group_size

    size, mean, std, differs = _statistics(
        rewards, weights, order, begin, end, columns, first_column, last_column, BLOCK
    )
    if SCALE == GROUP:
        divisor = _divisor(size, std, eps)
    elif SCALE == BATCH:
        divisor = tl.load(divisors + result)
    for start in range(begin, end, BLOCK):
        position = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = position < end
        row = _row(order, position, inside)
        score = _score(rewards, weights, row, inside, columns, first_column, last_column)
        advantage = score
        if BASELINE != NO_BASELINE:
            advantage = score - mean
            if BASELINE == LEAVE_ONE_OUT:
                # score - mean of the others = (score - mean of all) * n / (n - 1)
                advantage *= size / tl.maximum(size - 1.0, 1.0)
            advantage = tl.where(size == 1.0, score if KEEP_SINGLETON else 0.0, advantage)
        if SCALE != NO_SCALE:
            advantage /= divisor
        advantage = tl.where(advantage == advantage, advantage, 0.0)
        known = score == score
        at = row * tl.num_programs(1) + result
        if PER_COLUMN:
            tl.store(advantages + at, tl.where(known, advantage, float("nan")), mask=inside)
            tl.store(signal + at, tl.where(differs, inside, False), mask=inside)
        else:
            tl.store(advantages + at, tl.where(known, advantage, 0.0), mask=inside)
            tl.store(signal + at, tl.where(differs, known, False), mask=inside)


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
    count = rewards.shape[0]
    if not count:
        return rewards.new_empty(0), rewards.new_empty(0, dtype=torch.bool)

    by_group = (order, offsets, count if offsets is not None else count // group_size, group_size)
    options = (baseline, scale, eps, keep_singleton)
    if not normalize_before_sum:
        advantages, signal = _launch(rewards, weights, *by_group, *options, per_column=False)
        return advantages.view(count), signal.view(count)
    normalized, signals = _launch(rewards, None, *by_group, *options, per_column=True)
    whole = (None, None, 1, count)
    options = (MEAN.value, GROUP.value, eps, keep_singleton)
    advantages, _ = _launch(normalized, weights, *whole, *options, per_column=False)
    return advantages.view(count), signals.any(1) & ~rewards.isnan().all(1)


def _launch(
    rewards: Tensor,
    weights: Tensor | None,
    order: Tensor | None,
    offsets: Tensor | None,
    groups: int,
    group_size: int,
    baseline: int,
    scale: int,
    eps: float,
    keep_singleton: bool,
    *,
    per_column: bool,
) -> tuple[Tensor, Tensor]:
    """Advantages and signal of the weighted sum of the rewards, [B, 1], or of each reward on its own, [B, R]."""
    count, kinds = rewards.shape
    results = kinds if per_column else 1
    advantages = rewards.new_empty(count, results)
    signal = rewards.new_empty(count, results, dtype=torch.bool)
    divisors = rewards.new_empty(results) if scale == BATCH.value else None
    if divisors is not None:
        _batch_divisor_kernel[(results,)](
            rewards, weights, divisors, count, kinds, eps, PER_COLUMN=per_column, BLOCK=BLOCK, num_warps=1
        )
    _group_kernel[(groups, results)](
        rewards,
        weights,
        order,
        offsets,
        divisors,
        advantages,
        signal,
        group_size,
        kinds,
        eps,
        BASELINE=baseline,
        SCALE=scale,
        KEEP_SINGLETON=keep_singleton,
        PER_COLUMN=per_column,
        BLOCK=BLOCK,
        num_warps=1,
    )
    return advantages, signal
