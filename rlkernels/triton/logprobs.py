"""token_logprobs: a program per row of logits, or per part of a row where there are too few rows to fill a GPU.

A row's sums are formed part by part and joined in order. How wide a part is depends on the dtype alone. One kernel does
all of it, whether a program makes a whole row, makes one part, or joins the parts that others made: the same machine
code rounds alike, so a row's bits do not depend on how many rows there are.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlkernels.triton._config import num_warps, threads
from rlkernels.triton._launch import implements
from rlkernels.triton._math import LN2, LOG2E, expm1, soft_cap, softplus, tanh_derivative

# Below the lowest logarithm of a positive float, and finite, so that its product with a weight of 0 is 0.
LOWEST = tl.constexpr(-1e30)

# Each thread reads 16 bytes of each of a tile's lines at once: enough to keep the memory busy. Its columns stay within
# a thread, so that the loop over tiles needs no barrier.
LINES = 4
TILES_OF_PART = 4
# Up to so few rows a program makes one part of a row: with a program a row most of a GPU would be idle.
FEW_ROWS = 1024

# Two variants are compiled per dtype, ALIGNED or not, whatever the vocabulary, the rows, the strides and the options'
# values.
_DO_NOT_SPECIALIZE = [
    *("logits", "token_ids", "logprobs", "entropy", "row_stats", "sums"),
    *("grad_logprobs", "grad_entropy", "grad_logits"),
    *("inner_rows", "outer_stride", "inner_stride", "ids_outer_stride", "ids_inner_stride"),
    *("grad_outer_stride", "grad_inner_stride", "vocab_start", "vocab_size", "ignore_index"),
    "reads",
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


@triton.jit
def _parts_of_program(vocab_size, WIDTH: tl.constexpr):
    if tl.num_programs(1) > 1:
        first, last = tl.program_id(1), tl.program_id(1) + 1
    else:
        first, last = 0, tl.cdiv(vocab_size, WIDTH)
    return first, last


@triton.jit
def _tile(IN_WORDS: tl.constexpr, LINES: tl.constexpr, THREADS: tl.constexpr, WORD: tl.constexpr):
    """The columns of a tile, [LINES, THREADS, WORD]: a thread reads words of 16 bytes if the vocabulary is whole words,
    else neighbours read neighbouring elements. Either way the first and the last dimension stay within a thread."""
    line = tl.arange(0, LINES)[:, None, None] * (THREADS * WORD)
    thread = tl.arange(0, THREADS)[None, :, None]
    element = tl.arange(0, WORD)[None, None, :]
    if IN_WORDS:
        return line + thread * WORD + element
    else:
        return line + element * THREADS + thread


@triton.jit
def _anchor(top):
    """A finite max to subtract where there is nothing but -inf so far: any will do, since the sums are 0."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _moved(total, moment, drop, temperature, ENTROPY: tl.constexpr):
    """The sums with the max y - drop from those with the max y, where drop <= 0."""
    weight = tl.exp2(drop * (LOG2E / temperature))
    if ENTROPY:
        moment = (moment + total * tl.maximum(drop / temperature, LOWEST)) * weight
    return total * weight, moment


@triton.jit
def _joined(top, total, moment, part_top, part_total, part_moment, temperature, ENTROPY: tl.constexpr):
    """The sums over two disjoint parts of a row. An empty sum, (-inf, 0, 0), leaves the other as it is."""
    new_top = tl.maximum(top, part_top)
    anchor = _anchor(new_top)
    total, moment = _moved(total, moment, top - anchor, temperature, ENTROPY)
    part_total, part_moment = _moved(part_total, part_moment, part_top - anchor, temperature, ENTROPY)
    return new_top, total + part_total, moment + part_moment


