"""What the tests of the losses over tokens share: inputs with garbage where nothing is scored, the losses by loops, and
the comparison of a backend with both oracles."""

import itertools
import math

import torch

import rlkernels
from rlkernels import policy_loss
from tolerance import assert_as_accurate_as_torch

NAN = float("nan")
INF = float("inf")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The op that a backward pass calls, by backend; on CPUs PyTorch multiplies.
GRADIENT_OPS = {"cpu": (), "cuda": ("token_loss_backward",), "triton": ("token_loss_backward",)}


def as_given(inputs, main):
    """`inputs` in many dtypes and layouts, and the same as contiguous float32 and bool."""
    dtypes = dict.fromkeys(inputs, torch.float64) | {main: torch.bfloat16, "advantages": torch.float16}
    dtypes |= {"old_logprobs": torch.bfloat16, "mask": torch.int64, "cu_seqlens": torch.int32}
    given = {name: None if value is None else value.to(dtypes[name]) for name, value in inputs.items()}
    for name, value in given.items():
        if value is not None and value.dim() == 2 and name not in (main, "entropy"):
            given[name] = value.t().contiguous().t()
    plain = {name: None if value is None else value.float().contiguous() for name, value in given.items()}
    plain["mask"] = given["mask"] != 0
    if "cu_seqlens" in given:
        plain["cu_seqlens"] = given["cu_seqlens"]
    return given, plain


def spans_of(tokens, cu_seqlens):
    """Where each sequence stands in padded or packed `tokens`."""
    if cu_seqlens is None:
        return [(row, slice(None)) for row in range(tokens.shape[0])]
    return [(slice(start, end),) for start, end in itertools.pairwise(cu_seqlens.tolist())]


def aggregate_by_loops(losses, aggregation, normalizer):
    """One loss from those of each sequence's scored tokens."""
    losses = [loss for loss in losses if len(loss)]
    if aggregation == "seq_mean_token_mean":
        losses = [loss / len(loss) for loss in losses]
    total = sum(loss.sum() for loss in losses)
    if normalizer is not None:
        return total / float(normalizer)
    return total / {"token_mean": sum(map(len, losses)), "token_sum": 1}.get(aggregation, len(losses))


def kl(logprob, ref, estimator):
    difference = logprob - ref
    k2 = 0.5 * difference**2
    value = {"k1": difference, "k2": k2, "k3": torch.exp(-difference) - 1 + difference, "abs": difference.abs()}[
        estimator.removesuffix("+")
    ]
    return value.detach() + k2 - k2.detach() if estimator.endswith("+") else value


def clipped_surrogate(ratio, advantage, clip_low, clip_high, dual_clip, delta):
    capped = ratio if delta is None else ratio.clamp(max=delta)
    loss = torch.maximum(-advantage * capped, -advantage * ratio.clamp(1 - clip_low, 1 + clip_high))
    if dual_clip is not None:
        loss = torch.where(advantage < 0, torch.minimum(loss, -dual_clip * advantage), loss)
    low = (ratio < 1 - clip_low) & (advantage < 0)
    return loss, low, (ratio > 1 + clip_high) & (advantage > 0)


def weights_by_loops(old, sampler, correction, cap):
    """The weights of one sequence's tokens, and whether each was capped."""
    if sampler is None:
        return torch.ones_like(old), torch.zeros_like(old, dtype=torch.bool)
    difference = torch.where((old - sampler).isnan(), torch.zeros_like(old), old - sampler)
    weight = difference.exp() if correction.startswith("token") else difference.sum().exp().expand_as(old)
    capped = weight > cap
    return torch.where(capped, torch.full_like(weight, cap if correction.endswith("truncate") else 0.0), weight), capped


