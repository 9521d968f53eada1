import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from cases import ALSO_EMULATED, COMPILERS, THOROUGH_EMULATED, thorough, thorough_emulated
from head_problems import rows_under_a_cap
from op_calls import OpCalls
from rlkernels import _backends, linear_kl_divergence
from rlkernels._codes import DIVERGENCES
from rlkernels.ops.kl_divergence import divergence_and_centre
from rlkernels.ops.lm_head.tiles import POOL, tile_size
from rlkernels.reference.kl_divergence import kl_divergence
from tolerance import assert_as_accurate_as_torch

INF = float("inf")
NAN = float("nan")
# Triton's kernels serve NVIDIA GPUs too.
pytestmark = [pytest.mark.only("reference", *_backends.BACKENDS_OF["linear_kl_divergence"]), THOROUGH_EMULATED]
kernels_only = pytest.mark.only("cpu", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# The row kernels, on logits.


def eager(student, teacher, *, kind, beta, temperature, teacher_temperature, softcap, teacher_softcap):
    """As a user writes it: log_softmax and p (log p - log q), in float32."""

    def log_softmax(logits, temperature, softcap):
        z = logits.float().clamp(min=-1e30)  # 0 times -inf is NaN
        return ((softcap * torch.tanh(z / softcap) if softcap else z) / temperature).log_softmax(-1)

    def kl(log_p, log_q):
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    log_s = log_softmax(student, temperature, softcap)
    log_t = log_softmax(teacher, teacher_temperature, teacher_softcap)
    if kind == "forward":
        return kl(log_t, log_s)
    if kind == "reverse":
        return kl(log_s, log_t)
    log_m = torch.logaddexp(log_t + math.log(beta), log_s + math.log1p(-beta))
    return beta * kl(log_t, log_m) + (1 - beta) * kl(log_s, log_m)


def row_stats(backend, logits, temperature, softcap):
    """The largest capped logit of a row and the logarithm of the sum of exp((y - largest) / temperature)."""
    no_token = torch.full(logits.shape[:1], -1, device=logits.device)
    part_of = getattr(torch.ops.rlkernels.token_logprobs_part, backend)
    largest, total, *_ = part_of(logits, no_token, 0, temperature, softcap, -100, False)
    return torch.stack([largest, total.log()])


def by_kernel(backend, student, teacher, upstream, *, kind, beta, inplace=False, cut=None, **options):
    """The divergence and the gradient of the student's logits, from tiles that meet at `cut`."""
    temperatures = options["temperature"], options["teacher_temperature"]
    softcaps = options["softcap"], options["teacher_softcap"]
    stats = [
        row_stats(backend, logits, t, c)
        for logits, t, c in zip((student, teacher), temperatures, softcaps, strict=True)
    ]
    given = (*stats, DIVERGENCES.index(kind), beta, *temperatures, *softcaps)
    gradient = student.clone() if inplace else torch.full_like(student, NAN)
    vocab_size = student.shape[1]
    tiles = [slice(0, vocab_size)] if cut is None else [slice(0, cut), slice(cut, vocab_size)]
    op = torch.ops.rlkernels
    parts = (getattr(op.kl_divergence_part, backend)(student[:, at], teacher[:, at], *given) for at in tiles)
    divergence, centre = divergence_and_centre(sum(parts))
    for at in tiles:
        x = gradient[:, at] if inplace else student[:, at]
        arguments = (upstream, centre, x, teacher[:, at], *given, gradient[:, at])
        getattr(op.kl_divergence_part_backward, backend)(*arguments)
    return divergence, gradient


def by_formula(function, student, teacher, upstream, **options):
    leaf = student.clone().requires_grad_()
    value = function(leaf, teacher, **options)
    value.backward(upstream.to(value.dtype))
    return value.detach(), leaf.grad


def random_pair(what, vocab_size, generator):
    """Logits of a student and a teacher."""

    def normal():
        return 3 * torch.randn(vocab_size, generator=generator)

    student, teacher = normal(), normal()
    chance = torch.rand(vocab_size, generator=generator)
    somewhere = int(chance[0] * vocab_size)
    match what:
        case "plain":
            pass
        case "near":
            teacher = student + 1e-3 * teacher
        case "equal":
            teacher = student.clone()
        case "masked vocabulary":
            student[chance < 0.5] = teacher[chance < 0.5] = -INF
            student[somewhere] = teacher[somewhere] = 0.5
        case "huge":
            student[chance < 0.2] = 1e4
            teacher[chance > 0.8] = -1e4
        case "far from zero":
            student, teacher = student / 3 + 1e4, teacher / 3 - 1e4
        case "one finite":
            student[:], teacher[:] = -INF, -INF
            student[somewhere], teacher[somewhere] = -7.0, 3.0
        case "confident":
            student[somewhere] += 40.0
            teacher[somewhere] += 30.0
        case "of another mind":
            student[somewhere] += 60.0
            teacher[somewhere] -= 60.0
        case "all equal":
            student[:], teacher[:] = 2.0, -5.0
        case "a nan":
            student[somewhere] = NAN
        case "a nan in the teacher":
            teacher[somewhere] = NAN
        case "an inf":
            teacher[somewhere] = INF
        case "nothing finite":
            student[:] = -INF
    return student, teacher


FINITE = (
    *("plain", "near", "equal", "masked vocabulary", "huge", "far from zero", "one finite", "confident"),
    *("of another mind", "all equal"),
)
UNDEFINED = ("a nan", "a nan in the teacher", "an inf", "nothing finite")


def random_pairs(whats, vocab_size, seed):
    generator = torch.Generator().manual_seed(seed)
    pairs = [random_pair(what, vocab_size, generator) for what in whats]
    return [torch.stack(rows) for rows in zip(*pairs, strict=True)]


def upstream_for(rows, seed=0):
    return torch.randn(rows.shape[:-1], generator=torch.Generator().manual_seed(seed)).to(rows.device)


def options_of(kind, beta=0.5, temperature=1.0, teacher_temperature=1.0, softcap=0.0, teacher_softcap=0.0):
    names = ("kind", "beta", "temperature", "teacher_temperature", "softcap", "teacher_softcap")
    values = (kind, beta, temperature, teacher_temperature, softcap, teacher_softcap)
    return dict(zip(names, values, strict=True))


def assert_rows_match(backend, student, teacher, options, cut=None):
    upstream = upstream_for(student)
    got = by_kernel(backend, student, teacher, upstream, cut=cut, **options)
    oracle = by_formula(kl_divergence, student.double(), teacher.double(), upstream, **options)
    naive = by_formula(eager, student, teacher, upstream, **options)
    # What one excludes by -inf and the other, being capped, does not: the gradient has a test of its own.
    finite = ~oracle[0].isposinf()
    got, oracle, naive = ((value, gradient[finite]) for value, gradient in (got, oracle, naive))
    for what, *three in zip(("divergence", "gradient"), got, oracle, naive, strict=True):
        assert_as_accurate_as_torch(*three, what=what, gradient=what == "gradient")
    assert not (got[0] < 0).any()


@kernels_only
@ALSO_EMULATED
@given(
    whats=st.lists(st.sampled_from(FINITE + UNDEFINED), min_size=6, max_size=6),
    vocab_size=st.sampled_from([1, 2, 63, 129, 1000]) | st.integers(1, 300),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    kind=st.sampled_from(DIVERGENCES),
    beta=st.sampled_from([0.5, 0.1, 0.999]),
    temperatures=st.sampled_from([(1.0, 1.0), (0.7, 0.7), (3.0, 1.4)]),
    softcaps=st.sampled_from([(0.0, 0.0), (30.0, 0.0), (0.0, 2.0), (30.0, 30.0)]),
    seed=st.integers(0, 99),
)
def test_rows_match_reference(
    backend, device, emulated, whats, vocab_size, dtypes, kind, beta, temperatures, softcaps, seed
):
    pairs = random_pairs(whats if emulated else whats * 20, vocab_size, seed)
    student, teacher = (rows.to(device, dtype) for rows, dtype in zip(pairs, dtypes, strict=True))
    assert_rows_match(backend, student, teacher, options_of(kind, beta, *temperatures, *softcaps), vocab_size // 3)


@kernels_only
@ALSO_EMULATED
@pytest.mark.parametrize("dtype", [DTYPES[0], *map(thorough_emulated, DTYPES[1:])], ids=str)
@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("wide", [False, thorough(True)], ids=["", "wide"])
def test_every_pair_of_rows(backend, device, emulated, quick, kind, dtype, wide):
    """Each by itself, so that none hides behind another; emulated, where that takes too long, together."""
    # Six rows of each: in one, eager PyTorch may happen to round every element well, which makes too strict a measure.
    for whats in [FINITE * 6] if emulated else [[what] * rows for what in FINITE for rows in (60, 240)]:
        for vocab_size in (5000,) if wide else (5, 129)[quick:] if emulated else (1, 2, 5, 63, 129):
            if len(whats) * vocab_size > 500_000:  # in float64, seconds
                continue
            student, teacher = (rows.to(device, dtype) for rows in random_pairs(whats, vocab_size, seed=1))
            assert_rows_match(backend, student, teacher, options_of(kind))


@kernels_only
@ALSO_EMULATED
@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("temperature", [0.01, thorough_emulated(0.05)])
def test_softcap_at_a_low_temperature(backend, device, emulated, temperature, kind):
    student, teacher = (rows_under_a_cap(40 if emulated else 600, 37, 50.0, seed=s)[0].to(device) for s in (0, 1))
    assert_rows_match(backend, student, teacher, options_of(kind, 0.5, temperature, 3 * temperature, 50.0, 50.0))


@kernels_only
@ALSO_EMULATED
@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("what", UNDEFINED)
def test_undefined_rows_give_nan(backend, device, what, kind):
    student, teacher = (rows.to(device) for rows in random_pairs([what, "plain"], 63, seed=0))
    upstream = upstream_for(student)
    divergence, gradient = by_kernel(backend, student, teacher, upstream, **options_of(kind))
    assert divergence[0].isnan() and divergence[1].isfinite()
    assert gradient[0].isnan().all() and gradient[1].isfinite().all()
    upstream[0] = 0.0
    assert not by_kernel(backend, student, teacher, upstream, **options_of(kind))[1][0].any()


@kernels_only
@pytest.mark.parametrize("beta", [1e-6, 0.1, 0.5, 0.9, 1 - 1e-6])
@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-3, 1e-4])
def test_nearly_equal_distributions_keep_their_digits(backend, device, emulated, distance, kind, beta):
    """Divergences down to 1e-9, and of beta near 0 or 1 to 1e-15: sum p (log p - log q) is a multiple of 1e-7 here."""
    rows, vocab_size = (2, 129) if emulated else (8, 1000)
    generator = torch.Generator().manual_seed(0)
    student = (3 * torch.randn(rows, vocab_size, generator=generator)).to(device)
    teacher = student + distance * torch.randn(rows, vocab_size, generator=generator).to(device)
    options, upstream = options_of(kind, beta), torch.ones(rows, device=device)
    value, gradient = by_kernel(backend, student, teacher, upstream, **options)
    wanted, wanted_gradient = by_formula(kl_divergence, student.double(), teacher.double(), upstream, **options)
    # The logits are rounded to within ulp(8), relative to their largest: that is 1e-6 of the difference.
    relative = 2e-6 / distance
    torch.testing.assert_close(value.double(), wanted, rtol=relative, atol=0)
    assert (gradient - wanted_gradient).norm() <= relative * wanted_gradient.norm()


