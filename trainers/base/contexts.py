"""Contexts that restore something afterwards: the state of random number generators, and a model's mode."""

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
from torch import nn


class RandomState:
    """The states of all random number generators of this process."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.accelerator = None if device.type == "cpu" else torch.get_device_module(device)

    def state_dict(self) -> dict[str, Any]:
        return {
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "cpu": torch.get_rng_state(),
            "device": None if self.accelerator is None else self.accelerator.get_rng_state(self.device),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        torch.set_rng_state(state["cpu"])
        if self.accelerator is not None:
            self.accelerator.set_rng_state(state["device"], self.device)


@contextlib.contextmanager
def isolated_rng(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds all random number generators with `seed` for the with block and restores their states after it."""
    streams = RandomState(device)
    before = streams.state_dict()
    try:
        set_seed(seed, device_specific=True)
        yield
    finally:
        streams.load_state_dict(before)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Sets the model to evaluation mode, without dropout, and then back to its earlier mode."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
