"""What the losses over tokens share: their aggregation, the checks of what comes with it, and the gradient."""

import torch
from torch import Tensor

from rlkernels.ops import _checks


def per_token(
    name: str, value: Tensor, like_name: str, like: Tensor, dtype: torch.dtype, *, differentiable: bool = False
) -> Tensor:
    """`value`, one number a token as `like`, in `dtype` and contiguous."""
    _checks.tensor(name, value, _checks.FLOATS)
    _checks.shape(name, value, tuple(like.shape), because=f"that of {like_name}")
    _checks.same_device(name, value, like_name, like)
    if not differentiable:
        _checks.no_gradient(name, value, f"gradients do not flow to {name}")
        value = value.detach()
    return value.to(dtype).contiguous()


def optional_per_token(name: str, value: Tensor | None, *like, differentiable: bool = False) -> Tensor | None:
    return None if value is None else per_token(name, value, *like, differentiable=differentiable)


def normalizer_parts(
    normalizer: float | Tensor | None, like_name: str, like: Tensor, dtype: torch.dtype
) -> tuple[Tensor | None, float]:
    """The normalizer as the kernels take it: a tensor, or a number, 0 for none."""
    if normalizer is None:
        return None, 0.0
    if not isinstance(normalizer, Tensor):
        return None, _checks.number("normalizer", normalizer, above=0.0)
    _checks.tensor("normalizer", normalizer, (*_checks.FLOATS, *_checks.INTEGERS))
    _checks.shape("normalizer", normalizer, (), because="a number or a 0-d tensor")
    _checks.same_device("normalizer", normalizer, like_name, like)
    _checks.no_gradient("normalizer", normalizer, "gradients do not flow to normalizer")
    return normalizer.detach().to(dtype), 0.0


class _Gradient(torch.autograd.Function):
    """grad * factor, which must not pass for differentiable: grad came out of a kernel."""

    @staticmethod
    def forward(ctx, grad, factor):
        return grad * factor

    @staticmethod
    def backward(ctx, *gradients):
        raise NotImplementedError("the gradient of a loss over tokens cannot be differentiated again")


def gradient(grad: Tensor, factor: Tensor) -> Tensor:
    """The gradient that a kernel left, times 0-d `factor`."""
    return _Gradient.apply(grad, factor) if torch.is_grad_enabled() else grad * factor
