"""Schemas, their implementations, and the choice between them.

Every low-level op `rlkernels::<name>` has one overload per kernel backend, all of one schema, so that a backend is
chosen by the overload's name. The schema, the fake and the gradient are registered here, in Python, whatever was
built; the extensions and `rlkernels/triton` register implementations only. The reference is plain PyTorch and needs
no op of its own.
"""

import ctypes
import functools
import importlib
import os
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch.autograd import forward_ad

LIBRARY = torch.library.Library("rlkernels", "DEF")
KERNEL_BACKENDS = ("cpu", "cuda", "triton")
BACKENDS = ("reference", *KERNEL_BACKENDS)
WITHOUT_CUDA = ("cpu", "triton")
"""Of ops whose CUDA kernels would do nothing that Triton's do not: Triton serves them on NVIDIA GPUs too."""
PREFERENCE: dict[str, tuple[str, ...]] = {
    "token_logprobs": ("cpu", "triton", "cuda"),
    **dict.fromkeys(("kl_penalty", "shaped_rewards", "group_advantages"), KERNEL_BACKENDS),
    **dict.fromkeys(("gae", "discounted_returns", "td_lambda", "vtrace"), KERNEL_BACKENDS),
    **dict.fromkeys(("policy_loss", "value_loss"), KERNEL_BACKENDS),
    **dict.fromkeys(("masked_mean", "masked_whiten", "linear_token_logprobs", "linear_policy_loss"), WITHOUT_CUDA),
    **dict.fromkeys(("linear_preference_logps", "linear_kl_divergence"), WITHOUT_CUDA),
    **dict.fromkeys(("preference_loss", "reward_pair_loss"), ()),
}
"""For each public op the backends that have kernels for it, the first of those that serve a tensor's device first; an
op without any is plain PyTorch.

On NVIDIA GPUs the CUDA kernels precede Triton's, whose launch costs more host time. Logits are the exception: there the
arithmetic per element decides. Per element Triton's kernels take 9.3 instructions forward and CUDA's 18, with entropy
12.1 and 22.6, or 38 with a temperature too, and backward 12.4 and 40 (bfloat16, sm_90, read in the machine code). Under
Triton's interpreter the CPU kernels precede it."""

# A plain module global, so that torch.compile guards on it and recompiles when it changes.
_forced: str | None = None
_devices: dict[str, tuple[str, ...]] = dict.fromkeys(KERNEL_BACKENDS, ())
_reasons: dict[str, str] = dict.fromkeys(KERNEL_BACKENDS, "not loaded")
_functions: dict[tuple[str, str], Any] = {}


def define(
    name: str,
    schema: str,
    fake: Callable,
    *,
    backends: tuple[str, ...] = KERNEL_BACKENDS,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
) -> None:
    """Define `name` for the backends that have kernels for it: its schema, its shapes (`fake`), and its gradient if it
    has one: `backward(backend)` gives the function that autograd calls."""
    for backend in backends:
        LIBRARY.define(f"{name}.{backend}{schema}")
        qualified = f"rlkernels::{name}.{backend}"
        torch.library.register_fake(qualified, fake, lib=LIBRARY)
        if backward is not None:
            function = backward(backend)
            torch.library.register_autograd(qualified, function, setup_context=setup_context, lib=LIBRARY)
            if setup_context is not None:
                _functions[name, backend] = _autograd_function(op(name, backend), setup_context, function)


def _autograd_function(overload: torch._ops.OpOverload, setup_context: Callable, backward: Callable) -> type:
    """The gradient of an op for `call`. Its options, all behind its tensors, go as one, since PyTorch looks at each
    argument more than once."""
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
    """The op, differentiable. Equal to `op(name, backend)(*inputs)`, whose way through torch.library's autograd takes
    five times as long, longer than a small op itself; torch.compile needs that one."""
    if torch.compiler.is_compiling():
        return op(name, backend)(*inputs)
    function = _functions[name, backend]
    return function.apply(*inputs[: function.count], inputs[function.count :])


def op(name: str, backend: str) -> torch._ops.OpOverload:
    if torch.compiler.is_compiling() and forward_ad._current_level >= 0:
        # Whether a tensor has a tangent cannot be seen here, and the op would leave it out.
        raise NotImplementedError(f"rlkernels::{name} cannot be compiled within forward-mode differentiation")
    return getattr(getattr(torch.ops.rlkernels, name), backend)


def no_second_derivative(name: str) -> Callable:
    """The gradient of an op that is itself a gradient."""

    def refuse(ctx, *gradients):
        raise NotImplementedError(f"rlkernels::{name} has no derivative: the gradient cannot be differentiated again")

    return lambda backend: refuse


class _Refused(torch.autograd.Function):
    """Gradients that must not pass for differentiable by the sources that they were made of."""

    @staticmethod
    def forward(ctx, name, gradients, *sources):
        ctx.name = name
        return gradients

    @staticmethod
    def backward(ctx, *gradients):
        raise NotImplementedError(f"the gradient of {ctx.name} cannot be differentiated again")


