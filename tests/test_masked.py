import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rlkernels
from cases import COMPILERS, thorough_emulated
from op_calls import check_ops
from rlkernels import _backends, masked_mean, masked_whiten
from tolerance import assert_as_accurate_as_torch

# Triton's kernels serve NVIDIA GPUs too.
pytestmark = pytest.mark.only("reference", *_backends.BACKENDS_OF["masked_mean"])

WORKER = Path(__file__).with_name("masked_worker.py")
INF = float("inf")
NAN = float("nan")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = {1: "one", 63: "odd, less than a block", 1024: "a block", 1025: "one past a block", 70_001: "many"}


def eager_mean(x, mask, dim=None):
    """As a user writes it."""
    x = x if x.dtype == torch.float64 else x.float()
    scored = torch.ones_like(x, dtype=torch.bool) if mask is None else mask != 0
    dims = tuple(range(x.dim())) if dim is None else dim
    return torch.where(scored, x, 0.0).sum(dims) / scored.sum(dims).clamp(min=1)


def eager_whiten(x, mask, shift_mean=True, eps=1e-8, unbiased=True, eps_floor=False):
    """The scored elements alone, by torch.var."""
    x = x if x.dtype == torch.float64 else x.float()
    scored = torch.ones_like(x, dtype=torch.bool) if mask is None else mask != 0
    whitened = torch.zeros_like(x)
    values = x[scored]
    if len(values):
        variance = values.var(correction=int(unbiased)) if len(values) > unbiased else values.new_zeros(())
        scale = (variance.clamp(min=eps) if eps_floor else variance + eps).rsqrt()
        mean = values.mean()
        whitened[scored] = (values - mean) * scale + (0.0 if shift_mean else mean)
    return whitened


def random(shape, device, dtype=torch.float32, mean=0.0, std=1.0, scored=0.7, garbage=NAN, seed=0):
    """x and mask, with garbage in x where nothing is scored."""
    generator = torch.Generator().manual_seed(seed)
    x = mean + std * torch.randn(shape, generator=generator)
    mask = torch.rand(shape, generator=generator) < scored
    return x.masked_fill(~mask, garbage).to(device, dtype), mask.to(device)


def run_mean(function, x, mask, dim, upstream):
    leaf = x.clone().requires_grad_()
    means = function(leaf, mask, dim=dim)
    upstream = torch.full_like(means, upstream) * torch.arange(1, means.numel() + 1, device=x.device).view(means.shape)
    return means.detach(), torch.autograd.grad(means, leaf, upstream)[0]


def assert_mean_matches(x, mask, dim=None, upstream=-1.7):
    got, gradient = run_mean(masked_mean, x, mask, dim, upstream)
    naive, naive_gradient = run_mean(eager_mean, x, mask, dim, upstream)
    oracle, oracle_gradient = run_mean(eager_mean, x.double(), mask, dim, upstream)
    with rlkernels.use_backend("reference"):
        reference = run_mean(masked_mean, x.double(), mask, dim, upstream)
    for one, other in zip(reference, (oracle, oracle_gradient), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)

    # A sum of terms of both signs is as accurate as its terms are.
    size = eager_mean(x.double().abs(), mask, dim)
    allowed = 2 * (naive.double() - oracle).abs() + 2 * torch.finfo(torch.float32).eps * size
    assert (got.dtype, got.shape) == (naive.dtype, oracle.shape)
    assert ((got.double() - oracle).abs() <= allowed).all()
    assert_as_accurate_as_torch(gradient, oracle_gradient, naive_gradient, what="gradient", gradient=True)


def assert_whiten_matches(x, mask, **options):
    got = masked_whiten(x, mask, **options)
    oracle = eager_whiten(x.double(), mask, **options)
    with rlkernels.use_backend("reference"):
        torch.testing.assert_close(masked_whiten(x.double(), mask, **options), oracle, rtol=1e-9, atol=1e-11)
    assert_as_accurate_as_torch(got, oracle, eager_whiten(x, mask, **options))
    return got


