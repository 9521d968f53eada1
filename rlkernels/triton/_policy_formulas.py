"""The formulas of policy_loss, as csrc/include/rlkernels/policy_loss.h has them: for each objective the gain, -l, and
its slope by the token's log-probability."""

import math
from typing import NamedTuple

import triton
import triton.language as tl

from rlkernels._codes import OBJECTIVES, PolicyOptions
from rlkernels.triton._math import clamp, expm1

PPO = tl.constexpr(OBJECTIVES.index("ppo"))
REINFORCE = tl.constexpr(OBJECTIVES.index("reinforce"))
GSPO = tl.constexpr(OBJECTIVES.index("gspo"))
CISPO = tl.constexpr(OBJECTIVES.index("cispo"))
SAPO = tl.constexpr(OBJECTIVES.index("sapo"))
GMPO = tl.constexpr(OBJECTIVES.index("gmpo"))
DPPO_TV = tl.constexpr(OBJECTIVES.index("dppo_tv"))
DPPO_KL = tl.constexpr(OBJECTIVES.index("dppo_kl"))
VESPO = tl.constexpr(OBJECTIVES.index("vespo"))

# Weights whose logarithms are added up are at least 1e-8 and at most exp(20).
LEAST_LOG = tl.constexpr(math.log(1e-8))
LARGEST_LOG = tl.constexpr(20.0)


class Numbers(NamedTuple):
    """The options that are numbers. None where one has no effect: its arithmetic is left out of the kernels."""

    clip_low: float
    clip_high: float
    ratio_min: float
    ratio_max: float
    dual_clip: float | None
    delta: float | None
    log_ratio_clamp: float | None
    k_pos: float
    k_neg: float
    rate_pos: float
    rate_neg: float
    kl_coef: float | None
    entropy_coef: float | None
    sampler_cap: float
    log_sampler_cap: float


def numbers_of(o: PolicyOptions) -> Numbers:
    def finite(bound: float) -> float | None:
        return bound if bound < math.inf else None

    return Numbers(
        clip_low=o.clip_low,
        clip_high=o.clip_high,
        ratio_min=1.0 - o.clip_low,
        ratio_max=1.0 + o.clip_high,
        dual_clip=finite(o.dual_clip),
        delta=finite(o.delta),
        log_ratio_clamp=finite(o.log_ratio_clamp),
        k_pos=o.k_pos,
        k_neg=o.k_neg,
        rate_pos=o.rate_pos,
        rate_neg=o.rate_neg,
        kl_coef=o.kl_coef or None,
        entropy_coef=o.entropy_coef or None,
        sampler_cap=o.sampler_cap,
        log_sampler_cap=math.log(o.sampler_cap),
    )


@triton.jit
def between(x, low, high):
    """A NaN stays a NaN."""
    return tl.minimum(tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL), high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def one_where(condition):
    return tl.where(condition, 1.0, 0.0)


@triton.jit
def within_size(x, limit):
    if limit is None:
        return x
    else:
        return clamp(x, limit)


@triton.jit
def zero_where_clamped(slope, raw, limit):
    if limit is None:
        return slope
    else:
        return tl.where(tl.abs(raw) > limit, 0.0, slope)


@triton.jit
def clipped_surrogate(ratio, advantage, o):
    """ppo, gspo"""
    clipped_ratio = between(ratio, o.ratio_min, o.ratio_max)
    clipped = clipped_ratio * advantage
    free = ratio * advantage
    slope = free
    clipped_slope = tl.zeros(ratio.shape, tl.float32)
    if o.delta is not None:
        # Above delta the clipped term can be the smaller within the clips, too.
        clipped_slope = tl.where(clipped_ratio == ratio, free, 0.0)
        slope = tl.where(ratio > o.delta, 0.0, free)
        free = tl.where(ratio > o.delta, o.delta * advantage, free)
    gain = tl.where(clipped < free, clipped, free)
    slope = tl.where(clipped < free, clipped_slope, slope)
    if o.dual_clip is not None:
        least = o.dual_clip * advantage
        bounded = (advantage < 0.0) & (gain < least)
        gain = tl.where(bounded, least, gain)
        slope = tl.where(bounded, 0.0, slope)
    return gain, slope


@triton.jit
def sapo(ratio, advantage, o):
    temperature = tl.where(advantage > 0.0, o.rate_pos, o.rate_neg)
    z = temperature * (ratio - 1.0)
    e = tl.exp(-tl.abs(z))
    larger = 1.0 / (1.0 + e)
    gain = tl.where(z < 0.0, e * larger, larger) * (4.0 / temperature) * advantage
    # Where exp(-z) is 0 in float32, the ratio may be infinite.
    return gain, tl.where(z <= 110.0, 4.0 * e * larger * larger * ratio * advantage, 0.0)


@triton.jit
def gmpo_slope(gain, advantage, unclamped, clipped):
    return tl.where(clipped | (advantage == 0.0), 0.0, gain * unclamped)


@triton.jit
def policy_gradient(factor, advantage, logprob):
    """reinforce, cispo, dppo, vespo: the factor is not differentiated."""
    slope = factor * advantage
    return slope * logprob, slope


@triton.jit
def dppo_divergences(logprob, old_logprob, raw, OBJECTIVE: tl.constexpr):
    """How far the probability has gone up, and down; trusted while <= its clip."""
    p = tl.exp(logprob)
    q = tl.exp(old_logprob)
    if OBJECTIVE == DPPO_TV:
        return p - q, q - p
    else:
        not_p = 1e-8 - expm1(logprob)
        not_q = 1e-8 - expm1(old_logprob)
        divergence = (1.0 - q) * tl.log(not_q / not_p) - q * raw
        return tl.where(p <= q, 0.0, divergence), tl.where(p >= q, 0.0, divergence)


@triton.jit
def clamp_log(x):
    return tl.where(x < LEAST_LOG, LEAST_LOG, tl.where(x > LARGEST_LOG, LARGEST_LOG, x))


@triton.jit
def sampler_log_weight(old_logprob, sampler_logprob):
    difference = old_logprob - sampler_logprob
    return tl.where(
        difference == difference, difference, 0.0
    )  # without a number of the sampler's a token counts as it is
