"""What the tests of the functions that take TRL's place share."""

import importlib
import importlib.metadata
from contextlib import contextmanager

import pytest
import torch
from packaging.specifiers import SpecifierSet

from rlkernels.integrations.trl import PATCH
from tolerance import assert_as_accurate_as_torch

VERSION = importlib.metadata.version("trl")
ROWS = {
    row.target.split(":")[1].removesuffix(".apply").lstrip("_"): row
    for row in PATCH.rows
    if VERSION in SpecifierSet(row.versions, prereleases=True)
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
VOCAB, WIDTH = 53, 16
THEIRS_RUN = not VERSION.startswith("1.15.") or importlib.import_module("triton").knobs.runtime.interpret
"""The fused functions of 1.15 need a GPU, or Triton's interpreter."""
needs_theirs = pytest.mark.skipif(not THEIRS_RUN, reason=f"TRL {VERSION} needs a GPU")


def pair(name, *parameters):
    """The installed function and ours; skipped where it has not yet these parameters."""
    missing = [name] if name not in ROWS else [each for each in parameters if each not in ROWS[name].signature]
    if missing:
        pytest.skip(f"TRL {VERSION} has no {missing[0]}")
    return PATCH.original(ROWS[name].target), ROWS[name].ours


def assert_as_near(ours, theirs, truth, what):
    """To what is right, as theirs is: by the measures of `tolerance`, and on average not even a little further. In a
    single row all elements share one rounding, so an average says nothing. In float64 the truth has been rounded as
    often as what is compared with it, so a few digits are allowed."""
    if ours.dtype == torch.float64:
        torch.testing.assert_close(
            ours, truth, rtol=1e-12, atol=1e-14, equal_nan=True, msg=lambda text: f"{what}: {text}"
        )
        return
    assert_as_accurate_as_torch(ours, truth.double(), theirs, what=what)
    finite = truth.isfinite() & theirs.isfinite()
    rows = truth.shape[:-1].numel() if what.startswith("gradient") else truth.numel()
    truth = truth.detach().double()[finite]
    if truth.numel() and rows > 1:
        error, allowed, size = (
            value.square().mean().sqrt()
            for value in (ours.detach().double()[finite] - truth, theirs.detach().double()[finite] - truth, truth)
        )
        most = 1.1 * allowed + torch.finfo(ours.dtype).eps * size
        assert error <= most, f"{what}: an RMS error of {error:.3g} against {allowed:.3g} of theirs"


def differentiated(function, inputs, upstream):
    """What function(*inputs) gives, and the gradients of the sum of upstream * results."""
    leaves = [value.detach().clone().requires_grad_() for value in inputs]
    results = function(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    terms = [(r * g.to(r.dtype)).sum() for r, g in zip(results, upstream, strict=True) if r.requires_grad]
    return results, torch.autograd.grad(sum(terms), leaves)


def compare(ours, theirs, truth, inputs, upstream, names=("logits",), of_gradients=None):
    """`truth` takes float64 of the inputs. `of_gradients` sets their standard instead of theirs."""
    right = differentiated(truth, [value.double() for value in inputs], upstream)
    of_ours, of_theirs = (differentiated(function, inputs, upstream) for function in (ours, theirs))
    for i, results in enumerate(zip(of_ours[0], of_theirs[0], right[0], strict=True)):
        assert_as_near(*results, f"result {i}")
        assert results[0].requires_grad == results[1].requires_grad
    standard = of_theirs if of_gradients is None else differentiated(of_gradients, inputs, upstream)
    for name, *gradients in zip(names, of_ours[1], standard[1], right[1], strict=True):
        assert_as_near(*gradients, f"gradient of {name}")


def random_head(rows, dtype=torch.float32, width=WIDTH, seed=0, bias=True, spread=3.0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*rows, width, generator=g)
    weight = torch.randn(VOCAB, width, generator=g) * spread / width**0.5
    return [value.to(dtype) for value in (hidden, weight, *([torch.randn(VOCAB, generator=g)] if bias else []))]


def transformed(hidden, weight, bias=None, temperature=1.0, softcap=None, scale=1.0):
    z = hidden @ weight.T
    z = (z if bias is None else z + bias) * scale
    return (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature


@contextmanager
def partitioned(*parameters):
    """As ZeRO-3 leaves parameters between the passes: without data."""
    whole = [parameter.data for parameter in parameters]
    for parameter in parameters:
        parameter.data = torch.empty(0, dtype=parameter.dtype)
    try:
        yield
    finally:
        for parameter, data in zip(parameters, whole, strict=True):
            parameter.data = data
