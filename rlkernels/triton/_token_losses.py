"""What the losses over tokens share: the numbers of scored tokens of sequences, and the division of a sum of losses."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlkernels._codes import AGGREGATIONS
from rlkernels.triton._launch import implements, multiple_of_16
from rlkernels.triton._sequences import aligned_bounds, bounds, sequence_of

SEQ_MEAN_TOKEN_MEAN = AGGREGATIONS.index("seq_mean_token_mean")
SEQ_MEAN_TOKEN_SUM = AGGREGATIONS.index("seq_mean_token_sum")
TOKEN_SUM = AGGREGATIONS.index("token_sum")
BLOCK = 1024


@triton.jit(do_not_specialize=["count", "sequence_length"])
def _lengths_kernel(
    mask, cu_seqlens, lengths, count: tl.int64, sequence_length: tl.int64, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    """Scored tokens of each sequence."""
    sequence = tl.program_id(0).to(tl.int64)
    begin, end = bounds(sequence, cu_seqlens, count, sequence_length)
    if mask is not None:
        scored = tl.zeros((BLOCK,), tl.int32)
        first, last = aligned_bounds(begin, end)
        for start in range(first, last, BLOCK):
            token = start + tl.arange(0, BLOCK).to(tl.int64)
            inside = (token < last) & (token < multiple_of_16(count, ALIGNED))
            here = (token >= begin) & (token < end) & (tl.load(mask + token, mask=inside, other=0) != 0)
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
            mask, cu_seqlens, lengths, count, sequence_length, ALIGNED=count % 16 == 0, BLOCK=BLOCK
        )
    return lengths


def shape_of(tokens: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int]:
    """The number of sequences, and how long each is, 0 where they are packed."""
    if cu_seqlens is None:
        sequences, sequence_length = tokens.shape
        return sequences, sequence_length
    return cu_seqlens.shape[0] - 1, 0


@triton.jit
def sequence_of_block(block, cu_seqlens, sequences, steps, sequence_length, BLOCK: tl.constexpr):
    """The sequence of each token of a block."""
    if cu_seqlens is not None:
        return sequence_of(block * BLOCK + tl.arange(0, BLOCK), cu_seqlens, sequences, steps)
    else:
        # 64-bit division once a block, 32-bit division once a token.
        first = block * BLOCK
        within = (first % sequence_length).to(tl.int32) + tl.arange(0, BLOCK)
        return first // sequence_length + within // sequence_length


class Denominator:
    """What divides the sum of the losses: the normalizer, or a count."""

    def __init__(self, normalizer: Tensor | None, normalizer_value: float, aggregation: int) -> None:
        self.tensor = normalizer
        self.value = normalizer_value if normalizer_value > 0 else 1.0 if aggregation == TOKEN_SUM else None
        by_sequence = aggregation in (SEQ_MEAN_TOKEN_MEAN, SEQ_MEAN_TOKEN_SUM)
        self.counts_sequences = by_sequence and normalizer is None and self.value is None
        self.needs_lengths = aggregation == SEQ_MEAN_TOKEN_MEAN or self.counts_sequences


@triton.jit
def sum_of(values, count, BLOCK: tl.constexpr):
    """In the dtype of the values, in a fixed order."""
    total = tl.zeros((BLOCK,), values.dtype.element_ty)
    for start in range(0, count, BLOCK):
        index = start + tl.arange(0, BLOCK)
        total += tl.load(values + index, mask=index < count, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def one_over_denominator(tokens, lengths, normalizer, normalizer_value, sequences, BLOCK: tl.constexpr):
    """What the loss and the gradients are multiplied by, 0 where nothing is scored."""
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
    return tl.where(tokens > 0.0, 1.0 / denominator, 0.0)


@triton.jit
def _scale_kernel(grads, outputs, scale, grad_loss, count: tl.int64, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """The gradient of each token times scale and grad_loss, in the dtype of its input."""
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = token < multiple_of_16(count, ALIGNED)
    factor = tl.load(scale) * tl.load(grad_loss)
    for number in tl.static_range(len(grads)):
        value = tl.load(grads[number] + token, mask=inside, other=0.0) * factor
        tl.store(outputs[number] + token, value.to(outputs[number].dtype.element_ty), mask=inside)


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@implements("token_loss_backward")
def token_loss_backward(
    grad: Tensor, entropy_grad: Tensor, scale: Tensor, grad_loss: Tensor, dtype: int, entropy_dtype: int
) -> tuple[Tensor, Tensor]:
    grads = (grad, entropy_grad)
    outputs = tuple(
        value.new_empty(value.shape, dtype=DTYPES[number])
        for value, number in zip(grads, (dtype, entropy_dtype), strict=True)
    )
    count = max(grad.numel(), entropy_grad.numel())
    if count:
        _scale_kernel[(triton.cdiv(count, BLOCK),)](
            tuple(value for value in grads if value.numel()),
            tuple(value for value in outputs if value.numel()),
            scale,
            grad_loss,
            count,
            ALIGNED=count % 16 == 0,
            BLOCK=BLOCK,
        )
    return outputs[0], outputs[1]
