"""One micro-batch: sequences laid end to end, or padded, as the model and the losses take them.

Sequences that begin alike share their prefix: the model runs its tokens once. What follows the prefix is the sequence's
branch, and the losses see branches alone.

Where a sequence starts and ends is known from its length, never from token ids: the padding token may be the
end-of-sequence token, and either may be sampled.
"""

import itertools
from collections.abc import Iterable
from collections.abc import Sequence as Rows
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

IGNORE = -100  # the label of a token that is not in the loss


@dataclass
class Sequence:
    """One sequence of tokens. A label is the token itself where it is in the loss, else -100; the first token, which
    nothing predicts, never is.

    The first `prefix` tokens are run once for all sequences that begin with the same `prefix` tokens. None of them is
    the last of the sequence or predicts a token in the loss. The tokens after them are the branch."""

    input_ids: list[int]
    labels: list[int]
    prefix: int = 0

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        return tuple(self.input_ids[: self.prefix])

    @property
    def branch_length(self) -> int:
        return len(self.input_ids) - self.prefix


def sharing(sequences: Rows[Sequence]) -> list[Sequence]:
    """The sequences with the longest prefix that all of them can share."""
    columns = zip(*(sequence.input_ids for sequence in sequences), strict=False)
    prefix = sum(1 for _ in itertools.takewhile(lambda tokens: len(set(tokens)) == 1, columns))
    for sequence in sequences:
        # The token that predicts the first one in the loss is in the branch. Without a loss the last token is.
        first = next((place for place, label in enumerate(sequence.labels) if label != IGNORE), len(sequence))
        prefix = min(prefix, first - 1)
    return [replace(sequence, prefix=max(prefix, 0)) for sequence in sequences]


def num_run(sequences: Rows[Sequence]) -> int:
    """The number of tokens that the model runs for these sequences in one micro-batch."""
    prefixes = {sequence.prefix_ids for sequence in sequences}
    return sum(map(len, prefixes)) + sum(sequence.branch_length for sequence in sequences)


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """One micro-batch of S sequences, whose branches have N tokens.

    Values per token are packed and shifted: they have shape [N], branch after branch, and position p holds the value of
    the token that p predicts, which is the next one. The last position of a branch is therefore never in the loss.
    `dataclasses.replace` gives a batch with other fields.

    What the model and the losses take:

        model_inputs   keyword arguments of the model. Packed: input_ids [1, M], which holds each prefix once and its
                       branches after it, position_ids, which start at 0 in each sequence and go on in branches,
                       cu_seq_lens_*, and key_index where prefixes are shared. Padded on the right to length T:
                       input_ids and attention_mask [S, T]
        shift_labels   int64, shaped as input_ids: the token that each position predicts, -100 where it is not in the
                       loss
        index          int64 [N]: the places of the branches' tokens in input_ids; None if these are all, in their order
        token_ids      int64 [N]: the shift_labels of the branches
        mask           bool [N]: which tokens are in the loss
        cu_seqlens     int32 [S + 1]: where each branch starts, and N
        num_scored     the number of token_ids that are not -100, known without waiting for the device
        num_tokens     the number of tokens of all sequences, prefixes included
        num_run        the number of tokens in input_ids, padding included

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
    num_tokens: int
    num_run: int

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
        branches = [sequence.branch_length for sequence in sequences]
        labels = [token for each in sequences for token in (*each.labels[each.prefix + 1 :], IGNORE)]
        token_ids = torch.tensor(labels, dtype=torch.long)
        mask = token_ids != IGNORE
        inputs, index = packed_inputs(sequences) if padding_free else padded_inputs(sequences, pad_token_id)
        shift_labels = token_ids
        if index is not None:
            shift_labels = torch.full((inputs["input_ids"].numel(),), IGNORE).index_copy(0, index, token_ids)
            index = index.to(device)
        return cls(
            model_inputs={
                name: value.to(device) if isinstance(value, Tensor) else value
                for name, value in {"use_cache": False, **inputs}.items()
            },
            shift_labels=shift_labels.view_as(inputs["input_ids"]).to(device),
            index=index,
            token_ids=token_ids.to(device),
            mask=mask.to(device),
            cu_seqlens=torch.tensor(list(itertools.accumulate(branches, initial=0)), dtype=torch.int32, device=device),
            num_scored=int(mask.sum()),
            num_tokens=sum(map(len, sequences)),
            num_run=inputs["input_ids"].numel(),
            **fields,
        )

    def packed(self, values: Tensor) -> Tensor:
        """[N, ...]: the branches' part of what the model gives of its inputs, [1, M, ...] or [S, T, ...]."""
        flat = values.flatten(0, 1)
        # The gradient of flat[index] is several times slower on a CPU.
        return flat if self.index is None else flat.index_select(0, self.index)

    def split(self, values: Tensor) -> list[Tensor]:
        """The part of values [N] that belongs to each branch."""
        return list(values.split(self.cu_seqlens.diff().tolist()))

    def spread(self, values: Tensor) -> Tensor:
        """[N]: the value of its sequence, of values [S], for each token."""
        return values.repeat_interleave(self.cu_seqlens.diff(), output_size=len(self.mask))

    def sequence_sums(self, values: Tensor) -> Tensor:
        """[S]: the sum over each branch of values [N], masked tokens included."""
        return torch.segment_reduce(values, "sum", offsets=self.cu_seqlens.long(), axis=0)

    def sequence_means(self, values: Tensor) -> Tensor:
        """[S]: the mean over each branch of values [N], of the tokens in `mask` alone; 0 where there is none."""
        mask = self.mask.to(values.dtype)
        return self.sequence_sums(values * mask) / self.sequence_sums(mask).clamp(min=1)

    def last(self, values: Tensor) -> Tensor:
        """[S]: the last of each sequence's values [N]."""
        return values[self.cu_seqlens[1:].long() - 1]