@triton.jit
def _sums_of_part(
    start,
    first,
    end,
    token,
    temperature,
    softcap,
    SOFTCAP: tl.constexpr,
    PLAIN: tl.constexpr,
    ENTROPY: tl.constexpr,
    IN_WORDS: tl.constexpr,
    LINES: tl.constexpr,
    THREADS: tl.constexpr,
    WORD: tl.constexpr,
):
    """The sums over the columns [first, end), without the target's: top = max y, total = sum of exp(z - top of z), and
    moment = sum of exp(z - top of z) (z - top of z), where z = y / temperature. PLAIN columns are whole tiles and do
    not hold the target."""
    scale = LOG2E / temperature
    tile = _tile(IN_WORDS, LINES, THREADS, WORD)
    # Each thread has its own sums.
    top = tl.full((THREADS,), float("-inf"), tl.float32)
    total = tl.zeros((THREADS,), tl.float32)
    moment = tl.zeros((THREADS,), tl.float32)
    for at in range(first, end, LINES * THREADS * WORD):
        if PLAIN:
            y = soft_cap(tl.load(start + at + tile).to(tl.float32), softcap, SOFTCAP)
        else:
            inside = at + tile < end
            y = tl.load(start + at + tile, mask=inside, other=float("-inf")).to(tl.float32)
            if SOFTCAP:
                y = tl.where(inside, soft_cap(y, softcap, SOFTCAP), float("-inf"))
            # The target is kept out of the sums: for a confident token, z_t - logsumexp(z) would round to 0.
            if (token >= at) & (token < at + LINES * THREADS * WORD):
                y = tl.where(at + tile == token, float("-inf"), y)

        new_top = tl.maximum(top, tl.max(tl.max(y, 2), 0))
        anchor = _anchor(new_top)
        below = y - anchor[None, :, None]
        weight = tl.exp2(below * scale)
        drop = top - anchor
        rescale = tl.exp2(drop * scale)
        if ENTROPY:
            moment = (moment + total * tl.maximum(drop, LOWEST)) * rescale
            moment += tl.sum(tl.sum(weight * tl.maximum(below, LOWEST), 2), 0)
        total = total * rescale + tl.sum(tl.sum(weight, 2), 0)
        top = new_top

    part_top = tl.max(top, 0)
    drop = top - _anchor(part_top)
    rescale = tl.exp2(drop * scale)
    part_moment = tl.zeros((), tl.float32)
    if ENTROPY:
        part_moment = tl.sum((moment + total * tl.maximum(drop, LOWEST)) * rescale, 0) / temperature
    return part_top, tl.sum(total * rescale, 0), part_moment


@triton.jit
def _finished(target, others_top, others, others_moment, temperature, ENTROPY: tl.constexpr):
    """log p(target), the entropy, max y and log of the sum of exp(z - max z), from a row's target and sums."""
    # logprob = -softplus(logsumexp of the others - z_t)
    lead = (target - others_top) / temperature
    logprob = 0.0 - softplus(tl.log(others) - lead)
    # Log-softmax is undefined where there is a +inf. Among the others one has made logprob NaN already, and so has
    # nothing but -inf.
    logprob = tl.where(target == float("inf"), float("nan"), logprob)
    log_sum = tl.where(target >= others_top, -logprob, tl.log(others + tl.exp(lead)))
    log_sum = tl.where(logprob == logprob, log_sum, float("nan"))
    entropy = tl.zeros(target.shape, tl.float32)
    if ENTROPY:
        # -p_t log p_t + sum of p_v (-log p_v) over the others, all of whose terms are >= 0
        p_target = tl.exp(logprob)
        entropy = tl.where(p_target == 0.0, 0.0, -p_target * logprob)
        least = tl.maximum(lead, 0.0) + log_sum
        entropy += tl.where(others == 0.0, 0.0, tl.exp(-least) * (others * least - others_moment))
    largest = tl.where(logprob == logprob, tl.maximum(target, others_top), float("nan"))
    return logprob, entropy, largest, log_sum


