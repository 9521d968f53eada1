import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from cases import COMPILERS_AND_LAYOUTS, thorough_emulated
from launches import Seen
from op_calls import check_ops
from rlkernels import policy_loss
from rlkernels._codes import AGGREGATIONS, KL_ESTIMATORS, STRAIGHT_THROUGH
from token_losses import (
    DTYPES,
    GRADIENT_OPS,
    INF,
    NAN,
    as_given,
    assert_matches_oracles,
    make_inputs,
    run,
)

OBJECTIVES = ("ppo", "reinforce")
ESTIMATORS = (*KL_ESTIMATORS, *STRAIGHT_THROUGH)


@given(
    lengths=st.lists(st.integers(0, 12), min_size=0, max_size=6),
    padding=st.integers(0, 3),
    packed=st.booleans(),
    per_token=st.booleans(),
    old=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    distance=st.sampled_from([0.0, 0.01, 0.3, 3.0]),
    objective=st.sampled_from(OBJECTIVES),
    aggregation=st.sampled_from(AGGREGATIONS),
    clip=st.sampled_from([(0.2, 0.2), (0.2, 0.28), (0.05, 1.0)]),
    dual_clip=st.sampled_from([None, 1.5, 3.0]),
    log_ratio_clamp=st.sampled_from([None, 0.25, 20.0]),
    kl_term=st.sampled_from([None, *((coefficient, name) for name in ESTIMATORS for coefficient in (0.0, 0.1))]),
    normalizer=st.sampled_from([None, 7, 12.5, "tensor"]),
    seed=st.integers(0, 99),
)
def test_matches_oracles(
    backend,
    device,
    lengths,
    padding,
    packed,
    per_token,
    old,
    dtype,
    distance,
    objective,
    aggregation,
    clip,
    dual_clip,
    log_ratio_clamp,
    kl_term,
    normalizer,
    seed,
):
    inputs = make_inputs(
        lengths,
        max(lengths, default=0) + padding,
        device,
        dtype,
        packed=packed,
        per_token=per_token,
        distance=distance,
        old=old,
        reference=kl_term is not None,
        seed=seed,
    )
    coefficient, estimator = kl_term or (0.0, "k3")
    assert_matches_oracles(
        inputs,
        objective=objective,
        aggregation=aggregation,
        clip_low=clip[0],
        clip_high=clip[1],
        dual_clip=dual_clip,
        log_ratio_clamp=log_ratio_clamp,
        kl_coef=coefficient,
        kl_estimator=estimator,
        normalizer=torch.tensor(9.0, device=device) if normalizer == "tensor" else normalizer,
    )


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_and_aggregation(backend, device, objective, aggregation, packed):
    inputs = make_inputs([5, 0, 12, 1, 7], 12, device, packed=packed, per_token=True)
    for normalizer in (None, 64, torch.tensor(40, device=device)):
        assert_matches_oracles(
            inputs, objective=objective, aggregation=aggregation, normalizer=normalizer, kl_coef=0.05
        )


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_without_a_mask_every_token_is_scored(backend, device, aggregation, packed):
    inputs = make_inputs([9, 9, 9], 9, device, packed=packed, drop=0.0)
    assert inputs.pop("mask").all()
    assert_matches_oracles(inputs, aggregation=aggregation)


@pytest.mark.parametrize("log_ratio_clamp", [None, 0.25, 1.0])
@pytest.mark.parametrize("dual_clip", [None, 1.5])
@pytest.mark.parametrize("clip", [(0.2, 0.2), (0.0, 1.0)], ids=str)
def test_clips_and_clamps(backend, device, clip, dual_clip, log_ratio_clamp):
    """Ratios far enough apart that every bound is crossed, by advantages of both signs."""
    inputs = make_inputs([40, 30], 40, device, per_token=True, distance=0.8)
    assert_matches_oracles(
        inputs, clip_low=clip[0], clip_high=clip[1], dual_clip=dual_clip, log_ratio_clamp=log_ratio_clamp
    )


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_kl_term(backend, device, estimator):
    inputs = make_inputs([9, 4], 9, device)
    _, metrics, _ = assert_matches_oracles(inputs, kl_coef=0.3, kl_estimator=estimator)
    measured, measured_metrics, _ = run(policy_loss, inputs, kl_coef=0.0, kl_estimator=estimator)
    assert torch.equal(metrics, measured_metrics), "the KL is measured whether or not it is in the loss"
    without = run(policy_loss, {k: v for k, v in inputs.items() if k != "ref_logprobs"})
    assert torch.equal(measured, without[0])
    assert without[1][policy_loss.metrics.index("ref_kl")] == 0