@given(
    shape=st.lists(st.integers(0, 30), max_size=3).map(tuple),
    dtype=st.sampled_from(DTYPES),
    mean=st.sampled_from([0.0, -3.0, 1000.0]),
    scored=st.sampled_from([0.0, 0.1, 0.7, 1.0, None]),
    transposed=st.booleans(),
    data=st.data(),
)
def test_matches_eager(backend, device, shape, dtype, mean, scored, transposed, data):
    x, mask = random(shape, device, dtype, mean, scored=1.0 if scored is None else scored)
    if scored is None:
        mask = None
    if transposed and len(shape) > 1:
        x, mask = x.transpose(0, 1), None if mask is None else mask.transpose(0, 1)
    dims = [None, *range(-len(shape), len(shape))]
    assert_mean_matches(x, mask, data.draw(st.sampled_from(dims)))
    options = {
        "shift_mean": data.draw(st.booleans()),
        "eps": data.draw(st.sampled_from([1e-8, 1e-3, 2.0])),
        "unbiased": data.draw(st.booleans()),
        "eps_floor": data.draw(st.booleans()),
    }
    assert_whiten_matches(x, mask, **options)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("masked", [True, False])
def test_sizes(backend, device, emulated, size, masked):
    size = min(size, 5001) if emulated else size
    x, mask = random((size,), device, scored=0.7 if masked else 1.0)
    assert_mean_matches(x, mask if masked else None)
    assert_whiten_matches(x, mask if masked else None)


@pytest.mark.parametrize(
    "shape", [(3, 2500), *map(thorough_emulated, [(70_000, 3), (3, 1024)]), (1, 7), (2, 3, 1)], ids=str
)
@pytest.mark.parametrize("dim", [0, -1, None])
def test_mean_along_a_dimension(backend, device, emulated, quick, shape, dim):
    """Rows of several blocks, of one, of less; more rows than a GPU's second grid axis has."""
    if emulated and max(shape) > 1024:
        shape = (2, 1100) if dim else (300 if quick else 1100, 2)
    assert_mean_matches(*random(shape, device), dim)
    assert_mean_matches(random(shape, device, garbage=0.0)[0], None, dim)


@pytest.mark.parametrize("mean", [1e4, -1e4])
@pytest.mark.parametrize("std", [1.0, 0.01])
def test_large_mean_does_not_cancel(backend, device, mean, std):
    """The mean of the squares is 1e8 here, of which float32 keeps nothing below 8; the variance is 1, or 1e-4."""
    x, mask = random((5, 1000), device, mean=mean, std=std)
    got = assert_whiten_matches(x, mask)
    oracle = eager_whiten(x.double(), mask)
    # Better than eager PyTorch, whose mean is rounded to float32: a bias of 1e-4 standard deviations, or 1e-2.
    assert (got.double() - oracle).abs().max() < 2e-6
    for constant in (0.1, mean):
        assert_whiten_matches(torch.full((3, 700), constant, device=device), mask[:3, :700])


def test_blocks_of_different_means(backend, device):
    """Within each block of 1,024 there is no spread: all of it lies between blocks."""
    x = torch.arange(4.0, device=device).repeat_interleave(1024)
    assert_whiten_matches(x, None)
    x[1024:2048] = NAN
    assert_whiten_matches(x, ~x.isnan())
    assert_mean_matches(x, ~x.isnan())


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("size", [1e-38, 1e-25, 1.8e19, 1e20, 1e38])
def test_elements_of_any_size(backend, device, size, unbiased):
    """Also where the squares of their deviations overflow; by torch.std, which does not, where torch.var does."""
    x, mask = random((3, 700), device, garbage=0.0)
    x = size * x.clamp(-3, 3)
    scored = x[mask]
    for shift_mean in (True, False):
        whitened = masked_whiten(x, mask, shift_mean=shift_mean, unbiased=unbiased)
        oracle, naive = (
            (value - value.mean()) / (value.std(correction=int(unbiased)) + 1e-4 * (size < 1))
            + (0.0 if shift_mean else value.mean())
            for value in (scored.double(), scored)
        )
        assert_as_accurate_as_torch(whitened[mask], oracle, naive)
        assert not whitened[~mask].any()
    if size < 1e38:  # there the sums of eager PyTorch overflow
        assert_mean_matches(x, mask, 1)


@pytest.mark.parametrize("options", [{}, dict(unbiased=False, eps_floor=True)], ids=["", "floor"])
def test_float64_of_any_size(backend, device, options):
    """Also where the squares of their deviations overflow."""
    x, mask = random((3, 200), device, torch.float64, garbage=0.0)
    near = masked_whiten(x, mask, eps=2e-38, **options)
    torch.testing.assert_close(masked_whiten(x * 2.0**700, mask, **options), near, rtol=1e-13, atol=0)


