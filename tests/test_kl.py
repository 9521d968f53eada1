import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rlkernels
from cases import COMPILERS, thorough, thorough_emulated
from op_calls import check_ops
from rlkernels import kl_penalty, shaped_rewards
from rlkernels._codes import KL_ESTIMATORS, STRAIGHT_THROUGH
from tolerance import assert_as_accurate_as_torch

INF = float("inf")
NAN = float("nan")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ESTIMATORS = (*KL_ESTIMATORS, *STRAIGHT_THROUGH)
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


@pytest.mark.parametrize("size", [size if size < 10_000 else thorough_emulated(size) for size in SIZES])
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


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
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


@pytest.mark.parametrize("compiler", COMPILERS)
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


# shaped_rewards


def rewards_by_loops(
    scores, logprobs, ref_logprobs, mask=None, kl_coef=0.1, estimator="k1", cu_seqlens=None, score_at="last"
):
    """One sequence after the other, one token after the other."""
    rewards = torch.zeros_like(logprobs)
    if cu_seqlens is None:
        spans = [(row, slice(None)) for row in range(logprobs.shape[0])]
    else:
        spans = [(slice(start, end),) for start, end in itertools.pairwise(cu_seqlens.tolist())]
    for number, span in enumerate(spans):
        scored = torch.ones_like(logprobs[span]) if mask is None else mask[span]
        positions = scored.nonzero().flatten().tolist()
        for t in positions:
            penalty = eager(logprobs[span][t], ref_logprobs[span][t], estimator)
            rewards[span][t] = -kl_coef * penalty if kl_coef else 0.0
        if positions:
            at = positions[-1]
            if score_at == "after_last" and at + 1 < len(scored):
                at += 1
            rewards[span][at] += scores[number]
    return rewards


