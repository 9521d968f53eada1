import math

import torch
from torch import Tensor

from rlkernels import _backends, _registry
from rlkernels.ops import _checks
from rlkernels.reference import masked as reference


def masked_mean(x: Tensor, mask: Tensor | None, *, dim: int | None = None) -> Tensor:
    """Mean of the scored elements of a tensor.

        mean = sum of x over scored elements / number of scored elements

    Args:
        x: any shape, float32, bfloat16, float16 or float64 (served by the reference, in float64).
        mask: the shape of x, bool, integer or float; nonzero is scored; None scores every element.
        dim: the dimension to reduce, or None: all of them.

    Returns:
        float32 (float64 for float64 x), 0-d or the shape of x without `dim`.

    Differentiable: with respect to x; the gradient is 1 / number of scored elements at these, 0 elsewhere. Forward mode
    raises NotImplementedError, but in the reference.

    Edge cases: elements that are not scored may hold NaN or inf and leave no trace. Where nothing is scored the mean is
    0, as it is in verl's `masked_mean`; in TRL's and OpenRLHF's it is NaN. Where something is, all three agree (verl
    divides by the number + 1e-8, which float32 rounds away).

    Raises: TypeError, ValueError for wrong dtypes, shapes, devices and dimensions.

    Traffic: reads x and mask once; backward reads the mask and writes the gradient. bfloat16 and float16 inputs are
    widened to float32 first on a CPU; where `dim` is not the last dimension, x and mask are copied first.
    """
    mask = _checked(x, mask)
    if dim is not None:
        dim = _checks.integer("dim", dim)
        if not -x.dim() <= dim < x.dim():
            raise ValueError(f"dim must be one of the {x.dim()} dimensions of x; got {dim}")
        x, mask = x.movedim(dim, -1), None if mask is None else mask.movedim(dim, -1)
        shape, length = x.shape[:-1], x.shape[-1]
    else:
        shape, length = x.shape[:0], x.numel()
    backend = _backends.select(x, "masked_mean")
    rows = _checks.numbers(x.reshape(math.prod(shape), length), backend, _checks.arithmetic(x))
    if mask is not None:
        mask = _checks.flags(mask.reshape(rows.shape), backend)
    if backend == "reference":
        return reference.masked_mean(rows, mask).reshape(shape)
    _checks.no_tangent("x", x)
    means, _ = _registry.op("masked_mean", backend)(rows, mask)
    return means.reshape(shape)


def masked_whiten(
    x: Tensor,
    mask: Tensor | None,
    *,
    shift_mean: bool = True,
    eps: float = 1e-8,
    unbiased: bool = True,
    eps_floor: bool = False,
    group: "torch.distributed.ProcessGroup | None" = None,
) -> Tensor:
    """Scored elements to mean 0 and variance 1.

        result = (x - mean) / sqrt(variance + eps)            + mean, with shift_mean=False
        result = (x - mean) / sqrt(max(variance, eps))        with eps_floor=True

    mean and variance are of the scored elements, n of them; the variance is divided by n - 1, or n with unbiased=False.

        TRL `masked_whiten` (in its last PPO)            the defaults
        verl `masked_whiten`                             the defaults
        OpenRLHF `masked_normalize`, advantages          unbiased=False, eps_floor=True

    OpenRLHF's function normalises each row by itself; its advantages, and the functions of TRL and verl, all elements
    at once, as here.

    Args:
        x: any shape, float32, bfloat16, float16 or float64 (served by the reference, in float64).
        mask: the shape of x, bool, integer or float; nonzero is scored; None scores every element.
        shift_mean: False adds the mean again after scaling.
        eps: > 0.
        group: the processes over whose elements mean and variance are taken. Each calls this with its own x, and
            all get the same bits of both, by one collective of three numbers. None: this process alone.

    Returns:
        float32 of the shape of x (float64 for float64 x), 0 where nothing is scored.

    Not differentiable: advantages and rewards are data. Forward mode raises NotImplementedError.

    Edge cases: elements that are not scored may hold NaN or inf and leave no trace. With one element scored, or all
    equal, the variance is 0 and the result 0 (TRL divides by 0, verl raises). With nothing scored the result is 0.

    Raises: TypeError, ValueError for wrong dtypes, shapes, devices and options, and for x that requires a gradient.

    Traffic: reads x and mask twice, since the statistics come first, and writes the result. On a CPU bfloat16 and
    float16 inputs are widened to float32 first.

    References: Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance" (parts are combined by
    their pairwise formula, in fixed order; no sum of squares cancels).
    """
    mask = _checked(x, mask)
    _checks.no_gradient("x", x, "whitened values are data: gradients do not flow through them")
    eps = _checks.number("eps", eps, above=0.0)
    if group is not None and not isinstance(group, torch.distributed.ProcessGroup):
        raise TypeError(f"group must be a torch.distributed process group or None; got {type(group).__name__}")
    backend = _backends.select(x, "masked_whiten")
    x, mask = _checks.numbers(x.detach(), backend, _checks.arithmetic(x)), _checks.flags(mask, backend)
    if backend == "reference":
        moments = reference.masked_moments(x, mask)
    else:
        moments = _registry.op("masked_moments", backend)(x, mask)
    if group is not None:
        parts = moments.new_empty(3 * torch.distributed.get_world_size(group))
        torch.distributed.all_gather_into_tensor(parts, moments, group=group)
        moments = reference.combine_moments(parts.view(-1, 3))
    if backend == "reference":
        return reference.masked_whiten(
            x, mask, moments, shift_mean=shift_mean, eps=eps, unbiased=unbiased, eps_floor=eps_floor
        )
    return _registry.op("masked_whiten", backend)(x, mask, moments, shift_mean, eps, unbiased, eps_floor)


