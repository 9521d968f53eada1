import torch
import triton
import triton.language as tl
from torch import Tensor

from rlkernels.triton._launch import implements
from rlkernels.triton._math import clamp, expm1, expm1_minus_x, known_even

K1 = tl.constexpr(0)
K2 = tl.constexpr(1)
K3 = tl.constexpr(2)
# What is neither of these is abs, 3.

BLOCK = 1024


@triton.jit
def kl_estimate(d, ESTIMATOR: tl.constexpr):
    """Of d = log policy - log reference."""
    if ESTIMATOR == K1:
        return d
    elif ESTIMATOR == K2:
        return 0.5 * d * d
    elif ESTIMATOR == K3:
        return expm1_minus_x(-d)
    else:
        return tl.abs(d)


@triton.jit
def kl_estimate_derivative(d, ESTIMATOR: tl.constexpr, STRAIGHT_THROUGH: tl.constexpr):
    """d(kl_estimate)/dd. The straight-through forms take that of k2."""
    if STRAIGHT_THROUGH or ESTIMATOR == K2:
        return d
    elif ESTIMATOR == K1:
        return tl.full(d.shape, 1.0, tl.float32)
    elif ESTIMATOR == K3:
        return -expm1(-d)
    else:
        return tl.where(d > 0.0, 1.0, tl.where(d < 0.0, -1.0, d))


@triton.jit(do_not_specialize=["count"])
def _forward_kernel(
    logprobs,
    ref_logprobs,
    values,
    count: tl.int64,
    log_ratio_clamp,
    value_clamp,
    ESTIMATOR: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = token < known_even(count, EVEN)
    d = tl.load(logprobs + token, mask=inside) - tl.load(ref_logprobs + token, mask=inside)
    value = clamp(kl_estimate(clamp(d, log_ratio_clamp), ESTIMATOR), value_clamp)
    tl.store(values + token, value, mask=inside)


@triton.jit(do_not_specialize=["count"])
def _backward_kernel(
    grad,
    logprobs,
    ref_logprobs,
    grad_logprobs,
    count: tl.int64,
    log_ratio_clamp,
    value_clamp,
    ESTIMATOR: tl.constexpr,
    STRAIGHT_THROUGH: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = token < known_even(count, EVEN)
    log_ratio = tl.load(logprobs + token, mask=inside) - tl.load(ref_logprobs + token, mask=inside)
    d = clamp(log_ratio, log_ratio_clamp)
    clamped = (tl.abs(log_ratio) > log_ratio_clamp) | (tl.abs(kl_estimate(d, ESTIMATOR)) > value_clamp)
    derivative = tl.where(clamped, 0.0, kl_estimate_derivative(d, ESTIMATOR, STRAIGHT_THROUGH))
    tl.store(grad_logprobs + token, tl.load(grad + token, mask=inside) * derivative, mask=inside)


@implements("kl_penalty_forward")
def kl_penalty_forward(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    estimator: int,
    straight_through: bool,
    log_ratio_clamp: float,
    value_clamp: float,
) -> Tensor:
    values = torch.empty_like(logprobs)
    count = logprobs.numel()
    if count:
        _forward_kernel[(triton.cdiv(count, BLOCK),)](
            logprobs,
            ref_logprobs,
            values,
            count,
            log_ratio_clamp,
            value_clamp,
            ESTIMATOR=estimator,
            EVEN=count % 16 == 0,
            BLOCK=BLOCK,
        )
    return values


@implements("kl_penalty_backward")
def kl_penalty_backward(
    grad: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    estimator: int,
    straight_through: bool,
    log_ratio_clamp: float,
    value_clamp: float,
) -> Tensor:
    grad_logprobs = torch.empty_like(logprobs)
    count = logprobs.numel()
    if count:
        _backward_kernel[(triton.cdiv(count, BLOCK),)](
            grad,
            logprobs,
            ref_logprobs,
            grad_logprobs,
            count,
            log_ratio_clamp,
            value_clamp,
            ESTIMATOR=estimator,
            STRAIGHT_THROUGH=straight_through,
            EVEN=count % 16 == 0,
            BLOCK=BLOCK,
        )
    return grad_logprobs
