"""The fused LM head on 16-bit inputs: a product whose logits never reach memory.

One program after another takes a tile of logits, rows x tokens, sums it up along the hidden dimension in float32, and
turns it into what its rows' log-probabilities need of it (`_forward_kernel`), or into its gradient
(`_gradient_kernel`). A row's sums are those of its own dot products, tile by tile: they do not depend on the other
rows, nor on how many there are.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from rlkernels.triton._config import HeadTile, head_tile
from rlkernels.triton._launch import implements
from rlkernels.triton._math import LOG2E, soft_cap, tanh_derivative
from rlkernels.triton.logprobs import LOWEST, _anchor, _gradient, _row_gradient, token_logprobs_join


@triton.jit
def _tile_of(number, row_tiles, column_tiles, GROUP: tl.constexpr):
    """Tiles in the order in which few of both factors are under way at once: GROUP tiles of rows for each of tokens."""
    of_group = GROUP * column_tiles
    first = number // of_group * GROUP
    size = tl.minimum(row_tiles - first, GROUP)
    within = number % of_group
    return first + within % size, within // size


@triton.jit
def _block(
    factor, row, column, rows, width, stride, SIZE: tl.constexpr, BLOCK_K: tl.constexpr, DESCRIPTORS: tl.constexpr
):
    """[SIZE, BLOCK_K] of a factor [rows, width] from (row, column) on; 0 past its ends."""
    if DESCRIPTORS:
        return factor.load([row, column])
    else:
        r, c = row + tl.arange(0, SIZE), column + tl.arange(0, BLOCK_K)
        at = factor + r.to(tl.int64)[:, None] * stride + c[None, :]
        return tl.load(at, mask=(r < rows)[:, None] & (c < width)[None, :], other=0.0)


@triton.jit
def _logits(
    hidden,
    weight,
    bias,
    first_row,
    first_token,
    rows,
    tokens,
    width,
    hidden_stride,
    weight_stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """hidden @ weight.T + bias, for the rows and the tokens from the first ones on, as the left half of the tokens and
    the right one: both at once would take more registers than there are for what follows."""
    tile = tl.zeros((BLOCK_ROWS, BLOCK_TOKENS), tl.float32)
    for k in range(0, width, BLOCK_K):
        a = _block(hidden, first_row, k, rows, width, hidden_stride, BLOCK_ROWS, BLOCK_K, DESCRIPTORS)
        b = _block(weight, first_token, k, tokens, width, weight_stride, BLOCK_TOKENS, BLOCK_K, DESCRIPTORS)
        tile = tl.dot(a, b.T, tile)
    halves = tl.permute(tl.reshape(tile, (BLOCK_ROWS, 2, BLOCK_TOKENS // 2)), (0, 2, 1))
    left, right = tl.split(halves)
    if bias is not None:
        left += _bias(bias, first_token, tokens, BLOCK_TOKENS // 2)
        right += _bias(bias, first_token + BLOCK_TOKENS // 2, tokens, BLOCK_TOKENS // 2)
    return left, right


@triton.jit
def _bias(bias, first, tokens, SIZE: tl.constexpr):
    token = first + tl.arange(0, SIZE)
    return tl.load(bias + token, mask=token < tokens, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _target_at(token, first, tokens, SIZE: tl.constexpr):
    """Where the targets are among the SIZE tokens from `first` on, -1 where they are elsewhere."""
    at = token - first
    return tl.where((at >= 0) & (at < SIZE) & (token < tokens), at, -1).to(tl.int32)


@triton.jit
def _store_sums(
    y, sums, row, rows, first, tokens, target_at, temperature, softcap, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr
):
    """What logits [rows, columns], the first of which is that of token `first`, have in `sums` [4, rows]: as
    `token_logprobs_part` has it."""
    column = tl.arange(0, y.shape[1])
    y = soft_cap(y, softcap, SOFTCAP)
    holds = (target_at >= 0) & (target_at < y.shape[1])
    target = tl.zeros(target_at.shape, tl.float32)
    if tl.max(holds.to(tl.int32), 0) > 0:
        # The target is kept out of the sums: for a confident token, z_t - logsumexp(z) would round to 0.
        is_target = column[None, :] == target_at[:, None]
        target = tl.sum(tl.where(is_target, y, 0.0), 1)
        y = tl.where(is_target, float("-inf"), y)
    if first + y.shape[1] > tokens:
        y = tl.where((column < tokens - first)[None, :], y, float("-inf"))
    top = tl.max(y, 1)
    below = y - _anchor(top)[:, None]
    weight = tl.exp2(below * (LOG2E / temperature))
    moment = tl.zeros(top.shape, tl.float32)
    if ENTROPY:
        moment = tl.sum(weight * tl.maximum(below, LOWEST), 1) / temperature
    tl.store(sums + row, top, mask=row < rows)
    tl.store(sums + rows + row, tl.sum(weight, 1), mask=row < rows)
    tl.store(sums + 2 * rows + row, moment, mask=row < rows)
    tl.store(sums + 3 * rows + row, tl.where(holds, target, float("nan")), mask=row < rows)


_DO_NOT_SPECIALIZE = ["rows", "first", "end", "tokens", "ignore_index", "gradient_stride"]


@triton.jit(do_not_specialize=_DO_NOT_SPECIALIZE)
def _forward_kernel(
    hidden,
    weight,
    bias,
    token_ids,
    sums,
    rows: tl.int32,
    tokens: tl.int32,
    width: tl.int32,
    hidden_stride: tl.int64,
    weight_stride: tl.int64,
    temperature: tl.float32,
    softcap: tl.float32,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """`sums` [tiles of tokens, 2, 4, rows] are those of token_logprobs_part for each half of a tile."""
    HALF: tl.constexpr = BLOCK_TOKENS // 2
    row_tiles, token_tiles = tl.cdiv(rows, BLOCK_ROWS), tl.cdiv(tokens, BLOCK_TOKENS)
    for number in range(tl.program_id(0), row_tiles * token_tiles, tl.num_programs(0)):
        row_tile, token_tile = _tile_of(number, row_tiles, token_tiles, GROUP)
        first_row, first = row_tile * BLOCK_ROWS, token_tile * BLOCK_TOKENS
        left, right = _logits(
            *(hidden, weight, bias, first_row, first, rows, tokens, width, hidden_stride, weight_stride),
            *(BLOCK_ROWS, BLOCK_TOKENS, BLOCK_K, DESCRIPTORS),
        )
        row = first_row + tl.arange(0, BLOCK_ROWS)
        token = tl.load(token_ids + row, mask=row < rows, other=-1)
        target_at = _target_at(token, first, tokens, BLOCK_TOKENS)
        at = sums + token_tile.to(tl.int64) * 8 * rows
        _store_sums(left, at, row, rows, first, tokens, target_at, temperature, softcap, SOFTCAP, ENTROPY)
        _store_sums(
            *(right, at + 4 * rows.to(tl.int64), row, rows, first + HALF, tokens, target_at - HALF),
            *(temperature, softcap, SOFTCAP, ENTROPY),
        )


@triton.jit
def _store_gradient(
    x,
    gradient,
    first_row,
    column,
    rows,
    columns,
    gradient_stride,
    target_at,
    scored,
    of_rows,
    softcap,
    scale,
    ENTROPY: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """The gradient of logits [rows, columns], from the row's numbers in `of_rows`, to `gradient` at (row, column)."""
    top, log2_sum, offset, slope, at_target = of_rows
    value = _gradient(x, top[:, None], scale, log2_sum[:, None], offset[:, None], slope, softcap, ENTROPY, SOFTCAP)
    of_target = at_target[:, None]
    if SOFTCAP:
        of_target = of_target * tanh_derivative(x / softcap)
    within = tl.arange(0, x.shape[1])
    value = tl.where(within[None, :] == target_at[:, None], of_target, value)
    value = tl.where(scored[:, None], value, 0.0)
    if DESCRIPTORS:
        gradient.store([first_row, column], value.to(gradient.dtype))
    else:
        row = first_row + tl.arange(0, x.shape[0])
        column += within
        stride = gradient_stride // 8 * 8  # which shows the compiler that rows are of whole 16-byte words
        at = gradient + row.to(tl.int64)[:, None] * stride + column[None, :]
        tl.store(at, value, mask=(row < rows)[:, None] & (column < stride)[None, :])


