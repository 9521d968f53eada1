"""Schemas and their implementations.

Every low-level op `rlkernels::<name>` has one overload per kernel backend, all of one schema, so that a backend is
chosen by the overload's name. The schema, the fake and the gradient are registered here, in Python, whatever was
built; the extensions and `rlkernels/triton` register implementations only. The reference is plain PyTorch and needs
no op of its own.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from rlkernels._backends import BACKENDS_OF, KERNEL_BACKENDS, triton_devices

LIBRARY = torch.library.Library("rlkernels", "DEF")
_functions: dict[tuple[str, str], Any] = {}


def define(
    name: str,
    schema: str,
    fake: Callable,
    *,
    part_of: str,
    backends: tuple[str, ...] = KERNEL_BACKENDS,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
) -> None:
    """Define `name` for those of `backends` that serve the public op that it is part of: its schema, its shapes
    (`fake`), and its gradient if it has one. `backward(backend)` gives the function that autograd calls."""
    for backend in BACKENDS_OF[part_of]:
        if backend not in backends:
            continue
        LIBRARY.define(f"{name}.{backend}{schema}")
        qualified = f"rlkernels::{name}.{backend}"
        torch.library.register_fake(qualified, fake, lib=LIBRARY)
        if backward is not None:
            function = backward(backend)
            torch.library.register_autograd(qualified, function, setup_context=setup_context, lib=LIBRARY)
            if setup_context is not None:
                _functions[name, backend] = _autograd_function(op(name, backend), setup_context, function)


def _autograd_function(overload: torch._ops.OpOverload, setup_context: Callable, backward: Callable) -> type:
    """The op and its gradient for `call`. The options come after the tensors and are passed as one argument, since
    PyTorch looks at each argument more than once."""
    tensors = sum("Tensor" in str(argument.type) for argument in overload._schema.arguments)

    class Direct(torch.autograd.Function):
        count = tensors

        @staticmethod
        def forward(ctx, *inputs):
            inputs = (*inputs[:tensors], *inputs[tensors])
            with torch._C._AutoDispatchBelowAutograd():
                output = overload(*inputs)
            setup_context(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx, *gradients):
            return (*backward(ctx, *gradients)[:tensors], None)

    return Direct


def call(name: str, backend: str, *inputs):
    """Call the op, differentiably. The result is that of `op(name, backend)(*inputs)`, which torch.compile needs. That
    goes through torch.library's autograd and takes five times as long, longer than a small op itself."""
    if torch.compiler.is_compiling():
        return op(name, backend)(*inputs)
    function = _functions[name, backend]
    return function.apply(*inputs[: function.count], inputs[function.count :])


def op(name: str, backend: str) -> torch._ops.OpOverload:
    if torch.compiler.is_compiling() and forward_ad._current_level >= 0:
        # While compiling, a tensor's tangent cannot be seen, and the op would leave it out.
        raise NotImplementedError(f"rlkernels::{name} cannot be compiled within forward-mode differentiation")
    return getattr(getattr(torch.ops.rlkernels, name), backend)


def implement(name: str, backend: str, implementation: Callable) -> None:
    """Register Python code as the implementation of op `name`: a Triton launcher, say, which serves GPUs and, in a
    process with TRITON_INTERPRET=1, CPU tensors."""
    for device_type in triton_devices() if backend == "triton" else ("cpu",):
        LIBRARY.impl(f"{name}.{backend}", implementation, "CUDA" if device_type == "cuda" else "CPU")
