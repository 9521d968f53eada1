import mmap

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rlkernels
from cases import COMPILERS, THOROUGH_EMULATED, thorough_emulated
from head_problems import rows_under_a_cap
from op_calls import check_ops
from rlkernels import _backends, token_logprobs
from tolerance import assert_as_accurate_as_torch, ulp

IGNORE = -100
INF = float("inf")
NAN = float("nan")
pytestmark = pytest.mark.only("reference", *_backends.BACKENDS_OF["token_logprobs"])
kernels_only = pytest.mark.only("cpu", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VOCABULARIES = {
    1: "the target is the whole vocabulary",
    2: "one other logit",
    63: "less than a vector of 64, and odd",
    129: "one past a block of 128",
    1000: "many vectors and a tail of 8",
}


def eager(logits, token_ids, temperature=1.0, softcap=None):
    """As a user writes it: log_softmax, gather and p log p, in float32 or, for float64 logits, in float64."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    ignored = token_ids == IGNORE
    z = z.masked_fill(ignored.unsqueeze(-1), 0.0)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    log_p = (z / temperature).log_softmax(-1)
    logprobs = log_p.gather(-1, token_ids.masked_fill(ignored, 0).unsqueeze(-1)).squeeze(-1)
    p = log_p.exp()
    entropy = -(p * log_p.masked_fill(p == 0, 0.0)).sum(-1)
    return logprobs.masked_fill(ignored, 0.0), entropy.masked_fill(ignored, 0.0)


def kernel(logits, token_ids, **options):
    return token_logprobs(logits, token_ids, return_entropy=True, **options)


def random_row(kind, vocab_size, generator):
    """Logits of one kind and a target."""
    row = 3 * torch.randn(vocab_size, generator=generator)
    chance = torch.rand(vocab_size, generator=generator)
    target = somewhere = int(chance[0] * vocab_size)
    match kind:
        case "plain":
            pass
        case "masked vocabulary":
            row[chance < 0.5] = -INF
            row[target] = 0.5
        case "target masked":
            row[target] = -INF
        case "huge":
            row[chance < 0.2] = 1e4
            row[chance > 0.8] = -1e4
        case "far from zero":
            row = row / 3 + 1e4
        case "one finite":
            row[:] = -INF
            row[target] = -7.0
        case "nothing finite":
            row[:] = -INF
        case "confident":
            row[target] += 40.0
        case "all equal":
            row[:] = 2.0
        case "a nan":
            row[somewhere] = NAN
        case "an inf":
            row[somewhere] = INF
        case "ignored":
            target = IGNORE
        case "ignored nan":
            row[:] = NAN
            target = IGNORE
    return row, target


KINDS = (
    *("plain", "masked vocabulary", "target masked", "huge", "far from zero", "one finite", "nothing finite"),
    *("confident", "all equal", "a nan", "an inf", "ignored", "ignored nan"),
)


def random_rows(kinds, vocab_size, seed):
    generator = torch.Generator().manual_seed(seed)
    rows, targets = zip(*(random_row(kind, vocab_size, generator) for kind in kinds), strict=True)
    return torch.stack(rows), torch.tensor(targets)


# Each makes of rows [B, T, V] a base tensor and the view of it that holds them. What lies between the rows is NaN.
LAYOUTS = {
    "contiguous": (lambda rows: rows, lambda base: base),
    "next token": (lambda rows: torch.nn.functional.pad(rows, (0, 0, 0, 1), value=NAN), lambda base: base[:, :-1]),
    "sequence first": (lambda rows: rows.transpose(0, 1).contiguous(), lambda base: base.transpose(0, 1)),
    "vocabulary first": (lambda rows: rows.movedim(-1, 0).contiguous(), lambda base: base.movedim(0, -1)),
    "unaligned": (lambda rows: torch.nn.functional.pad(rows, (1, 2), value=NAN), lambda base: base[..., 1:-2]),
    "every other": (lambda rows: torch.stack([rows, rows + NAN], -1).flatten(-2), lambda base: base[..., ::2]),
    "expanded": (lambda rows: rows[:, :1].contiguous(), lambda base: base.expand(-1, 3, -1)),
    "one row": (lambda rows: rows[0, 0].contiguous(), lambda base: base),
    "four dimensions": (lambda rows: rows[None].contiguous(), lambda base: base.transpose(0, 1)),
}


def run(function, base, view, token_ids, upstream, **options):
    """Both outputs of `function` for view(base), and the gradient of base for the upstream gradients of both."""
    leaf = base.clone().requires_grad_()
    outputs = function(view(leaf), token_ids, **options)
    torch.autograd.backward(outputs, [gradient.to(outputs[0].dtype) for gradient in upstream])
    return *(output.detach() for output in outputs), leaf.grad


def assert_matches_reference(base, view, token_ids, upstream, **options):
    got = run(kernel, base, view, token_ids, upstream, **options)
    with rlkernels.use_backend("reference"):
        oracle = run(kernel, base.double(), view, token_ids, upstream, **options)
    naive = run(eager, base, view, token_ids, upstream, **options)
    for what, *three in zip(("logprobs", "entropy", "gradient"), got, oracle, naive, strict=True):
        assert_as_accurate_as_torch(*three, what=what, gradient=what == "gradient")
    assert not (got[0] > 0).any()
    assert not (got[1] < 0).any()


def upstream_for(token_ids, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(token_ids.shape, generator=generator).to(token_ids.device) for _ in range(2)]


def plain(shape, device, dtype=torch.float32, seed=0):
    """Logits, targets and upstream gradients with nothing special about them."""
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(shape, generator=generator)).to(device, dtype)
    token_ids = torch.randint(shape[-1], shape[:-1], generator=generator).to(device)
    return logits, token_ids, upstream_for(token_ids, seed)


def unchanged(base):
    return base


@given(
    kinds=st.lists(st.sampled_from(KINDS), min_size=6, max_size=6),
    vocab_size=st.sampled_from(list(VOCABULARIES)) | st.integers(1, 300),
    layout=st.sampled_from(list(LAYOUTS)),
    dtype=st.sampled_from(DTYPES),
    temperature=st.sampled_from([1.0, 0.7, 3.0]),
    # A small one shows what stands in for logits past the end of a row: -inf is finite once capped.
    softcap=st.sampled_from([None, 30.0, 2.0]),
    seed=st.integers(0, 99),
)
def test_matches_reference(backend, device, emulated, kinds, vocab_size, layout, dtype, temperature, softcap, seed):
    # If there are few rows, eager PyTorch may happen to round all of them well and be too strict a measure.
    rows, token_ids = random_rows(kinds if emulated else kinds * 5, vocab_size, seed)
    make_base, view = LAYOUTS[layout]
    base = make_base(rows.to(device, dtype).view(-1, 3, vocab_size))
    token_ids = token_ids.to(device)
    token_ids = token_ids[0] if layout == "one row" else token_ids.view(view(base).shape[:-1])
    assert_matches_reference(
        base, view, token_ids, upstream_for(token_ids, seed), temperature=temperature, softcap=softcap
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_every_kind_of_row(backend, device, emulated, quick, vocab_size, dtype):
    for kind in KINDS:
        rows, token_ids = random_rows([kind] * (1 if emulated and quick else 3), vocab_size, seed=1)
        rows, token_ids = rows.to(device, dtype), token_ids.to(device)
        assert_matches_reference(rows, unchanged, token_ids, upstream_for(token_ids))


@pytest.mark.parametrize("dtype", [thorough_emulated(DTYPES[0]), DTYPES[1], thorough_emulated(DTYPES[2])], ids=str)
def test_vocabulary_of_gpt2(backend, device, dtype):
    """50257: odd, so that every second row is unaligned, and longer than any block."""
    logits, token_ids, upstream = plain((2, 2, 50257), device, dtype)
    token_ids[0, 0] = 50256
    assert_matches_reference(logits, lambda base: base[:, :-1], token_ids[:, :1], [u[:, :1] for u in upstream])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_is_rounded_not_truncated(backend, device, dtype):
    """Enough rows for the signed-bias check to see half an ulp."""
    logits, token_ids, upstream = plain((64, 129), device, dtype)
    assert_matches_reference(logits, unchanged, token_ids, upstream)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradient_rounds_ties_to_even(backend, device, dtype):
    """The gradient of a token of probability 0 is the upstream gradient, here half-way between two numbers."""
    upstream = 1 + torch.finfo(dtype).eps * (torch.arange(8, device=device) + 0.5)
    logits = torch.zeros(8, 5, device=device, dtype=dtype)
    logits[:, 2] = -INF
    logprobs = token_logprobs(logits.requires_grad_(), torch.full((8,), 2, device=device))
    logprobs.backward(upstream)
    assert torch.equal(logits.grad[:, 2], upstream.to(dtype))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_reference_is_the_formula(kind, softcap):
    """The oracle itself against log_softmax in float64."""
    rows, token_ids = random_rows([kind] * 4, 63, seed=3)
    options = {"temperature": 0.7, "softcap": softcap}
    upstream = upstream_for(token_ids)
    got = run(kernel, rows.double(), unchanged, token_ids, upstream, **options)
    wanted = run(eager, rows.double(), unchanged, token_ids, upstream, **options)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11, equal_nan=True)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("kind", ["plain", "masked vocabulary", "one finite"])
def test_reference_gradcheck(kind, softcap):
    rows, token_ids = random_rows([kind] * 2 + ["ignored"], 5, seed=0)
    # A finite difference cannot be taken at -inf: its gradient is held to 0 above.
    finite = rows.isfinite()

    def function(values):
        logits = torch.full_like(rows, -INF, dtype=torch.float64).masked_scatter(finite, values)
        return token_logprobs(logits, token_ids, temperature=0.7, softcap=softcap, return_entropy=True)

    assert torch.autograd.gradcheck(function, rows[finite].double().requires_grad_())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("which", [0, 1], ids=["logprobs", "entropy"])
def test_gradient_of_one_output_alone(backend, device, emulated, quick, which, dtype):
    logits, token_ids, upstream = plain((16 if emulated and quick else 64, 129), device, dtype)
    gradients = []
    for function, cast in ((kernel, dtype), (kernel, torch.float64), (eager, dtype)):
        leaf = logits.to(cast, copy=True).requires_grad_()
        output = function(leaf, token_ids)[which]
        gradients += torch.autograd.grad(output, leaf, upstream[which].to(output.dtype))
    assert_as_accurate_as_torch(*gradients, gradient=True)


def test_logprobs_alone(backend, device):
    logits, token_ids, upstream = plain((5, 129), device)
    alone = token_logprobs(logits.requires_grad_(), token_ids)
    both, _ = token_logprobs(logits, token_ids, return_entropy=True)
    assert torch.equal(alone, both)
    (gradient,) = torch.autograd.grad(alone, logits, upstream[0])
    (gradient_both,) = torch.autograd.grad(both, logits, upstream[0])
    assert torch.equal(gradient, gradient_both)


def test_upstream_gradients_of_any_strides(backend, device):
    logits, token_ids, upstream = plain((4, 3, 63), device)
    wanted = run(kernel, logits, unchanged, token_ids, upstream)[2]
    strided = [gradient.t().contiguous().t() for gradient in upstream]
    assert torch.equal(run(kernel, logits, unchanged, token_ids, strided)[2], wanted)
    expanded = [gradient[:1, :1].expand(4, 3) for gradient in upstream]
    dense = [gradient.contiguous() for gradient in expanded]
    assert torch.equal(
        run(kernel, logits, unchanged, token_ids, expanded)[2], run(kernel, logits, unchanged, token_ids, dense)[2]
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gap", [20, 30, 45, 60])
def test_confident_tokens_keep_their_precision(backend, device, gap, dtype):
    """z_t - logsumexp(z) is 0 or a multiple of 2e-6 here; the logprob is e^-20 to e^-60."""
    logits, token_ids, _ = plain((8, 129), device)
    logits = logits.scatter(-1, token_ids.unsqueeze(-1), float(gap) + 10).to(dtype)
    leaf = logits.clone().requires_grad_()
    logprobs = token_logprobs(leaf, token_ids)
    logprobs.sum().backward()

    z = logits.double()
    target = token_ids.unsqueeze(-1)
    others = z.scatter(-1, target, -INF)
    odds_against = (others - z.gather(-1, target)).exp()
    exact = -torch.log1p(odds_against.sum(-1))
    # The difference of two logits about 70 apart is rounded to within ulp(64), which exp makes a relative error.
    relative = 4 * ulp(torch.tensor(64.0), torch.float32).item()
    torch.testing.assert_close(logprobs.double(), exact, rtol=relative, atol=0)

    gradient = leaf.grad.double()
    relative += 2 * torch.finfo(dtype).eps
    smallest = torch.finfo(dtype).smallest_normal if dtype == torch.float16 else 0.0
    wanted = (-odds_against * exact.exp().unsqueeze(-1)).scatter(-1, target, -torch.expm1(exact).unsqueeze(-1))
    torch.testing.assert_close(gradient, wanted, rtol=relative, atol=smallest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_vocabulary_masked_by_the_lowest_number(backend, device, dtype):
    logits = torch.randn(3, 9000, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    logits[:, 50:] = torch.finfo(dtype).min
    token_ids = torch.tensor([0, 7, 49], device=device)
    values = token_logprobs(logits, token_ids, return_entropy=True)
    for value, wanted in zip(values, token_logprobs(logits[:, :50], token_ids, return_entropy=True), strict=True):
        torch.testing.assert_close(value, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab_size", [37, thorough_emulated(131)])
@pytest.mark.parametrize("temperature", [0.01, thorough_emulated(0.05)])
@pytest.mark.parametrize("softcap", [2.0, 30.0, 50.0])
def test_softcap_at_a_low_temperature(backend, device, emulated, quick, softcap, temperature, vocab_size, dtype):
    """The rounding of softcap * tanh is divided by the temperature: it must be the same wherever a logit is read, for
    the largest less itself to be 0."""
    rows, token_ids = rows_under_a_cap(600 if not emulated else 60 if quick else 240, vocab_size, softcap)
    rows, token_ids = rows.to(device, dtype), token_ids.to(device)
    options = dict(temperature=temperature, softcap=softcap)
    assert_matches_reference(rows, unchanged, token_ids, upstream_for(token_ids), **options)


def test_never_above_zero(backend, device):
    """Also where rounding of a logsumexp would make it so: everything far from zero, one logit slightly ahead."""
    generator = torch.Generator().manual_seed(0)
    logits = 1e4 + torch.randn(64, 63, generator=generator)
    logits[:, 5] = 1e4 + 16
    logprobs = token_logprobs(logits.to(device), torch.full((64,), 5, device=device))
    assert (logprobs < 0).all()


def test_one_finite_logit_is_certain(backend, device):
    rows, token_ids = random_rows(["one finite"], 63, seed=0)
    token_ids = token_ids.to(device)
    logprobs, entropy, gradient = run(kernel, rows.to(device), unchanged, token_ids, upstream_for(token_ids))
    assert logprobs.item() == 0
    assert entropy.item() == 0
    assert not gradient.any()


@pytest.mark.parametrize("kind", ["nothing finite", "a nan", "an inf"])
def test_undefined_rows_give_nan(backend, device, kind):
    rows, token_ids = random_rows([kind, "plain"], 63, seed=0)
    token_ids = token_ids.to(device)
    logprobs, entropy, gradient = run(kernel, rows.to(device), unchanged, token_ids, upstream_for(token_ids))
    assert logprobs[0].isnan()
    assert entropy[0].isnan()
    assert gradient[0].isnan().all()
    for value in (logprobs, entropy, gradient):
        assert value[1].isfinite().all()


def test_masked_target(backend, device):
    rows, token_ids = random_rows(["target masked"], 63, seed=0)
    leaf = rows.to(device).requires_grad_()
    logprobs = token_logprobs(leaf, token_ids.to(device))
    logprobs.sum().backward()
    assert logprobs.item() == -INF
    probabilities = rows.double().softmax(-1)
    probabilities[0, token_ids[0]] -= 1
    torch.testing.assert_close(leaf.grad.cpu().double(), -probabilities, rtol=1e-5, atol=1e-7)


def test_ignored_rows_are_exactly_zero(backend, device):
    rows, token_ids = random_rows(["ignored nan", "plain", "ignored"], 129, seed=0)
    token_ids[token_ids == IGNORE] = 7
    token_ids[1] = 3
    leaf = rows.to(device).requires_grad_()
    logprobs, entropy = kernel(leaf, token_ids.to(device), ignore_index=7)
    torch.autograd.backward([logprobs, entropy], upstream_for(logprobs))
    ignored = torch.tensor([True, False, True], device=device)
    for value in (logprobs, entropy, leaf.grad):
        assert not value[ignored].any()
        assert value[~ignored].all()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8], ids=str)
def test_token_ids_of_any_integer_dtype_and_strides(backend, device, dtype):
    logits, token_ids, _ = plain((4, 3, 63), device)
    wanted = token_logprobs(logits, token_ids)
    assert torch.equal(token_logprobs(logits, token_ids.to(dtype)), wanted)
    assert torch.equal(token_logprobs(logits, token_ids.t().contiguous().t()), wanted)


def test_token_ids_of_a_dtype_that_cannot_hold_the_vocabulary_size(backend, device):
    logits = torch.randn(2, 50257, device=device)
    token_ids = torch.tensor([3, 32767], device=device)
    assert torch.equal(token_logprobs(logits, token_ids.short()), token_logprobs(logits, token_ids))


def test_float64_is_computed_in_float64(backend, device):
    logits, token_ids, _ = plain((4, 63), device, torch.float64)
    logprobs, entropy = kernel(logits, token_ids)
    wanted, wanted_entropy = eager(logits, token_ids)
    torch.testing.assert_close(logprobs, wanted, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(entropy, wanted_entropy, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("shape", [(0, 63), (0, 5, 63), (3, 0, 63), (63,), (1, 1, 1), (2, 1, 3, 63)], ids=str)
def test_shapes(backend, device, shape):
    logits, token_ids, upstream = plain(shape, device)
    logprobs, entropy, gradient = run(kernel, logits, unchanged, token_ids, upstream)
    assert logprobs.shape == entropy.shape == shape[:-1]
    assert gradient.shape == shape
    assert logprobs.dtype == entropy.dtype == torch.float32
    assert_matches_reference(logits, unchanged, token_ids, upstream)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_the_others(backend, device, dtype):
    logits, token_ids, upstream = plain((7, 300), device, dtype)
    together = run(kernel, logits, unchanged, token_ids, upstream)
    for row in range(7):
        at = slice(row, row + 1)
        alone = run(kernel, logits[at], unchanged, token_ids[at], [u[at] for u in upstream])
        for one, all_rows in zip(alone, together, strict=True):
            assert torch.equal(one, all_rows[at])


def small_parts(monkeypatch, few_rows=8):
    """Parts of 2,048 logits of 16 bits, or 1,024 of 32, where Triton's kernels are interpreted."""
    for name, value in (("LINES", 1), ("TILES_OF_PART", 2), ("FEW_ROWS", few_rows)):
        monkeypatch.setattr(f"rlkernels.triton.logprobs.{name}", value)


@pytest.mark.only("triton")
@pytest.mark.parametrize("few_rows", [0, 100])
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_several_parts(backend, device, emulated, dtype, softcap, few_rows, monkeypatch):
    small_parts(monkeypatch, few_rows)
    for vocab_size in (2048, 4297):
        rows, token_ids = random_rows(KINDS * (1 if emulated else 10), vocab_size, seed=2)
        rows, token_ids = rows.to(device, dtype), token_ids.to(device)
        assert_matches_reference(rows, unchanged, token_ids, upstream_for(token_ids), softcap=softcap)


@pytest.mark.parametrize("rows", [9, *map(thorough_emulated, (64, 512)), 8192])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_has_the_same_bits_among_any_number_of_rows(backend, device, emulated, dtype, rows, monkeypatch):
    """Programs of a GPU share a row part by part where there are few; where there are many, each has a row."""
    vocab_size = 2 * 16384 + 2000  # more than two parts
    if emulated:
        if rows > 1000:
            pytest.skip("a row takes 50 ms where GPU kernels run on a CPU")
        small_parts(monkeypatch)
        vocab_size = 2 * 2048 + 200
    logits, token_ids, upstream = plain((1, vocab_size), device, dtype)
    alone = run(kernel, logits, unchanged, token_ids, upstream)
    logits, token_ids, *upstream = (value.expand(rows, *value.shape[1:]) for value in (logits, token_ids, *upstream))
    for one, all_rows in zip(alone, run(kernel, logits, unchanged, token_ids, upstream), strict=True):
        assert torch.equal(all_rows, one.expand_as(all_rows))


@THOROUGH_EMULATED
def test_same_bits_on_every_run(backend, device, emulated):
    logits, token_ids, upstream = plain((4 if emulated else 64, 1000), device, torch.bfloat16)
    first = run(kernel, logits, unchanged, token_ids, upstream)
    for _ in range(3):
        for one, other in zip(first, run(kernel, logits, unchanged, token_ids, upstream), strict=True):
            assert torch.equal(one, other)


def test_more_rows_than_a_grid_dimension_holds(backend, device, emulated):
    """65,535 is the limit of a CUDA grid's second and third dimension; 70,000 rows as [A, B] in both orders."""
    if emulated:
        pytest.skip("70,000 blocks take minutes where GPU kernels run on a CPU")
    logits, token_ids, upstream = plain((70_000, 3), device)
    assert_matches_reference(logits, unchanged, token_ids, upstream)
    columns = [u.view(70_000, 1) for u in upstream]
    assert_matches_reference(logits.view(70_000, 1, 3), unchanged, token_ids.view(70_000, 1), columns)


@kernels_only
@pytest.mark.parametrize("dimension", [0, 1], ids=["A", "B"])
def test_rows_more_than_2_to_the_31_elements_apart(backend, device, dimension):
    distance = 2**31 + 3
    if device.type == "cpu":
        # Anonymous memory costs nothing until touched.
        memory = torch.frombuffer(mmap.mmap(-1, 2 * (distance + 64)), dtype=torch.bfloat16)
    else:
        memory = torch.zeros(distance + 64, dtype=torch.bfloat16, device=device)
    rows, token_ids, upstream = plain((2, 63), device, torch.bfloat16)
    wanted = run(kernel, rows, unchanged, token_ids, upstream)

    shape, strides = ((2, 1, 63), (distance, 63, 1)) if dimension == 0 else ((1, 2, 63), (63, distance, 1))
    logits = memory.as_strided(shape, strides).copy_(rows.view(shape)).requires_grad_()
    token_ids, upstream = token_ids.view(shape[:-1]), [u.view(shape[:-1]) for u in upstream]
    outputs = kernel(logits, token_ids)
    torch.autograd.backward(outputs, upstream)
    for one, other in zip((*outputs, logits.grad), wanted, strict=True):
        assert torch.equal(one.flatten(), other.flatten())

    op = torch.ops.rlkernels
    options = (1.0, 0.0, IGNORE)
    with torch.no_grad():
        saved = getattr(op.token_logprobs_forward, backend)(logits, token_ids, *options, True)
        getattr(op.token_logprobs_backward_, backend)(*upstream, logits, token_ids, *saved, *options)
    assert torch.equal(logits.flatten(), wanted[2].flatten())


def produced(leaf):
    """Logits as a model makes them: no leaf, and their producer does not need them again."""
    return leaf * 1


@pytest.mark.parametrize("dtype", [thorough_emulated(DTYPES[0]), DTYPES[1], thorough_emulated(DTYPES[2])], ids=str)
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "expanded"])
def test_inplace_backward_gives_the_same_gradient(backend, device, layout, dtype):
    rows, token_ids = random_rows(["plain", "masked vocabulary", "ignored nan", "confident", "huge", "plain"], 129, 0)
    make_base, view = LAYOUTS[layout]
    base = make_base(rows.to(device, dtype).view(2, 3, 129))
    token_ids = token_ids.to(device)
    token_ids = token_ids[0] if layout == "one row" else token_ids.view(view(base).shape[:-1])
    upstream = upstream_for(token_ids)
    options = {"temperature": 0.7, "softcap": 30.0}
    wanted = run(kernel, base, lambda leaf: view(produced(leaf)), token_ids, upstream, **options)
    got = run(kernel, base, lambda leaf: view(produced(leaf)), token_ids, upstream, inplace_backward=True, **options)
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(one, other)


