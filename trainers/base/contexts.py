"""Contexts that restore something afterwards: the state of random number generators, and a model's mode."""

import contextlib
import random
from collections.abc import Callable, Iterator

import numpy as np
import torch
from accelerate.utils import set_seed
from torch import nn


def random_state(device: torch.device) -> Callable[[], None]:
    """Records the state of all random number generators and returns a function that restores it."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    accelerator = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)

    def restore() -> None:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if accelerator is not None:
            torch.get_device_module(device).set_rng_state(accelerator, device)

    return restore


@contextlib.contextmanager
def isolated_rng(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds all random number generators with `seed` for the with block and restores their states after it."""
    restore = random_state(device)
    try:
        set_seed(seed, device_specific=True)
        yield
    finally:
        restore()


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Sets the model to evaluation mode, without dropout, and then back to its earlier mode."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