def _checked(x: Tensor, mask: Tensor | None) -> Tensor | None:
    _checks.tensor("x", x, _checks.FLOATS)
    if mask is None:
        return None
    _checks.mask("mask", mask, "x", x)
    return mask


def _mean_setup_context(ctx, inputs, output):
    x, mask = inputs
    _, scale = output
    ctx.save_for_backward(scale, mask)
    ctx.shape, ctx.dtype = x.shape, x.dtype
    ctx.mark_non_differentiable(scale)
    ctx.set_materialize_grads(False)


def _make_mean_backward(backend):
    def backward(ctx, grad, grad_scale):
        scale, mask = ctx.saved_tensors
        if backend in _checks.ON_GPUS:
            number = _checks.FLOATS.index(ctx.dtype)
            spread = _registry.op("masked_mean_backward", backend)
            return spread(grad.contiguous(), scale, mask, ctx.shape[1], number), None
        each = (grad * scale).unsqueeze(1)
        return each.expand(ctx.shape) if mask is None else torch.where(mask, each, 0.0), None

    return backward


def _spread_setup_context(ctx, inputs, output):
    _, scale, mask, *_ = inputs
    ctx.save_for_backward(scale, mask)


def _spread_backward(ctx, grad):
    scale, mask = ctx.saved_tensors
    grad = grad.float() if mask is None else torch.where(mask != 0, grad.float(), 0.0)
    return grad.sum(1) * scale, None, None, None, None


_registry.define(
    "masked_mean",
    "(Tensor x, Tensor? mask) -> (Tensor means, Tensor scale)",
    lambda x, mask: (x.new_empty(x.shape[0], dtype=torch.float32), x.new_empty(x.shape[0], dtype=torch.float32)),
    part_of="masked_mean",
    setup_context=_mean_setup_context,
    backward=_make_mean_backward,
)
_registry.define(
    "masked_mean_backward",
    "(Tensor grad, Tensor scale, Tensor? mask, SymInt length, int dtype) -> Tensor",
    lambda grad, scale, mask, length, dtype: grad.new_empty((grad.shape[0], length), dtype=_checks.FLOATS[dtype]),
    part_of="masked_mean",
    backends=_checks.ON_GPUS,
    setup_context=_spread_setup_context,
    backward=lambda backend: _spread_backward,
)
_registry.define(
    "masked_moments",
    "(Tensor x, Tensor? mask) -> Tensor",
    lambda x, mask: x.new_empty(3, dtype=torch.float64),
    part_of="masked_whiten",
)
_registry.define(
    "masked_whiten",
    "(Tensor x, Tensor? mask, Tensor moments, bool shift_mean, float eps, bool unbiased, bool eps_floor) -> Tensor",
    lambda x, *rest: x.new_empty(x.shape, dtype=torch.float32),
    part_of="masked_whiten",
)
