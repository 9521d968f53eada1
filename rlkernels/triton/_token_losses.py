"""What the losses over tokens share. At most PROGRAMS programs go through the tokens, each BLOCK of them at a time,
four per thread. Every program leaves its sums, which one more program adds up and divides."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlkernels._codes import AGGREGATIONS
from rlkernels.triton import _config
from rlkernels.triton._launch import DTYPES, implements, multiple_of_16
from rlkernels.triton._sequences import aligned_bounds, bounds

SEQ_MEAN_TOKEN_MEAN = AGGREGATIONS.index("seq_mean_token_mean")
SEQ_MEAN_TOKEN_SUM = AGGREGATIONS.index("seq_mean_token_sum")
TOKEN_SUM = AGGREGATIONS.index("token_sum")

BLOCK = 1024
PROGRAMS = 1024
LENGTHS_BLOCK = 2048  # bytes of a mask: 16 a thread
FINISH_WARPS = 16


def programs_for(count: int, sequences: int) -> int:
    """Tokens without a sequence make the loss NaN, whatever the sums and gradients are."""
    return min(PROGRAMS, triton.cdiv(count, BLOCK)) if sequences else 0


@triton.jit
def four_tokens(start, count, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """The first token of each thread, [BLOCK / 4], all of its tokens, [BLOCK / 4, 4], from `start` on, and which exist.
    Where `count` is a multiple of four, a thread's tokens all do or none does: they are loaded at once."""
    first = start + 4 * tl.arange(0, BLOCK // 4).to(tl.int64)
    token = first[:, None] + tl.arange(0, 4)[None, :]
    if ALIGNED:
        inside = tl.broadcast_to((first < count)[:, None], token.shape)
    else:
        inside = token < count
    return first, token, inside


@triton.jit
def load_scored(values, token, scored, inside):
    """Unscored tokens may hold anything: they are replaced before any arithmetic."""
    return tl.where(scored, tl.load(values + token, mask=inside, other=0.0).to(tl.float32), 0.0)


@triton.jit
def number_of(scored, mask, first, count):
    """How many of a thread's tokens are scored."""
    if mask is not None:
        return tl.sum(tl.where(scored, 1.0, 0.0), 1)
    else:
        return tl.minimum(tl.maximum(count - first, 0), 4).to(tl.float32)


@triton.jit
def padded_sequence(first, sequence_length):
    """The sequence of each token, and its place there."""
    sequence = first // sequence_length
    return sequence.to(tl.int32), (first - sequence * sequence_length).to(tl.int32)


@triton.jit
def step_on(sequence, within, stride, sequence_length):
    """padded_sequence of tokens that are `stride` further, without a division per token."""
    rows = stride // sequence_length
    within += (stride - rows * sequence_length).to(tl.int32)
    beyond = within >= sequence_length
    return sequence + rows.to(tl.int32) + beyond.to(tl.int32), tl.where(beyond, within - sequence_length, within)


@triton.jit
def four_padded(sequence, within, sequence_length, sequences):
    """The sequences of four tokens in a row, given the place of the first one; the last one for tokens beyond it."""
    beyond = within - sequence_length  # reaches 0 with the next sequence
    second = sequence + (beyond + 1 >= 0)
    third = sequence + (beyond + 2 >= 0) + (beyond + 2 >= sequence_length)
    fourth = sequence + (beyond + 3 >= 0) + (beyond + 3 >= sequence_length)
    fourth += beyond + 3 - sequence_length >= sequence_length
    last = sequences - 1
    return tl.minimum(sequence, last), tl.minimum(second, last), tl.minimum(third, last), tl.minimum(fourth, last)


@triton.jit
def _search(position, cu_seqlens, low, high, span):
    """The last s with cu_seqlens[s] <= position, by bisection between low and high, which are at most `span` apart."""
    while span > 0:
        middle = (low + high) // 2
        searching = low < high
        here = searching & (tl.load(cu_seqlens + 1 + middle, mask=searching, other=0) <= position)
        low = tl.where(here, middle + 1, low)
        high = tl.where(searching & (here == 0), middle, high)
        span = span // 2
    return low


@triton.jit
def four_packed(first, cu_seqlens, sequences, start, BLOCK: tl.constexpr):
    """The same where sequences are packed, for the BLOCK tokens from `start` on: each is sought among the sequences of
    these alone, which mostly are few. Stays below `sequences`, whatever cu_seqlens holds."""
    low = _search(start, cu_seqlens, sequences * 0, sequences - 1, sequences - 1)
    high = _search(start + BLOCK - 1, cu_seqlens, low, sequences - 1, sequences - 1 - low)
    none = (first * 0).to(tl.int32)
    one = _search(first, cu_seqlens, low + none, high + none, high - low)
    two = _search(first + 1, cu_seqlens, one, high + none, high - low)
    three = _search(first + 2, cu_seqlens, two, high + none, high - low)
    return one, two, three, _search(first + 3, cu_seqlens, three, high + none, high - low)


@triton.jit
def of_four(values, places, STRIDE: tl.constexpr = 1):
    """What `values` hold for the sequences of four tokens, every STRIDE numbers."""
    a = tl.load(values + places[0] * STRIDE).to(tl.float32)
    b = tl.load(values + places[1] * STRIDE).to(tl.float32)
    c = tl.load(values + places[2] * STRIDE).to(tl.float32)
    d = tl.load(values + places[3] * STRIDE).to(tl.float32)
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (a.shape[0], 4))


