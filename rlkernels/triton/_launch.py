import contextlib
import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlkernels import _registry

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Dtypes of results, by the numbers that ops give: their places in rlkernels.ops._checks.FLOATS."""


def implements(name: str) -> Callable[[Callable], Callable]:
    """Register a launcher as the Triton implementation of op `name`."""

    def register(launcher: Callable) -> Callable:
        @functools.wraps(launcher)
        def on_device(*inputs):
            with current(next(value.device for value in inputs if isinstance(value, Tensor))):
                return launcher(*inputs)

        _registry.implement(name, "triton", on_device)
        return on_device

    return register


def current(device: torch.device) -> contextlib.AbstractContextManager:
    """Makes `device` the current one, on which Triton launches. It most often is already: then this asks the driver for
    nothing, since making a device current and the other one again takes longer than a small launch."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def aligned(tensor: Tensor | None) -> Tensor | None:
    """The tensor, or, where it is a view that does not start at a multiple of 16 bytes, a copy that does. Kernels that
    say so of their pointers read 16 bytes at a time."""
    return tensor.clone() if tensor is not None and tensor.data_ptr() % 16 else tensor


@triton.jit
def multiple_of_16(count, ALIGNED: tl.constexpr):
    """`count`, in a form that shows the compiler a multiple of 16 where it is one: elements are then read 16 bytes at a
    time. With `count` itself left out of the specialisation, two variants of a kernel serve every length."""
    if ALIGNED:
        return count // 16 * 16
    else:
        return count
