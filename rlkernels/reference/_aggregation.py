import torch
from torch import Tensor

from rlkernels.reference._sequences import sum_by_sequence


def aggregate(
    loss: Tensor, scored: Tensor, sequence: Tensor, count: int, aggregation: str, normalizer: Tensor | float | None
) -> Tensor:
    """One loss (0-d) from those of the scored tokens. Each token lies in one of `count` sequences."""
    loss = loss.masked_fill(~scored, 0.0)
    num_tokens = scored.sum().to(loss.dtype)
    lengths = sum_by_sequence(scored.to(loss.dtype), sequence, count)
    if aggregation == "seq_mean_token_mean":
        loss = loss / lengths.clamp(min=1)[sequence]
    if normalizer is not None:
        denominator = torch.ones_like(num_tokens) * normalizer
    elif aggregation == "token_mean":
        denominator = num_tokens
    elif aggregation == "token_sum":
        denominator = torch.ones_like(num_tokens)
    else:
        denominator = (lengths > 0).sum().to(loss.dtype)
    return loss.sum() * torch.where(num_tokens > 0, 1 / denominator, torch.zeros_like(num_tokens))


def token_mean(value: Tensor, scored: Tensor, dtype: torch.dtype) -> Tensor:
    """Mean over the scored tokens, 0 where there are none."""
    return value.to(dtype).masked_fill(~scored, 0.0).sum() / scored.sum().to(dtype).clamp(min=1)
