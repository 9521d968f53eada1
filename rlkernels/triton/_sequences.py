"""Where the sequences of a batch begin and end: padded [count, length], or packed with cu_seqlens."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def bounds(sequence, cu_seqlens, tokens, length):
    """First token and end of a sequence, within [0, tokens] whatever cu_seqlens holds."""
    if cu_seqlens is not None:
        begin = tl.load(cu_seqlens + sequence).to(tl.int64)
        end = tl.load(cu_seqlens + sequence + 1).to(tl.int64)
        begin = tl.minimum(tl.maximum(begin, 0), tokens)
        end = tl.minimum(tl.maximum(end, begin), tokens)
    else:
        begin = sequence * length
        end = begin + length
    return begin, end


@triton.jit
def sequence_of(position, cu_seqlens, sequences, steps):
    """The last s with cu_seqlens[s] <= position, by bisection: the number of starts after the first that are not beyond
    it. Stays within [0, sequences], whatever cu_seqlens holds. `steps` is the bit length of `sequences`."""
    low = tl.zeros(position.shape, tl.int32)
    high = low + sequences
    for _ in range(steps):
        middle = (low + high) // 2
        searching = low < high
        here = searching & (tl.load(cu_seqlens + 1 + middle, mask=searching, other=0) <= position)
        low = tl.where(here, middle + 1, low)
        high = tl.where(searching & ~here, middle, high)
    return low


@triton.jit(do_not_specialize=["sequences", "tokens"])
def _valid_kernel(cu_seqlens, valid, sequences: tl.int32, tokens: tl.int64, BLOCK: tl.constexpr):
    """1 where cu_seqlens run from 0 to `tokens` without decreasing, else NaN."""
    wrong = (tl.load(cu_seqlens) != 0) | (tl.load(cu_seqlens + sequences) != tokens)
    wrong = tl.full((BLOCK,), 0, tl.int1) | wrong
    for start in range(0, sequences, BLOCK):
        sequence = start + tl.arange(0, BLOCK)
        inside = sequence < sequences
        begin = tl.load(cu_seqlens + sequence, mask=inside, other=0)
        wrong |= begin > tl.load(cu_seqlens + sequence + 1, mask=inside, other=0)
    tl.store(valid, tl.where(tl.max(wrong.to(tl.int32), 0) != 0, float("nan"), 1.0))


def valid_sequences(cu_seqlens: Tensor | None, tokens: int) -> Tensor | None:
    """What results are multiplied by: float32 [], 1, or NaN where cu_seqlens are wrong. The device says so, since the
    host does not look at values there. One launch; None without cu_seqlens."""
    if cu_seqlens is None:
        return None
    valid = cu_seqlens.new_empty((), dtype=torch.float32)
    _valid_kernel[(1,)](cu_seqlens, valid, cu_seqlens.shape[0] - 1, tokens, BLOCK=1024)
    return valid


@triton.jit
def aligned_bounds(begin, end):
    """The multiples of 16 around a sequence: what is loaded between them can be loaded 16 bytes at a time."""
    return begin // 16 * 16, (end + 15) // 16 * 16