@kernels_only
def test_inplace_backward_writes_into_the_logits(backend, device):
    logits, token_ids, upstream = plain((2, 4, 129), device, torch.bfloat16)
    wanted = run(kernel, logits, lambda base: base[:, :-1], token_ids[:, :-1], [u[:, :-1] for u in upstream])[2]
    leaf = logits.clone().requires_grad_()
    output = produced(leaf)
    outputs = kernel(output[:, :-1], token_ids[:, :-1], inplace_backward=True)
    torch.autograd.backward(outputs, [u[:, :-1] for u in upstream])
    assert torch.equal(output[:, :-1], wanted[:, :-1])
    assert torch.equal(output[:, -1], logits[:, -1]), "written beyond the rows that were passed"
    assert torch.equal(leaf.grad, wanted)


def test_second_backward_raises_after_inplace(backend, device):
    logits, token_ids, upstream = plain((4, 63), device)
    leaf = logits.requires_grad_()
    logprobs = token_logprobs(produced(leaf), token_ids, inplace_backward=True)
    logprobs.backward(upstream[0], retain_graph=True)
    first = leaf.grad.clone()
    if backend == "reference":
        logprobs.backward(upstream[0])
        torch.testing.assert_close(leaf.grad, 2 * first)
        return
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logprobs.backward(upstream[0])
    assert torch.equal(leaf.grad, first)


