"""What a public function calls underneath, for torch.library.opcheck."""

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class OpCalls(TorchDispatchMode):
    """Records every call of an `rlkernels::` op with copies of its arguments, made before it may overwrite them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[torch._ops.OpOverload, tuple, dict]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "rlkernels":
            copies = tree_map_only(torch.Tensor, _copy, (args, kwargs))
            self.calls.append((func, *copies))
        return func(*args, **kwargs)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """Equal values in equal strides."""
    copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return copy.copy_(tensor.detach())


def check_ops(run: Callable[[], None], backend: str, *expected: str, differentiable: tuple[str, ...] = ()) -> None:
    """Run `run`, expect exactly the ops `expected` of `backend` to be called, and put each through opcheck with the
    arguments it had; those in `differentiable` with floating-point inputs that require a gradient."""
    with OpCalls() as record:
        run()
    called = {call[0]._schema.name.removeprefix("rlkernels::"): call for call in record.calls}
    assert set(called) == set(expected)
    for name, (func, args, kwargs) in called.items():
        assert func._overloadname == backend
        if name in differentiable:
            args = tuple(
                arg.requires_grad_() if position == 0 and torch.is_floating_point(arg) else arg
                for position, arg in enumerate(args)
            )
        torch.library.opcheck(func, args, kwargs)
