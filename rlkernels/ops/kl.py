import torch
from torch import Tensor

from rlkernels import _backends, _registry
from rlkernels._codes import KL_ESTIMATORS, STRAIGHT_THROUGH
from rlkernels.ops import _checks
from rlkernels.ops._first_order import no_second_derivative
from rlkernels.reference import kl as reference

SCORE_AT = ("last", "after_last")


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

    Differentiable: with respect to both inputs, once; the gradients are each other's negatives. Second derivatives and
    forward mode raise NotImplementedError, but in the reference.

    Edge cases: -inf in both inputs gives NaN; empty input gives empty output.

    Raises: TypeError, ValueError for wrong dtypes, shapes, devices and options.

    Traffic: forward reads both inputs and writes the result; backward reads both and the upstream gradient and writes
    one gradient (a second one if the reference needs it). On a CPU bfloat16 and float16 inputs are widened to float32
    first.

    References: Schulman 2020, "Approximating KL divergence" (joschu.net/blog/kl-approx.html).
    """
    _checks.tensor("logprobs", logprobs, _checks.FLOATS)
    _checks.tensor("ref_logprobs", ref_logprobs, _checks.FLOATS)
    _checks.shape("ref_logprobs", ref_logprobs, tuple(logprobs.shape), because="that of logprobs")
    _checks.same_device("ref_logprobs", ref_logprobs, "logprobs", logprobs)
    _checks.choice("estimator", estimator, (*KL_ESTIMATORS, *STRAIGHT_THROUGH))
    straight_through = estimator.endswith("+")
    estimator = estimator.removesuffix("+")
    log_ratio_limit = clamp_limit("log_ratio_clamp", log_ratio_clamp)
    value_limit = clamp_limit("value_clamp", value_clamp)

    backend = _backends.select(logprobs, "kl_penalty")
    dtype = _checks.arithmetic(logprobs)
    logprobs, ref_logprobs = (_checks.numbers(value, backend, dtype) for value in (logprobs, ref_logprobs))
    if backend == "reference":
        return reference.kl_penalty(
            logprobs,
            ref_logprobs,
            estimator=estimator,
            straight_through=straight_through,
            log_ratio_clamp=log_ratio_limit,
            value_clamp=value_limit,
        )
    return _registry.call(
        "kl_penalty_forward",
        backend,
        logprobs,
        ref_logprobs,
        KL_ESTIMATORS.index(estimator),
        straight_through,
        log_ratio_limit,
        value_limit,
    )


def shaped_rewards(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor | None = None,
    *,
    kl_coef: float,
    estimator: str = "k1",
    cu_seqlens: Tensor | None = None,
    score_at: str = "last",
) -> Tensor:
    """Per-token rewards of sequences with one score each: a KL penalty at every token, and the score at the end.

        reward[t]  = -kl_coef * kl_penalty(logprobs[t], ref_logprobs[t])     at scored tokens, 0 elsewhere
        reward[t] += scores[sequence]                                        at one token of each sequence

    score_at="last": the sequence's last scored token (verl, OpenRLHF). "after_last": the token after it, which is not
    scored and so has nothing but the score, or, where the sequence has no room for it, the last scored token (TRL's
    last PPO, whose value mask goes one token further than its loss mask).

    Args:
        scores: [B], or [number of packed sequences]; float32, bfloat16, float16 or float64.
        logprobs: [B, T] padded, or [N] packed with cu_seqlens; of these dtypes (float64 is served by the reference, in
            float64); of the policy.
        ref_logprobs: the same shape; of the reference model.
        mask: the same shape, bool, integer or float; nonzero is scored; None scores every token. Scored tokens need not
            be consecutive.
        kl_coef: any number; with 0 nothing but the scores is left, also where an estimate would overflow.
        estimator: "k1", "k2", "k3" or "abs", as in kl_penalty, not clamped. verl clamps k3 (log-ratio 20, value 10),
            OpenRLHF each estimate at 10.
        cu_seqlens: int32 [S + 1], from 0 to N, not decreasing: where each packed sequence starts.

    Returns:
        float32 of the shape of logprobs (float64 for float64 logprobs).

    Not differentiable: rewards are data. Forward mode raises NotImplementedError.

    Edge cases: tokens that are not scored may hold NaN or inf and leave no trace. A sequence without a scored token has
    rewards of 0, and its score is lost: there is no token that it could reward (verl and OpenRLHF put it on the last
    padding token).

    Raises: TypeError, ValueError for wrong dtypes, shapes, devices and options, for inputs that require a gradient,
    and, on a CPU, for cu_seqlens that do not run from 0 to N without decreasing. On a GPU they make the rewards NaN, or
    raise with RLKERNELS_CHECK=1.

    Traffic: reads both log-probabilities once, the mask twice (to find the last scored token) and writes the rewards.
    On a CPU bfloat16 and float16 inputs are widened to float32 first. No host synchronisation.

    References: Ouyang et al. 2022 (InstructGPT, arXiv 2203.02155, equation 2); Stiennon et al. 2020 (arXiv 2009.01325).
    """
    because = "rewards are data: gradients do not flow through them"
    _checks.tensor("logprobs", logprobs, _checks.FLOATS)
    _checks.no_gradient("logprobs", logprobs, because)
    sequences, cu_seqlens = _checks.sequences("logprobs", logprobs, cu_seqlens)
    _checks.tensor("ref_logprobs", ref_logprobs, _checks.FLOATS)
    _checks.shape("ref_logprobs", ref_logprobs, tuple(logprobs.shape), because="that of logprobs")
    _checks.same_device("ref_logprobs", ref_logprobs, "logprobs", logprobs)
    _checks.no_gradient("ref_logprobs", ref_logprobs, because)
    _checks.tensor("scores", scores, _checks.FLOATS)
    _checks.shape("scores", scores, (sequences,), because="one a sequence")
    _checks.same_device("scores", scores, "logprobs", logprobs)
    _checks.no_gradient("scores", scores, because)
    if mask is not None:
        _checks.mask("mask", mask, "logprobs", logprobs)
    kl_coef = _checks.number("kl_coef", kl_coef)
    _checks.choice("estimator", estimator, KL_ESTIMATORS)
    _checks.choice("score_at", score_at, SCORE_AT)

    after_last = score_at == "after_last"
    backend = _backends.select(logprobs, "shaped_rewards")
    dtype = _checks.arithmetic(logprobs)
    scores, logprobs, ref_logprobs = (
        _checks.numbers(value.detach(), backend, dtype) for value in (scores, logprobs, ref_logprobs)
    )
    mask = _checks.flags(mask, backend)
    if cu_seqlens is not None and _checks.values_in_python(backend, cu_seqlens):
        _checks.cu_seqlens_values(cu_seqlens, logprobs.shape[0])
    if backend == "reference":
        rewards = reference.shaped_rewards(
            scores,
            logprobs,
            ref_logprobs,
            mask,
            cu_seqlens,
            kl_coef=kl_coef,
            estimator=estimator,
            after_last=after_last,
        )
        if cu_seqlens is None:
            return rewards
        return rewards * _checks.nan_unless_valid(cu_seqlens, logprobs.shape[0], rewards)
    return _registry.op("shaped_rewards", backend)(
        scores, logprobs, ref_logprobs, mask, cu_seqlens, kl_coef, KL_ESTIMATORS.index(estimator), after_last
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
        grad_logprobs, grad_ref = _registry.op("kl_penalty_backward", backend)(
            grad.contiguous(), logprobs, ref_logprobs, *ctx.options, ctx.needs_input_grad[1]
        )
        return grad_logprobs, grad_ref if ctx.needs_input_grad[1] else None, None, None, None, None

    return backward


_OPTIONS = "int estimator, bool straight_through, float log_ratio_clamp, float value_clamp"
_registry.define(
    "kl_penalty_forward",
    f"(Tensor logprobs, Tensor ref_logprobs, {_OPTIONS}) -> Tensor",
    lambda logprobs, *rest: logprobs.new_empty(logprobs.shape, dtype=torch.float32),
    part_of="kl_penalty",
    setup_context=_setup_context,
    backward=_make_backward,
)
_registry.define(
    "kl_penalty_backward",
    f"(Tensor grad, Tensor logprobs, Tensor ref_logprobs, {_OPTIONS}, bool need_ref) "
    "-> (Tensor grad_logprobs, Tensor grad_ref)",
    lambda grad, logprobs, ref_logprobs, *rest: (
        logprobs.new_empty(logprobs.shape),
        ref_logprobs.new_empty(logprobs.shape if rest[-1] else 0),
    ),
    part_of="kl_penalty",
    backward=no_second_derivative("kl_penalty_backward"),
)
_registry.define(
    "shaped_rewards",
    "(Tensor scores, Tensor logprobs, Tensor ref_logprobs, Tensor? mask, Tensor? cu_seqlens, "
    "float kl_coef, int estimator, bool after_last) -> Tensor",
    lambda scores, logprobs, *rest: logprobs.new_empty(logprobs.shape, dtype=torch.float32),
    part_of="shaped_rewards",
)
