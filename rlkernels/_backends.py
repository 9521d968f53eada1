"""Which backend serves an op: what each op has kernels for, what this process could load, what the user asked for."""

import ctypes
import functools
import importlib
import os
import warnings
from types import TracebackType

import torch

KERNEL_BACKENDS = ("cpu", "cuda", "triton")
BACKENDS = ("reference", *KERNEL_BACKENDS)
BACKENDS_OF: dict[str, tuple[str, ...]] = {
    "token_logprobs": ("cpu", "triton"),
    "kl_penalty": ("cpu", "cuda", "triton"),
    "shaped_rewards": ("cpu", "cuda", "triton"),
    "group_advantages": ("cpu", "cuda", "triton"),
    "gae": ("cpu", "cuda", "triton"),
    "discounted_returns": ("cpu", "cuda", "triton"),
    "td_lambda": ("cpu", "cuda", "triton"),
    "vtrace": ("cpu", "cuda", "triton"),
    "policy_loss": ("cpu", "cuda", "triton"),
    "value_loss": ("cpu", "cuda", "triton"),
    "masked_mean": ("cpu", "triton"),
    "masked_whiten": ("cpu", "triton"),
    "linear_token_logprobs": ("cpu", "triton"),
    "linear_policy_loss": ("cpu", "triton"),
    "linear_preference_logps": ("cpu", "triton"),
    "linear_kl_divergence": ("cpu", "triton"),
    "preference_loss": (),
    "reward_pair_loss": (),
}
"""The backends that have kernels for each public op. The first one that serves a tensor's device is chosen. An op
without any is plain PyTorch.

On NVIDIA GPUs the CUDA kernels precede Triton's, whose launch costs more host time. Where CUDA kernels would do nothing
that Triton's do not, there are none: for a logit Triton's take 7.0 instructions forward, 9.3 with entropy and 6.8
backward (bfloat16, sm_90, read in the machine code), and reading a logit, its exp and their sums take 6 at least. Under
Triton's interpreter the CPU kernels precede Triton's."""

# A plain module global, so that torch.compile guards on it and recompiles when it changes.
_forced: str | None = None
_devices: dict[str, tuple[str, ...]] = dict.fromkeys(KERNEL_BACKENDS, ())
_reasons: dict[str, str] = dict.fromkeys(KERNEL_BACKENDS, "not loaded")


def triton_devices() -> tuple[str, ...]:
    return ("cuda", "cpu") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",)


def loaded(backend: str, device_types: tuple[str, ...]) -> None:
    """Note that the implementations of `backend` are registered for `device_types`."""
    _devices[backend] = device_types
    _reasons[backend] = ""


def gpu_driver() -> bool:
    """Whether a GPU driver that this PyTorch can use is installed. This calls nothing of CUDA: after the first call no
    forked process could use it."""
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
        if _forced == "reference" or _forced in BACKENDS_OF[op]:
            return _forced
    for backend in BACKENDS_OF[op]:
        if device_type in _devices[backend]:
            return backend
    return "reference"


def note_stored_logits(device_type: str) -> None:
    """Warn, once for each kind of device, where the reference serves the fused head and nobody asked for it: callers
    mean to save the memory of the logits."""
    if _forced != "reference":
        _warn_of_stored_logits(device_type)


@functools.cache
def _warn_of_stored_logits(device_type: str) -> None:
    reasons = "; ".join(f"{name}: {status(name, device_type)}" for name in BACKENDS_OF["linear_token_logprobs"])
    warnings.warn(
        f"the reference, which stores all logits, serves the fused head on {device_type}: no kernels can ({reasons})",
        RuntimeWarning,
        stacklevel=2,
    )


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
    kernels for the backend chosen (`token_logprobs` for "cuda") by the next that has some. The environment variable
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
