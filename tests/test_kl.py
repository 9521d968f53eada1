import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rlkernels
from op_calls import check_ops
from rlkernels import kl_penalty
from tolerance import assert_as_accurate_as_torch

INF = float("inf")
NAN = float("nan")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ESTIMATORS = ("k1", "k2", "k3", "abs", "k1+", "k3+", "abs+")
SIZES = {0: "nothing", 1: "one token", 63: "odd, less than a block", 1025: "one past a block of 1024", 70_001: "many"}


def eager(logprobs, ref_logprobs, estimator, log_ratio_clamp=None, value_clamp=None):
    """As a user writes it, in float32 or, for float64 inputs, in float64; the straight-through forms as verl writes
    them, but with the gradient 0 where a clamp took effect."""
    if logprobs.dtype != torch.float64:
        logprobs, ref_logprobs = logprobs.float(), ref_logprobs.float()
    difference = logprobs - ref_logprobs
    if log_ratio_clamp is not None:
        difference = difference.clamp(-log_ratio_clamp, log_ratio_clamp)
    k2 = 0.5 * difference.square()
    value = {
        "k1": difference,
        "k2": k2,
        "k3": torch.exp(-difference) - 1 + difference,
        "abs": difference.abs(),
    }[estimator.removesuffix("+")]
    if value_clamp is not None:
        within = value.detach().abs() <= value_clamp
        value = value.clamp(-value_clamp, value_clamp)
        k2 = torch.where(within, k2, k2.detach())
    return k2 - k2.detach() + value.detach() if estimator.endswith("+") else value


def run(function, logprobs, ref_logprobs, upstream, **options):
    """Values and the gradients of both inputs."""
    leaves = [logprobs.clone().requires_grad_(), ref_logprobs.clone().requires_grad_()]
    values = function(*leaves, **options)
    return values.detach(), *torch.autograd.grad(values, leaves, upstream.to(values.dtype))


def assert_matches_reference(logprobs, ref_logprobs, upstream, **options):
    got = run(kl_penalty, logprobs, ref_logprobs, upstream, **options)
    with rlkernels.use_backend("reference"):
        oracle = run(kl_penalty, logprobs.double(), ref_logprobs.double(), upstream, **options)
    naive = run(eager, logprobs, ref_logprobs, upstream, **options)
    for what, *three in zip(("values", "gradient", "gradient of the reference"), got, oracle, naive, strict=True):
        assert_as_accurate_as_torch(*three, what=what, gradient=what != "values")