def test_infinite_kl_of_coefficient_zero_leaves_the_loss_alone(backend, device):
    """A token that the reference model's mask forbids."""
    inputs = make_inputs([9, 4], 9, device, drop=0.0)
    wanted = run(policy_loss, inputs)
    inputs["ref_logprobs"][0, 3] = -INF
    got = run(policy_loss, inputs)
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[2], wanted[2])


@pytest.mark.parametrize("sequences", [1, 3])
@pytest.mark.parametrize("length", [1, thorough_emulated(63), 129, 1025, thorough_emulated(5000)])
def test_lengths(backend, device, length, sequences):
    """1: no neighbour; 63: odd; 129, 1025: one past a block; 5000: several blocks to a sequence."""
    lengths = [length, *([max(length - 5, 0), length // 2][: sequences - 1])]
    for packed in (False, True):
        inputs = make_inputs(lengths, length, device, packed=packed, per_token=packed)
        for aggregation in AGGREGATIONS:
            assert_matches_oracles(inputs, aggregation=aggregation, kl_coef=0.1)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_inputs_as_the_caller_gave_them(backend, device, packed):
    """Whatever their dtypes and layouts, the results are those of float32 inputs and a bool mask."""
    inputs = make_inputs([9, 0, 14], 14, device, packed=packed, per_token=True, sampler=True, entropy=True)
    given, plain = as_given(inputs, "logprobs")
    options = dict(kl_coef=0.1, entropy_coef=0.1, sampler_correction="token_mask")
    for normalizer in (torch.tensor(7, device=device), torch.tensor(7.0, device=device, dtype=torch.bfloat16)):
        got = run(policy_loss, given, -1.7, normalizer=normalizer, **options)
        wanted = run(policy_loss, plain, -1.7, normalizer=7.0, **options)
        assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])
        assert (got[2].dtype, got[3].dtype) == (torch.bfloat16, torch.float64)
        assert torch.equal(got[2], wanted[2].bfloat16()) and torch.equal(got[3], wanted[3].double())


@pytest.mark.only("triton", "cuda")
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_a_call_launches_its_kernels_and_nothing_else(backend, device, packed):
    inputs = make_inputs([9, 0, 14], 14, device, torch.bfloat16, packed=packed, sampler=True, entropy=True)
    inputs["mask"] = inputs["mask"].long()
    leaves = [inputs[name].requires_grad_() for name in ("logprobs", "entropy")]
    upstream, normalizer = torch.tensor(2.0, device=device), torch.tensor(9, device=device)
    for objective in ("ppo", "gspo"):
        with Seen() as seen:
            loss, _ = policy_loss(**inputs, objective=objective, entropy_coef=0.1, normalizer=normalizer)
            torch.autograd.grad(loss, leaves, upstream)
        assert (seen.own, seen.launched) == (["policy_loss_forward", "token_loss_backward"], [])


@pytest.mark.only("triton")
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("width", [1, 3, 6, 90])
def test_a_program_goes_through_tokens_in_turns(backend, device, width, packed, monkeypatch):
    """As on a GPU beyond a million tokens: here two programs take 16 tokens at a time."""
    lengths = [width - index % 2 if width > 1 else index % 2 for index in range(180 // width)]
    inputs = make_inputs(lengths, width, device, packed=packed)
    options = dict(aggregation="seq_mean_token_mean", kl_coef=0.1)
    _, _, gradient = run(policy_loss, inputs, **options)
    monkeypatch.setattr("rlkernels.triton._token_losses.PROGRAMS", 2)
    for module in ("_token_losses", "policy_loss"):
        monkeypatch.setattr(f"rlkernels.triton.{module}.BLOCK", 16)
    got = assert_matches_oracles(inputs, 1.0, **options)
    assert torch.equal(got[2], gradient)


@pytest.mark.thorough_on("reference")
def test_many_short_sequences(backend, device, emulated):
    lengths = [index % 4 for index in range(70 if emulated else 700)]
    for packed in (False, True):
        for aggregation in AGGREGATIONS:
            assert_matches_oracles(make_inputs(lengths, 3, device, packed=packed), aggregation=aggregation)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_padded_equals_packed(backend, device, aggregation):
    lengths = [6, 0, 11, 1]
    padded = make_inputs(lengths, 13, device)
    packed = make_inputs(lengths, 13, device, packed=True)
    options = dict(aggregation=aggregation, kl_coef=0.1)
    loss, metrics, gradient = run(policy_loss, padded, **options)
    packed_loss, packed_metrics, packed_gradient = run(policy_loss, packed, **options)
    torch.testing.assert_close(packed_loss, loss)
    torch.testing.assert_close(packed_metrics, metrics)
    within = torch.arange(13, device=device) < torch.tensor(lengths, device=device).view(-1, 1)
    torch.testing.assert_close(packed_gradient, gradient[within])
    assert not gradient[~within].any()


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_sequence_advantage_is_that_of_each_of_its_tokens(backend, device, aggregation):
    lengths = [6, 0, 11, 1]
    for packed in (False, True):
        inputs = make_inputs(lengths, 13, device, packed=packed)
        repeats = torch.tensor(lengths if packed else [13] * 4, device=device)
        each = inputs["advantages"].repeat_interleave(repeats).view(inputs["logprobs"].shape)
        for one, other in zip(
            run(policy_loss, inputs, aggregation=aggregation),
            run(policy_loss, inputs | {"advantages": each}, aggregation=aggregation),
            strict=True,
        ):
            assert torch.equal(one, other)


def test_packed_with_as_many_sequences_as_tokens(backend, device):
    """[S] and [N] are the same shape: with one token each they are also the same thing."""
    inputs = make_inputs([1] * 5, 1, device, packed=True)
    assert_matches_oracles(inputs)


@pytest.mark.parametrize("garbage", [NAN, thorough_emulated(INF), thorough_emulated(-INF)])
@pytest.mark.parametrize("name", ["logprobs", "old_logprobs", "ref_logprobs", "advantages"])
def test_what_is_not_scored_leaves_no_trace(backend, device, name, garbage):
    clean = make_inputs([7, 12, 3], 12, device, per_token=True, garbage=False)
    dirty = clean | {name: clean[name].masked_fill(~clean["mask"], garbage)}
    options = dict(kl_coef=0.1, dual_clip=3.0, log_ratio_clamp=10.0)
    for aggregation in AGGREGATIONS:
        wanted = run(policy_loss, clean, aggregation=aggregation, **options)
        got = run(policy_loss, dirty, aggregation=aggregation, **options)
        for one, other in zip(got, wanted, strict=True):
            assert torch.equal(one, other)
        assert not got[2][~clean["mask"]].any()


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("normalizer", [None, 5.0])
def test_nothing_scored(backend, device, normalizer, aggregation):
    shapes = [make_inputs(lengths, width, device) for lengths, width in (([0, 0], 4), ([], 4), ([0, 0], 0))]
    shapes += [make_inputs(lengths, 4, device, packed=True) for lengths in ([0, 0], [])]
    for inputs in shapes:
        loss, metrics, gradient = run(policy_loss, inputs, aggregation=aggregation, normalizer=normalizer, kl_coef=0.1)
        assert loss == 0
        assert not metrics.any()
        assert not gradient.any()
        assert gradient.shape == inputs["logprobs"].shape


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float32, torch.bfloat16], ids=str)
def test_masks_of_other_dtypes(backend, device, dtype):
    inputs = make_inputs([7, 12, 3], 12, device)
    wanted = run(policy_loss, inputs)
    got = run(policy_loss, inputs | {"mask": inputs["mask"].to(dtype)})
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(one, other)


def test_strides(backend, device):
    inputs = make_inputs([7, 12, 3], 12, device, per_token=True)
    wanted = run(policy_loss, inputs, kl_coef=0.1)
    strided = {name: value.t().contiguous().t() for name, value in inputs.items()}
    wider = {name: torch.stack([value, value.roll(1)], -1)[..., 0] for name, value in inputs.items()}
    for other in (strided, wider):
        for one, two in zip(run(policy_loss, other, kl_coef=0.1), wanted, strict=True):
            assert torch.equal(one, two)


def test_on_policy(backend, device):
    """Without old log-probabilities the ratio is 1 and its gradient is there."""
    inputs = make_inputs([7, 12], 12, device, old=False, reference=False)
    loss, metrics, gradient = run(policy_loss, inputs)
    same = run(policy_loss, inputs | {"old_logprobs": inputs["logprobs"]})
    for one, other in zip((loss, metrics, gradient), same, strict=True):
        assert torch.equal(one, other)
    tokens = inputs["mask"].sum()
    wanted = -(inputs["advantages"].view(-1, 1) / tokens).expand(-1, 12).masked_fill(~inputs["mask"], 0.0)
    torch.testing.assert_close(gradient, wanted)
    assert dict(zip(policy_loss.metrics, metrics.tolist(), strict=True)) == {
        "ratio_mean": 1,
        "clip_fraction_low": 0,
        "clip_fraction_high": 0,
        "approx_kl": 0,
        "ref_kl": 0,
        "entropy": 0,
        "sampler_weight": 1,
        "sampler_capped": 0,
        "num_tokens": tokens,
    }


def test_clipping_by_hand(backend, device):
    """One token on each side of every branch."""
    log_ratio = torch.tensor([[-1.0, -1.0, 1.0, 1.0, 0.1, 2.0]], device=device)
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0, 2.0, -1.0]], device=device)
    inputs = {"logprobs": log_ratio, "old_logprobs": torch.zeros_like(log_ratio), "advantages": advantages}
    options = dict(clip_low=0.2, clip_high=0.3, dual_clip=3.0, aggregation="token_sum")
    loss, metrics, gradient = run(policy_loss, inputs, **options)
    terms = [-math.exp(-1), 0.8, -1.3, math.exp(1), -2 * math.exp(0.1), 3.0]
    slopes = [-math.exp(-1), 0.0, 0.0, math.exp(1), -2 * math.exp(0.1), 0.0]
    torch.testing.assert_close(loss.item(), sum(terms), rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient.flatten().tolist(), slopes, rtol=1e-6, atol=0)
    named = dict(zip(policy_loss.metrics, metrics.tolist(), strict=True))
    ratios = [math.exp(value) for value in log_ratio.flatten().tolist()]
    assert named["clip_fraction_low"] == pytest.approx(1 / 6)
    assert named["clip_fraction_high"] == pytest.approx(1 / 6)
    assert named["ratio_mean"] == pytest.approx(sum(ratios) / 6)
    assert named["approx_kl"] == pytest.approx(sum(r - 1 - math.log(r) for r in ratios) / 6)
    assert named["num_tokens"] == 6


