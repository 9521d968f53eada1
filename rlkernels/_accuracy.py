"""How close is close enough: no worse than PyTorch.

A kernel is held against the same formula in float64 (`oracle`) and may be at most twice as wrong as eager PyTorch
doing it with the same input and output dtypes (`naive`), plus a few ulp. For bfloat16 and float16 inputs the naive
formula computes in float32, the stricter of the two ways a user may write it.
"""

import math

import torch
from torch import Tensor

ULPS = 2
"""ULPs of each element in the output dtype, and as many of the largest element in float32, the dtype of the arithmetic:
one for rounding the result, one for rounding a step before it. The naive formula is sometimes exact by luck."""

ROUNDING = 1 / math.sqrt(12)
"""Standard deviation, in ulp, of an error spread evenly over [-1/2, 1/2] ulp, as that of rounding to nearest is."""

STANDARD_DEVIATIONS = 6
"""How far a mean of rounding errors may stray by chance: at 6 once in 5e8 comparisons."""


def comparable(
    got: Tensor, oracle: Tensor, naive: Tensor, what: str = "output"
) -> tuple[Tensor, Tensor, Tensor, torch.dtype]:
    """The finite elements in float64, and the dtype that they had. Raises AssertionError where `got` has another dtype
    or shape, or is finite where it should not be, or the reverse."""
    if got.dtype != naive.dtype:
        raise AssertionError(f"{what}: dtype {got.dtype}, wanted {naive.dtype}")
    if got.shape != oracle.shape:
        raise AssertionError(f"{what}: shape {list(got.shape)}, wanted {list(oracle.shape)}")
    if oracle.dtype != torch.float64:
        raise AssertionError(f"{what}: the oracle is {oracle.dtype}")
    got, oracle, naive = (t.detach().cpu().reshape(-1) for t in (got, oracle, naive))

    # NaN, infinities, and the float64 values that the output dtype cannot hold are compared for equality.
    rounded = oracle.to(got.dtype)
    finite = rounded.isfinite()
    same = (got == rounded) | (got.isnan() & rounded.isnan()) | finite
    same &= got.isfinite() | ~finite
    if not same.all():
        first = int((~same).nonzero()[0])
        raise AssertionError(
            f"{what}: {(~same).sum()} of {same.numel()} elements are not finite where they should be, or the reverse; "
            f"element {first} is {got[first].item()}, wanted {oracle[first].item()}"
        )
    # Where eager PyTorch overflows or loses itself it sets no standard.
    naive = torch.where(naive.isfinite(), naive, rounded)
    return got[finite].double(), oracle[finite], naive[finite].double(), got.dtype


def measures(
    got: Tensor, oracle: Tensor, naive: Tensor, dtype: torch.dtype, *, gradient: bool = False
) -> dict[str, tuple[float, float]]:
    """For each measure the error of `got` and the error that the rule allows, from what `comparable` returns."""
    if not oracle.numel():
        return {}
    spacing = ulp(oracle, dtype)
    arithmetic = ULPS * torch.finfo(torch.float32).eps
    if dtype == torch.float64:
        arithmetic = ULPS * torch.finfo(torch.float64).eps
    largest, rms = oracle.abs().max(), _rms(oracle)

    # Element by element, so that a wrong small element does not hide behind the ulp of a large one.
    def excess(value: Tensor) -> Tensor:
        return ((value - oracle).abs() - ULPS * spacing).clamp(min=0)

    found = {
        "maximum error": (excess(got).max(), 2 * excess(naive).max() + arithmetic * largest),
        "RMS error": (_rms(got - oracle), 2 * _rms(naive - oracle) + _rms(ULPS * spacing) + arithmetic * rms),
    }
    if gradient and rms > 0:
        chance = STANDARD_DEVIATIONS * ROUNDING * spacing.square().sum().sqrt() / oracle.abs().sum()
        found["signed bias"] = (
            _bias(got, oracle).abs(),
            2 * _bias(naive, oracle).abs() + arithmetic + chance,
        )
        rounding = (ULPS * spacing).square().sum() / oracle.square().sum()
        found["1 - cosine"] = (
            _misalignment(got, oracle),
            2 * _misalignment(naive, oracle) + rounding + arithmetic**2,
        )
    return {name: (error.item(), allowed.item()) for name, (error, allowed) in found.items()}


def ulp(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The spacing of `dtype` at each float64 `value`, that of the subnormals at and near 0."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(value.double().abs()).exponent - 1
    spacing = torch.ldexp(torch.full_like(value, info.eps, dtype=torch.float64), exponent)
    return spacing.clamp(min=info.smallest_normal * info.eps)


def _rms(value: Tensor) -> Tensor:
    return value.square().mean().sqrt()


def _bias(value: Tensor, oracle: Tensor) -> Tensor:
    """Mean error away from (+) or towards (-) zero, relative to the mean magnitude."""
    return ((value - oracle) * oracle.sign()).sum() / oracle.abs().sum()


def _misalignment(value: Tensor, oracle: Tensor) -> Tensor:
    """1 - cosine, as half the squared distance of the directions, which does not cancel."""
    if not value.any():
        return value.new_tensor(1.0)
    return (value / value.norm() - oracle / oracle.norm()).square().sum() / 2
