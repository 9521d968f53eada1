import torch
import triton
import triton.language as tl
from torch import Tensor

from rlkernels.triton._config import num_warps, threads
from rlkernels.triton._launch import implements
from rlkernels.triton._math import LN2, LOG2E, expm1, soft_cap, softplus, tanh_derivative

# Below the lowest logarithm of a positive float, and finite, so that its product with a weight of 0 is 0.
LOWEST = tl.constexpr(-1e30)

# Two variants are compiled per dtype, ALIGNED or not, whatever the vocabulary, the strides and the temperature.
_DO_NOT_SPECIALIZE = [
    "logits",
    "token_ids",
    "logprobs",
    "entropy",
    "row_stats",
    "parts",
    "grad_logprobs",
    "grad_entropy",
    "grad_logits",
    "inner_rows",
    "outer_stride",
    "inner_stride",
    "grad_outer_stride",
    "grad_inner_stride",
    "vocab_start",
    "vocab_size",
    "ignore_index",
]


@triton.jit
def _multiple_of_16_bytes(size, pointer, ALIGNED: tl.constexpr):
    """`size`, in a form that shows the compiler that rows are of whole 16-byte words where they are."""
    if ALIGNED:
        word: tl.constexpr = 128 // pointer.dtype.element_ty.primitive_bitwidth
        return size // word * word
    else:
        return size


@triton.jit
def _target(token, vocab_start, vocab_size, ignore_index, PART: tl.constexpr):
    """Where the target is among a row's logits, -1 where it is not; whether the row is scored, and what it gives if
    not. The target of a part may be in another."""
    ignored = token == ignore_index
    at = token - vocab_start
    inside = (at >= 0) & (at < vocab_size) & ~ignored
    at = tl.where(inside, at, -1).to(tl.int32)
    if PART:
        return at, ~ignored, 0.0
    else:
        return at, inside, tl.where(ignored, 0.0, float("nan"))