def first_order_only(name: str) -> Callable:
    """Decorates the backward of an autograd.Function: that its results are differentiated is refused, not left out of
    the graph. It is called as backward(ctx, saved, *gradients), where saved() are the tensors that it saved:
    checkpointing gives them once, and computes them for whoever asks. They must lead to all inputs that are
    differentiated; `leads_to_inputs` is one that does."""

    def decorate(backward: Callable) -> Callable:
        @functools.wraps(backward)
        def once(ctx, *gradients):
            saved = functools.cache(lambda: ctx.saved_tensors)
            with torch.no_grad():
                results = backward(ctx, saved, *gradients)
            return _Refused.apply(name, results, *saved(), *gradients) if torch.is_grad_enabled() else results

        return once

    return decorate


def leads_to_inputs(like: torch.Tensor) -> torch.Tensor:
    """What the forward of an autograd.Function returns and saves where it does not save its inputs themselves: as an
    output it leads to them, and it holds no memory."""
    return like.new_empty(0)


def implement(name: str, backend: str, implementation: Callable) -> None:
    """Register Python code as the implementation of op `name`: a Triton launcher, say, which serves GPUs and, in a
    process with TRITON_INTERPRET=1, CPU tensors."""
    for device_type in triton_devices() if backend == "triton" else ("cpu",):
        LIBRARY.impl(f"{name}.{backend}", implementation, "CUDA" if device_type == "cuda" else "CPU")


def triton_devices() -> tuple[str, ...]:
    return ("cuda", "cpu") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",)


def loaded(backend: str, device_types: tuple[str, ...]) -> None:
    """Note that the implementations of `backend` are registered for `device_types`."""
    _devices[backend] = device_types
    _reasons[backend] = ""


def gpu_driver() -> bool:
    """Whether a GPU driver that this PyTorch can use is installed. CUDA is not asked: after its first call no forked
    process can use it."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    if torch.version.hip:
        return os.path.exists("/dev/kfd")
    if torch.version.cuda is None:
        return False
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def load() -> None:
    """Load every backend that can serve on this machine; remember why the others cannot."""
    _load_module("cpu", "rlkernels._C", ("cpu",), "the C++ extension is not built (it takes a C++20 compiler)")
    gpu = gpu_driver()
    if gpu or "cpu" in triton_devices():
        _load_module("triton", "rlkernels.triton", triton_devices(), "triton is not installed")
    else:
        _reasons["triton"] = "no GPU is available"
    if gpu and torch.version.cuda:
        _load_module("cuda", "rlkernels._C_cuda", ("cuda",), "the CUDA extension is not built (it takes nvcc)")
    else:
        _reasons["cuda"] = "no NVIDIA GPU is available"
    name = os.environ.get("RLKERNELS_BACKEND")
    if name:
        _force(name, "RLKERNELS_BACKEND")


def _load_module(backend: str, module: str, device_types: tuple[str, ...], absent: str) -> None:
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name not in (module, "triton"):
            raise
        _reasons[backend] = absent
    except (ImportError, OSError) as error:
        if backend == "cpu" and os.environ.get("RLKERNELS_CPU_ISA"):
            raise  # an instruction set was asked for by name
        _reasons[backend] = f"{module} failed to load: {error}"
        warnings.warn(f"{_reasons[backend]}; a slower backend serves instead", RuntimeWarning, stacklevel=2)
    else:
        loaded(backend, device_types)


def status(backend: str, device_type: str) -> str | None:
    """None where `backend` serves tensors on `device_type`, else the reason why it does not."""
    if backend == "reference" or device_type in _devices[backend]:
        return None
    if not _devices[backend]:
        return _reasons[backend]
    return f"it serves {' and '.join(_devices[backend])} tensors only"


def select(tensor: torch.Tensor, op: str) -> str:
    """The backend that serves `tensor` for a public op; where the one that was asked for has no kernels for it, the
    next that has. float64 is always served by the reference, in float64."""
    if tensor.dtype == torch.float64:
        return "reference"
    device_type = tensor.device.type
    if _forced is not None:
        if _forced != "reference" and device_type not in _devices[_forced]:
            raise ValueError(
                f"backend {_forced!r} was asked for, but cannot serve a {device_type} tensor: "
                f"{status(_forced, device_type)}"
            )
        if _forced == "reference" or _forced in PREFERENCE[op]:
            return _forced
    for backend in PREFERENCE[op]:
        if device_type in _devices[backend]:
            return backend
    return "reference"


def _force(name: str, argument: str) -> None:
    global _forced
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"{argument} must be one of {', '.join(('auto', *BACKENDS))}; got {name!r}")
    if name in KERNEL_BACKENDS and not _devices[name]:
        raise ValueError(f"{argument}={name!r} cannot serve on this machine: {_reasons[name]}")
    _forced = None if name == "auto" else name


class use_backend:
    """Choose the implementation of every op: "reference", "cpu", "triton", "cuda", or "auto" (by the tensors' device).

    Takes effect at once, for the whole process; as a context manager it is undone on leaving the block. A compiled
    function recompiles when the choice changes. float64 tensors are always served by the reference, and an op without
    kernels for the backend chosen (`masked_*` for "cuda") by the next that has some. The environment variable
    RLKERNELS_BACKEND sets the choice at import.

    Raises ValueError for an unknown name, and for a backend that cannot serve on this machine (with the reason).

        rlkernels.use_backend("triton")
        with rlkernels.use_backend("reference"):
            ...
    """

    def __init__(self, name: str) -> None:
        self._previous = _forced
        _force(name, "backend")

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _forced
        _forced = self._previous
