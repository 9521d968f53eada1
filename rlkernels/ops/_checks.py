"""Checks of arguments, made in Python before any memory is touched. Each error names the argument, what came, and
what was wanted. Values inside tensors are the kernels' to check (on a GPU only with RLKERNELS_CHECK=1)."""

import os
from collections.abc import Iterable
from numbers import Integral, Rational, Real
from typing import Any, TypeVar

import torch
from torch.autograd import forward_ad

CHECK_VALUES = os.environ.get("RLKERNELS_CHECK") == "1"

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)
LEAST, MOST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
"""Magnitudes of options: those that float32, in which the kernels compute, holds in full."""
ON_GPUS = ("triton", "cuda")
"""The backends whose kernels take numbers and masks in the dtypes that the caller gave."""
MOST_DIVISOR = 2.0**100
"""What logits may be divided by at most: beyond, quotients are too small for float32, and 0 in kernels on CPUs."""


def tensor(name: str, value: object, dtypes: Iterable[torch.dtype]) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(value).__name__}")
    # A collective that is under way wraps its own result; other wrappers (a DTensor, a quantised weight) stand for more
    # than they hold.
    if hasattr(type(value), "__tensor_flatten__") and not hasattr(type(value), "trigger_wait"):
        raise TypeError(f"{name} must be a plain tensor; got a {type(value).__name__}, which wraps others")
    if value.layout != torch.strided or value.is_nested:
        layout = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise TypeError(f"{name} must be a dense tensor; got one of the layout {layout}")
    if value.dtype not in tuple(dtypes):
        wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must have one of the dtypes {wanted}; got {str(value.dtype).removeprefix('torch.')}")
    if value.is_meta:
        raise ValueError(f"{name} must be on a device that holds values, such as cpu; got meta")


def shape(name: str, value: torch.Tensor, *wanted: tuple[int, ...], because: str) -> None:
    # One by one: torch.compile cannot look for sizes that are symbols in a tuple.
    if all(tuple(value.shape) != one for one in wanted):
        shapes = " or ".join(str(list(one)) for one in wanted)
        raise ValueError(f"{name} must have the shape {shapes} ({because}); got {list(value.shape)}")


def same_device(name: str, value: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    if value.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name}, {other.device}; got {value.device}")


def no_gradient(name: str, value: torch.Tensor, because: str) -> None:
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} must not require a gradient ({because}); got requires_grad=True: detach it")
    no_tangent(name, value, because)


def no_tangent(name: str, value: torch.Tensor, because: str = "it has reverse-mode gradients alone") -> None:
    """An op that does not know forward mode would leave the tangent out."""
    if forward_ad._current_level < 0 or torch.compiler.is_compiling():
        return
    while torch._C._functorch.is_batchedtensor(value):  # vmap has no rule for unpack_dual
        value = torch._C._functorch.get_unwrapped(value)
    if forward_ad.unpack_dual(value).tangent is not None:
        raise NotImplementedError(f"{name} cannot be differentiated in forward mode ({because}); got a dual tensor")


def choice(name: str, value: object, valid: Iterable[str]) -> None:
    if not isinstance(value, str) or value not in tuple(valid):
        raise ValueError(f"{name} must be one of {', '.join(valid)}; got {value!r}")


def number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    finite: bool = True,
) -> float:
    """`value`, 0 or of a magnitude from LEAST to MOST whatever the dtype of the tensors; infinite unless `finite`."""
    if not _is_a(value, int, float, Real):
        raise TypeError(f"{name} must be a number; got {type(value).__name__}")
    if not isinstance(value, (float, Rational)):
        value = float(value)  # comparisons with the half floats of NumPy would overflow
    # Comparisons alone, which torch.compile can trace where a float has become an input of the graph.
    if (
        value != value
        or (finite and abs(value) == float("inf"))
        or (above is not None and not value > above)
        or (at_least is not None and not value >= at_least)
        or (at_most is not None and not value <= at_most)
    ):
        bounds = [f"> {above:g}"] if above is not None else [f">= {at_least:g}"] if at_least is not None else []
        bounds = (["finite"] if finite else []) + bounds + ([f"<= {at_most:g}"] if at_most is not None else [])
        raise ValueError(f"{name} must be {' and '.join(bounds) or 'a number'}; got {_shown(value)}")
    if value != 0 and not LEAST <= abs(value) <= MOST and abs(value) != float("inf"):
        raise ValueError(
            f"{name} must be a number that float32 holds in full (0, or a magnitude from {LEAST:.2g} to {MOST:.2g}); "
            f"got {_shown(value)}"
        )
    return float(value)


