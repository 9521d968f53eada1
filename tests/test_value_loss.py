import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import rlkernels
from cases import COMPILERS_AND_LAYOUTS, thorough_emulated
from launches import Seen
from op_calls import check_ops
from rlkernels import value_loss
from rlkernels._codes import AGGREGATIONS
from token_losses import (
    DTYPES,
    GRADIENT_OPS,
    INF,
    NAN,
    aggregate_by_loops,
    as_given,
    assert_sums_as_accurate,
    spans_of,
)
from tolerance import assert_as_accurate_as_torch


def by_loops(
    values, old_values, returns, mask=None, clip=0.2, cu_seqlens=None, aggregation="token_mean", normalizer=None
):
    """One sequence after the other, only its scored tokens; autograd does the rest. Loss, metrics, and their sizes."""
    losses, clipped, kept = [], [], []
    for span in spans_of(values, cu_seqlens):
        scored = torch.ones_like(values[span], dtype=torch.bool) if mask is None else mask[span]
        value, target = values[span][scored], returns[span][scored]
        loss = 0.5 * (value - target) ** 2
        over = torch.zeros_like(loss, dtype=torch.bool)
        if old_values is not None and clip is not None:
            old = old_values[span][scored]
            bounded = 0.5 * (torch.minimum(torch.maximum(value, old - clip), old + clip).detach() - target) ** 2
            over = bounded > loss
            loss = torch.where(over, bounded, loss)
        losses.append(loss)
        clipped.append(over)
        kept.append(torch.stack([value.detach(), target]))
    if not any(map(len, losses)):
        nothing = (values[:0].sum(), torch.zeros(6, dtype=values.dtype))
        return *nothing, *nothing
    loss = aggregate_by_loops(losses, aggregation, normalizer)
    value, target = torch.cat(kept, 1)
    unexplained = (value - target).var(correction=0) / target.var(correction=0)
    error = (value - target).square().mean()
    terms = [torch.cat(clipped).double().mean(), value.mean(), target.mean(), error, 1 - unexplained, value.numel()]
    sizes = [1, value.abs().mean(), target.abs().mean(), error, 1 + unexplained, value.numel()]
    return loss, torch.tensor(terms).to(values.dtype), loss, torch.tensor(sizes).to(values.dtype)


def run(function, inputs, upstream=1.0, **options):
    leaf = inputs["values"].clone().requires_grad_()
    loss, metrics, *sizes = function(**(inputs | {"values": leaf}), **options)
    (gradient,) = torch.autograd.grad(loss * upstream, leaf)
    return loss.detach(), metrics, gradient, *(size.detach() for size in sizes)


def assert_matches_oracles(inputs, upstream=-1.7, **options):
    """The backend against the reference in float64, and that against loops."""
    got = run(value_loss, inputs, upstream, **options)
    in_double = {name: v.double() if v is not None and v.is_floating_point() else v for name, v in inputs.items()}
    with rlkernels.use_backend("reference"):
        oracle = run(value_loss, in_double, upstream, **options)
        naive = run(value_loss, inputs, upstream, **options)
    on_host = {name: v if v is None else v.cpu() for name, v in in_double.items()}
    *loops, loss_size, metric_sizes = run(by_loops, on_host, upstream, **options)
    for one, other in zip(oracle, loops, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-9, atol=1e-12, equal_nan=True)
    assert_as_accurate_as_torch(got[2], oracle[2], naive[2], what="gradient", gradient=True)
    undefined = oracle[1].isnan()
    assert torch.equal(got[1].isnan(), undefined)
    got, oracle, naive = ((r[0], r[1].masked_fill(undefined, 0.0), r[2]) for r in (got, oracle, naive))
    assert_sums_as_accurate(got, oracle, naive, (loss_size, metric_sizes.nan_to_num()))
    return got


