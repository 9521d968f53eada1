import torch
from torch import Tensor


def sequence_of_token(tokens: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, int]:
    """For each token of a padded [B, T] or, with cu_seqlens, packed [N] tensor the number of its sequence; and how many
    sequences there are."""
    if cu_seqlens is None:
        count = tokens.shape[0]
        return torch.arange(count, device=tokens.device).unsqueeze(1).expand_as(tokens), count
    count = cu_seqlens.shape[0] - 1
    position = torch.arange(tokens.shape[0], device=tokens.device)
    return torch.searchsorted(cu_seqlens[1:].long(), position, right=True).clamp(max=max(count - 1, 0)), count


def sum_by_sequence(value: Tensor, sequence: Tensor, count: int) -> Tensor:
    """The sum of `value` over the tokens of each of `count` sequences, [count]."""
    return value.new_zeros(count).scatter_add(0, sequence.reshape(-1), value.reshape(-1))
