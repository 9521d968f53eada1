"""Checks of arguments, made in Python before any memory is touched. Each error names the argument, what came, and
what was wanted. Values inside tensors are the kernels' to check (on a GPU only with RLKERNELS_CHECK=1)."""

import os
from collections.abc import Iterable

import torch

CHECK_VALUES = os.environ.get("RLKERNELS_CHECK") == "1"

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


def tensor(name: str, value: object, dtypes: Iterable[torch.dtype]) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(value).__name__}")
    if value.dtype not in tuple(dtypes):
        wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must have one of the dtypes {wanted}; got {str(value.dtype).removeprefix('torch.')}")


def shape(name: str, value: torch.Tensor, *wanted: tuple[int, ...], because: str) -> None:
    if tuple(value.shape) not in wanted:
        shapes = " or ".join(str(list(one)) for one in wanted)
        raise ValueError(f"{name} must have the shape {shapes} ({because}); got {list(value.shape)}")


def same_device(name: str, value: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    if value.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name}, {other.device}; got {value.device}")


def no_gradient(name: str, value: torch.Tensor, because: str) -> None:
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} must not require a gradient ({because}); got requires_grad=True: detach it")


def choice(name: str, value: object, valid: Iterable[str]) -> None:
    if value not in tuple(valid):
        raise ValueError(f"{name} must be one of {', '.join(valid)}; got {value!r}")


def number(
    name: str, value: object, *, above: float | None = None, at_least: float | None = None, finite: bool = True
) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number; got {type(value).__name__}")
    bounds = [f"> {above:g}"] if above is not None else [f">= {at_least:g}"] if at_least is not None else []
    bounds = (["finite"] if finite else []) + bounds
    # Comparisons alone, which torch.compile can trace where a float has become an input of the graph.
    if (
        value != value
        or (finite and abs(value) == float("inf"))
        or (above is not None and not value > above)
        or (at_least is not None and not value >= at_least)
    ):
        raise ValueError(f"{name} must be {' and '.join(bounds) or 'a number'}; got {value}")
    return float(value)


def integer(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer; got {type(value).__name__}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} must fit in 64 bits; got {value}")


def mask(name: str, value: torch.Tensor, like_name: str, like: torch.Tensor) -> torch.Tensor:
    """`value` as a contiguous bool tensor: nonzero is scored."""
    tensor(name, value, (torch.bool, *INTEGERS, *FLOATS))
    shape(name, value, tuple(like.shape), because=f"that of {like_name}")
    same_device(name, value, like_name, like)
    return (value if value.dtype == torch.bool else value != 0).contiguous()


def values_in_python(backend: str, value: torch.Tensor) -> bool:
    """Whether values are checked before the kernel: where none would raise, and the host may wait for them."""
    if torch.compiler.is_compiling():
        return False
    return CHECK_VALUES or (backend == "reference" and value.is_cpu)


def working(value: torch.Tensor) -> torch.Tensor:
    """`value` in the dtype of the arithmetic: float64 stays, everything else becomes float32; contiguous."""
    return (value if value.dtype == torch.float64 else value.float()).contiguous()
