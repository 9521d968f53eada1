"""What is put back afterwards: random numbers, and the mode of a model."""

import contextlib
import random
from collections.abc import Callable, Iterator

import numpy as np
import torch
from accelerate.utils import set_seed
from torch import nn


def random_state(device: torch.device) -> Callable[[], None]:
    """Remembers where all streams of random numbers are; calling the result puts them back."""
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
    """Random numbers inside come from `seed`; the streams outside do not notice."""
    restore = random_state(device)
    try:
        set_seed(seed, device_specific=True)
        yield
    finally:
        restore()


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, without dropout; then in the mode that it had."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
