"""What the losses over tokens share: the checks of their inputs, and the gradients."""

import torch
from torch import Tensor

from rlkernels import _registry
from rlkernels.ops import _checks


def check_per_token(name: str, value: Tensor, like_name: str, like: Tensor, *, differentiable: bool = False) -> None:
    """`value` must hold one number per token, as `like` does."""
    _checks.tensor(name, value, _checks.FLOATS)
    _checks.shape(name, value, tuple(like.shape), because=f"that of {like_name}")
    _checks.same_device(name, value, like_name, like)
    if not differentiable:
        _checks.no_gradient(name, value, f"gradients do not flow to {name}")


def normalizer_parts(normalizer: float | Tensor | None, like_name: str, like: Tensor) -> tuple[Tensor | None, float]:
    """The normalizer as the kernels take it: a tensor, or a number, 0 for none."""
    if normalizer is None:
        return None, 0.0
    if not isinstance(normalizer, Tensor):
        return None, _checks.number("normalizer", normalizer, above=0.0)
    _checks.tensor("normalizer", normalizer, (*_checks.FLOATS, *_checks.INTEGERS))
    _checks.shape("normalizer", normalizer, (), because="a number or a 0-d tensor")
    _checks.same_device("normalizer", normalizer, like_name, like)
    _checks.no_gradient("normalizer", normalizer, "gradients do not flow to normalizer")
    return normalizer, 0.0


def gradients(
    backend: str, grad: Tensor, entropy_grad: Tensor, scale: Tensor, grad_loss: Tensor, *dtypes: int
) -> tuple[Tensor, Tensor]:
    """`grad` and `entropy_grad`, which a kernel left before the division by the loss's denominator, times `scale` and
    `grad_loss`, in the dtypes with these places in _checks.FLOATS. One that nobody asked for is empty, and stays so."""
    arguments = (backend, grad, entropy_grad, scale, grad_loss, *dtypes)
    return _Gradients.apply(*arguments) if torch.is_grad_enabled() else _scaled(*arguments)


def _scaled(backend, grad, entropy_grad, scale, grad_loss, *dtypes):
    if backend in _checks.ON_GPUS:
        return _registry.op("token_loss_backward", backend)(grad, entropy_grad, scale, grad_loss, *dtypes)
    factor = scale * grad_loss
    return grad * factor, entropy_grad * factor


class _Gradients(torch.autograd.Function):
    """Must not pass for differentiable: what is scaled came out of a kernel."""

    @staticmethod
    def forward(ctx, *arguments):
        return _scaled(*arguments)

    @staticmethod
    def backward(ctx, *gradients):
        raise NotImplementedError("the gradient of a loss over tokens cannot be differentiated again")


_registry.define(
    "token_loss_backward",
    "(Tensor grad, Tensor entropy_grad, Tensor scale, Tensor grad_loss, int dtype, int entropy_dtype) "
    "-> (Tensor grad_logprobs, Tensor grad_entropy)",
    lambda grad, entropy_grad, scale, grad_loss, *dtypes: tuple(
        value.new_empty(value.shape, dtype=_checks.FLOATS[dtype])
        for value, dtype in zip((grad, entropy_grad), dtypes, strict=True)
    ),
    part_of="policy_loss",
    backends=_checks.ON_GPUS,
)