@triton.jit(do_not_specialize=_DO_NOT_SPECIALIZE)
def _forward_kernel(
    logits,
    token_ids,
    logprobs,
    entropy,
    row_stats,
    parts,
    inner_rows: tl.int32,
    outer_stride: tl.int64,
    inner_stride: tl.int64,
    vocab_start: tl.int64,
    vocab_size: tl.int32,
    temperature: tl.float32,
    softcap: tl.float32,
    ignore_index: tl.int64,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    PART: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0)
    start = logits + row // inner_rows * outer_stride + row % inner_rows * inner_stride
    row = row.to(tl.int64)
    if ALIGNED:
        start = tl.multiple_of(start, 16)
    token, scored, fill = _target(tl.load(token_ids + row), vocab_start, vocab_size, ignore_index, PART)

    # y are logits after the softcap. They are divided by the temperature after the max is subtracted: the difference of
    # two logits is exact where their quotients would be rounded.
    scale = LOG2E / temperature
    target = soft_cap(tl.load(start + token, mask=token >= 0, other=0.0).to(tl.float32), softcap, SOFTCAP)
    # Each column of a tile has its own running max, sum of exp2 and sum of exp2 * (y - max), and stays within a thread.
    top = tl.full((COLUMNS,), float("-inf"), tl.float32)
    total = tl.zeros((COLUMNS,), tl.float32)
    moment = tl.zeros((COLUMNS,), tl.float32)
    tile = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    end = tl.where(scored, _multiple_of_16_bytes(vocab_size, logits, ALIGNED), 0)
    for first in range(0, end, ROWS * COLUMNS):
        inside = first + tile < end
        y = tl.load(start + first + tile, mask=inside, other=float("-inf")).to(tl.float32)
        if SOFTCAP:
            y = tl.where(inside, soft_cap(y, softcap, SOFTCAP), float("-inf"))
        # The target is kept out of the sums: for a confident token, z_t - logsumexp(z) would round to 0.
        if (token >= first) & (token < first + ROWS * COLUMNS):
            y = tl.where(first + tile == token, float("-inf"), y)

        new_top = tl.maximum(top, tl.max(y, 0))
        # In a column of nothing but -inf so far any finite max will do: the sums stay 0.
        anchor = tl.where(new_top == float("-inf"), 0.0, new_top)
        below = y - anchor[None, :]
        weight = tl.exp2(below * scale)
        drop = top - anchor
        rescale = tl.exp2(drop * scale)
        if ENTROPY:
            moment = (moment + total * tl.maximum(drop, LOWEST)) * rescale
            moment += tl.sum(weight * tl.maximum(below, LOWEST), 0)
        total = total * rescale + tl.sum(weight, 0)
        top = new_top

    others_top = tl.max(top, 0)
    anchor = tl.where(others_top == float("-inf"), 0.0, others_top)
    drop = top - anchor
    rescale = tl.exp2(drop * scale)
    others = tl.sum(total * rescale, 0)
    others_moment = tl.zeros((), tl.float32)
    if ENTROPY:
        others_moment = tl.sum((moment + total * tl.maximum(drop, LOWEST)) * rescale, 0) / temperature

    rows = tl.num_programs(0).to(tl.int64)
    if PART:
        # The max passes over a NaN and the sum does not; the two must agree.
        tl.store(parts + row, tl.where(others == others, others_top, float("nan")))
        tl.store(parts + rows + row, others)
        tl.store(parts + 2 * rows + row, others_moment)
        tl.store(parts + 3 * rows + row, tl.where(token >= 0, target, float("nan")))
    else:
        # logprob = -softplus(logsumexp of the others - z_t)
        lead = (target - others_top) / temperature
        logprob = 0.0 - softplus(tl.log(others) - lead)
        # Log-softmax is undefined where there is a +inf. Among the others one has made logprob NaN already, and so has
        # nothing but -inf.
        logprob = tl.where(target == float("inf"), float("nan"), logprob)
        target_leads = target >= others_top
        log_sum = tl.where(target_leads, -logprob, tl.log(others + tl.exp(lead)))

        tl.store(logprobs + row, tl.where(scored, logprob, fill))
        tl.store(row_stats + row, tl.where(scored, tl.maximum(target, others_top), fill))
        tl.store(row_stats + rows + row, tl.where(scored, tl.where(logprob == logprob, log_sum, float("nan")), fill))
        if ENTROPY:
            # -p_t log p_t + sum of p_v (-log p_v) over the others, all of whose terms are >= 0
            p_target = tl.exp(logprob)
            value = tl.where(p_target == 0.0, 0.0, -p_target * logprob)
            least = tl.maximum(lead, 0.0) + log_sum
            value += tl.where(others == 0.0, 0.0, tl.exp(-least) * (others * least - others_moment))
            tl.store(entropy + row, tl.where(scored, value, fill))