def policy_loss_by_loops(
    logprobs,
    old_logprobs,
    advantages,
    mask=None,
    cu_seqlens=None,
    ref_logprobs=None,
    sampler_logprobs=None,
    entropy=None,
    objective="ppo",
    aggregation="token_mean",
    clip_low=0.2,
    clip_high=0.2,
    dual_clip=None,
    delta=None,
    log_ratio_clamp=None,
    sapo_temperature_pos=1.0,
    sapo_temperature_neg=1.05,
    vespo_k_pos=2.0,
    vespo_lambda_pos=3.0,
    vespo_k_neg=3.0,
    vespo_lambda_neg=2.0,
    kl_coef=0.0,
    kl_estimator="k3",
    entropy_coef=0.0,
    sampler_correction="sequence_mask",
    sampler_cap=3.0,
    normalizer=None,
):
    """One sequence after the other, only its scored tokens, the formula as in the papers; autograd does the rest.

    Returns loss, metrics, and for each of both the mean of the absolute values that it is a sum and difference of."""
    per_token = advantages.shape == logprobs.shape
    losses, loss_sizes, terms, term_sizes = [], [], [], []
    limit = INF if log_ratio_clamp is None else log_ratio_clamp
    for number, span in enumerate(spans_of(logprobs, cu_seqlens)):
        scored = torch.ones_like(logprobs[span], dtype=torch.bool) if mask is None else mask[span]
        if not scored.any():
            continue
        logprob = logprobs[span][scored]
        old = logprob.detach() if old_logprobs is None else old_logprobs[span][scored]
        advantage = advantages[span][scored] if per_token else advantages[number].expand(len(logprob))
        sampler = None if sampler_logprobs is None else sampler_logprobs[span][scored]
        weight, capped = weights_by_loops(old, sampler, sampler_correction, sampler_cap)
        clips = (clip_low, clip_high, dual_clip, delta)
        raw = logprob - old
        log_ratio = raw.clamp(-limit, limit)
        ratio = log_ratio.exp()
        low = high = torch.zeros_like(scored[scored])
        applied = weight
        if objective == "ppo":
            loss, low, high = clipped_surrogate(ratio, advantage, *clips)
        elif objective == "gspo":
            if per_token or (sampler is not None and sampler_correction.startswith("token")):
                mean = raw.mean().detach() + logprob - logprob.detach()
            else:
                mean = raw.mean().expand_as(raw)
            ratio = mean.clamp(-limit, limit).exp()
            loss, low, high = clipped_surrogate(ratio, advantage, *clips)
        elif objective == "sapo":
            tau = torch.where(advantage > 0, sapo_temperature_pos, torch.full_like(ratio, sapo_temperature_neg))
            loss = -(4 / tau) / (1 + torch.exp(-tau * (ratio - 1))) * advantage
        elif objective == "gmpo":
            bounded = torch.where(advantage > 0, torch.clamp(raw, max=clip_high), torch.clamp(raw, min=-clip_low))
            bounded = torch.where(advantage == 0, torch.zeros_like(raw), bounded)
            low, high = (raw < -clip_low) & (advantage < 0), (raw > clip_high) & (advantage > 0)
            ratio = bounded.mean().clamp(-limit, limit).exp().expand_as(raw)
            loss = -advantage.mean() * ratio
            if sampler_correction.startswith("token"):
                applied = weight.clamp(min=1e-8).log().mean().exp()
        elif objective == "vespo":
            product = weight if sampler_correction.startswith("token") else weight[:1]
            log_w = raw.detach().clamp(-20, 20).sum() + product.clamp(min=1e-8).log().sum()
            w = log_w.exp().clamp(1e-8, math.exp(20.0))
            k = torch.where(advantage >= 0, vespo_k_pos, torch.full_like(ratio, vespo_k_neg))
            rate = torch.where(advantage >= 0, vespo_lambda_pos, torch.full_like(ratio, vespo_lambda_neg))
            ratio = rate.exp() * w**k * torch.exp(-rate * w)
            loss = -ratio * advantage * logprob
            applied = torch.ones_like(weight)
        else:
            factor = torch.ones_like(ratio)
            if objective == "cispo":
                factor = ratio.detach().clamp(1 - clip_low, 1 + clip_high)
                low, high = ratio < 1 - clip_low, ratio > 1 + clip_high
            elif objective.startswith("dppo"):
                p, q = logprob.detach().exp(), old.exp()
                distance = (p - q).abs()
                if objective == "dppo_kl":
                    distance = q * (q / p).log() + (1 - q) * ((1 - q + 1e-8) / (1 - p + 1e-8)).log()
                high = (advantage > 0) & (p > q) & (distance > clip_high)
                low = (advantage < 0) & (p < q) & (distance > clip_low)
                factor = ratio.detach().clamp(max=20.0 if delta is None else delta).masked_fill(low | high, 0.0)
            loss = -factor * advantage * logprob
        loss = torch.where(applied == 0, torch.zeros_like(loss), applied * loss)
        size, penalty, difference = loss.abs(), torch.zeros_like(ratio), torch.zeros_like(ratio)
        if ref_logprobs is not None:
            reference = ref_logprobs[span][scored]
            difference = (logprob - reference).abs()
            penalty = kl(logprob, reference, kl_estimator)
        if kl_coef:
            loss = loss + kl_coef * penalty
            size = size + kl_coef * (penalty.abs() + difference)
        bonus = torch.zeros_like(ratio) if entropy is None else entropy[span][scored]
        if entropy_coef:
            loss = loss - entropy_coef * bonus
            size = size + (entropy_coef * bonus).abs()
        losses.append(loss)
        loss_sizes.append(size)
        token_ratio = log_ratio.exp()
        approx_kl = token_ratio - 1 - log_ratio
        means = [ratio, low, high, approx_kl, penalty, bonus, weight, capped]
        terms.append(torch.stack([value.to(ratio.dtype) for value in means]))
        means[3], means[4], means[5] = token_ratio + 1 + log_ratio.abs(), penalty.abs() + difference, bonus.abs()
        term_sizes.append(torch.stack([value.to(ratio.dtype) for value in means]))
    if not losses:
        nothing = (logprobs[:0].sum(), torch.zeros(9, dtype=logprobs.dtype))
        return *nothing, *nothing
    metrics, metric_sizes = (
        torch.cat([torch.cat(parts, 1).mean(1), torch.tensor([sum(map(len, losses))])]).detach()
        for parts in (terms, term_sizes)
    )
    loss, size = (aggregate_by_loops(each, aggregation, normalizer) for each in (losses, loss_sizes))
    return loss, metrics, size, metric_sizes


