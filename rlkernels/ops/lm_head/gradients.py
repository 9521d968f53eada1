from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlkernels.ops.lm_head.tiles import Rows


@dataclass
class Gradients:
    """The gradients of what is differentiated; the others are None. Sums are at least float32 until complete."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    adapter: Tensor | None
    adapter_weight: Tensor | None

    def part(self, at: slice) -> "Gradients":
        """The same for rows `at` alone."""
        hidden = None if self.hidden is None else self.hidden[at]
        adapter = None if self.adapter is None else self.adapter[at]
        return replace(self, hidden=hidden, adapter=adapter)

    def scaled(self, factor: Tensor) -> "Gradients":
        """The same with the gradients of rows, [R, ...], multiplied by factor, [R]."""
        factor = factor.unsqueeze(-1)
        hidden = None if self.hidden is None else self.hidden * factor
        adapter = None if self.adapter is None else self.adapter * factor
        return replace(self, hidden=hidden, adapter=adapter)

    def results(self, rows: Rows, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
        """What a backward pass returns for hidden, weight, bias, adapter and adapter_weight."""
        of_rows = {"hidden": self.hidden, "adapter": self.adapter}
        of_rows = {n: None if value is None else rows.scatter(value.to(dtype)) for n, value in of_rows.items()}
        of_weights = (self.weight, self.bias, self.adapter_weight)
        weight, bias, adapter_weight = (None if value is None else value.to(dtype) for value in of_weights)
        return of_rows["hidden"], weight, bias, of_rows["adapter"], adapter_weight


def nan_if(too_few: Tensor | None, values: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The gradients, all NaN where `too_few` says that more rows are scored than were projected."""
    if too_few is None:
        return values
    return tuple(None if value is None else value.masked_fill_(too_few, float("nan")) for value in values)