PRODUCERS = {"tanh": torch.tanh, "exp": torch.exp, "softmax": lambda leaf: leaf.softmax(-1), "sigmoid": torch.sigmoid}


@pytest.mark.parametrize("view", [unchanged, lambda logits: logits[:, 1:]], ids=["whole", "view"])
@pytest.mark.parametrize("producer", PRODUCERS)
def test_producer_that_saved_the_logits_raises_after_inplace(backend, device, producer, view):
    logits, token_ids, upstream = plain((4, 3, 63), device)
    token_ids, upstream = view(token_ids), [view(u) for u in upstream]
    arguments = (kernel, logits / 10, lambda leaf: view(PRODUCERS[producer](leaf)), token_ids, upstream)
    wanted = run(*arguments)
    if backend == "reference":
        assert torch.equal(run(*arguments, inplace_backward=True)[2], wanted[2])
        return
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        run(*arguments, inplace_backward=True)


def test_other_users_of_the_logits_are_right_or_raise_after_inplace(backend, device):
    logits, token_ids, upstream = plain((4, 63), device)

    def gradient(before, inplace):
        leaf = logits.clone().requires_grad_()
        output = produced(leaf)
        other = output.square().sum() if before else 0.0
        logprobs = token_logprobs(output, token_ids, inplace_backward=inplace)
        other = other if before else output.square().sum()
        ((logprobs * upstream[0]).sum() + other).backward()
        return leaf.grad

    for before in (True, False):
        wanted = gradient(before, inplace=False)
        try:
            got = gradient(before, inplace=True)
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
        else:
            torch.testing.assert_close(got, wanted)


