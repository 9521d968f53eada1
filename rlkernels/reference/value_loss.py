import torch
from torch import Tensor

from rlkernels._codes import AGGREGATIONS
from rlkernels.reference._aggregation import aggregate, token_mean
from rlkernels.reference._sequences import sequence_of_token


def value_loss(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    normalizer: Tensor | float | None,
    aggregation: int,
    clip: float,
) -> tuple[Tensor, Tensor]:
    """Loss (0-d) and metrics [6] of padded [B, T] or, with cu_seqlens, packed [N] values."""
    scored = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    sequence, count = sequence_of_token(values, cu_seqlens)
    # Unscored tokens may hold anything: they are replaced before any arithmetic.
    values, returns = values.masked_fill(~scored, 0.0), returns.masked_fill(~scored, 0.0)
    error = values - returns
    loss = error.square()
    clipped = torch.zeros_like(scored)
    if old_values is not None:
        old = old_values.masked_fill(~scored, 0.0)
        bounded = (torch.maximum(torch.minimum(values, old + clip), old - clip) - returns).detach().square()
        clipped = bounded > loss
        loss = torch.where(clipped, bounded, loss)

    def mean(value: Tensor) -> Tensor:
        return token_mean(value.detach(), scored, torch.float64)

    def variance(value: Tensor) -> Tensor:
        return mean((value - mean(value)).square())

    spread, eps = variance(returns), torch.finfo(values.dtype).eps
    explained = 1 - variance(error) / spread
    # What rounding alone can make of returns that are all the same.
    explained = explained.masked_fill(spread <= (4 * eps * mean(returns)).square(), float("nan"))
    num_tokens = scored.sum().double()
    explained = explained.masked_fill(num_tokens == 0, 0.0)
    metrics = torch.stack([mean(clipped), mean(values), mean(returns), mean(error.square()), explained, num_tokens])
    loss = aggregate(0.5 * loss, scored, sequence, count, AGGREGATIONS[aggregation], normalizer)
    return loss, metrics.to(values.dtype)