@triton.jit(do_not_specialize=_DO_NOT_SPECIALIZE)
def _gradient_kernel(
    grad_logprobs,
    grad_entropy,
    hidden,
    weight,
    bias,
    token_ids,
    logprobs,
    entropy,
    row_stats,
    gradient,
    rows: tl.int32,
    first: tl.int32,
    end: tl.int32,
    tokens: tl.int32,
    width: tl.int32,
    hidden_stride: tl.int64,
    weight_stride: tl.int64,
    gradient_stride: tl.int64,
    temperature: tl.float32,
    softcap: tl.float32,
    ignore_index: tl.int64,
    SOFTCAP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """`gradient` [rows, end - first] is that of the logits of the tokens [first, end)."""
    HALF: tl.constexpr = BLOCK_TOKENS // 2
    ENTROPY: tl.constexpr = grad_entropy is not None
    columns = end - first
    row_tiles, token_tiles = tl.cdiv(rows, BLOCK_ROWS), tl.cdiv(columns, BLOCK_TOKENS)
    for number in range(tl.program_id(0), row_tiles * token_tiles, tl.num_programs(0)):
        row_tile, token_tile = _tile_of(number, row_tiles, token_tiles, GROUP)
        first_row, column = row_tile * BLOCK_ROWS, token_tile * BLOCK_TOKENS
        left, right = _logits(
            *(hidden, weight, bias, first_row, first + column, rows, tokens, width, hidden_stride, weight_stride),
            *(BLOCK_ROWS, BLOCK_TOKENS, BLOCK_K, DESCRIPTORS),
        )
        row = first_row + tl.arange(0, BLOCK_ROWS)
        inside = row < rows
        token = tl.load(token_ids + row, mask=inside, other=ignore_index)
        target_at = _target_at(token, first + column, tokens, BLOCK_TOKENS)
        scored = token != ignore_index
        logprob = tl.load(logprobs + row, mask=inside, other=0.0)
        top = tl.load(row_stats + row, mask=inside, other=0.0)
        log2_sum = tl.load(row_stats + rows + row, mask=inside, other=0.0) * LOG2E
        of_logprob, of_entropy, row_entropy = tl.zeros((BLOCK_ROWS,), tl.float32), 0.0, 0.0
        if grad_logprobs is not None:
            of_logprob = tl.load(grad_logprobs + row, mask=inside, other=0.0)
        if ENTROPY:
            of_entropy = tl.load(grad_entropy + row, mask=inside, other=0.0)
            row_entropy = tl.load(entropy + row, mask=inside, other=0.0)
        offset, slope, at_target = _row_gradient(of_logprob, of_entropy, logprob, row_entropy, temperature, ENTROPY)
        if ENTROPY:
            slope = slope[:, None]
        of_rows = (top, log2_sum, offset, slope, at_target)
        scale = LOG2E / temperature
        _store_gradient(
            *(left, gradient, first_row, column, rows, columns, gradient_stride, target_at, scored, of_rows, softcap),
            *(scale, ENTROPY, SOFTCAP, DESCRIPTORS),
        )
        _store_gradient(
            *(right, gradient, first_row, column + HALF, rows, columns, gradient_stride, target_at - HALF, scored),
            *(of_rows, softcap, scale, ENTROPY, SOFTCAP, DESCRIPTORS),
        )


@implements("linear_token_logprobs_sums")
def linear_token_logprobs_sums(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    temperature: float,
    softcap: float,
    return_entropy: bool,
) -> Tensor:
    tile = head_tile(_fits_descriptors(hidden, weight), softcap > 0)
    parts = hidden.new_empty(2 * triton.cdiv(len(weight), tile.tokens), 4, len(hidden), dtype=torch.float32)
    _forward_kernel[(_programs(hidden, len(weight), tile),)](
        *_factors(hidden, weight, tile),
        bias,
        token_ids,
        parts,
        len(hidden),
        *weight.shape,
        hidden.stride(0),
        weight.stride(0),
        temperature,
        softcap,
        SOFTCAP=softcap > 0,
        ENTROPY=return_entropy,
        **_constants(tile),
    )
    return token_logprobs_join(parts, temperature)


@implements("linear_token_logprobs_gradient")
def linear_token_logprobs_gradient(
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    logprobs: Tensor,
    entropy: Tensor,
    row_stats: Tensor,
    first: int,
    end: int,
    temperature: float,
    softcap: float,
    ignore_index: int,
) -> Tensor:
    tile = head_tile(_fits_descriptors(hidden, weight), softcap > 0)
    # Rows at multiples of 16 bytes, as whole tiles are written.
    gradient = hidden.new_empty(len(hidden), -(first - end) + (first - end) % 8)[:, : end - first]
    _gradient_kernel[(_programs(hidden, end - first, tile),)](
        grad_logprobs,
        grad_entropy,
        *_factors(hidden, weight, tile),
        bias,
        token_ids,
        logprobs,
        entropy,
        row_stats,
        TensorDescriptor.from_tensor(gradient, [tile.rows, tile.tokens // 2]) if tile.descriptors else gradient,
        len(hidden),
        first,
        end,
        *weight.shape,
        hidden.stride(0),
        weight.stride(0),
        gradient.stride(0),
        temperature,
        softcap,
        ignore_index,
        SOFTCAP=softcap > 0,
        **_constants(tile._replace(num_stages=min(tile.num_stages, 3))),
    )
    return gradient


def _programs(hidden: Tensor, tokens: int, tile: HeadTile) -> int:
    """One for each multiprocessor, which it fills, but not more than there are tiles."""
    tiles = triton.cdiv(len(hidden), tile.rows) * triton.cdiv(tokens, tile.tokens)
    most = torch.cuda.get_device_properties(hidden.device).multi_processor_count if hidden.is_cuda else 4
    return min(tiles, most)


def _constants(tile: HeadTile) -> dict[str, int]:
    return dict(
        BLOCK_ROWS=tile.rows,
        BLOCK_TOKENS=tile.tokens,
        BLOCK_K=tile.width,
        GROUP=16,
        DESCRIPTORS=tile.descriptors,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def _factors(hidden: Tensor, weight: Tensor, tile: HeadTile) -> tuple:
    if not tile.descriptors:
        return hidden, weight
    return (
        TensorDescriptor.from_tensor(hidden, [tile.rows, tile.width]),
        TensorDescriptor.from_tensor(weight, [tile.tokens, tile.width]),
    )


def _fits_descriptors(*factors: Tensor) -> bool:
    return all(factor.data_ptr() % 16 == 0 and factor.stride(0) % 8 == 0 for factor in factors)
