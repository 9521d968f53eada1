import contextlib
import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlkernels import _registry


def implements(name: str) -> Callable[[Callable], Callable]:
    """Register a launcher as the Triton implementation of op `name`.

    Triton launches on the current device, which need not be that of the tensors.
    """

    def register(launcher: Callable) -> Callable:
        @functools.wraps(launcher)
        def on_device(*inputs):
            device = next(value.device for value in inputs if isinstance(value, Tensor))
            with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
                return launcher(*inputs)

        _registry.implement(name, "triton", on_device)
        return on_device

    return register


@triton.jit
def multiple_of_16(count, ALIGNED: tl.constexpr):
    """`count`, in a form that shows the compiler a multiple of 16 where it is one: elements are then read 16 bytes at a
    time. With `count` itself left out of the specialisation, two variants of a kernel serve every length."""
    if ALIGNED:
        return count // 16 * 16
    else:
        return count
