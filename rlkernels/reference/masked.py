import torch
from torch import Tensor

from rlkernels.reference._units import unit_of


def masked_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """[rows, length] -> [rows]: the mean of each row's scored elements, 0 where there are none."""
    scored = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    return x.masked_fill(~scored, 0.0).sum(1) / scored.sum(1).clamp(min=1)


def masked_moments(x: Tensor, mask: Tensor | None) -> Tensor:
    """float64 [3]: of the scored elements their number, their mean, and the root of the sum of their squared deviations
    from it."""
    x = x.double()
    scored = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    count = scored.sum().double()
    mean = x.masked_fill(~scored, 0.0).sum() / count.clamp(min=1)
    return torch.stack([count, mean, _root_of_squares((x - mean).masked_fill(~scored, 0.0))])


def combine_moments(moments: Tensor) -> Tensor:
    """The moments of everything, from those of its parts, [parts, 3]."""
    counts, means, roots = moments.unbind(1)
    count = counts.sum()
    mean = (counts * means).sum() / count.clamp(min=1)
    return torch.stack([count, mean, _root_of_squares(torch.cat([roots, counts.sqrt() * (means - mean)]))])


def _root_of_squares(values: Tensor) -> Tensor:
    """sqrt(sum of values^2), also where the squares would overflow."""
    unit = unit_of(torch.nn.functional.pad(values.flatten().abs(), (0, 1)).amax())
    return unit * (values / unit).square().sum().sqrt()


def masked_whiten(
    x: Tensor, mask: Tensor | None, moments: Tensor, *, shift_mean: bool, eps: float, unbiased: bool, eps_floor: bool
) -> Tensor:
    count, mean, root_of_squares = moments.unbind()
    std = root_of_squares / (count - 1 if unbiased else count).clamp(min=1).sqrt()
    least = torch.full_like(std, eps).sqrt()
    std = torch.maximum(std, least) if eps_floor else torch.hypot(std, least)
    # In float64, since float32 would round a large mean by more than the deviations from it.
    whitened = (x.double() - mean) / std
    if not shift_mean:
        whitened = whitened + mean
    return (whitened if mask is None else whitened.masked_fill(~mask, 0.0)).to(x.dtype)