def test_the_largest_floats(backend, device):
    """Their sums overflow, and so do their differences, and 1 / std has lost digits."""
    largest = torch.finfo(torch.float32).max
    x = torch.tensor([largest, largest, largest, -largest, 0.0] * 300, device=device)
    assert_whiten_matches(x, None)
    assert_whiten_matches(x, None, shift_mean=False)
    mean = masked_mean(x, None)
    assert mean.item() == pytest.approx(0.4 * largest, rel=1e-6) or (backend == "reference" and mean.isinf())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_mean_keeps_its_digits_beside_large_deviations(backend, device, dtype):
    """The elements are +-6e4; their mean is small, and is added again."""
    x = torch.full((3000,), 6e4, dtype=dtype)
    x[torch.rand(3000, generator=torch.Generator().manual_seed(0)) < 0.493] *= -1
    assert_whiten_matches(x.to(device), None, shift_mean=False)


@pytest.mark.parametrize(
    "garbage", [NAN, thorough_emulated(INF), thorough_emulated(-INF), thorough_emulated(1e38)], ids=str
)
def test_what_is_not_scored_leaves_no_trace(backend, device, garbage):
    clean, mask = random((4, 300), device, garbage=0.0)
    dirty = clean.masked_fill(~mask, garbage)
    for shift_mean in (True, False):
        whitened = masked_whiten(dirty, mask, shift_mean=shift_mean)
        assert torch.equal(whitened, masked_whiten(clean, mask, shift_mean=shift_mean))
        assert not whitened[~mask].any()
    for dim in (None, 0, 1):
        for one, other in zip(
            run_mean(masked_mean, dirty, mask, dim, 1.0), run_mean(masked_mean, clean, mask, dim, 1.0), strict=True
        ):
            assert torch.equal(one, other)


@pytest.mark.parametrize("bad", [NAN, INF])
def test_scored_nan_and_infinity_show(backend, device, bad):
    x, mask = random((4, 300), device, garbage=0.0)
    x[1, 7], mask[1, 7] = bad, True
    assert masked_whiten(x, mask)[mask].isnan().all()
    assert not masked_whiten(x, mask)[~mask].any()
    means = masked_mean(x, mask, dim=1)
    assert torch.equal(means[[0, 2, 3]], masked_mean(x[[0, 2, 3]], mask[[0, 2, 3]], dim=1))
    torch.testing.assert_close(means[1].item(), bad, equal_nan=True)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (0, 3), (2, 5)], ids=str)
def test_nothing_scored(backend, device, shape):
    x = torch.full(shape, NAN, device=device)
    mask = torch.zeros(shape, dtype=torch.bool, device=device)
    for shift_mean in (True, False):
        whitened = masked_whiten(x, mask, shift_mean=shift_mean)
        assert whitened.shape == shape
        assert not whitened.any()
    for dim in (None, *range(len(shape))):
        means, gradient = run_mean(masked_mean, x, mask, dim, 1.0)
        assert not means.any()
        assert not gradient.any()
        assert means.shape == x.detach().nansum(dim).shape


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("unbiased", [True, False])
def test_one_scored_and_all_equal(backend, device, shift_mean, unbiased):
    x = torch.tensor([[3.0, 5.0], [5.0, 7.0]], device=device)
    for mask in ([[0, 0], [0, 1]], [[0, 1], [1, 0]]):
        mask = torch.tensor(mask, device=device)
        wanted = torch.zeros_like(x) if shift_mean else x * mask
        assert torch.equal(masked_whiten(x, mask, shift_mean=shift_mean, unbiased=unbiased), wanted)


def test_eps_is_added_or_the_floor(backend, device):
    x = torch.tensor([-0.01, 0.01], device=device)  # variance 1e-4, or 2e-4 unbiased
    for options, variance in (
        (dict(eps=1e-4), 2e-4 + 1e-4),
        (dict(eps=1e-4, unbiased=False), 1e-4 + 1e-4),
        (dict(eps=1e-3, eps_floor=True), 1e-3),
        (dict(eps=1e-5, eps_floor=True), 2e-4),
        (dict(eps=1e-5, eps_floor=True, unbiased=False), 1e-4),
    ):
        wanted = torch.tensor([-1.0, 1.0], device=device) * 0.01 / math.sqrt(variance)
        torch.testing.assert_close(masked_whiten(x, None, **options), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.int32, torch.uint8], ids=str)