def packed_inputs(sequences: Rows[Sequence]) -> tuple[dict[str, Any], Tensor | None]:
    """The model's inputs without padding, and `Batch.index`. Each prefix that several sequences share stands before
    their branches."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for place, sequence in enumerate(sequences):
        groups.setdefault(sequence.prefix_ids, []).append(place)
    input_ids: list[int] = []
    position_ids: list[int] = []
    blocks: list[tuple[int, int]] = []  # queries and keys of each block, as attention takes them
    key_index: list[int] = []  # the places of each block's keys in input_ids
    starts = [0] * len(sequences)  # of the branches in input_ids

    def add(sequence: Sequence, first: int, last: int) -> None:
        blocks.append((last - first, last))
        key_index.extend((*range(root, root + first), *range(len(input_ids), len(input_ids) + last - first)))
        input_ids.extend(sequence.input_ids[first:last])
        position_ids.extend(range(first, last))

    for prefix, places in groups.items():
        is_shared = len(prefix) > 0 and len(places) > 1
        root = len(input_ids)  # where the prefix starts
        if is_shared:
            add(sequences[places[0]], 0, len(prefix))
        for place in places:
            add(sequences[place], len(prefix) if is_shared else 0, len(sequences[place]))
            starts[place] = len(input_ids) - sequences[place].branch_length
    queries, keys = zip(*blocks, strict=True)
    inputs = {
        "input_ids": torch.tensor([input_ids]),
        "position_ids": torch.tensor([position_ids]),
        # Flash attention would find these itself, but wait for the device to do so.
        "cu_seq_lens_q": torch.tensor(list(itertools.accumulate(queries, initial=0)), dtype=torch.int32),
        "cu_seq_lens_k": torch.tensor(list(itertools.accumulate(keys, initial=0)), dtype=torch.int32),
        "max_length_q": max(queries),
        "max_length_k": max(keys),
    }
    if len(key_index) > len(input_ids):
        inputs["key_index"] = torch.tensor(key_index)
    if not any(sequence.prefix for sequence in sequences):
        return inputs, None
    spans = zip(starts, sequences, strict=True)
    return inputs, torch.cat([torch.arange(start, start + each.branch_length) for start, each in spans])


def padded_inputs(sequences: Rows[Sequence], pad_token_id: int) -> tuple[dict[str, Any], Tensor]:
    """The model's inputs, padded on the right, and `Batch.index`."""
    rows = [torch.tensor(sequence.input_ids) for sequence in sequences]
    input_ids = pad_sequence(rows, batch_first=True, padding_value=pad_token_id)
    positions = torch.arange(input_ids.shape[1])
    lengths, prefixes = torch.tensor([[len(each), each.prefix] for each in sequences]).T.unsqueeze(2)
    real = positions < lengths
    index = (real & (positions >= prefixes)).flatten().nonzero().squeeze(1)
    return {"input_ids": input_ids, "attention_mask": real.long()}, index


def shift(rows: Iterable[Any], device: torch.device) -> Tensor:
    """float32 [N]: packs and shifts rows of one value per token, as the values of `Batch` are. The first token's value
    is dropped, and the last position's is 0."""
    parts = [torch.as_tensor(row, dtype=torch.float32, device=device).roll(-1) for row in rows]
    for part in parts:
        part[-1] = 0.0
    return torch.cat(parts)