def make_inputs(
    lengths, width, device, dtype=torch.float32, packed=False, old=True, offset=0.0, drop=0.2, garbage=True, seed=0
):
    """Values, and returns around `offset`, of sequences of `lengths` tokens, padded to `width` or packed, a part of
    which (`drop`) is not scored, where every value is NaN or infinite."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), width)
    values = offset + torch.randn(shape, generator=generator)
    inputs = {
        "values": values,
        "old_values": values + 0.3 * torch.randn(shape, generator=generator),
        "returns": values + torch.randn(shape, generator=generator),
    }
    within = torch.arange(width) < torch.tensor(lengths, dtype=torch.int64).view(-1, 1)
    mask = within & (torch.rand(shape, generator=generator) >= drop)
    junk = torch.tensor([NAN, INF, -INF])[torch.randint(3, shape, generator=generator)]
    if garbage:
        inputs = {name: torch.where(mask, value, junk) for name, value in inputs.items()}
    if packed:
        inputs = {name: value[within] for name, value in inputs.items()}
        mask = mask[within]
    inputs = {name: value.to(device, dtype) for name, value in inputs.items()} | {"mask": mask.to(device)}
    if not old:
        inputs["old_values"] = None
    if packed:
        inputs["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    return inputs


@given(
    lengths=st.lists(st.integers(0, 12), min_size=0, max_size=6),
    padding=st.integers(0, 3),
    packed=st.booleans(),
    old=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    clip=st.sampled_from([None, 0.0, 0.2, 5.0]),
    aggregation=st.sampled_from(AGGREGATIONS),
    normalizer=st.sampled_from([None, 7, 12.5, "tensor"]),
    seed=st.integers(0, 99),
)
def test_matches_oracles(backend, device, lengths, padding, packed, old, dtype, clip, aggregation, normalizer, seed):
    width = max(lengths, default=0) + padding
    inputs = make_inputs(lengths, width, device, dtype, packed=packed, old=old, seed=seed)
    number = torch.tensor(9.0, device=device) if normalizer == "tensor" else normalizer
    assert_matches_oracles(inputs, clip=clip, aggregation=aggregation, normalizer=number)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_every_aggregation(backend, device, aggregation, packed):
    inputs = make_inputs([5, 0, 12, 1, 7], 12, device, packed=packed)
    for normalizer in (None, 64, torch.tensor(40, device=device)):
        assert_matches_oracles(inputs, aggregation=aggregation, normalizer=normalizer)
    dense = make_inputs([9, 9, 9], 9, device, packed=packed, drop=0.0)
    assert dense.pop("mask").all()
    assert_matches_oracles(dense, aggregation=aggregation)


@pytest.mark.parametrize("length", [1, 63, 129, 1025, 3000])
def test_lengths(backend, device, length):
    for packed in (False, True):
        for aggregation in ("token_mean", "seq_mean_token_mean"):
            inputs = make_inputs([length, max(length - 5, 0)], length, device, packed=packed)
            assert_matches_oracles(inputs, aggregation=aggregation)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_inputs_as_the_caller_gave_them(backend, device, packed):
    """Whatever their dtypes and layouts, the results are those of float32 inputs and a bool mask."""
    given, plain = as_given(make_inputs([9, 0, 14], 14, device, packed=packed), "values")
    for normalizer in (torch.tensor(7, device=device), torch.tensor(7.0, device=device, dtype=torch.bfloat16)):
        got = run(value_loss, given, -1.7, normalizer=normalizer)
        wanted = run(value_loss, plain, -1.7, normalizer=7.0)
        assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])
        assert torch.equal(got[2], wanted[2].bfloat16())


@pytest.mark.only("triton", "cuda")
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_a_call_launches_its_kernels_and_nothing_else(backend, device, packed):
    inputs = make_inputs([9, 0, 14], 14, device, torch.bfloat16, packed=packed)
    inputs["mask"] = inputs["mask"].long()
    inputs["values"].requires_grad_()
    upstream, normalizer = torch.tensor(2.0, device=device), torch.tensor(9, device=device)
    with Seen() as seen:
        loss, _ = value_loss(**inputs, aggregation="seq_mean_token_mean", normalizer=normalizer)
        torch.autograd.grad(loss, inputs["values"], upstream)
    assert (seen.own, seen.launched) == (["value_loss_forward", "token_loss_backward"], [])


@pytest.mark.only("triton")
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("width", [1, 3, 6, 90])
def test_a_program_goes_through_tokens_in_turns(backend, device, width, packed, monkeypatch):
    """As on a GPU beyond a million tokens: here two programs take 16 tokens at a time."""
    lengths = [width - index % 2 if width > 1 else index % 2 for index in range(180 // width)]
    inputs = make_inputs(lengths, width, device, packed=packed)
    options = dict(aggregation="seq_mean_token_mean")
    _, _, gradient = run(value_loss, inputs, **options)
    monkeypatch.setattr("rlkernels.triton._token_losses.PROGRAMS", 2)
    for module in ("_token_losses", "value_loss"):
        monkeypatch.setattr(f"rlkernels.triton.{module}.BLOCK", 16)
    got = assert_matches_oracles(inputs, 1.0, **options)
    assert torch.equal(got[2], gradient)


def test_by_hand(backend, device):
    """One token on each side of every branch."""
    values = torch.tensor([[1.0, 1.0, 2.0, 2.0, -3.0]], device=device)
    old = torch.tensor([[0.9, 0.0, 0.0, 0.0, 0.0]], device=device)
    returns = torch.tensor([[3.0, 3.0, -1.0, 1.5, -5.0]], device=device)
    inputs = dict(values=values, old_values=old, returns=returns)
    loss, metrics, gradient = run(value_loss, inputs, clip=0.5, aggregation="token_sum")
    # Within the clip; bounded at 0.5, which is further off; at 0.5 nearer; at 0.5, further; at -0.5, further.
    assert loss.item() == pytest.approx((2**2 + 2.5**2 + 3**2 + 1**2 + 4.5**2) / 2)
    assert gradient.flatten().tolist() == [-2.0, 0.0, 3.0, 0.0, 0.0]
    named = dict(zip(value_loss.metrics, metrics.tolist(), strict=True))
    assert named["clip_fraction"] == pytest.approx(3 / 5)
    assert named["value_mean"] == pytest.approx(3 / 5)
    assert named["return_mean"] == pytest.approx(1.5 / 5)
    assert named["squared_error"] == pytest.approx((4 + 4 + 9 + 0.25 + 4) / 5)
    spread, error = returns.double().var(correction=0), (values - returns).double().var(correction=0)
    assert named["explained_variance"] == pytest.approx(1 - (error / spread).item())
    assert named["num_tokens"] == 5
    unclipped = run(value_loss, inputs, clip=None, aggregation="token_sum")
    assert unclipped[0].item() == pytest.approx((4 + 4 + 9 + 0.25 + 4) / 2)
    for one, other in zip(
        unclipped, run(value_loss, inputs | {"old_values": None}, aggregation="token_sum"), strict=True
    ):
        assert torch.equal(one, other)


def test_explained_variance_far_from_zero(backend, device):
    """Where the mean is ten thousand times the spread, and where there is no spread."""
    inputs = make_inputs([700, 500], 700, device, offset=1e4)
    assert_matches_oracles(inputs)
    constant = inputs | {"returns": torch.full_like(inputs["returns"], 0.1)}
    for returns in (constant["returns"], constant["returns"] * 1e6, constant["returns"] * 0):
        assert run(value_loss, inputs | {"returns": returns})[1][4].isnan()
    one = make_inputs([1], 1, device, drop=0.0)
    assert run(value_loss, one)[1][4].isnan()
    perfect = inputs | {"returns": inputs["values"]}
    assert run(value_loss, perfect)[1][4] == 1


@pytest.mark.parametrize("garbage", [NAN, thorough_emulated(INF), thorough_emulated(-INF)])
@pytest.mark.parametrize("name", ["values", "old_values", "returns"])
def test_what_is_not_scored_leaves_no_trace(backend, device, name, garbage):
    clean = make_inputs([7, 12, 3], 12, device, garbage=False)
    dirty = clean | {name: clean[name].masked_fill(~clean["mask"], garbage)}
    for aggregation in AGGREGATIONS:
        wanted, got = (run(value_loss, inputs, aggregation=aggregation) for inputs in (clean, dirty))
        for one, other in zip(got, wanted, strict=True):
            assert torch.equal(one, other)
        assert not got[2][~clean["mask"]].any()


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("normalizer", [None, 5.0])
def test_nothing_scored(backend, device, normalizer, aggregation):
    shapes = [make_inputs(lengths, width, device) for lengths, width in (([0, 0], 4), ([], 4), ([0, 0], 0))]
    shapes += [make_inputs(lengths, 4, device, packed=True) for lengths in ([0, 0], [])]
    for inputs in shapes:
        loss, metrics, gradient = run(value_loss, inputs, aggregation=aggregation, normalizer=normalizer)
        assert loss == 0
        assert not metrics.any()
        assert not gradient.any()
        assert gradient.shape == inputs["values"].shape


def test_strides_and_masks(backend, device):
    inputs = make_inputs([7, 12, 3], 12, device)
    wanted = run(value_loss, inputs)
    strided = {name: value.t().contiguous().t() for name, value in inputs.items()}
    others = [strided, *(inputs | {"mask": inputs["mask"].to(dtype)} for dtype in (torch.int64, torch.bfloat16))]
    for other in others:
        for one, two in zip(run(value_loss, other), wanted, strict=True):
            assert torch.equal(one, two)


def test_without_a_gradient(backend, device):
    inputs = make_inputs([7, 12, 3], 12, device, torch.bfloat16)
    wanted = run(value_loss, inputs)
    with torch.no_grad():
        loss, metrics = value_loss(**(inputs | {"values": inputs["values"].clone().requires_grad_()}))
    assert not loss.requires_grad
    assert torch.equal(loss, wanted[0])
    assert torch.equal(metrics, wanted[1])
    assert (loss.dtype, loss.shape, metrics.dtype) == (torch.float32, (), torch.float32)
    assert value_loss.metrics == (
        *("clip_fraction", "value_mean", "return_mean", "squared_error", "explained_variance", "num_tokens"),
    )


def test_same_bits_on_every_run(backend, device, emulated):
    length = 1300 if emulated else 40_000
    inputs = make_inputs([length, 1, 0], length, device)
    first, *others = (run(value_loss, inputs) for _ in range(3))
    for other in others:
        for one, two in zip(first, other, strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_reference_gradcheck(packed):
    inputs = make_inputs([3, 0, 4], 4, "cpu", torch.float64, packed=packed, garbage=False)
    values = inputs.pop("values").requires_grad_()
    for aggregation in AGGREGATIONS:
        assert torch.autograd.gradcheck(
            lambda leaf, a=aggregation: value_loss(leaf, **inputs, aggregation=a)[0], values
        )


@pytest.mark.parametrize("bounds", [[1, 12], [0, 11], [0, 8, 4, 12], [0, -1, 12], [0, 20, 12]], ids=str)
def test_bad_cu_seqlens(backend, device, bounds, monkeypatch):
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)
    tokens = torch.zeros(12, device=device)

    def call():
        return value_loss(tokens, None, tokens, cu_seqlens=cu_seqlens, aggregation="seq_mean_token_mean")

    if device.type == "cpu" and backend in ("reference", "cpu"):
        with pytest.raises(ValueError, match=r"cu_seqlens.*got"):
            call()
    else:
        assert call()[0].isnan()
    monkeypatch.setattr("rlkernels.ops._checks.CHECK_VALUES", True)
    with pytest.raises(ValueError, match=r"cu_seqlens.*got"):
        call()


@pytest.mark.only("cpu", "triton", "cuda")
def test_second_derivative_is_refused(backend, device):
    values = torch.randn(2, 3, device=device, requires_grad=True)
    loss, _ = value_loss(values, None, torch.zeros(2, 3, device=device))
    gradient = torch.autograd.grad(loss, values, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="differentiated again"):
        gradient.square().sum().backward()


@pytest.mark.only("cpu", "triton", "cuda")
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_opcheck(backend, device, packed):
    inputs = make_inputs([3, 0, 4], 4, device, packed=packed, garbage=False)
    check_ops(
        lambda: run(value_loss, inputs, aggregation="seq_mean_token_mean"),
        backend,
        "value_loss_forward",
        *GRADIENT_OPS[backend],
        differentiable=("value_loss_forward",),
    )


@COMPILERS_AND_LAYOUTS
def test_compile(backend, device, compiler, packed):
    torch._dynamo.reset()
    inputs = make_inputs([3, 0, 4], 4, device, packed=packed)

    def function(values, **rest):
        loss, metrics = value_loss(values * 1.1, **rest)
        return loss * 2, metrics

    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    for one, other in zip(run(compiled, inputs), run(function, inputs), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_nothing_is_read_back_by_the_host(backend, device, aggregation, packed, monkeypatch):
    monkeypatch.setattr("rlkernels.ops._checks.cu_seqlens_values", lambda *values: None)
    inputs = make_inputs([3, 0, 4], 4, device, packed=packed)
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(value) for name, value in inputs.items()}
        leaf = fake.pop("values").requires_grad_()
        loss, metrics = value_loss(leaf, **fake, aggregation=aggregation)
        (gradient,) = torch.autograd.grad(loss, leaf)
    assert (loss.shape, metrics.shape, gradient.shape) == ((), (6,), leaf.shape)


TOKENS = torch.zeros(2, 3)
BAD_INPUT = {
    "values no tensor": (dict(values=[0.0]), TypeError, ("values", "list")),
    "values integer": (dict(values=TOKENS.long()), TypeError, ("values", "float32", "int64")),
    "values 1-d": (dict(values=torch.zeros(6)), ValueError, ("values", "[B, T]", "[6]")),
    "old_values shape": (dict(old_values=torch.zeros(2, 4)), ValueError, ("old_values", "[2, 3]", "[2, 4]")),
    "old_values gradient": (
        dict(old_values=torch.zeros(2, 3, requires_grad=True)),
        ValueError,
        ("old_values", "detach"),
    ),
    "returns None": (dict(returns=None), TypeError, ("returns", "NoneType")),
    "returns shape": (dict(returns=torch.zeros(3)), ValueError, ("returns", "[2, 3]", "[3]")),
    "returns gradient": (dict(returns=torch.zeros(2, 3, requires_grad=True)), ValueError, ("returns", "detach")),
    "returns device": (dict(returns=torch.zeros(2, 3, device="meta")), ValueError, ("returns", "cpu", "meta")),
    "mask shape": (dict(mask=torch.ones(3) > 0), ValueError, ("mask", "[2, 3]", "[3]")),
    "mask a list": (dict(mask=[[1] * 3] * 2), TypeError, ("mask", "list")),
    "clip negative": (dict(clip=-0.1), ValueError, ("clip", ">= 0", "-0.1")),
    "clip a string": (dict(clip="0.2"), TypeError, ("clip", "number", "str")),
    "cu_seqlens with padded": (
        dict(cu_seqlens=torch.tensor([0, 6], dtype=torch.int32)),
        ValueError,
        ("values", "cu_seqlens", "[2, 3]"),
    ),
    "aggregation": (dict(aggregation="mean"), ValueError, ("aggregation", "token_mean", "token_sum", "'mean'")),
    "normalizer 0": (dict(normalizer=0), ValueError, ("normalizer", "> 0", "0")),
    "normalizer a vector": (dict(normalizer=torch.ones(1)), ValueError, ("normalizer", "0-d", "[1]")),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input(backend, device, name):
    changes, error, fragments = BAD_INPUT[name]
    arguments = {"values": TOKENS, "old_values": TOKENS, "returns": TOKENS}
    with pytest.raises(error) as raised:
        value_loss(**(arguments | changes))
    for fragment in fragments:
        assert fragment in str(raised.value)