@triton.jit(do_not_specialize=_DO_NOT_SPECIALIZE)
def _backward_kernel(
    grad_logprobs,
    grad_entropy,
    logits,
    token_ids,
    logprobs,
    entropy,
    row_stats,
    grad_logits,
    inner_rows: tl.int32,
    outer_stride: tl.int64,
    inner_stride: tl.int64,
    grad_outer_stride: tl.int64,
    grad_inner_stride: tl.int64,
    vocab_start: tl.int64,
    vocab_size: tl.int32,
    temperature: tl.float32,
    softcap: tl.float32,
    ignore_index: tl.int64,
    SOFTCAP: tl.constexpr,
    PART: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    start = logits + row // inner_rows * outer_stride + row % inner_rows * inner_stride
    grad_start = grad_logits + row // inner_rows * grad_outer_stride + row % inner_rows * grad_inner_stride
    row = row.to(tl.int64)
    if ALIGNED:
        start = tl.multiple_of(start, 16)
        grad_start = tl.multiple_of(grad_start, 16)
    token, scored, fill = _target(tl.load(token_ids + row), vocab_start, vocab_size, ignore_index, PART)

    logprob = tl.load(logprobs + row)
    top = tl.load(row_stats + row)
    log_sum = tl.load(row_stats + tl.num_programs(0) + row)

    # d(grad_logprob * logprob + grad_entropy * H) / dz_v = -p_v (grad_logprob + grad_entropy (log p_v + H)) for v != t;
    # for the target 1 - p_t = -expm1(logprob). All is divided by the temperature here, once per row.
    offset = tl.zeros((), tl.float32)
    at_target = tl.zeros((), tl.float32)
    slope = tl.zeros((), tl.float32)
    if grad_logprobs is not None:
        offset += tl.load(grad_logprobs + row) / temperature
        at_target -= offset * expm1(logprob)
    if grad_entropy is not None:
        g = tl.load(grad_entropy + row) / temperature
        h = tl.load(entropy + row)
        p_target = tl.exp(logprob)
        at_target -= tl.where(p_target == 0.0, 0.0, g * p_target * (logprob + h))
        offset += g * h
        slope = g * LN2

    scale = LOG2E / temperature
    log2_sum = log_sum * LOG2E
    columns = tl.arange(0, BLOCK)
    # Rows of the gradient, which is of the narrower dtype if it is not the logits', have the fewer words.
    end = _multiple_of_16_bytes(vocab_size, grad_logits, ALIGNED)
    for first in range(0, end, BLOCK):
        inside = first + columns < end
        x = tl.load(start + first + columns, mask=inside & scored, other=0.0).to(tl.float32)
        log2_p = (soft_cap(x, softcap, SOFTCAP) - top) * scale - log2_sum
        p = tl.exp2(log2_p)
        if grad_entropy is not None:
            gradient = tl.where(p == 0.0, 0.0, -p * (offset + slope * log2_p))
        else:
            gradient = -p * offset
        if (token >= first) & (token < first + BLOCK):
            gradient = tl.where(first + columns == token, at_target, gradient)
        if SOFTCAP:
            gradient *= tanh_derivative(x / softcap)
        tl.store(grad_start + first + columns, tl.where(scored, gradient, fill), mask=inside)


@implements("token_logprobs_forward")
def token_logprobs_forward(
    logits: Tensor, token_ids: Tensor, temperature: float, softcap: float, ignore_index: int, return_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    outer, inner, _ = logits.shape
    logprobs = torch.empty(outer, inner, dtype=torch.float32, device=logits.device)
    entropy = torch.empty_like(logprobs) if return_entropy else logprobs.new_empty(0)
    row_stats = logprobs.new_empty(2, outer, inner)
    _forward(
        logits, token_ids, logprobs, entropy, row_stats, None, 0, temperature, softcap, ignore_index, return_entropy
    )
    return logprobs, entropy, row_stats


@implements("token_logprobs_part")
def token_logprobs_part(
    logits: Tensor,
    token_ids: Tensor,
    vocab_start: int,
    temperature: float,
    softcap: float,
    ignore_index: int,
    return_entropy: bool,
) -> Tensor:
    parts = torch.empty(4, len(logits), dtype=torch.float32, device=logits.device)
    outputs = (None, None, None, parts)
    _forward(logits[None], token_ids, *outputs, vocab_start, temperature, softcap, ignore_index, return_entropy)
    return parts


def _forward(
    logits: Tensor,
    token_ids: Tensor,
    logprobs: Tensor | None,
    entropy: Tensor | None,
    row_stats: Tensor | None,
    parts: Tensor | None,
    vocab_start: int,
    temperature: float,
    softcap: float,
    ignore_index: int,
    return_entropy: bool,
) -> None:
    outer, inner, vocab_size = logits.shape
    if not outer * inner:
        return
    aligned = _aligned(logits)
    _forward_kernel[(outer * inner,)](
        logits,
        token_ids,
        logprobs,
        entropy,
        row_stats,
        parts,
        inner,
        *logits.stride()[:2],
        vocab_start,
        vocab_size,
        temperature,
        softcap,
        ignore_index,
        SOFTCAP=softcap > 0,
        ENTROPY=return_entropy,
        PART=parts is not None,
        ALIGNED=aligned,
        ROWS=_tile_rows(softcap, aligned),
        COLUMNS=threads("rows") * 16 // logits.element_size(),
        num_warps=num_warps("rows"),
    )


@implements("token_logprobs_backward")
def token_logprobs_backward(
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    token_ids: Tensor,
    logprobs: Tensor,
    entropy: Tensor,
    row_stats: Tensor,
    temperature: float,
    softcap: float,
    ignore_index: int,
) -> Tensor:
    grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    saved = (token_ids, logprobs, entropy, row_stats)
    _backward(grad_logprobs, grad_entropy, logits, *saved, grad_logits, None, temperature, softcap, ignore_index)
    return grad_logits


@implements("token_logprobs_backward_")
def token_logprobs_backward_(
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    token_ids: Tensor,
    logprobs: Tensor,
    entropy: Tensor,
    row_stats: Tensor,
    temperature: float,
    softcap: float,
    ignore_index: int,
) -> None:
    saved = (token_ids, logprobs, entropy, row_stats)
    _backward(grad_logprobs, grad_entropy, logits, *saved, logits, None, temperature, softcap, ignore_index)


@implements("token_logprobs_part_backward")
def token_logprobs_part_backward(
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    token_ids: Tensor,
    vocab_start: int,
    logprobs: Tensor,
    entropy: Tensor,
    row_stats: Tensor,
    temperature: float,
    softcap: float,
    ignore_index: int,
    gradient: Tensor,
) -> None:
    saved = (token_ids, logprobs, entropy, row_stats)
    options = (vocab_start, temperature, softcap, ignore_index)
    _backward(grad_logprobs, grad_entropy, logits[None], *saved, gradient[None], *options)


def _backward(
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    token_ids: Tensor,
    logprobs: Tensor,
    entropy: Tensor,
    row_stats: Tensor,
    grad_logits: Tensor,
    vocab_start: int | None,
    temperature: float,
    softcap: float,
    ignore_index: int,
) -> None:
    """vocab_start is None where the logits are those of the whole vocabulary."""
    outer, inner, vocab_size = logits.shape
    if not outer * inner:
        return
    aligned = _aligned(logits) and _aligned(grad_logits)
    _backward_kernel[(outer * inner,)](
        grad_logprobs,
        grad_entropy,
        logits,
        token_ids,
        logprobs,
        entropy,
        row_stats,
        grad_logits,
        inner,
        *logits.stride()[:2],
        *grad_logits.stride()[:2],
        vocab_start or 0,
        vocab_size,
        temperature,
        softcap,
        ignore_index,
        SOFTCAP=softcap > 0,
        PART=vocab_start is not None,
        ALIGNED=aligned,
        BLOCK=_tile_rows(softcap, aligned) * threads("rows") * 16 // logits.element_size(),
        num_warps=num_warps("rows"),
    )


def _tile_rows(softcap: float, aligned: bool) -> int:
    """A tile is up to four rows of 16 bytes for each thread, enough to keep the memory busy; its columns stay within a
    thread, so that the loop over the vocabulary needs no barrier. Half as many where tanh takes the registers, half
    again where each element needs its own address."""
    return 4 // (1 + (softcap > 0)) // (2 - aligned)


def _aligned(logits: Tensor) -> bool:
    """Whether rows start at a multiple of 16 bytes and are one long, as loads and stores of 16 bytes need."""
    outer, inner, vocab_size = logits.shape
    strides = (stride for stride, size in zip(logits.stride(), (outer, inner), strict=False) if size > 1)
    sizes = (stride * logits.element_size() for stride in (vocab_size, *strides))
    return all(at % 16 == 0 for at in (logits.data_ptr(), *sizes))
