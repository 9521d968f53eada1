"""Collects what trainers log: means and extremes over optimizer steps and processes."""

import itertools
import math
from collections.abc import Container
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

# Prefix, within `Metrics`, of names that reward functions log under; and names that transformers' Trainer logs.
LOGGED = "log_metric: "
TAKEN = {"loss", "grad_norm", "learning_rate", "epoch", "step", "num_tokens", "num_input_tokens_seen", "runtime"}
TAKEN |= {"samples_per_second", "steps_per_second", "model_preparation_time"}


class Metrics:
    """Weighted means and extremes of the values added since the last log. They stay on the device until then."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sums: dict[str, Tensor] = {}
        self.highest: dict[str, Tensor] = {}  # the pair (-minimum, maximum)

    def add(self, name: str, value: Tensor | float, weight: Tensor | float = 1.0) -> None:
        """Adds a value to the mean of `name`. NaN is ignored."""
        value = torch.as_tensor(value, dtype=torch.float32, device=self.device)
        weight = torch.as_tensor(weight, dtype=torch.float32, device=self.device) * ~value.isnan()
        pair = torch.stack([value.nan_to_num(0.0) * weight, weight])
        self.sums[name] = self.sums[name] + pair if name in self.sums else pair

    def add_range(self, name: str, values: Tensor) -> None:
        """Logs the minimum of all values as min_{name} and the maximum as max_{name}."""
        pair = torch.stack([-values.min(), values.max()])
        self.highest[name] = self.highest[name].maximum(pair) if name in self.highest else pair

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """The values since the last log; `load_state_dict` restores them."""
        return {"sums": dict(self.sums), "highest": dict(self.highest)}

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        for kind, values in state.items():
            setattr(self, kind, {name: value.to(self.device) for name, value in values.items()})

    def clear(self) -> None:
        self.sums.clear()
        self.highest.clear()

    def flush(self, accelerator: Any) -> dict[str, float]:
        """The means and extremes over all processes, which are then cleared. Names may differ between processes, since
        reward functions choose theirs. A reward function's name that another metric has becomes name_2."""
        own = list(self.sums), list(self.highest)
        found = gather_object([own]) if accelerator.num_processes > 1 else [own]
        means, ranges = (sorted({name for names in parts for name in names}) for parts in zip(*found, strict=True))
        values: dict[str, float] = {}
        if means:
            nothing = torch.zeros(2, device=self.device)
            sums = accelerator.reduce(torch.stack([self.sums.get(name, nothing) for name in means])).tolist()
            values |= {name: total / weight for name, (total, weight) in zip(means, sums, strict=True) if weight}
        if ranges:
            nothing = torch.full((2,), -math.inf, device=self.device)
            pairs = torch.stack([self.highest.get(name, nothing) for name in ranges])
            for name, (least, greatest) in zip(ranges, accelerator.gather(pairs[None]).amax(0).tolist(), strict=True):
                values |= {f"min_{name}": -least, f"max_{name}": greatest}
        self.clear()
        for name in [each for each in values if each.startswith(LOGGED)]:
            values[unique(name.removeprefix(LOGGED), TAKEN | values.keys())] = values.pop(name)
        return values


def unique(name: str, taken: Container[str]) -> str:
    """The name, or the first of name_2, name_3, ... that is not taken."""
    numbered = (f"{name}_{number}" for number in itertools.count(2))
    return next(each for each in itertools.chain([name], numbered) if each not in taken)