@kernels_only
@pytest.mark.parametrize("dtype", [*DTYPES[:2], thorough_emulated(DTYPES[2])], ids=str)
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_equal_distributions_do_not_diverge(backend, device, kind, dtype):
    student = random_pairs(["plain", "masked vocabulary", "huge", "confident"], 129, 0)[0].to(device, dtype)
    for options in (options_of(kind), options_of(kind, 0.1, 0.7, 0.7, 30.0, 30.0)):
        for value in by_kernel(backend, student, student.clone(), upstream_for(student), **options):
            assert not value.any()


@kernels_only
@ALSO_EMULATED
def test_what_one_of_them_excludes(backend, device):
    """Token 2 has no probability for one of them. The rest is as without it."""
    student, teacher = (rows.to(device) for rows in random_pairs(["plain"] * 2, 9, seed=0))
    upstream = torch.tensor([1.0, -2.0], device=device)
    for excluding, infinite in ((student, "forward"), (teacher, "reverse")):
        logits = [rows.clone() for rows in (student, teacher)]
        logits[0 if excluding is student else 1][:, 2] = -INF
        # Far below exp's range, but not -inf.
        finite = [rows.clamp(min=-1e4) for rows in logits]
        for kind in DIVERGENCES:
            value, gradient = by_kernel(backend, *logits, upstream, **options_of(kind))
            if kind == infinite:
                assert (value == INF).all()
                if kind == "forward":
                    wanted = (logits[0].softmax(-1) - logits[1].softmax(-1)) * upstream.unsqueeze(-1)
                    torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-7)
                continue
            wanted = by_formula(kl_divergence, *(rows.double() for rows in finite), upstream, **options_of(kind))
            for one, other in zip((value, gradient), wanted, strict=True):
                torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-7)
    # Also where the probability that the other gives it rounds to 0.
    student[:, 2], teacher[:, 2] = -INF, -1e4
    assert (by_kernel(backend, student, teacher, upstream, **options_of("forward"))[0] == INF).all()
    assert (by_kernel(backend, teacher, student, upstream, **options_of("reverse"))[0] == INF).all()


