from typing import Any

import torch
from torch import Tensor

from rlkernels import _backends, _registry
from rlkernels._codes import (
    AGGREGATIONS,
    KL_ESTIMATORS,
    OBJECTIVES,
    POLICY_METRICS,
    SAMPLER_CORRECTIONS,
    STRAIGHT_THROUGH,
    PolicyOptions,
)
from rlkernels.ops import _checks
from rlkernels.ops._token_losses import check_per_token, gradients, normalizer_parts
from rlkernels.ops.kl import clamp_limit
from rlkernels.reference import policy_loss as reference


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    sampler_logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
    objective: str = "ppo",
    aggregation: str = "token_mean",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    delta: float | None = None,
    log_ratio_clamp: float | None = None,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    entropy_coef: float = 0.0,
    sampler_correction: str = "sequence_mask",
    sampler_cap: float = 3.0,
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Policy-gradient loss over sampled tokens, with its gradient and metrics from the same pass.

        x = logprobs - old_logprobs,  d = clamp(x, -log_ratio_clamp, log_ratio_clamp),  r = exp(d)
        clip(r) = clamp(r, 1 - clip_low, 1 + clip_high),  sg(.) is not differentiated

        ppo        l = -min(min(r, delta) A, clip(r) A);  with dual_clip, where A < 0:  l = min(l, -dual_clip A)
        gspo       as ppo, with r = exp(clamp(mean of x over the sequence)) for each of its tokens
        reinforce  l = -A logprobs, GPG's loss too
        cispo      l = -sg(clip(r)) A logprobs
        sapo       l = -(4 / tau) sigmoid(tau (r - 1)) A,  tau = temperature_pos where A > 0, else temperature_neg
        gmpo       l = -R A,  R = exp(clamp(mean of c over the sequence)),  A the sequence's mean;
                   c = min(x, clip_high) where A > 0, max(x, -clip_low) where A < 0
        dppo_tv    l = -sg(min(r, delta)) A logprobs where trusted, else 0, of p = exp(logprobs), q = exp(old_logprobs):
                   trusted where p - q <= clip_high if A > 0, where q - p <= clip_low if A < 0
        dppo_kl    the same with q log(q / p) + (1 - q) log((1 - q + 1e-8) / (1 - p + 1e-8)) in place of |p - q|
        vespo      l = -sg(phi) A logprobs,  phi = exp(lambda + k log w - lambda w),  k and lambda by the sign of A,
                   log w = clamp(sum of clamp(x, -20, 20) over the sequence, log 1e-8, 20)

        with sampler_logprobs: l = u l, not differentiated by u, where u = exp(old_logprobs - sampler_logprobs), for
        sequence_* the product over the sequence;  truncate: min(u, sampler_cap),  mask: 0 where u > sampler_cap.
        gmpo takes the geometric mean of its tokens' u instead, vespo their product into w (each at least 1e-8)

        l += kl_coef * kl_penalty(logprobs, ref_logprobs, estimator=kl_estimator) - entropy_coef * entropy

        token_mean           sum of l over scored tokens / number of scored tokens
        token_sum            sum of l over scored tokens
        seq_mean_token_mean  mean over sequences of (sum of l / scored tokens of the sequence)
        seq_mean_token_sum   mean over sequences of the sum of l

    Sequences without a scored token are not counted. `normalizer` replaces the number of tokens in token_mean, the 1 in
    token_sum and the number of sequences in seq_*, never a sequence's own number of tokens. TRL's grpo, gspo and sapo
    are seq_mean_token_mean over B, bnpo token_mean, dapo, cispo and vespo token_sum over their num_items, dr_grpo
    token_sum over B * max_completion_length, luspo objective gspo with seq_mean_token_sum over B; verl's
    seq-mean-token-sum-norm is seq_mean_token_sum over the number of sequences times its loss_scale_factor.

    Args:
        logprobs: [B, T] padded, or [N] packed with cu_seqlens; float32, bfloat16, float16 or float64 (served by the
            reference, in float64).
        old_logprobs: the same shape, of the policy that sampled; None: logprobs themselves (on-policy, ratio 1), which
            are then not read twice.
        advantages: A, one a token, the shape of logprobs, or one a sequence, [B] or [number of packed sequences] (if
            there are as many as packed tokens: one a token).
        mask: the shape of logprobs, bool, integer or float; nonzero is scored; None scores every token.
        cu_seqlens: int32 [S + 1], from 0 to N, not decreasing: where each packed sequence starts.
        ref_logprobs: the same shape as logprobs. Measured in the metrics also where kl_coef is 0.
        sampler_logprobs: the same shape, as the inference engine gave them, which samples from slightly other
            probabilities than old_logprobs; NaN: weight 1.
        entropy: the same shape. Measured in the metrics also where entropy_coef is 0.
        clip_low, clip_high: >= 0. Of the ratio; of its logarithm in gmpo, whose authors use 0.4; of the probability, or
            of the divergence, in dppo. cispo as in TRL: clip_low=1, clip_high = epsilon_high - 1.
        dual_clip: > 1, or None; ppo and gspo.
        delta: > 0, or None for no bound, in dppo for 20, as in verl.
        log_ratio_clamp: >= 0, or None; the gradient through the ratio is 0 where it clamps.
        sapo_temperature_pos, sapo_temperature_neg, vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg: > 0.
        kl_estimator: as in kl_penalty, the straight-through forms included; not clamped.
        sampler_correction: "token_truncate", "token_mask", "sequence_truncate" or "sequence_mask".
        sampler_cap: > 0.
        normalizer: a number > 0, or a 0-d tensor.

    Returns:
        loss: 0-d float32 (float64 for float64 logprobs).
        metrics: float32 [9], named by `policy_loss.metrics`, means over scored tokens (0 if there are none):
            ratio_mean, of r (gspo: the sequence's, gmpo: R, vespo: phi); clip_fraction_low (ratio < 1 - clip_low where
            A < 0) and clip_fraction_high (ratio > 1 + clip_high where A > 0), in gmpo of tokens whose x is bounded, in
            dppo of those not trusted, in cispo whatever A is, 0 for the others; approx_kl, the mean of exp(d) - 1 - d;
            ref_kl, the mean of the estimator, 0 without a reference; entropy, 0 if not given; sampler_weight, of u as
            capped, 1 without a sampler, and sampler_capped, where u > sampler_cap; num_tokens.

    Differentiable: the loss with respect to logprobs and entropy, once. Second derivatives and forward mode raise
    NotImplementedError, but in the reference. The gradient of gspo is that of GSPO-token, where each token's ratio is r
    with the derivative of its own; with one advantage and one weight a sequence it is that of the sequence's ratio.
    Everything else is data and must not require a gradient.

    Edge cases: tokens that are not scored may hold NaN or inf and leave no trace, nor do those of weight 0, but in the
    metrics. With nothing scored the loss, its gradient and the metrics are 0.

    Raises: TypeError, ValueError for wrong dtypes, shapes, devices and options, and, on a CPU, for cu_seqlens that do
    not run from 0 to N without decreasing. On a GPU they make the loss and its gradient NaN, or raise with
    RLKERNELS_CHECK=1.

    Traffic: reads each input once (the mask twice for seq_*, whose lengths come first; for gspo, gmpo, vespo and
    sequence_*, whose sums over sequences come first, all but ref_logprobs and entropy twice), on GPUs in the dtype
    given, and writes the gradients asked for in float32; backward reads each once and writes it in the dtype of its
    input. No host synchronisation.

    References: Schulman et al. 2017 (PPO, arXiv 1707.06347); Ye et al. 2020 (dual clip, arXiv 1912.09729); Yu et al.
    2025 (DAPO, arXiv 2503.14476); INTELLECT-2 (delta, arXiv 2505.07291); GSPO (2507.18071), MiniMax-M1 (CISPO,
    2506.13585), SAPO (2511.20347), GMPO (2507.20673), GPG (2504.02546), DPPO (2602.04879), VESPO (2602.10693),
    LUSPO (2602.05261).
    """
    _checks.tensor("logprobs", logprobs, _checks.FLOATS)
    shape = tuple(logprobs.shape)
    sequences, cu_seqlens = _checks.sequences("logprobs", logprobs, cu_seqlens)

    for name, value in (
        ("old_logprobs", old_logprobs),
        ("ref_logprobs", ref_logprobs),
        ("sampler_logprobs", sampler_logprobs),
        ("entropy", entropy),
    ):
        if value is not None:
            check_per_token(name, value, "logprobs", logprobs, differentiable=name == "entropy")
    _checks.tensor("advantages", advantages, _checks.FLOATS)
    _checks.shape("advantages", advantages, shape, (sequences,), because="one a token or one a sequence")
    _checks.same_device("advantages", advantages, "logprobs", logprobs)
    _checks.no_gradient("advantages", advantages, "gradients do not flow to advantages")
    if mask is not None:
        _checks.mask("mask", mask, "logprobs", logprobs)
    _checks.choice("objective", objective, OBJECTIVES)
    _checks.choice("aggregation", aggregation, AGGREGATIONS)
    _checks.choice("kl_estimator", kl_estimator, (*KL_ESTIMATORS, *STRAIGHT_THROUGH))
    _checks.choice("sampler_correction", sampler_correction, SAMPLER_CORRECTIONS)
    clip_low = _checks.number("clip_low", clip_low, at_least=0.0)
    clip_high = _checks.number("clip_high", clip_high, at_least=0.0)
    dual_limit = float("inf") if dual_clip is None else _checks.number("dual_clip", dual_clip, above=1.0)
    if delta is None:
        ratio_limit = 20.0 if objective in ("dppo_tv", "dppo_kl") else float("inf")
    else:
        ratio_limit = _checks.number("delta", delta, above=0.0)
    log_ratio_limit = clamp_limit("log_ratio_clamp", log_ratio_clamp)
    k_pos = k_neg = rate_pos = rate_neg = 1.0
    if objective == "sapo":
        rate_pos = _checks.number("sapo_temperature_pos", sapo_temperature_pos, above=0.0)
        rate_neg = _checks.number("sapo_temperature_neg", sapo_temperature_neg, above=0.0)
    elif objective == "vespo":
        k_pos = _checks.number("vespo_k_pos", vespo_k_pos, above=0.0)
        k_neg = _checks.number("vespo_k_neg", vespo_k_neg, above=0.0)
        rate_pos = _checks.number("vespo_lambda_pos", vespo_lambda_pos, above=0.0)
        rate_neg = _checks.number("vespo_lambda_neg", vespo_lambda_neg, above=0.0)
    kl_coef = _checks.number("kl_coef", kl_coef)
    if kl_coef != 0.0 and ref_logprobs is None:
        raise ValueError(f"ref_logprobs must be given when kl_coef is not 0; got None with kl_coef={kl_coef:g}")
    entropy_coef = _checks.number("entropy_coef", entropy_coef)
    if entropy_coef != 0.0 and entropy is None:
        raise ValueError(
            f"entropy must be given when entropy_coef is not 0; got None with entropy_coef={entropy_coef:g}"
        )
    sampler_cap = _checks.number("sampler_cap", sampler_cap, above=0.0)
    normalizer, normalizer_value = normalizer_parts(normalizer, "logprobs", logprobs)
    options = PolicyOptions(
        aggregation=AGGREGATIONS.index(aggregation),
        objective=OBJECTIVES.index(objective),
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_limit,
        delta=ratio_limit,
        log_ratio_clamp=log_ratio_limit,
        k_pos=k_pos,
        k_neg=k_neg,
        rate_pos=rate_pos,
        rate_neg=rate_neg,
        kl_coef=kl_coef,
        kl_estimator=KL_ESTIMATORS.index(kl_estimator.removesuffix("+")),
        kl_straight_through=kl_estimator.endswith("+"),
        entropy_coef=entropy_coef,
        sampler_correction=SAMPLER_CORRECTIONS.index(sampler_correction),
        sampler_cap=sampler_cap,
    )

    backend = _backends.select(logprobs, "policy_loss")
    if cu_seqlens is not None and _checks.values_in_python(backend, cu_seqlens):
        _checks.cu_seqlens_values(cu_seqlens, shape[0])
    dtype = _checks.arithmetic(logprobs)
    differentiated = torch.is_grad_enabled()
    tensors = (
        _checks.numbers(logprobs, backend, dtype),
        _checks.numbers(old_logprobs, backend, dtype),
        _checks.numbers(advantages, backend, dtype),
        _checks.flags(mask, backend),
        cu_seqlens,
        _checks.numbers(ref_logprobs, backend, dtype),
        _checks.numbers(sampler_logprobs, backend, dtype),
        _checks.numbers(entropy, backend, dtype),
    )
    divisor = _checks.numbers(normalizer, backend, dtype)
    if backend == "reference":
        arguments: Any = (*tensors, normalizer_value or divisor, options)
        loss, metrics = reference.policy_loss(*arguments)
        if cu_seqlens is not None:
            loss = loss * _checks.nan_unless_valid(cu_seqlens, shape[0], loss)
        return loss, metrics
    loss, metrics, *_ = _registry.call(
        "policy_loss_forward",
        backend,
        *tensors,
        divisor,
        normalizer_value,
        *options,
        differentiated and logprobs.requires_grad,
        differentiated and entropy is not None and entropy.requires_grad and entropy_coef != 0.0,
    )
    return loss, metrics


policy_loss.metrics = POLICY_METRICS  # type: ignore[attr-defined]


def _forward_fake(logprobs, *rest):
    # Gradients are in float32 until they are scaled: they are rounded once, and do not underflow in float16 before a
    # loss scale reaches them.
    *_, need_grad, need_entropy_grad = rest
    grads = [logprobs.shape if needed else (0,) for needed in (need_grad, need_entropy_grad)]
    shapes = ((), (len(POLICY_METRICS),), *grads, ())
    return tuple(logprobs.new_empty(shape, dtype=torch.float32) for shape in shapes)


def _setup_context(ctx, inputs, output):
    _, metrics, grad, entropy_grad, scale = output
    # The gradients stay differentiable, so that using them in a graph is refused rather than left out of it.
    ctx.mark_non_differentiable(metrics, scale)
    ctx.save_for_backward(grad, entropy_grad, scale)
    ctx.nothing = (None,) * (len(inputs) - 8)
    ctx.needed = inputs[-2:]
    ctx.dtypes = [_checks.FLOATS.index(torch.float32 if x is None else x.dtype) for x in (inputs[0], inputs[7])]
    ctx.set_materialize_grads(False)


def _make_backward(backend):
    def backward(ctx, grad_loss, *others):
        grad, entropy_grad = gradients(backend, *ctx.saved_tensors, grad_loss, *ctx.dtypes)
        need_grad, need_entropy_grad = ctx.needed
        return grad if need_grad else None, *(None,) * 6, entropy_grad if need_entropy_grad else None, *ctx.nothing

    return backward


_registry.define(
    "policy_loss_forward",
    "(Tensor logprobs, Tensor? old_logprobs, Tensor advantages, Tensor? mask, Tensor? cu_seqlens, "
    "Tensor? ref_logprobs, Tensor? sampler_logprobs, Tensor? entropy, Tensor? normalizer, float normalizer_value, "
    + ", ".join(f"{kind.__name__} {name}" for name, kind in PolicyOptions.__annotations__.items())
    + ", bool need_grad, bool need_entropy_grad) "
    "-> (Tensor loss, Tensor metrics, Tensor grad, Tensor entropy_grad, Tensor scale)",
    _forward_fake,
    part_of="policy_loss",
    setup_context=_setup_context,
    backward=_make_backward,
)
