import torch
from torch import Tensor

from rlkernels.ops import _checks, _registry
from rlkernels.ops.kl import ESTIMATORS, STRAIGHT_THROUGH, clamp_limit
from rlkernels.reference import policy_loss as reference

OBJECTIVES = ("ppo", "reinforce")
AGGREGATIONS = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "token_sum")
"""Both in the order of the kernels' codes."""


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    objective: str = "ppo",
    aggregation: str = "token_mean",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    log_ratio_clamp: float | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Policy-gradient loss over sampled tokens, with its gradient and metrics from the same pass.

        d = clamp(logprobs - old_logprobs, -log_ratio_clamp, log_ratio_clamp),  ratio = exp(d)
        ppo:        l = -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A)
                    with dual_clip, where A < 0:  l = min(l, -dual_clip * A)
        reinforce:  l = -logprobs * A
        l += kl_coef * kl_penalty(logprobs, ref_logprobs, estimator=kl_estimator)

        token_mean           sum of l over scored tokens / number of scored tokens
        token_sum            sum of l over scored tokens
        seq_mean_token_mean  mean over sequences of (sum of l / scored tokens of the sequence)
        seq_mean_token_sum   mean over sequences of the sum of l

    Sequences without a scored token are not counted. `normalizer` replaces the number of tokens in token_mean, the 1 in
    token_sum and the number of sequences in seq_*, never a sequence's own number of tokens. TRL's grpo is
    seq_mean_token_mean over B, bnpo token_mean, dapo token_sum over its num_items, dr_grpo token_sum over
    B * max_completion_length.

    Args:
        logprobs: [B, T] padded, or [N] packed with cu_seqlens; float32, bfloat16, float16 or float64 (served by the
            reference, in float64).
        old_logprobs: the same shape, of the policy that sampled; None: logprobs themselves (on-policy, ratio 1), which
            are then not read twice.
        advantages: one a token, the shape of logprobs, or one a sequence, [B] or [number of packed sequences].
        mask: the shape of logprobs, bool, integer or float; nonzero is scored; None scores every token.
        cu_seqlens: int32 [S + 1], from 0 to N, not decreasing: where each packed sequence starts.
        ref_logprobs: the same shape as logprobs. Measured in the metrics also where kl_coef is 0.
        clip_low, clip_high: >= 0.
        dual_clip: > 1, or None.
        log_ratio_clamp: >= 0, or None; the gradient through the ratio is 0 where it clamps.
        kl_estimator: as in kl_penalty, the straight-through forms included; not clamped.
        normalizer: a number > 0, or a 0-d tensor.

    Returns:
        loss: 0-d float32 (float64 for float64 logprobs).
        metrics: float32 [6], named by `policy_loss.metrics`, means over scored tokens (0 if there are none):
            ratio_mean; clip_fraction_low (ratio < 1 - clip_low where A < 0) and clip_fraction_high (ratio >
            1 + clip_high where A > 0), both 0 for reinforce; approx_kl, the mean of ratio - 1 - d; ref_kl, the mean of
            the estimator, 0 without a reference; num_tokens.

    Differentiable: the loss with respect to logprobs, once. Everything else is data and must not require a gradient.

    Edge cases: tokens that are not scored may hold NaN or inf and leave no trace. With nothing scored the loss, its
    gradient and the metrics are 0.

    Raises: TypeError, ValueError for wrong dtypes, shapes, devices and options, and, on a CPU, for cu_seqlens that do
    not run from 0 to N without decreasing. On a GPU they make the loss and its gradient NaN, or raise with
    RLKERNELS_CHECK=1.

    Traffic: reads each input once (the mask twice for seq_*, whose lengths come first) and writes the gradient;
    backward reads and writes the gradient once. No host synchronisation.

    References: Schulman et al. 2017 (PPO, arXiv 1707.06347); Ye et al. 2020 (dual clip, arXiv 1912.09729); Yu et al.
    2025 (DAPO, arXiv 2503.14476).
    """
    _checks.tensor("logprobs", logprobs, _checks.FLOATS)
    shape = tuple(logprobs.shape)
    sequences, cu_seqlens = _checks.sequences("logprobs", logprobs, cu_seqlens)

    work = _checks.working(logprobs)
    old_logprobs = _per_token("old_logprobs", old_logprobs, logprobs, work)
    ref_logprobs = _per_token("ref_logprobs", ref_logprobs, logprobs, work)
    _checks.tensor("advantages", advantages, _checks.FLOATS)
    _checks.shape("advantages", advantages, shape, (sequences,), because="one a token or one a sequence")
    _checks.same_device("advantages", advantages, "logprobs", logprobs)
    _checks.no_gradient("advantages", advantages, "the loss is differentiated by logprobs alone")
    advantages = advantages.detach().to(work.dtype).contiguous()
    if mask is not None:
        mask = _checks.mask("mask", mask, "logprobs", logprobs)
    _checks.choice("objective", objective, OBJECTIVES)
    _checks.choice("aggregation", aggregation, AGGREGATIONS)
    _checks.choice("kl_estimator", kl_estimator, (*ESTIMATORS, *STRAIGHT_THROUGH))
    clip_low = _checks.number("clip_low", clip_low, at_least=0.0)
    clip_high = _checks.number("clip_high", clip_high, at_least=0.0)
    dual_limit = float("inf") if dual_clip is None else _checks.number("dual_clip", dual_clip, above=1.0)
    log_ratio_limit = clamp_limit("log_ratio_clamp", log_ratio_clamp)
    kl_coef = _checks.number("kl_coef", kl_coef)
    if kl_coef != 0.0 and ref_logprobs is None:
        raise ValueError(f"ref_logprobs must be given when kl_coef is not 0; got None with kl_coef={kl_coef:g}")
    normalizer_value = 0.0
    if isinstance(normalizer, Tensor):
        _checks.tensor("normalizer", normalizer, (*_checks.FLOATS, *_checks.INTEGERS))
        _checks.shape("normalizer", normalizer, (), because="a number or a 0-d tensor")
        _checks.same_device("normalizer", normalizer, "logprobs", logprobs)
        _checks.no_gradient("normalizer", normalizer, "the loss is differentiated by logprobs alone")
        normalizer = normalizer.detach().to(work.dtype)
    elif normalizer is not None:
        normalizer_value = _checks.number("normalizer", normalizer, above=0.0)
    straight_through = kl_estimator.endswith("+")
    kl_estimator = kl_estimator.removesuffix("+")

    backend = _registry.select(work)
    if cu_seqlens is not None and _checks.values_in_python(backend, cu_seqlens):
        _checks.cu_seqlens_values(cu_seqlens, shape[0])
    if backend == "reference":
        loss, metrics = reference.policy_loss(
            work,
            old_logprobs,
            advantages,
            mask,
            cu_seqlens,
            ref_logprobs,
            normalizer,
            objective=objective,
            aggregation=aggregation,
            clip_low=clip_low,
            clip_high=clip_high,
            dual_clip=dual_limit,
            log_ratio_clamp=log_ratio_limit,
            kl_coef=kl_coef,
            kl_estimator=kl_estimator,
            kl_straight_through=straight_through,
        )
    else:
        loss, metrics, _, _ = _registry.op("policy_loss_forward", backend)(
            work,
            old_logprobs,
            advantages,
            mask,
            cu_seqlens,
            ref_logprobs,
            normalizer if isinstance(normalizer, Tensor) else None,
            normalizer_value,
            OBJECTIVES.index(objective),
            AGGREGATIONS.index(aggregation),
            clip_low,
            clip_high,
            dual_limit,
            log_ratio_limit,
            kl_coef,
            ESTIMATORS.index(kl_estimator),
            straight_through,
        )
    if cu_seqlens is not None and backend != "cpu":
        loss = loss * _checks.nan_unless_valid(cu_seqlens, shape[0], loss)
    return loss, metrics.detach()


METRICS = ("ratio_mean", "clip_fraction_low", "clip_fraction_high", "approx_kl", "ref_kl", "num_tokens")
policy_loss.metrics = METRICS  # type: ignore[attr-defined]


def _per_token(name: str, value: Tensor | None, logprobs: Tensor, work: Tensor) -> Tensor | None:
    if value is None:
        return None
    _checks.tensor(name, value, _checks.FLOATS)
    _checks.shape(name, value, tuple(logprobs.shape), because="that of logprobs")
    _checks.same_device(name, value, "logprobs", logprobs)
    _checks.no_gradient(name, value, "the loss is differentiated by logprobs alone")
    return value.detach().to(work.dtype).contiguous()


def _forward_fake(logprobs, *rest):
    return (
        logprobs.new_empty(()),
        logprobs.new_empty(len(METRICS)),
        logprobs.new_empty(logprobs.shape),
        logprobs.new_empty(()),
    )


def _setup_context(ctx, inputs, output):
    _, _, grad, scale = output
    ctx.save_for_backward(grad, scale)
    ctx.inputs = len(inputs)
    ctx.set_materialize_grads(False)


class _Gradient(torch.autograd.Function):
    """grad * scale * grad_loss, which must not pass for differentiable: grad came out of the kernel."""

    @staticmethod
    def forward(ctx, grad, scale, grad_loss):
        return grad * (scale * grad_loss)

    @staticmethod
    def backward(ctx, *gradients):
        raise NotImplementedError("the gradient of policy_loss cannot be differentiated again")


def _backward(ctx, grad_loss, grad_metrics, grad_grad, grad_scale):
    grad, scale = ctx.saved_tensors
    return _Gradient.apply(grad, scale, grad_loss), *(None,) * (ctx.inputs - 1)


_registry.define(
    "policy_loss_forward",
    "(Tensor logprobs, Tensor? old_logprobs, Tensor advantages, Tensor? mask, Tensor? cu_seqlens, "
    "Tensor? ref_logprobs, Tensor? normalizer, float normalizer_value, int objective, int aggregation, "
    "float clip_low, float clip_high, float dual_clip, float log_ratio_clamp, float kl_coef, int kl_estimator, "
    "bool kl_straight_through) -> (Tensor loss, Tensor metrics, Tensor grad, Tensor scale)",
    _forward_fake,
    setup_context=_setup_context,
    backward=lambda backend: _backward,
)