@kernels_only
def test_two_inplace_users_of_the_same_logits_raise(backend, device):
    logits, token_ids, _ = plain((4, 63), device)
    output = produced(logits.requires_grad_())
    both = [token_logprobs(output, token_ids, inplace_backward=True) for _ in range(2)]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sum(both).sum().backward()


def test_inplace_backward_refuses_what_it_must_not_overwrite(backend, device):
    logits, token_ids, _ = plain((4, 3, 63), device)
    leaf = logits.requires_grad_()
    for refused in (leaf, leaf[:, :]):
        with pytest.raises(ValueError, match=r"logits .*leaf.*got"):
            token_logprobs(refused, token_ids, inplace_backward=True)
    expanded = produced(leaf)[:, :1].expand(4, 3, 63)
    windows = produced(leaf).flatten().unfold(0, 63, 5)[:12].view(4, 3, 63)
    for refused in (expanded, windows):
        with pytest.raises(ValueError, match=r"logits .*overlap.*got"):
            token_logprobs(refused, token_ids, inplace_backward=True)
    with torch.no_grad():
        token_logprobs(leaf, token_ids, inplace_backward=True)
    token_logprobs(leaf.detach(), token_ids, inplace_backward=True)


@pytest.mark.parametrize("wrong", [-1, 63, 64, 2**40, -(2**40)])
def test_ids_out_of_range(backend, device, wrong, monkeypatch):
    logits, token_ids, upstream = plain((4, 3, 63), device)
    wanted = run(kernel, logits, unchanged, token_ids, upstream)
    bad = token_ids.clone()
    bad[2, 1] = wrong
    message = rf"token_ids.*\b63\b.*{wrong}|token_ids.*{wrong}.*\b63\b"
    if device.type == "cpu" and backend in ("reference", "cpu"):
        with pytest.raises(ValueError, match=message):
            token_logprobs(logits, bad)
    else:
        for inplace in (False, True):
            got = run(kernel, logits, produced, bad, upstream, inplace_backward=inplace)
            for one, other in zip(got, wanted, strict=True):
                assert one[2, 1].isnan().all()
                one[2, 1] = other[2, 1]
                assert torch.equal(one, other)
    monkeypatch.setattr("rlkernels.ops._checks.CHECK_VALUES", True)
    with pytest.raises(ValueError, match=message):
        token_logprobs(logits, bad)


