"""One micro-batch: sequences laid end to end, or padded, as the model and the losses take them."""

import itertools
from collections.abc import Iterable
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import Any

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


def lay_out(
    sequences: Rows[Sequence], device: torch.device, *, padding_free: bool = True, pad_token_id: int = 0
) -> dict[str, Any]:
    """One micro-batch of N tokens in S sequences.

    What is per token is packed, [N], and shifted: position p holds what belongs to the token that p predicts, so that
    the last position of each sequence is never scored.

        model_inputs   what the model takes: [1, N] with reset position ids, or [S, T] padded on the right
        shift_labels   the labels, shifted, shaped as the model's input_ids
        index          None, or [N], where the packed tokens stand among the padded ones
        token_ids      [N], the labels, shifted;  mask  [N], where they are not -100
        cu_seqlens     int32 [S + 1], where each sequence starts
        num_scored     how many tokens are in the loss
    """
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
            # For flash attention, which would find them itself, but wait for the device to do so.
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
    return {
        "model_inputs": {name: to(value, device) for name, value in inputs.items()},
        "shift_labels": shift_labels.to(device),
        "index": index,
        "token_ids": token_ids.to(device),
        "mask": mask.to(device),
        "cu_seqlens": cu_seqlens.to(device),
        "num_scored": int(mask.sum()),
    }


def to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def shift(rows: Iterable[Any], device: torch.device) -> Tensor:
    """float32 [N] of one value per token of each sequence, laid out and shifted as in `lay_out`; the first token's
    value is dropped and the last position's is 0."""
    parts = [torch.as_tensor(row, dtype=torch.float32, device=device).roll(-1) for row in rows]
    for part in parts:
        part[-1] = 0.0
    return torch.cat(parts)


def split(values: Tensor, batch: dict[str, Any]) -> list[Tensor]:
    """The parts of [N] that belong to each sequence."""
    return list(values.split(batch["cu_seqlens"].diff().tolist()))
