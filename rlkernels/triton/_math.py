"""Elementary functions from exp and log alone: libdevice's do not run under Triton's interpreter, nor on AMD GPUs."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _exp_remainder(x):
    """(exp(x) - 1 - x) / x^2 for |x| < 1: the ten terms of its series that reach 2^-24 of the sum."""
    r = 1.0 / 3628800 + x * (1.0 / 39916800)
    r = 1.0 / 362880 + x * r
    r = 1.0 / 40320 + x * r
    r = 1.0 / 5040 + x * r
    r = 1.0 / 720 + x * r
    r = 1.0 / 120 + x * r
    r = 1.0 / 24 + x * r
    r = 1.0 / 6 + x * r
    return 0.5 + x * r


@triton.jit
def expm1(x):
    return tl.where(tl.abs(x) < 1.0, x + x * x * _exp_remainder(x), tl.exp(x) - 1.0)


@triton.jit
def expm1_minus_x(x):
    """exp(x) - 1 - x, which is never negative, and which expm1(x) - x would round to 0 where x is small."""
    return tl.where(tl.abs(x) < 1.0, x * x * _exp_remainder(x), (tl.exp(x) - 1.0) - x)


@triton.jit
def exp_of_double(x):
    """exp of a float64, in float32. The GPU's own exp2 is only as exact as its argument, which the whole part leaves
    small."""
    y = x * 1.4426950408889634
    y = tl.where(y < -1000.0, -1000.0, tl.where(y > 1000.0, 1000.0, y))
    whole = y.to(tl.int32)
    return tl.exp2(whole.to(tl.float32)) * tl.exp2((y - whole).to(tl.float32))


@triton.jit
def log1p(x):
    """For -1/2 <= x <= 1: 2 artanh(s) with s = x / (2 + x), |s| <= 1/3, eight terms of its series."""
    s = x / (2.0 + x)
    q = s * s
    r = 1.0 / 13 + q * (1.0 / 15)
    r = 1.0 / 11 + q * r
    r = 1.0 / 9 + q * r
    r = 1.0 / 7 + q * r
    r = 1.0 / 5 + q * r
    r = 1.0 / 3 + q * r
    return 2.0 * s * (1.0 + q * r)


@triton.jit
def softplus(x):
    """log(1 + exp(x))"""
    return tl.where(x > 0.0, x, 0.0) + log1p(tl.exp(-tl.abs(x)))


@triton.jit
def tanh(x):
    """As accurate as PyTorch's, or nearly: a low temperature makes much of the error of a capped logit."""
    size = tl.abs(x)
    q = size * size
    # Minimax polynomial for (tanh(x) - x) / x^3 below 1, where the other form would lose digits.
    r = 0.00230192975 + q * -0.000358611229
    r = -0.00794689357 + q * r
    r = 0.0214871988 + q * r
    r = -0.0538799912 + q * r
    r = 0.133323476 + q * r
    r = -0.333332956 + q * r
    t = tl.where(size < 1.0, size + q * size * r, 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0))
    return tl.where(x < 0.0, -t, t)


@triton.jit
def soft_cap(x, softcap, SOFTCAP: tl.constexpr):
    """softcap * tanh(x / softcap), or x. A product that is added to something would else be rounded only with the sum:
    y - max y would not be 0 where y is the largest, once divided by a low temperature far from it."""
    if SOFTCAP:
        return tl.fma(softcap + tl.zeros(x.shape, tl.float32), tanh(x / softcap), 0.0)
    else:
        return x


@triton.jit
def tanh_derivative(x):
    """1 - tanh(x)^2, without the cancellation where tanh(x) is near 1."""
    e = tl.exp(-2.0 * tl.abs(x))
    return 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def whitening_unit(squares):
    """What numbers with this sum of squared deviations, a float64, are multiplied by before they are whitened: near
    float32's largest numbers their differences and squares would overflow. It is a power of two: nothing is rounded."""
    return tl.where(squares > 1.2676506002282294e30, 1.262177448353619e-29, 1.0).to(tl.float32)  # 2^100, 2^-96


@triton.jit
def clamp(x, limit):
    """x within [-limit, limit]; a NaN stays a NaN, as in PyTorch's clamp."""
    return tl.where(x < -limit, -limit, tl.where(x > limit, limit, x))
