from typing import Any

import torch
from torch import Tensor

from rlkernels import _backends, _registry
from rlkernels._codes import AGGREGATIONS, VALUE_METRICS
from rlkernels.ops import _checks
from rlkernels.ops._token_losses import check_per_token, gradients, normalizer_parts
from rlkernels.reference import value_loss as reference


def value_loss(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    mask: Tensor | None = None,
    *,
    clip: float | None = 0.2,
    cu_seqlens: Tensor | None = None,
    aggregation: str = "token_mean",
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """PPO's clipped value loss over tokens, with its gradient and metrics from the same pass.

        b = clamp(values, old_values - clip, old_values + clip)
        l = max((values - returns)^2, (b - returns)^2) / 2

    Aggregated as in policy_loss, `normalizer` included.

    Args:
        values: [B, T] padded, or [N] packed with cu_seqlens; float32, bfloat16, float16 or float64 (served by the
            reference, in float64).
        old_values: the same shape, predicted when the tokens were sampled; None: not clipped.
        returns: the same shape, what the values are to predict.
        mask: the shape of values, bool, integer or float; nonzero is scored; None scores every token.
        clip: >= 0; None: not clipped.
        cu_seqlens: int32 [S + 1], from 0 to N, not decreasing: where each packed sequence starts.
        aggregation: "token_mean", "seq_mean_token_mean", "seq_mean_token_sum" or "token_sum".
        normalizer: a number > 0, or a 0-d tensor.

    Returns:
        loss: 0-d float32 (float64 for float64 values).
        metrics: float32 [6], named by `value_loss.metrics`, over scored tokens: clip_fraction, of those whose second
            square is the larger; value_mean; return_mean; squared_error, the mean of (values - returns)^2;
            explained_variance, 1 - variance(returns - values) / variance(returns); num_tokens.

    Differentiable: the loss with respect to values, once; 0 where the second square is the larger. Second derivatives
    and forward mode raise NotImplementedError, but in the reference. Everything else is data and must not require a
    gradient.

    Edge cases: tokens that are not scored may hold NaN or inf and leave no trace. With nothing scored the loss, its
    gradient and the metrics are 0. Where all returns are the same, one token included, explained_variance is NaN.

    Raises: TypeError, ValueError for wrong dtypes, shapes, devices and options, and, on a CPU, for cu_seqlens that do
    not run from 0 to N without decreasing. On a GPU they make the loss and its gradient NaN, or raise with
    RLKERNELS_CHECK=1.

    Traffic: reads each input once (the mask twice for seq_*, whose lengths come first), on GPUs in the dtype given, and
    writes the gradient in float32; backward reads it once and writes it in the dtype of values. No host
    synchronisation.

    References: Schulman et al. 2017 (PPO, arXiv 1707.06347); the clip is that of OpenAI's baselines.
    """
    _checks.tensor("values", values, _checks.FLOATS)
    _, cu_seqlens = _checks.sequences("values", values, cu_seqlens)
    if old_values is not None:
        check_per_token("old_values", old_values, "values", values)
    check_per_token("returns", returns, "values", values)
    if mask is not None:
        _checks.mask("mask", mask, "values", values)
    _checks.choice("aggregation", aggregation, AGGREGATIONS)
    clip = None if clip is None else _checks.number("clip", clip, at_least=0.0)
    if clip is None:
        clip, old_values = 0.0, None
    normalizer, normalizer_value = normalizer_parts(normalizer, "values", values)

    backend = _backends.select(values, "value_loss")
    if cu_seqlens is not None and _checks.values_in_python(backend, cu_seqlens):
        _checks.cu_seqlens_values(cu_seqlens, values.shape[0])
    dtype = _checks.arithmetic(values)
    tensors = (
        _checks.numbers(values, backend, dtype),
        _checks.numbers(old_values, backend, dtype),
        _checks.numbers(returns, backend, dtype),
        _checks.flags(mask, backend),
        cu_seqlens,
    )
    divisor = _checks.numbers(normalizer, backend, dtype)
    options = (AGGREGATIONS.index(aggregation), clip)
    if backend == "reference":
        arguments: Any = (*tensors, normalizer_value or divisor, *options)
        loss, metrics = reference.value_loss(*arguments)
        if cu_seqlens is not None:
            loss = loss * _checks.nan_unless_valid(cu_seqlens, values.shape[0], loss)
        return loss, metrics
    need_grad = torch.is_grad_enabled() and values.requires_grad
    loss, metrics, *_ = _registry.call(
        "value_loss_forward", backend, *tensors, divisor, normalizer_value, *options, need_grad
    )
    return loss, metrics


value_loss.metrics = VALUE_METRICS  # type: ignore[attr-defined]


def _forward_fake(values, *rest):
    shapes = ((), (len(VALUE_METRICS),), values.shape if rest[-1] else (0,), ())
    return tuple(values.new_empty(shape, dtype=torch.float32) for shape in shapes)


def _setup_context(ctx, inputs, output):
    _, metrics, grad, scale = output
    # The gradient stays differentiable, so that using it in a graph is refused rather than left out of it.
    ctx.mark_non_differentiable(metrics, scale)
    ctx.save_for_backward(grad, scale)
    ctx.nothing = (None,) * (len(inputs) - 1)
    ctx.dtype = _checks.FLOATS.index(inputs[0].dtype)
    ctx.set_materialize_grads(False)


def _make_backward(backend):
    def backward(ctx, grad_loss, *others):
        grad, scale = ctx.saved_tensors
        return gradients(backend, grad, grad.new_empty(0), scale, grad_loss, ctx.dtype, 0)[0], *ctx.nothing

    return backward


_registry.define(
    "value_loss_forward",
    "(Tensor values, Tensor? old_values, Tensor returns, Tensor? mask, Tensor? cu_seqlens, Tensor? normalizer, "
    "float normalizer_value, int aggregation, float clip, bool need_grad) "
    "-> (Tensor loss, Tensor metrics, Tensor grad, Tensor scale)",
    _forward_fake,
    part_of="value_loss",
    setup_context=_setup_context,
    backward=_make_backward,
)