@pytest.mark.only("cpu")
def test_bad_ids_write_nothing_in_place(backend, device):
    logits, token_ids, upstream = plain((1, 300, 63), device)
    options = (1.0, 0.0, IGNORE)
    saved = torch.ops.rlkernels.token_logprobs_forward.cpu(logits, token_ids, *options, True)
    before = logits.clone()
    token_ids[0, 299] = 63
    with pytest.raises(ValueError, match="token_ids"):
        torch.ops.rlkernels.token_logprobs_backward_.cpu(*upstream, logits, token_ids, *saved, *options)
    assert torch.equal(logits, before)


@kernels_only
def test_opcheck(backend, device):
    logits, token_ids, upstream = plain((2, 3, 63), device)
    token_ids[0, 0] = IGNORE
    check_ops(
        lambda: run(kernel, logits, lambda leaf: leaf[:, :, :], token_ids, upstream, softcap=30.0),
        backend,
        "token_logprobs_forward",
        "token_logprobs_backward",
        differentiable=("token_logprobs_forward",),
    )
    check_ops(
        lambda: run(kernel, logits, produced, token_ids, upstream, inplace_backward=True),
        backend,
        "token_logprobs_forward",
        "token_logprobs_backward_",
    )


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("compiler", COMPILERS)
def test_compile(backend, device, compiler, inplace):
    torch._dynamo.reset()
    logits, token_ids, upstream = plain((2, 4, 129), device, torch.bfloat16)

    def function(leaf, token_ids):
        logprobs, entropy = kernel((leaf * 2)[:, :-1], token_ids, inplace_backward=inplace)
        return logprobs * 3, entropy

    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    arguments = (token_ids[:, :-1], [u[:, :-1] for u in upstream])
    wanted = run(function, logits, unchanged, *arguments)
    got = run(compiled, logits, unchanged, *arguments)
    for one, other in zip(got, wanted, strict=True):
        if backend == "reference" and compiler == "inductor":
            torch.testing.assert_close(one, other)
        else:
            assert torch.equal(one, other)