def test_masks_of_other_dtypes(backend, device, dtype):
    x, mask = random((4, 30), device)
    assert torch.equal(masked_whiten(x, mask.to(dtype)), masked_whiten(x, mask))
    assert torch.equal(masked_mean(x, 3 * mask.to(dtype), dim=0), masked_mean(x, mask, dim=0))


def test_strides(backend, device):
    x, mask = random((6, 40), device)
    strided = [value.t().contiguous().t() for value in (x, mask)]
    assert torch.equal(masked_whiten(*strided), masked_whiten(x, mask))
    for dim in (None, 0, 1):
        assert torch.equal(masked_mean(*strided, dim=dim), masked_mean(x, mask, dim=dim))
    beyond = [torch.cat([value.flatten()[:1], value.flatten()])[1:].view(6, 40) for value in (x, mask)]
    assert torch.equal(masked_whiten(*beyond), masked_whiten(x, mask))  # not at a multiple of 16 bytes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(backend, device, dtype):
    x, mask = random((5, 200), device, dtype)
    assert masked_whiten(x, mask).dtype == masked_mean(x, mask).dtype == torch.float32
    assert_whiten_matches(x, mask)
    assert_mean_matches(x, mask, 1)


def test_same_bits_on_every_run_and_for_any_number_of_threads(backend, device, emulated):
    x, mask = random((3, 1500) if emulated else (50, 3001), device, mean=3.0)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 2, 5):
            torch.set_num_threads(count)
            results.append((masked_whiten(x, mask), masked_mean(x, mask), masked_mean(x, mask, dim=1)))
    finally:
        torch.set_num_threads(threads)
    if backend == "reference":
        results = results[1:3]  # torch.sum goes by the number of threads
    for again in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(again, results[0], strict=True))


def test_a_row_mean_does_not_depend_on_the_others(backend, device):
    x, mask = random((7, 1300), device)
    together = masked_mean(x, mask, dim=1)
    for row in range(7):
        assert torch.equal(masked_mean(x[row : row + 1], mask[row : row + 1], dim=1), together[row : row + 1])


@pytest.mark.parametrize("dim", [None, 0, -1])
def test_reference_gradcheck(dim):
    x, mask = random((4, 5), "cpu", torch.float64, garbage=0.0)
    assert torch.autograd.gradcheck(lambda x: masked_mean(x, mask, dim=dim), x.requires_grad_())


def test_whiten_by_its_definition(backend, device):
    x, mask = random((8, 200), device, mean=5.0, std=3.0)
    whitened = masked_whiten(x, mask)[mask].double()
    torch.testing.assert_close(whitened.mean().item(), 0.0, atol=1e-6, rtol=0)
    torch.testing.assert_close(whitened.var().item(), 1.0, atol=1e-5, rtol=0)
    kept = masked_whiten(x, mask, shift_mean=False)[mask].double()
    torch.testing.assert_close(kept.mean(), x[mask].double().mean(), atol=1e-5, rtol=0)


@pytest.mark.only("cpu")
@pytest.mark.parametrize("processes", [2, 3])
def test_whiten_over_a_group_equals_one_process(backend, device, tmp_path, forked, processes):
    """Parts of different sizes, one of them of nothing; the last has a mean far from the others'."""
    sizes = [1300, 0, 700][:processes] if processes == 3 else [1300, 700]
    parts = [random((size,), "cpu", mean=100.0 * (rank == processes - 1)) for rank, size in enumerate(sizes)]
    torch.save(parts, tmp_path / "parts.pt")
    code, printed = forked.run_together(processes, str(WORKER), str(tmp_path))
    assert code == 0, printed[-4000:]
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(processes)]
    x, mask = (torch.cat(values) for values in zip(*parts, strict=True))
    for name, options in results[0]["options"].items():
        whole = masked_whiten(x, mask, **options)
        torch.testing.assert_close(torch.cat([result[name] for result in results]), whole, rtol=1e-6, atol=1e-6)
    for result in results[1:]:
        assert torch.equal(result["moments"], results[0]["moments"]), "every rank has the same bits"