def integer(name: str, value: Any) -> int:
    if not _is_a(value, int, Integral):
        raise TypeError(f"{name} must be an integer; got {type(value).__name__}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} must fit in 64 bits; got {_shown(value)}")
    return int(value)


def _is_a(value: object, *kinds: type) -> bool:
    """Among them NumPy's scalars; no bool, tensor or text."""
    return isinstance(value, kinds) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    """Python refuses to print an integer of thousands of digits."""
    large = _is_a(value, Integral) and abs(value) > MOST
    return f"an integer of {int(value).bit_length()} bits" if large else str(value)


def mask(name: str, value: torch.Tensor, like_name: str, like: torch.Tensor) -> None:
    tensor(name, value, (torch.bool, *INTEGERS, *FLOATS))
    shape(name, value, tuple(like.shape), because=f"that of {like_name}")
    same_device(name, value, like_name, like)
    no_gradient(name, value, "gradients do not flow to a mask")


def sequences(name: str, value: torch.Tensor, cu_seqlens: torch.Tensor | None) -> tuple[int, torch.Tensor | None]:
    """The number of sequences of a padded [B, T] or, with cu_seqlens, packed [N] tensor; and cu_seqlens, contiguous."""
    if cu_seqlens is None:
        if value.dim() != 2:
            raise ValueError(f"{name} must have the shape [B, T], or [N] with cu_seqlens; got {list(value.shape)}")
        return value.shape[0], None
    tensor("cu_seqlens", cu_seqlens, (torch.int32,))
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"cu_seqlens must have the shape [number of sequences + 1]; got {list(cu_seqlens.shape)}")
    if value.dim() != 1:
        raise ValueError(f"{name} must have the shape [N] when cu_seqlens is given; got {list(value.shape)}")
    same_device("cu_seqlens", cu_seqlens, name, value)
    return cu_seqlens.shape[0] - 1, cu_seqlens.contiguous()


def cu_seqlens_values(cu_seqlens: torch.Tensor, total: int) -> None:
    """The CPU kernels check by themselves; this is for the reference, and for GPUs with RLKERNELS_CHECK=1."""
    values = cu_seqlens.tolist()
    if values[0] != 0 or values[-1] != total:
        raise ValueError(
            f"cu_seqlens must run from 0 to {total}, the number of tokens; got {values[0]} to {values[-1]}"
        )
    for index in range(1, len(values)):
        if values[index] < values[index - 1]:
            raise ValueError(f"cu_seqlens must not decrease; got {values[index - 1]}, {values[index]} at {index - 1}")


def nan_unless_valid(cu_seqlens: torch.Tensor, total: int, like: torch.Tensor) -> torch.Tensor:
    """1, or NaN: said on the device, where the host does not look at values."""
    starts, ends = cu_seqlens[:-1], cu_seqlens[1:]
    valid = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == total) & (starts <= ends).all()
    return torch.where(valid, 1.0, float("nan")).to(like.dtype)


def values_in_python(backend: str, value: torch.Tensor) -> bool:
    """Whether values are checked before the kernel: where none would raise, and the host may wait for them."""
    if torch.compiler.is_compiling():
        return False
    return CHECK_VALUES or (backend == "reference" and value.is_cpu)


def arithmetic(value: torch.Tensor) -> torch.dtype:
    """The dtype that is computed in: float64 for float64, float32 for everything else."""
    return torch.float64 if value.dtype == torch.float64 else torch.float32


Given = TypeVar("Given", torch.Tensor, torch.Tensor | None)


def numbers(value: Given, backend: str, dtype: torch.dtype) -> Given:
    """`value` as the kernels of `backend` take it, contiguous. Kernels for GPUs widen what they load, and a conversion
    here would be a launch of its own; the others get `dtype`."""
    if value is None:
        return None
    return (value if backend in ON_GPUS else value.to(dtype)).contiguous()


def flags(value: Given, backend: str) -> Given:
    """A mask as the kernels of `backend` take it, contiguous: those for GPUs compare with 0 what they load."""
    if value is None:
        return None
    return (value if backend in ON_GPUS else scored(value)).contiguous()


def scored(mask: torch.Tensor) -> torch.Tensor:
    """bool: nonzero is scored."""
    return mask if mask.dtype == torch.bool else mask != 0


def working(value: torch.Tensor) -> torch.Tensor:
    """`value` in the dtype of the arithmetic, contiguous."""
    return value.to(arithmetic(value)).contiguous()