def run(function, inputs, upstream=1.0, **options):
    """Loss, metrics and the gradients, by the log-probabilities and where it is given by the entropy, of the loss times
    `upstream`."""
    leaves = {name: inputs[name].clone().requires_grad_() for name in ("logprobs", "entropy") if name in inputs}
    loss, metrics, *sizes = function(**(inputs | leaves), **options)
    gradients = torch.autograd.grad(loss * upstream, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return loss.detach(), metrics, *gradients, *(size.detach() for size in sizes)


def assert_matches_oracles(inputs, upstream=-1.7, **options):
    """The backend against the reference in float64, and that against loops."""
    got = run(policy_loss, inputs, upstream, **options)
    in_double = {name: v.double() if v is not None and v.is_floating_point() else v for name, v in inputs.items()}
    with rlkernels.use_backend("reference"):
        oracle = run(policy_loss, in_double, upstream, **options)
        naive = run(policy_loss, inputs, upstream, **options)
    on_host = {name: v if v is None else v.cpu() for name, v in in_double.items()}
    *by_loops, loss_size, metric_sizes = run(policy_loss_by_loops, on_host, upstream, **options)
    for one, other in zip(oracle, by_loops, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-9, atol=1e-12)
    for gradients in zip(got[2:], oracle[2:], naive[2:], strict=True):
        assert_as_accurate_as_torch(*gradients, what="gradient", gradient=True)
    assert_sums_as_accurate(got, oracle, naive, (loss_size, metric_sizes))
    return got


def assert_sums_as_accurate(got, oracle, naive, sizes):
    """Loss and metrics: a sum of terms of both signs is as accurate as its terms, of the mean size given, are."""
    for what, size, *three in zip(("loss", "metrics"), sizes, got, oracle, naive, strict=False):
        value, exact, eager = (one.detach().double().cpu() for one in three)
        allowed = 2 * (eager - exact).abs() + 2 * torch.finfo(torch.float32).eps * size
        assert ((value - exact).abs() <= allowed).all(), f"{what}: {value}, wanted {exact}, PyTorch {eager}"


def make_inputs(
    lengths,
    width,
    device,
    dtype=torch.float32,
    packed=False,
    per_token=False,
    distance=0.3,
    old=True,
    reference=True,
    sampler=False,
    entropy=False,
    drop=0.2,
    garbage=True,
    seed=0,
):
    """Sequences of `lengths` tokens. A part (`drop`) of them is not scored, as if a tool had written it, padded to
    `width` or packed. Every value at a token that is not scored is NaN or infinite. The sampler is at 1/8 of the
    `distance` of the others, and has no number for every ninth token; every ninth advantage of a token is 0."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), width)
    logprobs = -3 * torch.rand(shape, generator=generator)
    values = {
        "logprobs": logprobs,
        "old_logprobs": -(logprobs + distance * torch.randn(shape, generator=generator)).abs(),
        "ref_logprobs": -(logprobs + distance * torch.randn(shape, generator=generator)).abs(),
        "token_advantages": torch.randn(shape, generator=generator),
    }
    within = torch.arange(width) < torch.tensor(lengths, dtype=torch.int64).view(-1, 1)
    mask = within & (torch.rand(shape, generator=generator) >= drop)
    junk = torch.tensor([NAN, INF, -INF])[torch.randint(3, shape, generator=generator)]
    advantages = torch.randn(len(lengths), generator=generator)
    values["sampler_logprobs"] = values["old_logprobs" if old else "logprobs"] + distance / 8 * torch.randn(
        shape, generator=generator
    )
    unknown = torch.rand(shape, generator=generator) < 1 / 9
    values["sampler_logprobs"] = values["sampler_logprobs"].masked_fill(unknown, NAN)
    values["entropy"] = 2 * torch.rand(shape, generator=generator)
    none = torch.rand(shape, generator=generator) < 1 / 9
    values["token_advantages"] = values["token_advantages"].masked_fill(none, 0.0)
    if garbage:
        values = {name: torch.where(mask, value, junk) for name, value in values.items()}
        advantages[~mask.any(1)] = NAN
    if packed:
        values = {name: value[within] for name, value in values.items()}
        mask = mask[within]
    inputs = {
        "logprobs": values["logprobs"].to(device, dtype),
        "old_logprobs": values["old_logprobs"].to(device, dtype) if old else None,
        "advantages": (values["token_advantages"] if per_token else advantages).to(device),
        "mask": mask.to(device),
    }
    for name, given in (("ref_logprobs", reference), ("sampler_logprobs", sampler), ("entropy", entropy)):
        if given:
            inputs[name] = values[name].to(device, dtype)
    if packed:
        ends = torch.tensor([0, *lengths]).cumsum(0)
        inputs["cu_seqlens"] = ends.to(device, torch.int32)
    return inputs
