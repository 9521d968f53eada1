from torch import Tensor

from rlkernels.ops import _checks, _registry
from rlkernels.reference import kl as reference

ESTIMATORS = ("k1", "k2", "k3", "abs")
"""In the order of the kernels' codes. "k1+", "k3+" and "abs+" are the straight-through forms."""
STRAIGHT_THROUGH = ("k1+", "k3+", "abs+")


def kl_penalty(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    *,
    estimator: str = "k3",
    log_ratio_clamp: float | None = None,
    value_clamp: float | None = None,
) -> Tensor:
    """Per-token estimates of KL(policy || reference) from the log-probabilities of sampled tokens.

        d   = clamp(logprobs - ref_logprobs, -log_ratio_clamp, log_ratio_clamp)
        k1  = d                   gradient 1
        k2  = d^2 / 2             gradient d
        k3  = exp(-d) - 1 + d     gradient 1 - exp(-d)
        abs = |d|                 gradient sign(d)
        result = clamp(estimate, -value_clamp, value_clamp)

    "k1+", "k3+" and "abs+" have the value of the estimator named and the gradient of k2 (straight-through), the one
    whose expectation is the gradient of the KL. Every gradient, theirs included, is 0 where either clamp took effect.

    Args:
        logprobs: any shape, float32, bfloat16, float16 or float64 (served by the reference, in float64); of the policy.
        ref_logprobs: the same shape; of the reference model.
        estimator: "k1", "k2", "k3", "abs", "k1+", "k3+" or "abs+".
        log_ratio_clamp: >= 0, or None. verl uses 20 for k3.
        value_clamp: >= 0, or None. verl uses 10 for k3.

    Returns:
        float32 of the same shape (float64 for float64 logprobs).

    Differentiable: with respect to both inputs; the gradients are each other's negatives.

    Edge cases: -inf in both inputs gives NaN; empty input gives empty output.

    Raises: TypeError, ValueError for wrong dtypes, shapes, devices and options.

    Traffic: forward reads both inputs and writes the result; backward reads both and the upstream gradient and writes
    one gradient (a second one if the reference needs it). bfloat16 and float16 inputs are widened to float32 first.

    References: Schulman 2020, "Approximating KL divergence" (joschu.net/blog/kl-approx.html).
    """
    _checks.tensor("logprobs", logprobs, _checks.FLOATS)
    _checks.tensor("ref_logprobs", ref_logprobs, _checks.FLOATS)
    _checks.shape("ref_logprobs", ref_logprobs, tuple(logprobs.shape), because="that of logprobs")
    _checks.same_device("ref_logprobs", ref_logprobs, "logprobs", logprobs)
    _checks.choice("estimator", estimator, (*ESTIMATORS, *STRAIGHT_THROUGH))
    straight_through = estimator.endswith("+")
    estimator = estimator.removesuffix("+")
    log_ratio_limit = clamp_limit("log_ratio_clamp", log_ratio_clamp)
    value_limit = clamp_limit("value_clamp", value_clamp)

    logprobs = _checks.working(logprobs)
    ref_logprobs = ref_logprobs.to(logprobs.dtype).contiguous()
    backend = _registry.select(logprobs)
    if backend == "reference":
        return reference.kl_penalty(
            logprobs,
            ref_logprobs,
            estimator=estimator,
            straight_through=straight_through,
            log_ratio_clamp=log_ratio_limit,
            value_clamp=value_limit,
        )
    return _registry.op("kl_penalty_forward", backend)(
        logprobs, ref_logprobs, ESTIMATORS.index(estimator), straight_through, log_ratio_limit, value_limit
    )


def clamp_limit(name: str, value: float | None) -> float:
    return float("inf") if value is None else _checks.number(name, value, at_least=0.0)


def _setup_context(ctx, inputs, output):
    logprobs, ref_logprobs, *options = inputs
    ctx.save_for_backward(logprobs, ref_logprobs)
    ctx.options = options


def _make_backward(backend):
    def backward(ctx, grad):
        logprobs, ref_logprobs = ctx.saved_tensors
        grad_logprobs = _registry.op("kl_penalty_backward", backend)(
            grad.contiguous(), logprobs, ref_logprobs, *ctx.options
        )
        grad_ref = -grad_logprobs if ctx.needs_input_grad[1] else None
        return grad_logprobs, grad_ref, None, None, None, None

    return backward


_OPTIONS = "int estimator, bool straight_through, float log_ratio_clamp, float value_clamp"
_registry.define(
    "kl_penalty_forward",
    f"(Tensor logprobs, Tensor ref_logprobs, {_OPTIONS}) -> Tensor",
    lambda logprobs, *rest: logprobs.new_empty(logprobs.shape),
    setup_context=_setup_context,
    backward=_make_backward,
)
_registry.define(
    "kl_penalty_backward",
    f"(Tensor grad, Tensor logprobs, Tensor ref_logprobs, {_OPTIONS}) -> Tensor",
    lambda grad, logprobs, *rest: logprobs.new_empty(logprobs.shape),
    backward=_registry.no_second_derivative("kl_penalty_backward"),
)