@triton.jit(do_not_specialize=_DO_NOT_SPECIALIZE)
def _forward_kernel(
    logits,
    token_ids,
    logprobs,
    entropy,
    row_stats,
    sums,
    inner_rows: tl.int32,
    outer_stride: tl.int64,
    inner_stride: tl.int64,
    ids_outer_stride: tl.int64,
    ids_inner_stride: tl.int64,
    vocab_start: tl.int64,
    vocab_size: tl.int32,
    temperature: tl.float32,
    softcap: tl.float32,
    ignore_index: tl.int64,
    reads: tl.int32,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    PART: tl.constexpr,
    ALIGNED: tl.constexpr,
    IN_WORDS: tl.constexpr,
    LINES: tl.constexpr,
    THREADS: tl.constexpr,
    WORD: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A program makes all parts of its row, or one of them if a row has several programs, or it reads the sums of all.
    Then it finishes the row; if it made one part, or if the logits are a tile (PART), it writes the sums instead.
    `sums` [parts, 4, rows] are top, total, moment and the target's y, NaN in a part that does not hold it."""
    row = tl.program_id(0)
    outer, inner = row // inner_rows, row % inner_rows
    start = logits + outer * outer_stride + inner * inner_stride
    token = tl.load(token_ids + outer * ids_outer_stride + inner * ids_inner_stride).to(tl.int64)
    row = row.to(tl.int64)
    rows = tl.num_programs(0).to(tl.int64)
    if ALIGNED:
        start = tl.multiple_of(start, 16)
    token, scored, fill = _target(token, vocab_start, vocab_size, ignore_index, PART)

    # y are logits after the softcap. They are divided by the temperature after the max is subtracted: the difference of
    # two logits is exact where their quotients would be rounded.
    target = soft_cap(tl.load(start + token, mask=token >= 0, other=0.0).to(tl.float32), softcap, SOFTCAP)
    others_top = float("-inf")
    others = 0.0
    others_moment = 0.0
    end = tl.where(scored, _multiple_of_16_bytes(vocab_size, logits, ALIGNED), 0)
    first_part, last_part = _parts_of_program(vocab_size, WIDTH)
    for part in range(first_part, last_part):
        if reads != 0:
            at = sums + part * 4 * rows + row
            top = tl.load(at)
            total = tl.load(at + rows)
            moment = tl.load(at + 2 * rows)
        else:
            first = part * WIDTH
            if (first + WIDTH <= end) & ((token < first) | (token >= first + WIDTH)):
                top, total, moment = _sums_of_part(
                    *(start, first, first + WIDTH, token, temperature, softcap),
                    *(SOFTCAP, True, ENTROPY, IN_WORDS, LINES, THREADS, WORD),
                )
            else:
                top, total, moment = _sums_of_part(
                    *(start, first, tl.minimum(first + WIDTH, end), token, temperature, softcap),
                    *(SOFTCAP, False, ENTROPY, IN_WORDS, (LINES + 1) // 2, THREADS, WORD),
                )
        others_top, others, others_moment = _joined(
            others_top, others, others_moment, top, total, moment, temperature, ENTROPY
        )

    if PART | (tl.num_programs(1) > 1):
        at = sums + tl.program_id(1) * 4 * rows + row
        if PART:
            # The max passes over a NaN and the sum does not; the two must agree.
            others_top = tl.where(others == others, others_top, float("nan"))
        tl.store(at, others_top)
        tl.store(at + rows, others)
        tl.store(at + 2 * rows, others_moment)
        tl.store(at + 3 * rows, tl.where(token >= 0, target, float("nan")))
    elif not PART:
        logprob, value, largest, log_sum = _finished(target, others_top, others, others_moment, temperature, ENTROPY)
        tl.store(logprobs + row, tl.where(scored, logprob, fill))
        tl.store(row_stats + row, tl.where(scored, largest, fill))
        tl.store(row_stats + rows + row, tl.where(scored, log_sum, fill))
        if ENTROPY:
            tl.store(entropy + row, tl.where(scored, value, fill))


@triton.jit(do_not_specialize=["parts", "count", "rows"])
def _join_kernel(
    parts,
    sums,
    logprobs,
    entropy,
    row_stats,
    count: tl.int32,
    rows: tl.int64,
    temperature: tl.float32,
    FINISH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Joins the sums of tiles, [count, 4, rows], a row a thread, in the order of the tiles."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    moment = tl.zeros((BLOCK,), tl.float32)
    target = tl.full((BLOCK,), float("nan"), tl.float32)
    for part in range(count):
        at = parts + part * 4 * rows + row
        part_top = tl.load(at, mask=inside, other=float("-inf"))
        part_total = tl.load(at + rows, mask=inside, other=0.0)
        part_moment = tl.load(at + 2 * rows, mask=inside, other=0.0)
        part_target = tl.load(at + 3 * rows, mask=inside, other=0.0)
        top, total, moment = _joined(top, total, moment, part_top, part_total, part_moment, temperature, True)
        target = tl.where(part_target == part_target, part_target, target)
    if FINISH:
        logprob, value, largest, log_sum = _finished(target, top, total, moment, temperature, True)
        tl.store(logprobs + row, logprob, mask=inside)
        tl.store(entropy + row, value, mask=inside)
        tl.store(row_stats + row, largest, mask=inside)
        tl.store(row_stats + rows + row, log_sum, mask=inside)
    else:
        tl.store(sums + row, tl.where(total == total, top, float("nan")), mask=inside)
        tl.store(sums + rows + row, total, mask=inside)
        tl.store(sums + 2 * rows + row, moment, mask=inside)
        tl.store(sums + 3 * rows + row, target, mask=inside)


@triton.jit
def _row_gradient(of_logprob, of_entropy, logprob, entropy, temperature, ENTROPY: tl.constexpr):
    """offset and slope, for `_gradient`, and dz of the target, of rows with these upstream gradients.

    d(of_logprob * logprob + of_entropy * H) / dz_v = -p_v (of_logprob + of_entropy (log p_v + H)) for v != t; for the
    target 1 - p_t = -expm1(logprob). All is divided by the temperature here, once per row."""
    offset = 0.0 - of_logprob / temperature
    at_target = offset * expm1(logprob)
    slope = 0.0
    if ENTROPY:
        g, h = of_entropy / temperature, entropy
        p_target = tl.exp(logprob)
        at_target -= tl.where(p_target == 0.0, 0.0, g * p_target * (logprob + h))
        offset -= g * h
        slope = 0.0 - g * LN2
    return offset, slope, at_target


@triton.jit
def _gradient(x, top, scale, log2_sum, offset, slope, softcap, ENTROPY: tl.constexpr, SOFTCAP: tl.constexpr):
    """p (offset + slope log2 p) dy/dx, for any logit but the target's."""
    log2_p = (soft_cap(x, softcap, SOFTCAP) - top) * scale - log2_sum
    p = tl.exp2(log2_p)
    if ENTROPY:
        # p is 0 long before the bound, and 0 times -inf would be NaN.
        gradient = p * (offset + slope * tl.maximum(log2_p, -1000.0))
    else:
        gradient = p * offset
    if SOFTCAP:
        gradient *= tanh_derivative(x / softcap)
    return gradient


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
    ids_outer_stride: tl.int64,
    ids_inner_stride: tl.int64,
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
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0)
    outer, inner = row // inner_rows, row % inner_rows
    start = logits + outer * outer_stride + inner * inner_stride
    grad_start = grad_logits + outer * grad_outer_stride + inner * grad_inner_stride
    token = tl.load(token_ids + outer * ids_outer_stride + inner * ids_inner_stride).to(tl.int64)
    row = row.to(tl.int64)
    if ALIGNED:
        start = tl.multiple_of(start, 16)
        grad_start = tl.multiple_of(grad_start, 16)
    token, scored, fill = _target(token, vocab_start, vocab_size, ignore_index, PART)

    logprob = tl.load(logprobs + row)
    top = tl.load(row_stats + row)
    log_sum = tl.load(row_stats + tl.num_programs(0) + row)

    ENTROPY: tl.constexpr = grad_entropy is not None
    of_logprob, of_entropy, row_entropy = 0.0, 0.0, 0.0
    if grad_logprobs is not None:
        of_logprob = tl.load(grad_logprobs + row)
    if ENTROPY:
        of_entropy = tl.load(grad_entropy + row)
        row_entropy = tl.load(entropy + row)
    offset, slope, at_target = _row_gradient(of_logprob, of_entropy, logprob, row_entropy, temperature, ENTROPY)
    scale, log2_sum = LOG2E / temperature, log_sum * LOG2E
    # Rows of the gradient, which is of the narrower dtype if it is not the logits', have the fewer words.
    end = _multiple_of_16_bytes(vocab_size, grad_logits, ALIGNED)
    first_part, last_part = _parts_of_program(vocab_size, WIDTH)
    for part in range(first_part, last_part):
        first = part * WIDTH
        if scored & (first + WIDTH <= end) & ((token < first) | (token >= first + WIDTH)):
            for at in range(first, first + WIDTH, BLOCK):
                columns = at + tl.arange(0, BLOCK)
                x = tl.load(start + columns).to(tl.float32)
                gradient = _gradient(x, top, scale, log2_sum, offset, slope, softcap, ENTROPY, SOFTCAP)
                tl.store(grad_start + columns, gradient)
        else:
            for at in range(first, tl.minimum(first + WIDTH, end), BLOCK):
                columns = at + tl.arange(0, BLOCK)
                inside = columns < end
                x = tl.load(start + columns, mask=inside & scored, other=0.0).to(tl.float32)
                gradient = _gradient(x, top, scale, log2_sum, offset, slope, softcap, ENTROPY, SOFTCAP)
                of_target = at_target
                if SOFTCAP:
                    of_target = at_target * tanh_derivative(x / softcap)
                gradient = tl.where(columns == token, of_target, gradient)
                tl.store(grad_start + columns, tl.where(scored, gradient, fill), mask=inside)


@implements("token_logprobs_forward")
def token_logprobs_forward(
    logits: Tensor, token_ids: Tensor, temperature: float, softcap: float, ignore_index: int, return_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    outer, inner, _ = logits.shape
    logprobs = torch.empty(outer, inner, dtype=torch.float32, device=logits.device)
    entropy = torch.empty_like(logprobs) if return_entropy else logprobs.new_empty(0)
    row_stats = logprobs.new_empty(2, outer, inner)
    if not token_ids.numel():
        return logprobs, entropy, row_stats
    outputs = (logprobs, entropy, row_stats)
    options = (temperature, softcap, ignore_index, return_entropy)
    programs = _programs_of_row(logits)
    if programs == 1:
        # Some tensor must stand for the sums: without one another variant would be compiled, of other machine code.
        _forward(logits, token_ids, outputs, row_stats, None, options)
    else:
        sums = logprobs.new_empty(programs, 4, token_ids.numel())
        _forward(logits, token_ids, outputs, sums, None, options, programs=programs)
        _forward(logits, token_ids, outputs, sums, None, options, reads=True)
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
    sums = torch.empty(4, len(logits), dtype=torch.float32, device=logits.device)
    options = (temperature, softcap, ignore_index, return_entropy)
    if len(logits):
        _forward(logits[None], token_ids[None], (None, None, None), sums, vocab_start, options)
    return sums


def _forward(
    logits: Tensor,
    token_ids: Tensor,
    outputs: tuple[Tensor | None, Tensor | None, Tensor | None],
    sums: Tensor,
    vocab_start: int | None,
    options: tuple[float, float, int, bool],
    *,
    programs: int = 1,
    reads: bool = False,
) -> None:
    """`programs` share a row. vocab_start is None where the logits are those of the whole vocabulary."""
    outer, inner, vocab_size = logits.shape
    temperature, softcap, ignore_index, return_entropy = options
    word = 16 // logits.element_size()
    _forward_kernel[(outer * inner, programs)](
        logits,
        token_ids,
        *outputs,
        sums,
        inner,
        *logits.stride()[:2],
        *token_ids.stride(),
        vocab_start or 0,
        vocab_size,
        temperature,
        softcap,
        ignore_index,
        int(reads),
        SOFTCAP=softcap > 0,
        ENTROPY=return_entropy,
        PART=vocab_start is not None,
        ALIGNED=_aligned(logits),
        IN_WORDS=vocab_size % word == 0,
        LINES=max(LINES // (1 + (softcap > 0)) // (1 + (vocab_size % word > 0)), 1),
        THREADS=threads("rows"),
        WORD=word,
        WIDTH=_width(logits),
        num_warps=num_warps("rows"),
    )


@implements("token_logprobs_join")
def token_logprobs_join(parts: Tensor, temperature: float) -> Tensor:
    sums = parts.new_empty(parts.shape[1:])
    _join(parts, sums, (None, None, None), temperature)
    return sums


@implements("token_logprobs_finish")
def token_logprobs_finish(parts: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    rows = parts.shape[2]
    logprobs, entropy, row_stats = parts.new_empty(rows), parts.new_empty(rows), parts.new_empty(2, rows)
    _join(parts, None, (logprobs, entropy, row_stats), temperature)
    return logprobs, entropy, row_stats


def _join(
    parts: Tensor,
    sums: Tensor | None,
    outputs: tuple[Tensor | None, Tensor | None, Tensor | None],
    temperature: float,
) -> None:
    count, _, rows = parts.shape
    if rows:
        block = threads("tokens")
        inputs = (parts, sums, *outputs, count, rows, temperature)
        _join_kernel[(triton.cdiv(rows, block),)](
            *inputs, FINISH=sums is None, BLOCK=block, num_warps=num_warps("tokens")
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
    saved = (token_ids[None], logprobs, entropy, row_stats)
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
    _backward_kernel[(outer * inner, _programs_of_row(logits))](
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
        *token_ids.stride(),
        *grad_logits.stride()[:2],
        vocab_start or 0,
        vocab_size,
        temperature,
        softcap,
        ignore_index,
        SOFTCAP=softcap > 0,
        PART=vocab_start is not None,
        ALIGNED=aligned,
        BLOCK=_width(logits) // TILES_OF_PART // (1 + (softcap > 0)) // (2 - aligned),
        WIDTH=_width(logits),
        num_warps=num_warps("rows"),
    )


def _width(logits: Tensor) -> int:
    """Columns of a part."""
    return TILES_OF_PART * LINES * threads("rows") * 16 // logits.element_size()


def _programs_of_row(logits: Tensor) -> int:
    outer, inner, vocab_size = logits.shape
    return triton.cdiv(vocab_size, _width(logits)) if outer * inner <= FEW_ROWS else 1


def _aligned(logits: Tensor) -> bool:
    """Whether rows start at a multiple of 16 bytes and are one long, as loads and stores of 16 bytes need."""
    outer, inner, vocab_size = logits.shape
    strides = (stride for stride, size in zip(logits.stride(), (outer, inner), strict=False) if size > 1)
    sizes = (stride * logits.element_size() for stride in (vocab_size, *strides))
    return all(at % 16 == 0 for at in (logits.data_ptr(), *sizes))