def test_log_ratio_clamp_by_hand(backend, device):
    """A clamped ratio is a constant: exp(+-clamp), and no gradient. The clamp's own value is not clamped."""
    log_ratio = torch.tensor([[-50.0, 50.0, 2.0, -2.0, 0.5]], device=device)
    inputs = {
        "logprobs": log_ratio,
        "old_logprobs": torch.zeros_like(log_ratio),
        "advantages": torch.tensor([[1.0, -1.0, -1.0, 1.0, -1.0]], device=device),
    }
    options = dict(log_ratio_clamp=2.0, clip_low=0.99, clip_high=10.0, aggregation="token_sum")
    loss, _, gradient = run(policy_loss, inputs, **options)
    e = math.exp
    torch.testing.assert_close(loss.item(), -e(-2) + e(2) + e(2) - e(-2) + e(0.5), rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient.flatten().tolist(), [0.0, 0.0, e(2), -e(-2), e(0.5)], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_is_rounded_not_truncated(backend, device, dtype):
    inputs = make_inputs([300] * 4, 300, device, dtype, per_token=True)
    assert_matches_oracles(inputs, objective="ppo", kl_coef=0.1)


def test_upstream_gradient_scales_the_gradient(backend, device):
    inputs = make_inputs([7, 12], 12, device)
    _, _, once = run(policy_loss, inputs, 1.0)
    _, _, twice = run(policy_loss, inputs, 2.0)
    assert torch.equal(twice, 2 * once)
    assert not run(policy_loss, inputs, 0.0)[2].any()


def test_backward_twice(backend, device):
    """The saved gradient is not consumed by the first pass."""
    inputs = make_inputs([7, 12], 12, device)
    leaf = inputs["logprobs"].requires_grad_()
    loss, _ = policy_loss(**inputs)
    loss.backward(retain_graph=True)
    once = leaf.grad.clone()
    loss.backward()
    assert torch.equal(leaf.grad, 2 * once)


def test_metrics_and_dtypes(backend, device):
    inputs = make_inputs([7, 12], 12, device, torch.bfloat16)
    loss, metrics = policy_loss(**(inputs | {"logprobs": inputs["logprobs"].requires_grad_()}))
    assert (loss.dtype, loss.shape) == (torch.float32, ())
    assert (metrics.dtype, metrics.shape) == (torch.float32, (len(policy_loss.metrics),))
    assert loss.requires_grad
    assert not metrics.requires_grad
    assert policy_loss.metrics == (
        *("ratio_mean", "clip_fraction_low", "clip_fraction_high", "approx_kl", "ref_kl"),
        *("entropy", "sampler_weight", "sampler_capped", "num_tokens"),
    )
    (gradient,) = torch.autograd.grad(loss, inputs["logprobs"])
    assert gradient.dtype == torch.bfloat16


def test_same_bits_on_every_run(backend, device, emulated):
    inputs = make_inputs([1300, 1, 0] if emulated else [30_000, 40_000, 1, 0], 1300 if emulated else 40_000, device)
    for aggregation in AGGREGATIONS:
        first, *others = (run(policy_loss, inputs, aggregation=aggregation) for _ in range(3))
        for other in others:
            for one, two in zip(first, other, strict=True):
                assert torch.equal(one, two)


def test_a_token_gradient_does_not_depend_on_the_others(backend, device):
    """Up to the count: with a normalizer not even on that."""
    inputs = make_inputs([40, 50, 60], 60, device, per_token=True, reference=False)
    options = dict(aggregation="token_sum", normalizer=64.0)
    _, _, together = run(policy_loss, inputs, **options)
    for row in range(3):
        alone = run(policy_loss, {name: value[row : row + 1] for name, value in inputs.items()}, **options)[2]
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_reference_gradcheck(packed):
    inputs = make_inputs([3, 0, 4], 4, "cpu", torch.float64, packed=packed, garbage=False, distance=0.5)
    logprobs = inputs.pop("logprobs").requires_grad_()
    for aggregation in AGGREGATIONS:
        for objective in OBJECTIVES:
            options = dict(
                objective=objective, aggregation=aggregation, kl_coef=0.1, dual_clip=2.0, log_ratio_clamp=1.0
            )
            assert torch.autograd.gradcheck(lambda leaf, o=options: policy_loss(leaf, **inputs, **o)[0], logprobs)


@pytest.mark.parametrize("bounds", [[1, 12], [0, 11], [0, 13], [0, 8, 4, 12], [0, -1, 12], [0, 20, 12]], ids=str)
def test_bad_cu_seqlens(backend, device, bounds, monkeypatch):
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)
    tokens = torch.zeros(12, device=device)

    def call():
        return policy_loss(tokens, None, tokens, cu_seqlens=cu_seqlens, aggregation="seq_mean_token_mean")

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
    logprobs = torch.randn(2, 3, device=device, requires_grad=True)
    loss, _ = policy_loss(logprobs, logprobs.detach() - 0.1, torch.ones(2, device=device))
    gradient = torch.autograd.grad(loss, logprobs, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="differentiated again"):
        gradient.square().sum().backward()