@pytest.mark.only("cpu", "triton")
def test_opcheck(backend, device):
    x, mask = random((3, 21), device, garbage=0.0)
    for one_mask in (mask, None):
        check_ops(
            lambda one_mask=one_mask: run_mean(masked_mean, x, one_mask, 1, 1.0),
            backend,
            "masked_mean",
            *(["masked_mean_backward"] if backend == "triton" else []),
            differentiable=("masked_mean",),
        )
        check_ops(
            lambda one_mask=one_mask: masked_whiten(x, one_mask, eps_floor=True),
            backend,
            "masked_moments",
            "masked_whiten",
        )


@pytest.mark.parametrize("compiler", COMPILERS)
def test_compile(backend, device, compiler):
    torch._dynamo.reset()
    x, mask = random((5, 40), device, garbage=0.0)

    def function(x, mask):
        return masked_mean(2 * x, mask, dim=0).sum() + masked_mean(x * x, mask)

    def whiten(x, mask):
        return masked_whiten(x * 2, mask, shift_mean=False)

    leaf = x.clone().requires_grad_()
    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    values = [one(leaf, mask) for one in (compiled, function)]
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*(torch.autograd.grad(value, leaf)[0] for value in values))
    compiled = torch.compile(whiten, fullgraph=True, backend=compiler)
    torch.testing.assert_close(compiled(x, mask), whiten(x, mask), rtol=1e-6, atol=1e-6)


def test_where_a_backend_has_no_kernels_the_next_serves(monkeypatch):
    """On an NVIDIA GPU Triton, although CUDA precedes it and also where CUDA was asked for."""
    tensor = torch.zeros(1)
    for name, serves in (("cuda", True), ("triton", True), ("cpu", False)):
        monkeypatch.setitem(_backends._devices, name, ("cpu",) if serves else ())
    with rlkernels.use_backend("auto"):
        assert _backends.select(tensor, "policy_loss") == "cuda"
        assert _backends.select(tensor, "masked_whiten") == "triton"
    with rlkernels.use_backend("cuda"):
        assert _backends.select(tensor, "masked_whiten") == "triton"
    with rlkernels.use_backend("reference"):
        assert _backends.select(tensor, "masked_whiten") == "reference"
    assert not hasattr(torch.ops.rlkernels.masked_whiten, "cuda")


X = torch.zeros(2, 3)
BAD_INPUT = {
    "x no tensor": (dict(x=[0.0]), TypeError, ("x", "list")),
    "x integer": (dict(x=X.long()), TypeError, ("x", "float32", "int64")),
    "mask a list": (dict(mask=[[1] * 3] * 2), TypeError, ("mask", "list")),
    "mask shape": (dict(mask=torch.ones(3)), ValueError, ("mask", "[2, 3]", "[3]")),
    "mask device": (dict(mask=torch.ones(2, 3, device="meta")), ValueError, ("mask", "cpu", "meta")),
    "mask complex": (dict(mask=torch.ones(2, 3) * 1j), TypeError, ("mask", "bool", "complex64")),
}
BAD_MEAN = {
    "dim beyond": (dict(dim=2), ValueError, ("dim", "2 dimensions")),
    "dim below": (dict(dim=-3), ValueError, ("dim", "-3")),
    "dim of a scalar": (dict(x=torch.zeros(()), mask=None, dim=0), ValueError, ("dim", "0 dimensions")),
    "dim a tuple": (dict(dim=(0, 1)), TypeError, ("dim", "integer", "tuple")),
}
BAD_WHITEN = {
    "x gradient": (dict(x=torch.zeros(2, 3, requires_grad=True)), ValueError, ("x", "requires_grad", "detach")),
    "eps 0": (dict(eps=0), ValueError, ("eps", "> 0", "0")),
    "eps nan": (dict(eps=NAN), ValueError, ("eps", "> 0", "nan")),
    "eps a string": (dict(eps="1e-8"), TypeError, ("eps", "number", "str")),
    "group": (dict(group=2), TypeError, ("group", "process group", "int")),
}


@pytest.mark.parametrize("name", [*BAD_INPUT, *BAD_MEAN, *BAD_WHITEN])
def test_bad_input(backend, device, name):
    functions = [masked_mean] * (name not in BAD_WHITEN) + [masked_whiten] * (name not in BAD_MEAN)
    changes, error, fragments = (BAD_INPUT | BAD_MEAN | BAD_WHITEN)[name]
    for function in functions:
        with pytest.raises(error) as raised:
            function(**({"x": X, "mask": torch.ones(2, 3)} | changes))
        for fragment in fragments:
            assert fragment in str(raised.value)
