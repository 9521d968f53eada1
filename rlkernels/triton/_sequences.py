"""Where the sequences of a batch begin and end: padded [count, length], or packed with cu_seqlens."""

import triton
import triton.language as tl


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


@triton.jit
def aligned_bounds(begin, end):
    """The multiples of 16 around a sequence: what is loaded between them can be loaded 16 bytes at a time."""
    return begin // 16 * 16, (end + 15) // 16 * 16