def test_clipped_ratio_that_overflows_has_no_gradient(backend, device):
    logprobs = torch.zeros(1, 2, device=device, requires_grad=True)
    old = torch.tensor([[-100.0, -INF]], device=device)
    policy_loss(logprobs, old, torch.ones(1, device=device))[0].backward()
    assert (logprobs.grad == 0).all()


@pytest.mark.only("reference", "cpu")
@pytest.mark.thorough_on("reference")
def test_compile_once_for_changing_options(backend, device):
    """Floats that change become inputs of the graph, which the checks must let through."""
    torch._dynamo.reset()
    inputs = make_inputs([3, 0, 4], 4, device)

    def loss(number):
        options = dict(normalizer=number, clip_low=0.1 * number, clip_high=number, kl_coef=number, dual_clip=1 + number)
        return policy_loss(**inputs, **options)[0]

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for number in (0.5, 1.5, 2.5):
        torch.testing.assert_close(compiled(number), loss(number))


@pytest.mark.only("cpu", "triton", "cuda")
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_opcheck(backend, device, packed):
    inputs = make_inputs([3, 0, 4], 4, device, packed=packed, garbage=False)
    check_ops(
        lambda: run(policy_loss, inputs, aggregation="seq_mean_token_mean", kl_coef=0.1),
        backend,
        "policy_loss_forward",
        *GRADIENT_OPS[backend],
        differentiable=("policy_loss_forward",),
    )


