"""One micro-batch: sequences laid end to end, or padded, as the model and the losses take them.

Where a sequence starts and ends is known from its length, never from token ids: the padding token may be the
end-of-sequence token, and either may be sampled.
"""

import itertools
from collections.abc import Iterable
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

IGNORE = -100  # the label of a token that is not in the loss


@dataclass
class Sequence:
    """One sequence of tokens. A label is the token itself where it is in the loss, else -100; the first token, which
    nothing predicts, never is."""

    input_ids: list[int]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """One micro-batch of N tokens in S sequences.

    Values per token are packed and shifted: they have shape [N], sequence after sequence, and position p holds the
    value of the token that p predicts, which is the next one. The last position of a sequence is therefore never in the
    loss. `dataclasses.replace` gives a batch with other fields.

    What the model and the losses take:

        model_inputs   keyword arguments of the model. Packed: input_ids [1, N], position_ids that start again at 0 in
                       each sequence, and cu_seq_lens_*. Padded on the right to length T: input_ids and attention_mask
                       [S, T]
        shift_labels   int64, shaped as input_ids: the token that each position predicts, -100 where it is not in the
                       loss
        index          int64 [N]: the places of the packed tokens among the S x T padded ones; None if packed
        token_ids      int64 [N]: shift_labels without padding
        mask           bool [N]: which tokens are in the loss
        cu_seqlens     int32 [S + 1]: where each sequence starts, and N
        num_scored     the number of token_ids that are not -100, known without waiting for the device

    The batch's place in its optimizer step:

        normalizer     what the sum of the step's losses is divided by: a number, or a 0-d tensor
        is_filler      whether the batch runs only because another process has more of them; its loss does not count
        router_share   the share of the batch's router loss in that of the step
    """

    model_inputs: dict[str, Any]
    shift_labels: Tensor
    index: Tensor | None
    token_ids: Tensor
    mask: Tensor
    cu_seqlens: Tensor
    num_scored: int

    normalizer: float | Tensor = 1.0
    is_filler: bool = False
    router_share: float = 1.0

    @classmethod
    def lay_out(
        cls,
        sequences: Rows[Sequence],
        device: torch.device,
        *,
        padding_free: bool = True,
        pad_token_id: int = 0,
        **fields: Any,
    ) -> Self:
        """The batch of these sequences on `device`: packed, or padded unless `padding_free`. `fields` are the others,
        those of a subclass included."""
        lengths = [len(sequence) for sequence in sequences]
        starts = list(itertools.accumulate(lengths, initial=0))
        packed = torch.tensor([token for sequence in sequences for token in sequence.input_ids], dtype=torch.long)
        labels = [token for sequence in sequences for token in (*sequence.labels[1:], IGNORE)]
        token_ids = torch.tensor(labels, dtype=torch.long)
        mask = token_ids != IGNORE
        cu_seqlens = torch.tensor(starts, dtype=torch.int32)
        inputs: dict[str, Any] = {"use_cache": False}
        index = None
        if padding_free:
            inputs |= {
                "input_ids": packed.unsqueeze(0),
                "position_ids": torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0),
                # Flash attention would find these itself, but wait for the device to do so.
                "cu_seq_lens_q": cu_seqlens,
                "cu_seq_lens_k": cu_seqlens,
                "max_length_q": max(lengths),
                "max_length_k": max(lengths),
            }
            shift_labels = token_ids.unsqueeze(0)
        else:
            real = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
            inputs |= {
                "input_ids": pad_sequence(packed.split(lengths), batch_first=True, padding_value=pad_token_id),
                "attention_mask": real.long(),
            }
            shift_labels = pad_sequence(token_ids.split(lengths), batch_first=True, padding_value=IGNORE)
            index = real.flatten().nonzero().squeeze(1).to(device)
        return cls(
            model_inputs={
                name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()
            },
            shift_labels=shift_labels.to(device),
            index=index,
            token_ids=token_ids.to(device),
            mask=mask.to(device),
            cu_seqlens=cu_seqlens.to(device),
            num_scored=int(mask.sum()),
            **fields,
        )

    def packed(self, values: Tensor) -> Tensor:
        """[N, ...]: what the model gives of its inputs, [1, N, ...] or [S, T, ...], without padding."""
        flat = values.flatten(0, 1)
        return flat if self.index is None else flat[self.index]

    def split(self, values: Tensor) -> list[Tensor]:
        """The part of values [N] that belongs to each sequence."""
        return list(values.split(self.cu_seqlens.diff().tolist()))

    def spread(self, values: Tensor) -> Tensor:
        """[N]: the value of its sequence, of values [S], for each token."""
        return values.repeat_interleave(self.cu_seqlens.diff(), output_size=len(self.mask))

    def sequence_sums(self, values: Tensor) -> Tensor:
        """[S]: the sum over each sequence of values [N], masked tokens included."""
        return torch.segment_reduce(values, "sum", offsets=self.cu_seqlens.long(), axis=0)

    def sequence_means(self, values: Tensor) -> Tensor:
        """[S]: the mean over each sequence of values [N], of the tokens in `mask` alone; 0 where there is none."""
        mask = self.mask.to(values.dtype)
        return self.sequence_sums(values * mask) / self.sequence_sums(mask).clamp(min=1)

    def last(self, values: Tensor) -> Tensor:
        """[S]: the last of each sequence's values [N]."""
        return values[self.cu_seqlens[1:].long() - 1]


def shift(rows: Iterable[Any], device: torch.device) -> Tensor:
    """float32 [N]: packs and shifts rows of one value per token, as the values of `Batch` are. The first token's value
    is dropped, and the last position's is 0."""
    parts = [torch.as_tensor(row, dtype=torch.float32, device=device).roll(-1) for row in rows]
    for part in parts:
        part[-1] = 0.0
    return torch.cat(parts)