@triton.jit
def aligned_span(begin, end, count, ALIGNED: tl.constexpr):
    """First token and number of tokens of the multiples of 16 around a sequence, as far as there are tokens: these can
    be loaded 16 bytes at a time."""
    first, last = aligned_bounds(begin, end)
    if not ALIGNED:
        last = tl.minimum(last, count)
    return first, (last - first).to(tl.int32)


@triton.jit(do_not_specialize=["count", "sequence_length"])
def _lengths_kernel(
    mask, cu_seqlens, lengths, count: tl.int64, sequence_length: tl.int64, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    """Scored tokens of each sequence."""
    sequence = tl.program_id(0).to(tl.int64)
    begin, end = bounds(sequence, cu_seqlens, count, sequence_length)
    if mask is not None:
        scored = tl.zeros((BLOCK,), tl.int32)
        first, size = aligned_span(begin, end, count, ALIGNED)
        for start in range(0, size, BLOCK):
            place = start + tl.arange(0, BLOCK)
            here = (place >= (begin - first).to(tl.int32)) & (place < (end - first).to(tl.int32))
            here &= tl.load(mask + (first + place), mask=place < size, other=0) != 0
            scored += here.to(tl.int32)
        length = tl.sum(scored, 0)
    else:
        length = end - begin
    tl.store(lengths + sequence, length.to(tl.float32))


def sequence_lengths(like: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """The number of scored tokens of each sequence of a padded [B, T] or packed [N] tensor, in float32."""
    sequences, sequence_length = shape_of(like, cu_seqlens)
    lengths = like.new_empty(sequences, dtype=torch.float32)
    if sequences:
        count = like.numel()
        _lengths_kernel[(sequences,)](
            mask, cu_seqlens, lengths, count, sequence_length, ALIGNED=count % 16 == 0, BLOCK=LENGTHS_BLOCK
        )
    return lengths


def shape_of(tokens: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int]:
    """The number of sequences, and how long each is, 0 where they are packed."""
    if cu_seqlens is None:
        sequences, sequence_length = tokens.shape
        return sequences, sequence_length
    return cu_seqlens.shape[0] - 1, 0


class Denominator:
    """What divides the sum of the losses: the normalizer, or a count."""

    def __init__(self, normalizer: Tensor | None, normalizer_value: float, aggregation: int) -> None:
        self.tensor = normalizer
        self.value = normalizer_value if normalizer_value > 0 else 1.0 if aggregation == TOKEN_SUM else None
        by_sequence = aggregation in (SEQ_MEAN_TOKEN_MEAN, SEQ_MEAN_TOKEN_SUM)
        self.counts_sequences = by_sequence and normalizer is None and self.value is None
        self.needs_lengths = aggregation == SEQ_MEAN_TOKEN_MEAN or self.counts_sequences


@triton.jit
def store_sum(sums, row, values):
    """Adds up what the threads of a program hold, in a fixed order; as sums[row, program]."""
    programs = tl.num_programs(0)
    tl.store(sums + row * programs + tl.program_id(0), tl.sum(values, 0))


@triton.jit
def sums_of_all(sums, programs, ROWS: tl.constexpr, PROGRAMS: tl.constexpr):
    """The sum of each row of `sums`, [ROWS, programs], as the first numbers of a power of two."""
    row = tl.arange(0, triton.next_power_of_2(ROWS))
    program = tl.arange(0, PROGRAMS)
    inside = (row < ROWS)[:, None] & (program < programs)[None, :]
    return row, tl.sum(tl.load(sums + row[:, None] * programs + program[None, :], mask=inside, other=0.0), 1)


@triton.jit
def pick(totals, row, number):
    return tl.sum(tl.where(row == number, totals, 0.0), 0)


@triton.jit
def one_over_denominator(tokens, lengths, normalizer, normalizer_value, valid, sequences, BLOCK: tl.constexpr):
    """What the loss and the gradients are multiplied by: 0 where nothing is scored, NaN where cu_seqlens are wrong."""
    if normalizer is not None:
        denominator = tl.load(normalizer).to(tl.float32)
    elif normalizer_value is not None:
        denominator = normalizer_value
    elif lengths is not None:
        scored = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, sequences, BLOCK):
            sequence = start + tl.arange(0, BLOCK)
            length = tl.load(lengths + sequence, mask=sequence < sequences, other=0.0)
            scored += (length > 0.0).to(tl.int32)
        denominator = tl.sum(scored, 0).to(tl.float32)
    else:
        denominator = tokens
    factor = tl.where(tokens > 0.0, 1.0 / denominator, 0.0)
    if valid is not None:
        factor *= tl.load(valid)
    return factor


@triton.jit(do_not_specialize=["count"])
def _scale_kernel(grads, outputs, scale, grad_loss, count: tl.int64, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """The gradients of each token times scale and grad_loss, in the dtypes of their inputs."""
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = token < multiple_of_16(count, ALIGNED)
    factor = tl.load(scale) * tl.load(grad_loss)
    for number in tl.static_range(len(grads)):
        gradient = tl.load(grads[number] + token, mask=inside, other=0.0) * factor
        tl.store(outputs[number] + token, gradient.to(outputs[number].dtype.element_ty), mask=inside)


@implements("token_loss_backward")
def token_loss_backward(
    grad: Tensor, entropy_grad: Tensor, scale: Tensor, grad_loss: Tensor, dtype: int, entropy_dtype: int
) -> tuple[Tensor, Tensor]:
    result = grad.new_empty(grad.shape, dtype=DTYPES[dtype])
    entropy_result = entropy_grad.new_empty(entropy_grad.shape, dtype=DTYPES[entropy_dtype])
    wanted = [pair for pair in ((grad, result), (entropy_grad, entropy_result)) if pair[0].numel()]
    if wanted:
        count = wanted[0][0].numel()
        _scale_kernel[(triton.cdiv(count, BLOCK),)](
            tuple(gradient for gradient, _ in wanted),
            tuple(output for _, output in wanted),
            scale,
            grad_loss,
            count,
            ALIGNED=count % 16 == 0,
            BLOCK=BLOCK,
            num_warps=_config.num_warps("losses"),  # with more tokens a thread, 16-bit results would change hands
        )
    return result, entropy_result