@COMPILERS_AND_LAYOUTS
def test_compile(backend, device, compiler, packed):
    torch._dynamo.reset()
    inputs = make_inputs([3, 0, 4], 4, device, packed=packed)
    normalizer = torch.tensor(9.0, device=device)

    def function(logprobs, **rest):
        loss, metrics = policy_loss(logprobs * 1.1, normalizer=normalizer, kl_coef=0.1, **rest)
        return loss * 2, metrics

    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    for one, other in zip(run(compiled, inputs), run(function, inputs), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_nothing_is_read_back_by_the_host(backend, device, aggregation, packed, monkeypatch):
    """Fake tensors have no values: an .item(), a comparison or a data-dependent shape on the way raises. As on a GPU,
    where values are not checked."""
    monkeypatch.setattr("rlkernels.ops._checks.cu_seqlens_values", lambda *values: None)
    inputs = make_inputs([3, 0, 4], 4, device, packed=packed)
    inputs["normalizer"] = torch.tensor(9.0, device=device)
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(value) for name, value in inputs.items()}
        leaf = fake.pop("logprobs").requires_grad_()
        loss, metrics = policy_loss(leaf, **fake, aggregation=aggregation, kl_coef=0.1)
        (gradient,) = torch.autograd.grad(loss, leaf)
    assert (loss.shape, metrics.shape, gradient.shape) == ((), (9,), leaf.shape)