@kernels_only
@ALSO_EMULATED
@pytest.mark.parametrize("dtype", [thorough_emulated(DTYPES[0]), DTYPES[1], thorough_emulated(DTYPES[2])], ids=str)
def test_gradient_may_take_the_place_of_the_logits(backend, device, emulated, quick, dtype):
    kinds = FINITE[::3] if emulated and quick else FINITE
    student, teacher = (rows.to(device, dtype) for rows in random_pairs(kinds, 129, seed=0))
    for kind in DIVERGENCES:
        given = (backend, student, teacher, upstream_for(student))
        wanted = by_kernel(*given, **options_of(kind, softcap=30.0, teacher_softcap=30.0), cut=50)
        got = by_kernel(*given, **options_of(kind, softcap=30.0, teacher_softcap=30.0), cut=50, inplace=True)
        for one, other in zip(got, wanted, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("beta", [0.5, 0.1])
@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("what", FINITE)
def test_reference_is_the_formula(what, kind, beta):
    student, teacher = (rows.double() for rows in random_pairs([what] * 4, 63, seed=3))
    options = options_of(kind, beta, 0.7, 1.4, 30.0, 20.0)
    upstream = upstream_for(student)
    got = by_formula(kl_divergence, student, teacher, upstream, **options)
    finite = [rows.clamp(min=-1e30) for rows in (student, teacher)]

    def in_float64(*arguments, **options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "float", torch.Tensor.double)
            return eager(*arguments, **options)

    wanted = by_formula(in_float64, *finite, upstream, **options)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("what", ["plain", "near", "masked vocabulary", "of another mind"])
def test_reference_gradcheck(what, kind):
    student, teacher = (rows.double() for rows in random_pairs([what] * 2, 5, seed=0))
    # A finite difference cannot be taken at -inf: its gradient is held to 0 above.
    finite = student.isfinite()

    def function(values):
        logits = torch.full_like(student, -INF).masked_scatter(finite, values)
        return kl_divergence(logits, teacher, **options_of(kind, 0.3, 0.7, 1.4, 5.0, 8.0))

    assert torch.autograd.gradcheck(function, student[finite].requires_grad_())


# The whole op, on hidden states and heads.


def plain(device, dtype=torch.float32, rows=(2, 5), widths=(16, 24), vocab_size=129, seed=0):
    """Hidden states, heads and biases of a student and a teacher, and a mask."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=generator)).to(device, dtype)

    width, teacher_width = widths
    return dict(
        hidden=normal(*rows, width),
        weight=normal(vocab_size, width, scale=0.5),
        bias=normal(vocab_size),
        teacher_hidden=normal(*rows, teacher_width),
        teacher_weight=normal(vocab_size, teacher_width, scale=0.5),
        teacher_bias=normal(vocab_size),
        mask=(torch.arange(math.prod(rows)) % 3 != 1).view(rows).to(device),
    )


LEAVES = ("hidden", "weight", "bias")
TILE = (4, 100)
"""The tiles of the last rows and of the last tokens are not whole. Emulated, larger tiles take seconds."""


def run(function, inputs, upstream=None, tile=TILE, **options):
    """The divergence, and the gradients of hidden, weight and bias."""
    leaves = {name: inputs[name].clone().requires_grad_() for name in LEAVES if inputs[name] is not None}
    with tile_size(tile):
        value = function(**(inputs | leaves), **options)
    upstream = upstream_for(value.unsqueeze(-1)) if upstream is None else upstream
    value.backward(upstream.to(value.dtype))
    return value.detach(), *(leaf.grad for leaf in leaves.values())


def from_logits(
    hidden,
    weight,
    teacher_hidden,
    teacher_weight,
    mask,
    *,
    bias,
    teacher_bias,
    kind="forward",
    beta=0.5,
    temperature=1.0,
    softcap=0.0,
    teacher_softcap=0.0,
    scale=1.0,
    teacher_scale=1.0,
    logits_budget_mb=None,
):
    """As a user writes it, from all logits."""
    student = torch.nn.functional.linear(hidden, weight, bias)
    teacher = torch.nn.functional.linear(teacher_hidden, teacher_weight, teacher_bias)
    options = options_of(
        kind, beta, temperature / scale, temperature / teacher_scale, softcap / scale, teacher_softcap / teacher_scale
    )
    function = kl_divergence if hidden.dtype == torch.float64 else eager
    return function(student, teacher, **options).masked_fill(~mask, 0.0)


def in_float64(inputs):
    return {n: value.double() if torch.is_floating_point(value) else value for n, value in inputs.items()}


def assert_same(got, wanted):
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(one, other)


TILES = {"kept": {}, "computed again": dict(logits_budget_mb=0)}
MODELS = {
    "plain": {},
    "scaled": dict(temperature=0.7, softcap=10.0, teacher_softcap=20.0, scale=0.5, teacher_scale=2.0),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_matches_reference(backend, device, emulated, kind, tiles, model, dtype):
    inputs = plain(device, dtype, (3, 9) if emulated else (5, 31))
    options = dict(kind=kind, beta=0.3) | TILES[tiles] | MODELS[model]
    got = run(linear_kl_divergence, inputs, **options)
    oracle = run(from_logits, in_float64(inputs), **options)
    naive = run(from_logits, inputs, **options)
    for what, *three in zip(("divergence", *LEAVES), got, oracle, naive, strict=True):
        assert_as_accurate_as_torch(*three, what=what, gradient=what != "divergence")
    assert not (got[0] < 0).any()


@pytest.mark.only("cpu")
def test_tiles_of_the_default_size(backend, device):
    inputs = plain(device, rows=(300,), widths=(64, 96), vocab_size=5003)
    got, oracle, naive = (
        run(linear_kl_divergence, inputs, tile=None),
        run(from_logits, in_float64(inputs)),
        run(from_logits, inputs),
    )
    for what, *three in zip(("divergence", *LEAVES), got, oracle, naive, strict=True):
        assert_as_accurate_as_torch(*three, what=what, gradient=what != "divergence")


def test_float64_is_computed_in_float64(backend, device):
    inputs = in_float64(plain(device))
    got, wanted = (run(function, inputs, kind="js") for function in (linear_kl_divergence, from_logits))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_a_model_does_not_diverge_from_itself(backend, device, kind):
    inputs = plain(device)
    inputs |= {f"teacher_{name}": inputs[name] for name in LEAVES}
    for value in run(linear_kl_divergence, inputs, kind=kind, softcap=30.0, teacher_softcap=30.0):
        assert value.abs().max() < (1e-6 if backend == "reference" else 1e-12)


def test_beta_0_and_1_are_the_two_directions(backend, device):
    inputs = plain(device)
    for beta, kind in ((0, "forward"), (1.0, "reverse")):
        assert_same(*(run(linear_kl_divergence, inputs, **o) for o in (dict(kind="js", beta=beta), dict(kind=kind))))


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
def test_trl(backend, device, beta):
    gkd = pytest.importorskip("trl.experimental.gkd")
    inputs = plain(device)

    def theirs(hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, mask):
        student = torch.nn.functional.linear(hidden, weight, bias)
        teacher = torch.nn.functional.linear(teacher_hidden, teacher_weight, teacher_bias)
        loss = gkd.GKDTrainer.generalized_jsd_loss
        terms = loss(student, teacher, beta=beta, temperature=0.7, reduction="none")
        return terms.sum(-1).masked_fill(~mask, 0.0)

    got = run(linear_kl_divergence, inputs, kind="js", beta=beta, temperature=0.7)
    for one, other in zip(got, run(theirs, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.1, 1.0])
def test_trl_chunked(backend, device, beta):
    trl = pytest.importorskip("trl.kernels.chunked_divergence")
    inputs = plain(device)

    def theirs(hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, mask):
        teacher = (teacher_hidden.flatten(0, 1), teacher_weight, teacher_bias)
        options = (beta, 0.7, 0.5, 10.0, 2.0, 20.0)
        value, _ = trl.ChunkedDivergenceFunction.apply(hidden.flatten(0, 1), weight, bias, *teacher, *options)
        return value.view(mask.shape).masked_fill(~mask, 0.0)

    got = run(linear_kl_divergence, inputs, kind="js", beta=beta, **MODELS["scaled"])
    for one, other in zip(got, run(theirs, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_masked_rows_leave_no_trace(backend, device, kind):
    """Not even where the vocabulary that a bias excludes makes the divergence of such a row infinite."""
    inputs = plain(device)
    inputs["bias"][3], inputs["teacher_bias"][3:5] = -INF, -INF
    if kind == "reverse":
        inputs["bias"][4] = -INF
    wanted = run(linear_kl_divergence, inputs, kind=kind)
    out = ~inputs["mask"]
    for name, value in (("hidden", NAN), ("teacher_hidden", INF)):
        inputs[name][out] = value
    got = run(linear_kl_divergence, inputs, kind=kind)
    assert_same(got, wanted)
    assert all(value.isfinite().all() for value in got)
    assert not got[0][out].any() and not got[1][out].any() and got[0][~out].all()


@pytest.mark.parametrize("shape", [(0,), (3, 0), (), (1,), (2, 1, 3)], ids=str)
def test_shapes(backend, device, shape):
    inputs = plain(device, rows=shape)
    inputs["mask"] = None if shape == () else torch.ones_like(inputs["mask"])
    value, *gradients = run(linear_kl_divergence, inputs)
    assert value.shape == shape and value.dtype == torch.float32
    for name, gradient in zip(LEAVES, gradients, strict=True):
        assert gradient.shape == inputs[name].shape and gradient.isfinite().all()
        assert gradient.any() == (value.numel() > 0)


def test_nothing_scored(backend, device):
    inputs = plain(device)
    inputs["mask"] = torch.zeros_like(inputs["mask"])
    for value in run(linear_kl_divergence, inputs):
        assert value.isfinite().all() and not value.any()


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.uint8], ids=str)
def test_masks_of_other_dtypes_and_strides(backend, device, dtype):
    inputs = plain(device)
    wanted = run(linear_kl_divergence, inputs)
    inputs["mask"] = inputs["mask"].to(dtype).t().contiguous().t() * 3
    assert_same(run(linear_kl_divergence, inputs), wanted)


def test_inputs_of_any_strides(backend, device):
    inputs = plain(device)
    wanted = run(linear_kl_divergence, inputs, upstream_for(inputs["hidden"]))
    for name in ("hidden", "weight", "teacher_hidden", "teacher_weight"):
        inputs[name] = inputs[name].transpose(0, 1).contiguous().transpose(0, 1)
    upstream = upstream_for(inputs["hidden"]).t().contiguous().t()
    for one, other in zip(run(linear_kl_divergence, inputs, upstream), wanted, strict=True):
        torch.testing.assert_close(one, other)


@kernels_only
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_budgets_and_counts_change_nothing(backend, device, dtype):
    inputs = plain(device, dtype)
    scored = int(inputs["mask"].sum())
    wanted = run(linear_kl_divergence, inputs, kind="js")
    for options in (
        dict(logits_budget_mb=0),
        dict(logits_budget_mb=1e-2),
        dict(num_scored=scored),
        dict(num_scored=scored + 2),
    ):
        got = run(linear_kl_divergence, inputs, kind="js", **options)
        # Kept logits of 16 bits give hidden's gradient in one product, others in as many as there are tiles.
        same = 4 if dtype == torch.float32 else 1
        assert_same(got[:same], wanted[:same])
        for one, other in zip(got[same:], wanted[same:], strict=True):
            torch.testing.assert_close(one, other, rtol=0.1, atol=0.01)


@kernels_only
def test_a_row_does_not_depend_on_the_others(backend, device):
    inputs = plain(device, torch.bfloat16)
    together = run(linear_kl_divergence, inputs, kind="reverse")
    inputs["mask"][1:] = False
    for value, whole in zip(run(linear_kl_divergence, inputs, kind="reverse")[:2], together, strict=False):
        assert torch.equal(value[0], whole[0])


def test_too_few_scored(backend, device):
    if backend == "reference":
        pytest.skip("the reference projects every row")
    inputs = plain(device)
    scored = int(inputs["mask"].sum())
    if device.type == "cpu":
        with pytest.raises(ValueError, match=rf"num_scored .*{scored}.*got {scored - 1}"), tile_size(TILE):
            linear_kl_divergence(**inputs, num_scored=scored - 1)
    else:
        with tile_size(TILE):
            assert linear_kl_divergence(**inputs, num_scored=scored - 1).isnan().all()


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor of floating-point numbers that any operation has made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.elements = max(self.elements, tensor.numel())
        return result


@kernels_only
def test_logits_are_never_whole(backend, device):
    POOL.clear()
    inputs = plain(device, rows=(24,), widths=(2, 2), vocab_size=300)
    with LargestTensor() as largest:
        run(linear_kl_divergence, inputs, logits_budget_mb=0)
    # All tokens of a block of 4 rows, or one range of the vocabulary of the 16 rows that are scored.
    assert largest.elements <= max(4 * 300, 16 * 100)


@pytest.mark.parametrize("frozen", [("hidden",), ("weight", "bias"), ("bias",)], ids=str)
def test_frozen_inputs(backend, device, frozen):
    inputs = plain(device)
    wanted = dict(zip(LEAVES, run(linear_kl_divergence, inputs)[1:], strict=True))
    leaves = {name: inputs[name].clone().requires_grad_(name not in frozen) for name in LEAVES}
    with tile_size(TILE):
        value = linear_kl_divergence(**(inputs | leaves))
    value.backward(upstream_for(value.unsqueeze(-1)))
    for name, leaf in leaves.items():
        assert leaf.grad is None if name in frozen else torch.equal(leaf.grad, wanted[name])


def test_the_teacher_is_data(backend, device):
    """Also where it is the student's own head."""
    inputs = plain(device, widths=(16, 16))
    inputs["teacher_weight"] = inputs["weight"].clone()
    wanted = run(linear_kl_divergence, inputs)[2]
    weight = inputs["weight"].requires_grad_()
    teacher_hidden = inputs["teacher_hidden"].requires_grad_()
    with tile_size(TILE):
        value = linear_kl_divergence(**(inputs | dict(teacher_weight=weight)))
    value.backward(upstream_for(value.unsqueeze(-1)))
    assert teacher_hidden.grad is None
    assert torch.equal(weight.grad, wanted)


def test_teacher_of_another_dtype(backend, device):
    inputs = plain(device)
    coarse = inputs | {n: inputs[n].bfloat16() for n in inputs if n.startswith("teacher")}
    rounded = coarse | {n: coarse[n].float() for n in coarse if n.startswith("teacher")}
    value, *gradients = run(linear_kl_divergence, coarse)
    wanted, *wanted_gradients = run(linear_kl_divergence, rounded)
    torch.testing.assert_close(value, wanted, rtol=0.05, atol=0.05)
    for name, one, other in zip(LEAVES, gradients, wanted_gradients, strict=True):
        assert one.dtype == inputs[name].dtype
        torch.testing.assert_close(one, other, rtol=0.1, atol=0.1)


def test_autocast(backend, device):
    inputs = plain(device)
    half = {n: v.bfloat16() if torch.is_floating_point(v) else v for n, v in inputs.items()}
    wanted = run(linear_kl_divergence, half)
    with torch.autocast(device.type, torch.bfloat16):
        got = run(linear_kl_divergence, inputs)
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(one, other.to(one.dtype))


@kernels_only
def test_opcheck(backend, device):
    inputs = plain(device)
    with OpCalls() as record:
        run(linear_kl_divergence, inputs, kind="js", softcap=30.0)
    called = {call[0]._schema.name.removeprefix("rlkernels::"): call for call in record.calls}
    # The first gives a NaN for a token that is in no tile, which opcheck finds unequal to itself.
    assert set(called) == {"token_logprobs_part", "kl_divergence_part", "kl_divergence_part_backward"}
    for name in list(called)[1:]:
        func, args, kwargs = called[name]
        assert func._overloadname == backend
        torch.library.opcheck(func, args, kwargs)


@kernels_only
def test_opcheck_of_what_torch_compile_sees(backend, device):
    inputs = plain(device)
    names = ("hidden", "weight", "bias", "teacher_hidden", "teacher_weight", "teacher_bias")
    scored = torch.where(inputs["mask"].flatten(), 0, -100)
    tensors = [inputs[name].flatten(0, -2) if "hidden" in name else inputs[name] for name in names]
    options = (2, 0.3, 0.7, 1.4, 30.0, 0.0, None, [4, 100], 0)
    op = torch.ops.rlkernels
    forward, backward = (getattr(getattr(op, f"linear_kl_divergence_{n}"), backend) for n in ("forward", "backward"))
    for tensor in tensors[:3]:
        tensor.requires_grad_()
    torch.library.opcheck(forward, (*tensors, scored, *options))
    tensors = [tensor.detach() for tensor in tensors]
    _, saved = forward(*tensors, scored, *options)
    arguments = (upstream_for(scored.unsqueeze(-1)), saved, [True, False, True], *tensors, scored, *options)
    torch.library.opcheck(backward, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("compiler", COMPILERS)
def test_compile(backend, device, compiler):
    torch._dynamo.reset()
    inputs = plain(device)

    def function(hidden, **rest):
        return linear_kl_divergence(hidden * 2, **rest, kind="reverse", temperature=0.7) * 3

    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    for one, other in zip(run(compiled, inputs), run(function, inputs), strict=True):
        if backend == "reference" and compiler == "inductor":
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        else:
            assert torch.equal(one, other)


BAD_INPUT = {
    "hidden no tensor": (dict(hidden=[[1.0]]), TypeError, ("hidden", "list")),
    "hidden 0-d": (dict(hidden=torch.zeros(()), teacher_hidden=torch.zeros(())), ValueError, ("hidden", "H", "[]")),
    "weight no tensor": (dict(weight=None), TypeError, ("weight", "NoneType")),
    "weight width": (dict(weight=torch.zeros(5, 4)), ValueError, ("weight", "[V, 3]", "[5, 4]")),
    "teacher_hidden rows": (dict(teacher_hidden=torch.zeros(3, 4)), ValueError, ("teacher_hidden", "[2, ", "[3, 4]")),
    "teacher_hidden dim": (dict(teacher_hidden=torch.zeros(4)), ValueError, ("teacher_hidden", "[2, ", "[4]")),
    "teacher_hidden width": (
        dict(teacher_hidden=torch.zeros(2, 9)),
        ValueError,
        ("teacher_weight", "[5, 9]", "[5, 4]"),
    ),
    "teacher_weight vocabulary": (
        dict(teacher_weight=torch.zeros(6, 4)),
        ValueError,
        ("teacher_weight", "[5, 4]", "[6, 4]"),
    ),
    "teacher_weight dtype": (
        dict(teacher_weight=torch.zeros(5, 4).half()),
        TypeError,
        ("teacher_weight", "teacher_hidden", "float32", "float16"),
    ),
    "teacher float64": (
        dict(teacher_hidden=torch.zeros(2, 4).double()),
        TypeError,
        ("teacher_hidden", "float32", "float64"),
    ),
    "teacher_hidden device": (
        dict(teacher_hidden=torch.zeros(2, 4, device="meta")),
        ValueError,
        ("teacher_hidden", "cpu", "meta"),
    ),
    "bias shape": (dict(bias=torch.zeros(4)), ValueError, ("bias", "[5]", "[4]")),
    "teacher_bias shape": (dict(teacher_bias=torch.zeros(4)), ValueError, ("teacher_bias", "[5]", "[4]")),
    "mask shape": (dict(mask=torch.zeros(3)), ValueError, ("mask", "[2]", "[3]")),
    "mask no tensor": (dict(mask=[1, 0]), TypeError, ("mask", "list")),
    "kind": (dict(kind="jsd"), ValueError, ("kind", "forward, reverse, js", "jsd")),
    "beta": (dict(beta=1.5), ValueError, ("beta", "<= 1", "1.5")),
    "beta negative": (dict(beta=-0.5), ValueError, ("beta", ">= 0", "-0.5")),
    "temperature 0": (dict(temperature=0.0), ValueError, ("temperature", "> 0", "0")),
    "softcap a string": (dict(softcap="30"), TypeError, ("softcap", "number", "str")),
    "teacher_softcap 0": (dict(teacher_softcap=0.0), ValueError, ("teacher_softcap", "> 0", "0")),
    "teacher_scale": (dict(teacher_scale=-1.0), ValueError, ("teacher_scale", "> 0", "-1")),
    "num_scored": (dict(num_scored=3), ValueError, ("num_scored", "2", "3")),
    "budget": (dict(logits_budget_mb=-1), ValueError, ("logits_budget_mb", ">= 0", "-1")),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input(backend, device, name):
    changes, error, fragments = BAD_INPUT[name]
    arguments = dict(
        hidden=torch.zeros(2, 3),
        weight=torch.zeros(5, 3),
        teacher_hidden=torch.zeros(2, 4),
        teacher_weight=torch.zeros(5, 4),
    )
    with pytest.raises(error) as raised:
        linear_kl_divergence(**(arguments | changes))
    for fragment in fragments:
        assert fragment in str(raised.value)