def plain(shape, device, dtype=torch.float32, distance=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logprobs = -3 * torch.rand(shape, generator=generator)
    ref_logprobs = logprobs + distance * torch.randn(shape, generator=generator)
    upstream = torch.randn(shape, generator=generator)
    return logprobs.to(device, dtype), ref_logprobs.to(device, dtype), upstream.to(device)


@given(
    shape=st.lists(st.integers(0, 40), max_size=3).map(tuple),
    dtype=st.sampled_from(DTYPES),
    # Below 1e-3 the terms of k3 cancel; above 89 its exponential leaves float32.
    distance=st.sampled_from([0.0, 1e-4, 0.1, 1.0, 10.0, 60.0]),
    estimator=st.sampled_from(ESTIMATORS),
    log_ratio_clamp=st.sampled_from([None, 0.0, 0.5, 20.0]),
    value_clamp=st.sampled_from([None, 0.0, 0.3, 10.0]),
    transposed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_matches_reference(
    backend, device, shape, dtype, distance, estimator, log_ratio_clamp, value_clamp, transposed, seed
):
    inputs = plain(shape, device, dtype, distance, seed)
    if transposed and len(shape) > 1:
        inputs = [value.transpose(0, 1) for value in inputs]
    assert_matches_reference(*inputs, estimator=estimator, log_ratio_clamp=log_ratio_clamp, value_clamp=value_clamp)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_sizes(backend, device, estimator, size):
    assert_matches_reference(*plain((size,), device), estimator=estimator, log_ratio_clamp=2.0, value_clamp=1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradient_is_rounded_not_truncated(backend, device, estimator, dtype):
    assert_matches_reference(*plain((5, 200), device, dtype), estimator=estimator)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("clamps", [{}, {"log_ratio_clamp": 0.5}, {"value_clamp": 0.3}], ids=str)
def test_reference_is_the_formula(estimator, clamps):
    inputs = plain((300,), "cpu", torch.float64)
    got, wanted = (run(function, *inputs, estimator=estimator, **clamps) for function in (kl_penalty, eager))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("estimator", [name for name in ESTIMATORS if not name.endswith("+")])
@pytest.mark.parametrize("clamps", [{}, {"log_ratio_clamp": 0.5}, {"value_clamp": 0.3}], ids=str)
def test_reference_gradcheck(estimator, clamps):
    logprobs, ref_logprobs, _ = plain((20,), "cpu", torch.float64)
    leaves = logprobs.requires_grad_(), ref_logprobs.requires_grad_()
    assert torch.autograd.gradcheck(lambda *inputs: kl_penalty(*inputs, estimator=estimator, **clamps), leaves)


@pytest.mark.parametrize("estimator", ["k1", "k3", "abs"])
@pytest.mark.parametrize("clamps", [{}, {"log_ratio_clamp": 0.5}, {"value_clamp": 0.3}], ids=str)
def test_straight_through_has_the_value_of_one_and_the_gradient_of_k2(backend, device, estimator, clamps):
    inputs = plain((300,), device)
    values, gradient, gradient_ref = run(kl_penalty, *inputs, estimator=estimator + "+", **clamps)
    base = run(kl_penalty, *inputs, estimator=estimator, **clamps)
    k2 = run(kl_penalty, *inputs, estimator="k2")
    assert torch.equal(values, base[0])
    difference = inputs[0] - inputs[1]
    clamped = difference.abs() > clamps.get("log_ratio_clamp", INF)
    clamped |= run(kl_penalty, *inputs, estimator=estimator)[0].abs() > clamps.get("value_clamp", INF)
    assert clamped.any() == bool(clamps)
    assert torch.equal(gradient, k2[1].masked_fill(clamped, 0.0))
    assert torch.equal(gradient_ref, -gradient)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_values_at_which_the_formulas_bend(backend, device, estimator):
    """0, where abs has no derivative (0 is taken); a clamp's own value, which is not clamped; the numbers beside it."""
    limit = 0.5
    above = torch.nextafter(torch.tensor(limit), torch.tensor(1.0)).item()
    difference = torch.tensor([0.0, -0.0, limit, -limit, above, -above], device=device)
    zero = torch.zeros_like(difference)
    _, gradient, gradient_ref = run(
        kl_penalty, difference, zero, torch.ones_like(zero), estimator=estimator, log_ratio_clamp=limit
    )
    straight = {"k1": [1, 1, 1, 1], "abs": [0, 0, 1, -1]}.get(estimator)
    if straight is None and estimator != "k3":
        straight = [0, 0, limit, -limit]
    if straight is None:
        straight = (-torch.expm1(-difference[:4])).tolist()
    wanted = torch.tensor([*straight, 0, 0], device=device, dtype=torch.float32)
    torch.testing.assert_close(gradient, wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient_ref, -wanted, rtol=1e-6, atol=0)


def test_small_differences_keep_their_precision(backend, device):
    """exp(-d) - 1 + d is 0 or noise below 1e-4; with expm1 the error is that of one rounding of d."""
    difference = torch.tensor([1e-3, -1e-3, 1e-4, -1e-4, 1e-5], device=device)
    values = kl_penalty(difference, torch.zeros_like(difference), estimator="k3")
    exact = torch.expm1(-difference.double()) + difference.double()
    error = (values.double() - exact).abs()
    assert (error <= 2 * torch.finfo(torch.float32).eps * difference.abs()).all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_extreme_values(backend, device, estimator):
    logprobs = torch.tensor([-INF, 0.0, -INF, NAN, -1.0, -1e4, 0.0, -1e30], device=device)
    ref_logprobs = torch.tensor([0.0, -INF, -INF, -1.0, NAN, 0.0, -1e4, 1e30], device=device)
    inputs = logprobs, ref_logprobs, torch.ones_like(logprobs)
    got = run(kl_penalty, *inputs, estimator=estimator)[0]
    with rlkernels.use_backend("reference"):
        wanted = run(kl_penalty, *inputs, estimator=estimator)[0]
    torch.testing.assert_close(got, wanted, equal_nan=True)
    values, gradient, _ = run(kl_penalty, *inputs, estimator=estimator, log_ratio_clamp=20.0, value_clamp=10.0)
    clamped = torch.tensor([True, True, False, False, False, True, True, True], device=device)
    assert values[clamped].isfinite().all()
    assert not gradient[clamped].any()
    assert values[~clamped].isnan().all()


def test_only_what_is_needed_is_differentiated(backend, device):
    logprobs, ref_logprobs, upstream = plain((40,), device)
    wanted = run(kl_penalty, logprobs, ref_logprobs, upstream)
    values = kl_penalty(logprobs.requires_grad_(), ref_logprobs)
    assert torch.equal(torch.autograd.grad(values, logprobs, upstream)[0], wanted[1])
    values = kl_penalty(logprobs.detach(), ref_logprobs.requires_grad_())
    assert torch.equal(torch.autograd.grad(values, ref_logprobs, upstream)[0], wanted[2])
    assert not kl_penalty(logprobs.detach(), ref_logprobs.detach()).requires_grad


def test_strides(backend, device):
    logprobs, ref_logprobs, upstream = plain((6, 40), device)
    wanted = run(kl_penalty, logprobs, ref_logprobs, upstream)
    strided = [value.t().contiguous().t() for value in (logprobs, ref_logprobs, upstream)]
    for one, other in zip(run(kl_penalty, *strided), wanted, strict=True):
        assert torch.equal(one, other)
    one_upstream = upstream[:1, :1]
    for one, other in zip(
        run(kl_penalty, logprobs, ref_logprobs, one_upstream.expand(6, 40)),
        run(kl_penalty, logprobs, ref_logprobs, one_upstream.repeat(6, 40)),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_inputs_of_different_dtypes(backend, device):
    logprobs, ref_logprobs, upstream = plain((40,), device)
    values, gradient, gradient_ref = run(kl_penalty, logprobs, ref_logprobs.bfloat16(), upstream)
    assert torch.equal(values, kl_penalty(logprobs, ref_logprobs.bfloat16().float()))
    assert (gradient.dtype, gradient_ref.dtype) == (torch.float32, torch.bfloat16)


def test_a_token_does_not_depend_on_the_others_and_bits_repeat(backend, device):
    inputs = plain((1100,), device)
    together = run(kl_penalty, *inputs)
    for one, other in zip(run(kl_penalty, *inputs), together, strict=True):
        assert torch.equal(one, other)
    for at in (slice(0, 1), slice(17, 18), slice(1000, 1100), slice(3, 77)):
        for one, all_tokens in zip(run(kl_penalty, *(value[at] for value in inputs)), together, strict=True):
            assert torch.equal(one, all_tokens[at])


@pytest.mark.only("cpu", "triton", "cuda")
@pytest.mark.parametrize("estimator", ["k3", "k3+"])
def test_opcheck(backend, device, estimator):
    inputs = plain((3, 21), device)
    check_ops(
        lambda: run(kl_penalty, *inputs, estimator=estimator, value_clamp=1.0),
        backend,
        "kl_penalty_forward",
        "kl_penalty_backward",
        differentiable=("kl_penalty_forward",),
    )


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile(backend, device, compiler):
    torch._dynamo.reset()
    inputs = plain((5, 40), device)

    def function(logprobs, ref_logprobs):
        return 2 * kl_penalty(logprobs * 1.5, ref_logprobs, estimator="k3+", value_clamp=1.0)

    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    for one, other in zip(run(compiled, *inputs), run(function, *inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


BAD_INPUT = {
    "logprobs no tensor": (dict(logprobs=[0.0]), TypeError, ("logprobs", "list")),
    "logprobs integer": (dict(logprobs=torch.zeros(3, dtype=torch.int32)), TypeError, ("logprobs", "float32", "int32")),
    "ref_logprobs None": (dict(ref_logprobs=None), TypeError, ("ref_logprobs", "NoneType")),
    "ref_logprobs bool": (dict(ref_logprobs=torch.ones(3) > 0), TypeError, ("ref_logprobs", "float32", "bool")),
    "shapes that broadcast": (dict(ref_logprobs=torch.zeros(1)), ValueError, ("ref_logprobs", "[3]", "[1]")),
    "shapes": (dict(ref_logprobs=torch.zeros(3, 1)), ValueError, ("ref_logprobs", "[3]", "[3, 1]")),
    "device": (dict(ref_logprobs=torch.zeros(3, device="meta")), ValueError, ("ref_logprobs", "cpu", "meta")),
    "estimator unknown": (dict(estimator="k4"), ValueError, ("estimator", "k1", "k3+", "abs", "k4")),
    "k2+": (dict(estimator="k2+"), ValueError, ("estimator", "k2+")),
    "estimator None": (dict(estimator=None), ValueError, ("estimator", "k3", "None")),
    "log_ratio_clamp negative": (dict(log_ratio_clamp=-1), ValueError, ("log_ratio_clamp", ">= 0", "-1")),
    "log_ratio_clamp nan": (dict(log_ratio_clamp=NAN), ValueError, ("log_ratio_clamp", ">= 0", "nan")),
    "value_clamp negative": (dict(value_clamp=-0.5), ValueError, ("value_clamp", ">= 0", "-0.5")),
    "value_clamp a string": (dict(value_clamp="10"), TypeError, ("value_clamp", "number", "str")),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input(backend, device, name):
    changes, error, fragments = BAD_INPUT[name]
    arguments = {"logprobs": torch.zeros(3), "ref_logprobs": torch.zeros(3)}
    with pytest.raises(error) as raised:
        kl_penalty(**(arguments | changes))
    for fragment in fragments:
        assert fragment in str(raised.value)


def test_value_clamp_alone_stops_the_gradient_of_what_overflows(backend, device):
    logprobs = torch.tensor([-100.0, -1.0], device=device, requires_grad=True)
    kl_penalty(logprobs, torch.zeros(2, device=device), value_clamp=10.0).sum().backward()
    torch.testing.assert_close(logprobs.grad.cpu(), torch.tensor([0.0, 1 - math.e]))
