import torch
import triton
import triton.language as tl
from torch import Tensor

from rlkernels.triton._launch import DTYPES, implements, multiple_of_16
from rlkernels.triton._math import whitening_unit

BLOCK = 1024
# Parts that one step of a sum over blocks takes.
PARTS = 256


@triton.jit
def _scored_values(x, mask, element, inside):
    """Which elements are scored, and those elements, 0 elsewhere: what is not scored may hold anything."""
    scored = inside
    if mask is not None:
        scored = scored & (tl.load(mask + element, mask=inside, other=0) != 0)
    return scored, tl.where(scored, tl.load(x + element, mask=inside, other=0.0).to(tl.float32), 0.0)


@triton.jit(do_not_specialize=["length", "blocks_per_row"])
def _sums_kernel(
    x, mask, sums, counts, length: tl.int64, blocks_per_row: tl.int64, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    """The sum, in double, and the number of the scored elements of each block of a row."""
    block = tl.program_id(0).to(tl.int64)
    length = multiple_of_16(length, ALIGNED)
    position = block % blocks_per_row * BLOCK + tl.arange(0, BLOCK)
    scored, value = _scored_values(x, mask, block // blocks_per_row * length + position, position < length)
    tl.store(sums + block, tl.sum(value.to(tl.float64), 0))
    tl.store(counts + block, tl.sum(scored.to(tl.float32), 0))


@triton.jit
def _sum(parts, count, PARTS: tl.constexpr):
    total = tl.zeros((PARTS,), tl.float64)
    for start in range(0, count, PARTS):
        part = start + tl.arange(0, PARTS)
        total += tl.load(parts + part, mask=part < count, other=0.0).to(tl.float64)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["blocks_per_row"])
def _mean_kernel(sums, counts, means, scale, blocks_per_row: tl.int64, PARTS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    count = _sum(counts + row * blocks_per_row, blocks_per_row, PARTS)
    total = _sum(sums + row * blocks_per_row, blocks_per_row, PARTS)
    factor = 1.0 / tl.maximum(count, 1.0)
    tl.store(means + row, (total * factor).to(tl.float32))
    tl.store(scale + row, factor.to(tl.float32))


@triton.jit(do_not_specialize=["length", "blocks_per_row"])
def _spread_kernel(
    grad, scale, mask, spread, length: tl.int64, blocks_per_row: tl.int64, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    """Each scored element's share of the gradient of its row's mean."""
    block = tl.program_id(0).to(tl.int64)
    row = block // blocks_per_row
    length = multiple_of_16(length, ALIGNED)
    position = block % blocks_per_row * BLOCK + tl.arange(0, BLOCK)
    inside = position < length
    share = tl.zeros((BLOCK,), tl.float32) + tl.load(grad + row) * tl.load(scale + row)
    if mask is not None:
        share = tl.where(tl.load(mask + row * length + position, mask=inside, other=0) != 0, share, 0.0)
    tl.store(spread + row * length + position, share, mask=inside)


@triton.jit(do_not_specialize=["count"])
def _block_moments_kernel(x, mask, parts, count: tl.int64, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """The number, mean, and sum of squared deviations of the scored elements of each block, in double."""
    block = tl.program_id(0).to(tl.int64)
    count = multiple_of_16(count, ALIGNED)
    element = block * BLOCK + tl.arange(0, BLOCK)
    scored, value = _scored_values(x, mask, element, element < count)
    size = tl.sum(scored.to(tl.float32), 0)
    wide = value.to(tl.float64)
    mean = tl.sum(wide, 0) / tl.maximum(size, 1.0)
    deviation = tl.where(scored, wide - mean, 0.0)
    blocks = tl.num_programs(0).to(tl.int64)
    tl.store(parts + block, size.to(tl.float64))
    tl.store(parts + blocks + block, mean)
    tl.store(parts + 2 * blocks + block, tl.sum(deviation * deviation, 0))


@triton.jit(do_not_specialize=["blocks"])
def _moments_kernel(parts, moments, blocks: tl.int64, PARTS: tl.constexpr):
    """Combines the moments of all blocks, in a fixed order."""
    total = tl.zeros((PARTS,), tl.float64)
    for start in range(0, blocks, PARTS):
        part = start + tl.arange(0, PARTS)
        inside = part < blocks
        size = tl.load(parts + part, mask=inside, other=0.0)
        total += size * tl.load(parts + blocks + part, mask=inside, other=0.0)
    count = _sum(parts, blocks, PARTS)
    mean = tl.sum(total, 0) / tl.maximum(count, 1.0)
    squares = tl.zeros((PARTS,), tl.float64)
    for start in range(0, blocks, PARTS):
        part = start + tl.arange(0, PARTS)
        inside = part < blocks
        size = tl.load(parts + part, mask=inside, other=0.0)
        distance = tl.load(parts + blocks + part, mask=inside, other=0.0) - mean
        squares += tl.load(parts + 2 * blocks + part, mask=inside, other=0.0) + size * distance * distance
    tl.store(moments, count)
    tl.store(moments + 1, mean)
    tl.store(moments + 2, tl.sqrt(tl.sum(squares, 0)))


@triton.jit(do_not_specialize=["count"])
def _whiten_kernel(
    x,
    mask,
    moments,
    whitened,
    count: tl.int64,
    eps,
    SHIFT_MEAN: tl.constexpr,
    UNBIASED: tl.constexpr,
    EPS_FLOOR: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    count = multiple_of_16(count, ALIGNED)
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = element < count
    scored, value = _scored_values(x, mask, element, inside)

    root_of_squares = tl.load(moments + 2)
    squares = root_of_squares * root_of_squares
    unit = whitening_unit(squares)
    # The mean in two floats, whose difference from an element keeps its digits also where the mean is large.
    mean = tl.load(moments + 1)
    high = (mean * unit).to(tl.float32)
    low = (mean * unit - high).to(tl.float32)
    divisor = tl.load(moments).to(tl.float32)
    if UNBIASED:
        divisor -= 1.0
    variance = (squares * unit * unit).to(tl.float32) / tl.maximum(divisor, 1.0)
    eps *= unit * unit
    if EPS_FLOOR:
        variance = tl.where(variance < eps, eps, variance)
    else:
        variance += eps
    result = ((value * unit - high) - low) * (1.0 / tl.sqrt(variance))
    if not SHIFT_MEAN:
        result += mean.to(tl.float32)
    tl.store(whitened + element, tl.where(scored, result, 0.0), mask=inside)


@implements("masked_mean")
def masked_mean(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    rows, length = x.shape
    blocks_per_row = triton.cdiv(length, BLOCK)
    blocks = rows * blocks_per_row
    sums, counts = x.new_empty(blocks, dtype=torch.float64), x.new_empty(blocks, dtype=torch.float32)
    means, scale = x.new_empty(rows, dtype=torch.float32), x.new_empty(rows, dtype=torch.float32)
    if blocks:
        _sums_kernel[(blocks,)](x, mask, sums, counts, length, blocks_per_row, ALIGNED=length % 16 == 0, BLOCK=BLOCK)
    if rows:
        _mean_kernel[(rows,)](sums, counts, means, scale, blocks_per_row, PARTS=PARTS)
    return means, scale


@implements("masked_mean_backward")
def masked_mean_backward(grad: Tensor, scale: Tensor, mask: Tensor | None, length: int, dtype: int) -> Tensor:
    rows = grad.shape[0]
    spread = grad.new_empty(rows, length, dtype=DTYPES[dtype])
    blocks_per_row = triton.cdiv(length, BLOCK)
    if blocks := rows * blocks_per_row:
        _spread_kernel[(blocks,)](
            grad, scale, mask, spread, length, blocks_per_row, ALIGNED=length % 16 == 0, BLOCK=BLOCK
        )
    return spread


@implements("masked_moments")
def masked_moments(x: Tensor, mask: Tensor | None) -> Tensor:
    count = x.numel()
    blocks = triton.cdiv(count, BLOCK)
    parts = x.new_empty(3, blocks, dtype=torch.float64)
    moments = x.new_empty(3, dtype=torch.float64)
    if blocks:
        _block_moments_kernel[(blocks,)](x, mask, parts, count, ALIGNED=count % 16 == 0, BLOCK=BLOCK)
    _moments_kernel[(1,)](parts, moments, blocks, PARTS=PARTS)
    return moments


@implements("masked_whiten")
def masked_whiten(
    x: Tensor, mask: Tensor | None, moments: Tensor, shift_mean: bool, eps: float, unbiased: bool, eps_floor: bool
) -> Tensor:
    whitened = torch.empty_like(x, dtype=torch.float32)
    count = x.numel()
    if count:
        _whiten_kernel[(triton.cdiv(count, BLOCK),)](
            x,
            mask,
            moments,
            whitened,
            count,
            eps,
            SHIFT_MEAN=shift_mean,
            UNBIASED=unbiased,
            EPS_FLOOR=eps_floor,
            ALIGNED=count % 16 == 0,
            BLOCK=BLOCK,
        )
    return whitened
