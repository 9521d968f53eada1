"""A replacement beside what it replaces: results, their dtypes and gradients, against the original in float64."""

from collections.abc import Callable

import torch
from torch import Tensor

from tolerance import ulp

SLACK = 4
"""Ulp of the largest element of a result, or of 1, by which ours may be further from the truth than theirs. In float64,
where theirs is the truth, with rounding errors of its own, 16 times as many."""


def assert_as_theirs(ours: Callable, theirs: Callable, *inputs, leaves=(0,), slack=SLACK) -> tuple:
    """Calls both with `inputs`, differentiating by those at the places `leaves`. Returns ours' results."""
    results, gradients = _run(ours, inputs, leaves, None)
    wanted, wanted_gradients = _run(theirs, inputs, leaves, None)
    truth, true_gradients = _run(theirs, inputs, leaves, torch.float64)
    assert len(results) == len(wanted)
    for got, want, true in zip(results, wanted, truth, strict=True):
        if want is None:
            assert got is None
            continue
        assert got.requires_grad == want.requires_grad
        _assert_as_near(got.detach(), want.detach(), true.detach(), "result", slack)
    for got, want, true in zip(gradients, wanted_gradients, true_gradients, strict=True):
        _assert_as_near(got, want, true, "gradient", slack)
    return results


def _run(function: Callable, inputs: tuple, leaves: tuple, dtype: torch.dtype | None) -> tuple[tuple, tuple]:
    given = []
    for index, value in enumerate(inputs):
        if isinstance(value, Tensor):
            if value.is_floating_point() and dtype is not None:
                value = value.to(dtype)
            value = value.detach().clone().requires_grad_(index in leaves)
        given.append(value)
    # Not leaves themselves, which must not be changed in place.
    arguments = [value * 1 if isinstance(value, Tensor) and value.requires_grad else value for value in given]
    results = function(*arguments)
    results = results if isinstance(results, tuple) else (results,)
    total = torch.zeros((), dtype=torch.float64)
    for result in results:
        if result is not None and result.requires_grad:
            weights = torch.linspace(0.5, 1.5, max(result.numel(), 1))[: result.numel()].view(result.shape)
            total = total + (result.double() * weights).sum()
    wanted = [given[index] for index in leaves if isinstance(given[index], Tensor)]
    if not total.requires_grad:
        return results, ()
    gradients = torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True)
    return results, gradients


def _assert_as_near(got: Tensor, want: Tensor, truth: Tensor, what: str, slack: float) -> None:
    assert got.dtype == want.dtype, f"{what}: {got.dtype}, theirs {want.dtype}"
    assert got.shape == want.shape, f"{what}: {list(got.shape)}, theirs {list(want.shape)}"
    dtype, finite = got.dtype, want.isfinite()
    if what == "result":
        torch.testing.assert_close(got[~finite], want[~finite], equal_nan=True, rtol=0, atol=0)
    got, want, truth = got[finite].double(), want[finite].double(), truth[finite].double()
    if not len(truth):
        return
    scale = truth.abs().max().clamp(min=1.0 if what == "result" else 0.0)
    allowed = (want - truth).abs().max() + slack * ulp(scale, dtype)
    if dtype == torch.float64:
        allowed *= 16
    error = (got - truth).abs().max()
    assert error <= allowed, f"{what}: ours is {error:.3g} from the truth, where {allowed:.3g} is allowed"