TOKENS = torch.zeros(2, 3)
BAD_INPUT = {
    "logprobs no tensor": (dict(logprobs=[0.0]), TypeError, ("logprobs", "list")),
    "logprobs integer": (dict(logprobs=torch.zeros(2, 3).long()), TypeError, ("logprobs", "float32", "int64")),
    "logprobs 1-d": (dict(logprobs=torch.zeros(6)), ValueError, ("logprobs", "[B, T]", "[6]")),
    "logprobs 3-d": (dict(logprobs=torch.zeros(2, 3, 1)), ValueError, ("logprobs", "[B, T]", "[2, 3, 1]")),
    "old_logprobs shape": (dict(old_logprobs=torch.zeros(2, 4)), ValueError, ("old_logprobs", "[2, 3]", "[2, 4]")),
    "old_logprobs gradient": (
        dict(old_logprobs=torch.zeros(2, 3, requires_grad=True)),
        ValueError,
        ("old_logprobs", "detach"),
    ),
    "old_logprobs integer": (dict(old_logprobs=TOKENS.long()), TypeError, ("old_logprobs", "float32", "int64")),
    "ref_logprobs shape": (dict(ref_logprobs=torch.zeros(3)), ValueError, ("ref_logprobs", "[2, 3]", "[3]")),
    "ref_logprobs gradient": (
        dict(ref_logprobs=torch.zeros(2, 3, requires_grad=True)),
        ValueError,
        ("ref_logprobs", "detach"),
    ),
    "advantages shape": (dict(advantages=torch.zeros(3)), ValueError, ("advantages", "[2, 3]", "[2]", "[3]")),
    "advantages column": (dict(advantages=torch.zeros(2, 1)), ValueError, ("advantages", "[2]", "[2, 1]")),
    "advantages None": (dict(advantages=None), TypeError, ("advantages", "NoneType")),
    "advantages gradient": (
        dict(advantages=torch.zeros(2, requires_grad=True)),
        ValueError,
        ("advantages", "detach"),
    ),
    "mask shape": (dict(mask=torch.ones(3) > 0), ValueError, ("mask", "[2, 3]", "[3]")),
    "mask a list": (dict(mask=[[1] * 3] * 2), TypeError, ("mask", "list")),
    "mask device": (dict(mask=torch.ones(2, 3, device="meta")), ValueError, ("mask", "cpu", "meta")),
    "cu_seqlens with padded": (
        dict(cu_seqlens=torch.tensor([0, 6], dtype=torch.int32)),
        ValueError,
        ("logprobs", "cu_seqlens", "[2, 3]"),
    ),
    "cu_seqlens int64": (dict(cu_seqlens=torch.tensor([0, 6])), TypeError, ("cu_seqlens", "int32", "int64")),
    "cu_seqlens empty": (dict(cu_seqlens=torch.zeros(0, dtype=torch.int32)), ValueError, ("cu_seqlens", "[0]")),
    "cu_seqlens a list": (dict(cu_seqlens=[0, 6]), TypeError, ("cu_seqlens", "list")),
    "objective": (dict(objective="grpo"), ValueError, ("objective", "ppo", "reinforce", "grpo")),
    "aggregation": (dict(aggregation="mean"), ValueError, ("aggregation", "token_mean", "token_sum", "'mean'")),
    "kl_estimator": (dict(kl_estimator="k5"), ValueError, ("kl_estimator", "k3+", "k5")),
    "clip_low negative": (dict(clip_low=-0.1), ValueError, ("clip_low", ">= 0", "-0.1")),
    "clip_high nan": (dict(clip_high=NAN), ValueError, ("clip_high", ">= 0", "nan")),
    "clip_low None": (dict(clip_low=None), TypeError, ("clip_low", "number", "NoneType")),
    "dual_clip 1": (dict(dual_clip=1.0), ValueError, ("dual_clip", "> 1", "1.0")),
    "log_ratio_clamp": (dict(log_ratio_clamp=-1.0), ValueError, ("log_ratio_clamp", ">= 0", "-1")),
    "kl_coef without a reference": (dict(kl_coef=0.1), ValueError, ("ref_logprobs", "kl_coef", "None")),
    "kl_coef inf": (dict(kl_coef=INF, ref_logprobs=TOKENS), ValueError, ("kl_coef", "finite", "inf")),
    "normalizer 0": (dict(normalizer=0), ValueError, ("normalizer", "> 0", "0")),
    "normalizer negative": (dict(normalizer=-2.0), ValueError, ("normalizer", "> 0", "-2")),
    "normalizer a vector": (dict(normalizer=torch.ones(1)), ValueError, ("normalizer", "0-d", "[1]")),
    "normalizer a string": (dict(normalizer="tokens"), TypeError, ("normalizer", "number", "str")),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input(backend, device, name):
    changes, error, fragments = BAD_INPUT[name]
    arguments = {"logprobs": TOKENS, "old_logprobs": TOKENS, "advantages": torch.zeros(2)}
    with pytest.raises(error) as raised:
        policy_loss(**(arguments | changes))
    for fragment in fragments:
        assert fragment in str(raised.value)