BAD_INPUT = {
    "logits no tensor": (dict(logits=[[1.0]]), TypeError, ("logits", "list")),
    "logits integer": (dict(logits=torch.zeros(2, 5, dtype=torch.int64)), TypeError, ("logits", "float32", "int64")),
    "logits 0-d": (dict(logits=torch.zeros(())), ValueError, ("logits", "V", "[]")),
    "no vocabulary": (dict(logits=torch.zeros(2, 0)), ValueError, ("logits", "V", "[2, 0]")),
    "token_ids no tensor": (dict(token_ids=[1, 2]), TypeError, ("token_ids", "list")),
    "token_ids float": (dict(token_ids=torch.zeros(2)), TypeError, ("token_ids", "int64", "float32")),
    "token_ids bool": (dict(token_ids=torch.zeros(2, dtype=torch.bool)), TypeError, ("token_ids", "int64", "bool")),
    "token_ids shape": (dict(token_ids=torch.zeros(3, dtype=torch.int64)), ValueError, ("token_ids", "[2]", "[3]")),
    "token_ids like logits": (
        dict(token_ids=torch.zeros(2, 5, dtype=torch.int64)),
        ValueError,
        ("token_ids", "[2]", "[2, 5]"),
    ),
    "token_ids device": (
        dict(token_ids=torch.zeros(2, dtype=torch.int64, device="meta")),
        ValueError,
        ("token_ids", "cpu", "meta"),
    ),
    "temperature 0": (dict(temperature=0.0), ValueError, ("temperature", "> 0", "0")),
    "temperature negative": (dict(temperature=-1.0), ValueError, ("temperature", "> 0", "-1")),
    "temperature nan": (dict(temperature=NAN), ValueError, ("temperature", "> 0", "nan")),
    "temperature inf": (dict(temperature=INF), ValueError, ("temperature", "finite", "inf")),
    "temperature a string": (dict(temperature="1"), TypeError, ("temperature", "number", "str")),
    "softcap 0": (dict(softcap=0.0), ValueError, ("softcap", "> 0", "0")),
    "softcap a string": (dict(softcap="30"), TypeError, ("softcap", "number", "str")),
    "ignore_index a float": (dict(ignore_index=0.5), TypeError, ("ignore_index", "int", "float")),
    "ignore_index None": (dict(ignore_index=None), TypeError, ("ignore_index", "int", "None")),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input(backend, device, name):
    changes, error, fragments = BAD_INPUT[name]
    arguments = {"logits": torch.zeros(2, 5), "token_ids": torch.zeros(2, dtype=torch.int64)}
    with pytest.raises(error) as raised:
        token_logprobs(**(arguments | changes))
    for fragment in fragments:
        assert fragment in str(raised.value)