def reward_inputs(lengths, width, device, dtype=torch.float32, packed=False, holes=0.0, garbage=NAN, seed=0):
    """Sequences whose first `length` tokens are scored, but for holes, and the others garbage; packed without those
    that no sequence has, but with one more token each that is not scored."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), width)
    mask = torch.arange(width) < torch.tensor(lengths).view(-1, 1)
    mask &= torch.rand(shape, generator=generator) >= holes
    logprobs, ref_logprobs = (-3 * torch.rand(shape, generator=generator) for _ in range(2))
    scores = torch.randn(len(lengths), generator=generator)
    cu_seqlens = None
    if packed:
        there = torch.arange(width) < (torch.tensor(lengths).view(-1, 1) + 1)
        logprobs, ref_logprobs, mask = logprobs[there], ref_logprobs[there], mask[there]
        cu_seqlens = torch.nn.functional.pad(there.sum(1).cumsum(0), (1, 0)).int().to(device)
    logprobs, ref_logprobs = (value.masked_fill(~mask, garbage) for value in (logprobs, ref_logprobs))
    values = {"scores": scores, "logprobs": logprobs, "ref_logprobs": ref_logprobs}
    values = {name: value.to(device, dtype) for name, value in values.items()}
    return {**values, "mask": mask.to(device), "cu_seqlens": cu_seqlens}


def assert_rewards_match(inputs, **options):
    options = {"kl_coef": 0.1, **options}
    got = shaped_rewards(**inputs, **options)
    floats = ("scores", "logprobs", "ref_logprobs")
    in_double = inputs | {name: inputs[name].double() for name in floats}
    in_float = inputs | {name: inputs[name].float() for name in floats}
    with rlkernels.use_backend("reference"):
        oracle = shaped_rewards(**in_double, **options)
    by_loops = rewards_by_loops(**{name: v if v is None else v.cpu() for name, v in in_double.items()}, **options)
    torch.testing.assert_close(oracle.cpu(), by_loops, rtol=1e-12, atol=1e-14)
    naive = rewards_by_loops(**{name: v if v is None else v.cpu() for name, v in in_float.items()}, **options)
    assert_as_accurate_as_torch(got, oracle, naive)
    return got


SCORE_AT = ("last", "after_last")


@given(
    lengths=st.lists(st.integers(0, 12), max_size=6),
    room=st.integers(0, 9),
    dtype=st.sampled_from(DTYPES),
    packed=st.booleans(),
    holes=st.sampled_from([0.0, 0.3, 0.9]),
    kl_coef=st.sampled_from([0.0, 0.1, -2.0]),
    estimator=st.sampled_from(KL_ESTIMATORS),
    score_at=st.sampled_from(SCORE_AT),
    seed=st.integers(0, 99),
)
def test_rewards_match_loops(backend, device, lengths, room, dtype, packed, holes, kl_coef, estimator, score_at, seed):
    width = max(lengths, default=0) + room
    inputs = reward_inputs(lengths, width, device, dtype, packed, holes, seed=seed)
    assert_rewards_match(inputs, kl_coef=kl_coef, estimator=estimator, score_at=score_at)


@pytest.mark.parametrize("score_at", SCORE_AT)
@pytest.mark.parametrize(
    "length", [thorough(1022), thorough_emulated(1023), 1024, 1025, thorough(2047), thorough(2048)]
)
def test_score_at_the_edge_of_a_block(backend, device, length, score_at):
    """Kernels take blocks of 1,024 tokens; the token after the last may be the first of the next, and nothing but
    padding may follow for blocks."""
    for width in (length, length + 1, 3072):
        assert_rewards_match(reward_inputs([length], width, device), score_at=score_at)
    assert_rewards_match(reward_inputs([length, 0, 5, 1030], 2100, device, packed=True), score_at=score_at)
    exact = torch.tensor([0, 1024, 1024, 2048], dtype=torch.int32, device=device)
    inputs = reward_inputs([2048], 2048, device, holes=0.3)
    inputs = {name: value if value is None else value.flatten() for name, value in inputs.items()}
    scores = torch.tensor([1.0, 2.0, 3.0], device=device)
    assert_rewards_match(inputs | {"scores": scores, "cu_seqlens": exact}, score_at=score_at)


@pytest.mark.parametrize("score_at", SCORE_AT)
@pytest.mark.parametrize("at", [[5], [5, 1500], [1023, 9000], [5, 1023, 9999], [1024], []], ids=str)
def test_last_token_far_from_the_others(backend, device, at, score_at):
    """Between the scored tokens nothing for longer than what a kernel looks at in one step."""
    inputs = reward_inputs([0], 10_000, device, garbage=-1.0)
    inputs["mask"][0, at] = True
    assert_rewards_match(inputs, score_at=score_at)


@pytest.mark.parametrize("score_at", SCORE_AT)
@pytest.mark.parametrize("packed", [False, True])
def test_rewards_without_a_mask(backend, device, packed, score_at):
    inputs = reward_inputs([1100, 1100], 1101, device, packed=packed, garbage=-1.0)
    inputs["mask"] = None
    got = assert_rewards_match(inputs, score_at=score_at)
    last = got.view(2, -1)[:, -1] - got.new_tensor(0.0)
    without_score = shaped_rewards(**(inputs | {"scores": torch.zeros(2, device=device)}), kl_coef=0.1)
    torch.testing.assert_close(last, without_score.view(2, -1)[:, -1] + inputs["scores"])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("lengths", [[5, 0, 5, 0], [1024, 0, 0], [0, 5]], ids=str)
def test_sequence_without_a_scored_token_beside_a_full_one(backend, device, lengths, packed):
    """Its first token comes after a scored one too, but of another sequence."""
    inputs = reward_inputs(lengths, max(lengths), device, packed=packed)
    for score_at in SCORE_AT:
        assert_rewards_match(inputs, score_at=score_at)


@pytest.mark.parametrize("score_at", SCORE_AT)
def test_many_short_sequences(backend, device, emulated, score_at):
    lengths = [index % 4 for index in range(400 if emulated else 70_000)]
    for packed in (False, True):
        inputs = reward_inputs(lengths, 4, device, packed=packed, garbage=-1.0)
        got = shaped_rewards(**inputs, kl_coef=0.0, score_at=score_at)
        scored = torch.tensor(lengths, device=device) > 0
        assert torch.equal(got[got != 0], inputs["scores"][scored])
    assert_rewards_match(reward_inputs(lengths[:300], 4, device, packed=True), score_at=score_at)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("garbage", [NAN, INF, -INF, 1e30], ids=str)
def test_no_reward_from_what_is_not_scored(backend, device, packed, garbage):
    """Not even by a score on a padding token, but where it was asked for."""
    lengths = [7, 12, 0]
    clean, dirty = (reward_inputs(lengths, 20, device, packed=packed, garbage=g, holes=0.2) for g in (-1.0, garbage))
    for score_at in SCORE_AT:
        rewards = shaped_rewards(**dirty, kl_coef=0.1, score_at=score_at)
        assert torch.equal(rewards, shaped_rewards(**clean, kl_coef=0.1, score_at=score_at))
        assert rewards[~dirty["mask"]].count_nonzero() == (2 if score_at == "after_last" else 0)
    dirty["scores"][2] = NAN
    assert shaped_rewards(**dirty, kl_coef=0.1).isfinite().all(), "the score of a sequence without a scored token"


@pytest.mark.parametrize("lengths", [[], [0, 0]], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_no_tokens(backend, device, packed, lengths):
    for width in (0, 3):
        inputs = reward_inputs(lengths, width, device, packed=packed)
        rewards = shaped_rewards(**inputs, kl_coef=0.1)
        assert rewards.shape == inputs["logprobs"].shape
        assert not rewards.any()


def test_infinite_penalty_of_coefficient_zero_leaves_the_score_alone(backend, device):
    inputs = reward_inputs([3], 4, device)
    inputs["ref_logprobs"][0, 1] = -INF
    for estimator in KL_ESTIMATORS:
        rewards = shaped_rewards(**inputs, kl_coef=0.0, estimator=estimator)
        assert torch.equal(rewards, torch.tensor([[0.0, 0.0, inputs["scores"].item(), 0.0]], device=device))
        assert shaped_rewards(**inputs, kl_coef=0.1, estimator=estimator)[0, 1].isinf()


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.uint8], ids=str)
def test_reward_masks_of_other_dtypes_and_strides(backend, device, dtype):
    inputs = reward_inputs([7, 12, 3], 12, device)
    wanted = shaped_rewards(**inputs, kl_coef=0.1)
    assert torch.equal(shaped_rewards(**(inputs | {"mask": 2 * inputs["mask"].to(dtype)}), kl_coef=0.1), wanted)
    strided = {
        name: value.t().contiguous().t() if value is not None and value.dim() == 2 else value
        for name, value in inputs.items()
    }
    assert torch.equal(shaped_rewards(**strided, kl_coef=0.1), wanted)
    beyond = {  # not at a multiple of 16 bytes
        name: torch.cat([value.flatten()[:1], value.flatten()])[1:].view(value.shape)
        for name, value in inputs.items()
        if value is not None
    }
    assert torch.equal(shaped_rewards(**beyond, kl_coef=0.1), wanted)


def test_rewards_of_a_row_do_not_depend_on_the_others_and_bits_repeat(backend, device):
    inputs = reward_inputs([700, 12, 333], 800, device, holes=0.1)
    together = shaped_rewards(**inputs, kl_coef=0.1, estimator="k3")
    assert torch.equal(shaped_rewards(**inputs, kl_coef=0.1, estimator="k3"), together)
    for row in range(3):
        alone = {name: value if value is None else value[row : row + 1] for name, value in inputs.items()}
        assert torch.equal(shaped_rewards(**alone, kl_coef=0.1, estimator="k3")[0], together[row])


@pytest.mark.parametrize("bounds", [[0, 5, 11], [1, 5, 12], [0, 9, 5, 12], [0, 5, 13], [0]], ids=str)
def test_rewards_of_bad_cu_seqlens(backend, device, bounds, monkeypatch):
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)
    tokens, mask = torch.zeros(12, device=device), torch.arange(12, device=device) < 9
    scores = torch.ones(len(bounds) - 1, device=device)
    if backend in ("cpu", "reference") and device.type == "cpu":
        with pytest.raises(ValueError, match="cu_seqlens"):
            shaped_rewards(scores, tokens, tokens, mask, kl_coef=0.1, cu_seqlens=cu_seqlens)
        return
    for score_at in SCORE_AT:
        rewards = shaped_rewards(scores, tokens, tokens, mask, kl_coef=0.1, cu_seqlens=cu_seqlens, score_at=score_at)
        assert rewards.isnan().all()
    monkeypatch.setattr("rlkernels.ops._checks.CHECK_VALUES", True)
    with pytest.raises(ValueError, match="cu_seqlens"):
        shaped_rewards(scores, tokens, tokens, mask, kl_coef=0.1, cu_seqlens=cu_seqlens)


@pytest.mark.only("cpu", "triton", "cuda")
@pytest.mark.parametrize("packed", [False, True])
def test_rewards_opcheck(backend, device, packed):
    inputs = reward_inputs([5, 3], 9, device, packed=packed, garbage=-1.0)
    check_ops(lambda: shaped_rewards(**inputs, kl_coef=0.1), backend, "shaped_rewards")


@pytest.mark.thorough
@pytest.mark.parametrize("packed", [False, True])
def test_rewards_compile(backend, device, packed):
    torch._dynamo.reset()
    inputs = reward_inputs([5, 3], 9, device, packed=packed, garbage=-1.0)

    def function(scores, **inputs):
        return 2 * shaped_rewards(scores * 1.5, **inputs, kl_coef=0.1, estimator="k3", score_at="after_last")

    compiled = torch.compile(function, fullgraph=True, backend="inductor")
    torch.testing.assert_close(compiled(**inputs), function(**inputs), rtol=1e-6, atol=1e-6)


TWO = torch.zeros(2, 3)
BAD_REWARDS = {
    "scores shape": (dict(scores=torch.zeros(3)), ValueError, ("scores", "[2]", "[3]")),
    "scores None": (dict(scores=None), TypeError, ("scores", "NoneType")),
    "scores integer": (dict(scores=torch.zeros(2).long()), TypeError, ("scores", "float32", "int64")),
    "scores gradient": (dict(scores=torch.zeros(2, requires_grad=True)), ValueError, ("scores", "detach")),
    "scores device": (dict(scores=torch.zeros(2, device="meta")), ValueError, ("scores", "cpu", "meta")),
    "logprobs 1-d": (dict(logprobs=torch.zeros(6)), ValueError, ("logprobs", "[B, T]", "[6]")),
    "logprobs gradient": (dict(logprobs=torch.zeros(2, 3, requires_grad=True)), ValueError, ("logprobs", "detach")),
    "ref_logprobs shape": (dict(ref_logprobs=torch.zeros(2, 4)), ValueError, ("ref_logprobs", "[2, 3]", "[2, 4]")),
    "ref_logprobs gradient": (
        dict(ref_logprobs=torch.zeros(2, 3, requires_grad=True)),
        ValueError,
        ("ref_logprobs", "detach"),
    ),
    "mask shape": (dict(mask=torch.ones(3)), ValueError, ("mask", "[2, 3]", "[3]")),
    "kl_coef nan": (dict(kl_coef=NAN), ValueError, ("kl_coef", "finite", "nan")),
    "kl_coef a tensor": (dict(kl_coef=torch.ones(())), TypeError, ("kl_coef", "number", "Tensor")),
    "estimator straight-through": (dict(estimator="k3+"), ValueError, ("estimator", "k1, k2, k3, abs", "k3+")),
    "score_at": (dict(score_at="eos"), ValueError, ("score_at", "last, after_last", "eos")),
    "cu_seqlens with padded": (
        dict(cu_seqlens=torch.tensor([0, 6], dtype=torch.int32)),
        ValueError,
        ("logprobs", "cu_seqlens", "[2, 3]"),
    ),
    "cu_seqlens int64": (
        dict(cu_seqlens=torch.tensor([0, 6]), logprobs=torch.zeros(6)),
        TypeError,
        ("cu_seqlens", "int32", "int64"),
    ),
}


@pytest.mark.parametrize("name", BAD_REWARDS)
def test_bad_rewards_input(backend, device, name):
    changes, error, fragments = BAD_REWARDS[name]
    arguments = {"scores": torch.zeros(2), "logprobs": TWO, "ref_logprobs": TWO, "kl_coef": 0.1}
    with pytest.raises(error) as raised:
        shaped_rewards(**(arguments | changes))
    for fragment in fragments:
        assert fragment in str(raised.value)
