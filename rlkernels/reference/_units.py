import torch
from torch import Tensor


def unit_of(largest: Tensor) -> Tensor:
    """A power of two about as large as `largest`, 1 where that is 0 or not finite: divided by it, numbers of that size
    lose nothing, and their sums and squares neither overflow nor vanish."""
    unit = largest / (2 * torch.frexp(largest).mantissa)
    return torch.where(unit.isfinite() & (unit > 0), unit, 1.0)
