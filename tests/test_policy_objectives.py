"""The objectives of policy_loss beside ppo and reinforce, the sampler's weights, the entropy bonus, and the memory."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from cases import COMPILERS_AND_LAYOUTS, THOROUGH_EMULATED, thorough_emulated
from op_calls import check_ops
from rlkernels import policy_loss
from rlkernels._codes import AGGREGATIONS, OBJECTIVES, SAMPLER_CORRECTIONS
from token_losses import (
    DTYPES,
    GRADIENT_OPS,
    INF,
    NAN,
    assert_matches_oracles,
    make_inputs,
    run,
)

NEW = ("gspo", "cispo", "sapo", "gmpo", "dppo_tv", "dppo_kl", "vespo")
BY_SEQUENCE = ("gspo", "gmpo", "vespo")
# Bounds that about half of the tokens cross whose log-ratios are of size 0.3.
CLIPS = {"dppo_tv": (0.05, 0.06), "dppo_kl": (0.004, 0.006)}


def clips(objective, default=(0.2, 0.28)):
    low, high = CLIPS.get(objective, default)
    return dict(clip_low=low, clip_high=high)


def named(metrics):
    return dict(zip(policy_loss.metrics, metrics.tolist(), strict=True))


@given(
    lengths=st.lists(st.integers(0, 12), min_size=0, max_size=6),
    packed=st.booleans(),
    per_token=st.booleans(),
    old=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    distance=st.sampled_from([0.01, 0.3, 1.0]),
    objective=st.sampled_from(OBJECTIVES),
    aggregation=st.sampled_from(AGGREGATIONS),
    dual_clip=st.sampled_from([None, 1.5]),
    delta=st.sampled_from([None, 0.9, 1.5]),
    log_ratio_clamp=st.sampled_from([None, 0.1, 20.0]),
    kl_coef=st.sampled_from([None, 0.0, 0.1]),
    entropy_coef=st.sampled_from([None, 0.0, 0.01]),
    sampler=st.sampled_from([None, *((name, cap) for name in SAMPLER_CORRECTIONS for cap in (0.9, 1.01, 3.0))]),
    normalizer=st.sampled_from([None, 12.5, "tensor"]),
    seed=st.integers(0, 99),
)
def test_matches_oracles(
    backend,
    device,
    lengths,
    packed,
    per_token,
    old,
    dtype,
    distance,
    objective,
    aggregation,
    dual_clip,
    delta,
    log_ratio_clamp,
    kl_coef,
    entropy_coef,
    sampler,
    normalizer,
    seed,
):
    inputs = make_inputs(
        lengths,
        max(lengths, default=0) + 1,
        device,
        dtype,
        packed=packed,
        per_token=per_token or (packed and len(lengths) == sum(lengths)),
        distance=distance,
        old=old,
        reference=kl_coef is not None,
        sampler=sampler is not None,
        entropy=entropy_coef is not None,
        seed=seed,
    )
    correction, cap = sampler or ("sequence_mask", 3.0)
    assert_matches_oracles(
        inputs,
        objective=objective,
        aggregation=aggregation,
        **clips(objective),
        dual_clip=dual_clip,
        delta=delta,
        log_ratio_clamp=log_ratio_clamp,
        kl_coef=kl_coef or 0.0,
        entropy_coef=entropy_coef or 0.0,
        sampler_correction=correction,
        sampler_cap=cap,
        normalizer=torch.tensor(9.0, device=device) if normalizer == "tensor" else normalizer,
    )


@pytest.mark.parametrize("packed", [False, thorough_emulated(True)], ids=["padded", "packed"])
@pytest.mark.parametrize("objective", NEW)
def test_every_objective(backend, device, objective, packed):
    """With one advantage a token and one a sequence, and with every aggregation and sampler correction."""
    for per_token, aggregation, correction in (
        (False, "token_mean", None),
        (True, "seq_mean_token_mean", "token_truncate"),
        (False, "seq_mean_token_sum", "token_mask"),
        (True, "token_sum", "sequence_truncate"),
        (False, "seq_mean_token_mean", "sequence_mask"),
    ):
        options = dict(aggregation=aggregation, **clips(objective))
        if correction:
            options |= dict(sampler_correction=correction, sampler_cap=1.02, kl_coef=0.1)
        inputs = make_inputs(
            [5, 0, 12, 1, 7], 12, device, packed=packed, per_token=per_token, sampler=correction is not None
        )
        _, metrics, _ = assert_matches_oracles(inputs, objective=objective, **options)
        assert (correction is None) == (named(metrics)["sampler_capped"] == 0)


@pytest.mark.parametrize("objective", ["gspo", thorough_emulated("gmpo"), "vespo", thorough_emulated("dppo_kl")])
def test_lengths(backend, device, objective):
    """1: no neighbour; 129: odd; 2100: several blocks to a sequence. Sums of as many log-ratios."""
    for length in (1, 129, 2100):
        for packed in (False, True):
            inputs = make_inputs(
                [length, max(length - 5, 0)], length, device, packed=packed, sampler=True, distance=0.05
            )
            options = dict(objective=objective, sampler_correction="sequence_truncate", **clips(objective))
            assert_matches_oracles(inputs, aggregation="seq_mean_token_mean", **options)


@pytest.mark.parametrize("objective", NEW)
def test_without_a_mask_every_token_is_scored(backend, device, objective):
    for packed in (False, True):
        inputs = make_inputs([9, 9, 9], 9, device, packed=packed, drop=0.0, sampler=True)
        assert inputs.pop("mask").all()
        assert_matches_oracles(inputs, objective=objective, sampler_correction="token_truncate", **clips(objective))


@pytest.mark.parametrize("delta", [0.7, 1.1, 1.6])
@pytest.mark.parametrize("dual_clip", [None, 1.5])
@pytest.mark.parametrize("objective", ["ppo", thorough_emulated("gspo"), "dppo_tv"])
def test_delta(backend, device, objective, dual_clip, delta):
    """Below, between and above the clips, by ratios far enough apart that it is crossed."""
    inputs = make_inputs([1] * 40, 1, device, distance=0.8)
    options = dict(clip_low=0.2, clip_high=0.3) | ({} if objective == "ppo" else clips(objective, (0.2, 0.3)))
    with_delta = assert_matches_oracles(inputs, objective=objective, dual_clip=dual_clip, delta=delta, **options)
    without = run(policy_loss, inputs, -1.7, objective=objective, dual_clip=dual_clip, **options)
    # Where the advantage is negative, a dual clip below delta is met first.
    assert torch.equal(with_delta[2], without[2]) == (objective != "dppo_tv" and dual_clip is not None and delta == 1.6)


@pytest.mark.parametrize("objective", ["gspo", "gmpo", "sapo", "cispo"])
def test_log_ratio_clamp(backend, device, objective):
    """The mean over the sequence is clamped where the ratio is the sequence's."""
    inputs = make_inputs([1] * 20 + [4] * 4, 4, device, distance=0.8)
    options = dict(objective=objective, clip_low=0.9, clip_high=5.0)
    clamped = assert_matches_oracles(inputs, log_ratio_clamp=0.3, **options)
    free = run(policy_loss, inputs, -1.7, **options)
    assert not torch.equal(clamped[2], free[2])
    assert free[2].any()


def test_sapo_by_hand(backend, device):
    log_ratio, advantage = math.log(1.5), torch.tensor([[2.0, -3.0]], device=device)
    inputs = {
        "logprobs": torch.full((1, 2), log_ratio, device=device),
        "old_logprobs": torch.zeros(1, 2, device=device),
        "advantages": advantage,
    }
    options = dict(objective="sapo", sapo_temperature_pos=2.0, sapo_temperature_neg=4.0, aggregation="token_sum")
    loss, _, gradient = run(policy_loss, inputs, **options)
    gates = [1 / (1 + math.exp(-1.0)), 1 / (1 + math.exp(-2.0))]
    assert loss.item() == pytest.approx(-(4 / 2) * gates[0] * 2 + (4 / 4) * gates[1] * 3)
    wanted = [-4 * gates[0] * (1 - gates[0]) * 1.5 * 2, 4 * gates[1] * (1 - gates[1]) * 1.5 * 3]
    torch.testing.assert_close(gradient.flatten().tolist(), wanted, rtol=1e-6, atol=0)


def test_vespo_by_hand(backend, device):
    """phi(1) = 1, and by the sign of the advantage."""
    ones = torch.ones(2, 2, device=device)
    advantages = torch.tensor([1.0, -1.0], device=device)
    _, metrics, gradient = run(
        policy_loss, dict(logprobs=-ones, old_logprobs=-ones, advantages=advantages), objective="vespo"
    )
    torch.testing.assert_close(gradient, -advantages.view(2, 1).expand(2, 2) / 4)
    assert named(metrics)["ratio_mean"] == pytest.approx(1)
    log_w = 2 * 0.25
    _, _, gradient = run(
        policy_loss,
        dict(logprobs=-ones, old_logprobs=-1.25 * ones, advantages=advantages),
        objective="vespo",
        vespo_k_neg=1.5,
        vespo_lambda_neg=0.5,
    )
    phi = [math.exp(k * log_w + rate * (1 - math.exp(log_w))) for k, rate in ((2.0, 3.0), (1.5, 0.5))]
    torch.testing.assert_close(gradient[:, 0].tolist(), [-phi[0] / 4, phi[1] / 4], rtol=1e-6, atol=0)


def test_vespo_bounds_each_log_ratio_before_their_sum(backend, device):
    """25 and -15 sum up to 10, but count as 20 and -15."""
    old = torch.tensor([[-26.0, -1.0]], device=device)
    logprobs = torch.tensor([[-1.0, -16.0]], device=device)
    inputs = dict(logprobs=logprobs, old_logprobs=old, advantages=torch.ones(1, device=device))
    options = dict(objective="vespo", vespo_k_pos=2.0, vespo_lambda_pos=0.01)
    _, metrics, _ = run(policy_loss, inputs, **options)
    wanted = math.exp(0.01 + 2.0 * 5.0 - 0.01 * math.exp(5.0))
    assert named(metrics)["ratio_mean"] == pytest.approx(wanted, rel=1e-5)


def test_gmpo_by_hand(backend, device):
    """Each token's log-ratio is bounded on the side that its advantage would push it to."""
    log_ratio = torch.tensor([[-1.0, 0.1, 1.0, 0.0], [-1.0, 0.1, 1.0, 0.0]], device=device)
    inputs = dict(
        logprobs=log_ratio,
        old_logprobs=torch.zeros_like(log_ratio),
        advantages=torch.tensor([1.0, -1.0], device=device),
    )
    loss, metrics, gradient = run(policy_loss, inputs, objective="gmpo", clip_low=0.4, clip_high=0.3)
    ratios = [math.exp((-1.0 + 0.1 + 0.3) / 4), math.exp((-0.4 + 0.1 + 1.0) / 4)]
    assert loss.item() == pytest.approx((-ratios[0] + ratios[1]) / 2)
    wanted = [[-ratios[0] / 8, -ratios[0] / 8, 0.0, -ratios[0] / 8], [0.0, *[ratios[1] / 8] * 3]]
    torch.testing.assert_close(gradient.tolist(), wanted, rtol=1e-6, atol=0)
    assert (named(metrics)["clip_fraction_low"], named(metrics)["clip_fraction_high"]) == (1 / 8, 1 / 8)


@pytest.mark.parametrize("objective", ["dppo_tv", "dppo_kl"])
def test_dppo_by_hand(backend, device, objective):
    """Trusted are small moves, and large ones that the advantage turns back."""
    old = torch.tensor([[0.5, 0.5, 0.5, 0.5, 0.5, 0.5]], device=device).log()
    new = torch.tensor([[0.55, 0.9, 0.9, 0.1, 0.1, 0.45]], device=device).log()
    advantages = torch.tensor([[1.0, 1.0, -1.0, -1.0, 1.0, -1.0]], device=device)
    inputs = dict(logprobs=new, old_logprobs=old, advantages=advantages)
    _, metrics, gradient = run(
        policy_loss, inputs, objective=objective, clip_low=0.2, clip_high=0.2, delta=1.5, aggregation="token_sum"
    )
    wanted = torch.tensor([-1.1, 0.0, 1.5, 0.0, -0.2, 0.9], device=device)
    torch.testing.assert_close(gradient[0], wanted, rtol=1e-6, atol=0)
    assert named(metrics)["clip_fraction_low"] == pytest.approx(1 / 6)
    assert named(metrics)["clip_fraction_high"] == pytest.approx(1 / 6)


def test_dppo_truncates_at_20(backend, device):
    logprobs = torch.tensor([[-1.0]], device=device)
    inputs = dict(logprobs=logprobs, old_logprobs=logprobs - 5.0, advantages=torch.ones(1, device=device))
    options = dict(objective="dppo_tv", clip_high=1.0)
    assert run(policy_loss, inputs, **options)[2].item() == pytest.approx(-20)
    assert run(policy_loss, inputs, **options, delta=1000.0)[2].item() == pytest.approx(-math.exp(5), rel=1e-6)


def test_confident_tokens_keep_their_divergence(backend, device):
    """1 - p is taken from log p, not from p, which float32 rounds to 1."""
    p = torch.tensor([[1e-6, 3e-7, 1e-7, 1e-8, 1e-4, 2e-3]])
    old, new = torch.log1p(-4 * p), torch.log1p(-p)
    inputs = dict(logprobs=new.to(device), old_logprobs=old.to(device), advantages=torch.ones(1, 6, device=device))
    for clip in (1e-7, 3e-6, 1e-5, 1e-4):
        assert_matches_oracles(inputs, objective="dppo_kl", clip_high=clip)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_ratios_that_overflow(backend, device, objective):
    """Where float32 cannot hold the ratio, what is bounded stays bounded, and nothing becomes NaN."""
    logprobs = torch.tensor([[-1.0, -1.0, -200.0, -200.0]], device=device)
    inputs = dict(
        logprobs=logprobs.expand(2, 4),
        old_logprobs=torch.tensor([[-150.0, -INF, -1.0, -1.0], [-150.0, -150.0, -1.0, -1.0]], device=device),
        advantages=torch.tensor([1.0, 1.0], device=device),
    )
    if objective in BY_SEQUENCE:
        inputs["old_logprobs"] = inputs["old_logprobs"].clamp(min=-150.0)
    loss, _, gradient = run(policy_loss, inputs, objective=objective)
    assert loss.isfinite() and gradient.isfinite().all()
    if objective not in ("gmpo", "vespo"):
        assert_matches_oracles(inputs | {"old_logprobs": inputs["old_logprobs"].clamp(min=-150.0)}, objective=objective)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("correction", ["token_mask", "sequence_mask"])
def test_what_the_sampler_mask_drops_leaves_no_trace(backend, device, correction, objective):
    """Also where the ratio overflows."""
    if objective == "vespo" or (objective in BY_SEQUENCE and correction == "token_mask"):
        return  # the token is part of the sequence's ratio
    logprobs = -torch.rand(3, 5, generator=torch.Generator().manual_seed(0)) - 0.1
    old = logprobs - 0.1
    sampler = old.clone()
    where = (0, 2) if correction == "token_mask" else (0,)
    old[where] = -1000.0
    sampler[where] = -2000.0
    inputs = dict(
        logprobs=logprobs.to(device),
        old_logprobs=old.to(device),
        sampler_logprobs=sampler.to(device),
        advantages=-torch.ones(3, device=device),
    )
    loss, metrics, gradient = run(policy_loss, inputs, objective=objective, sampler_correction=correction)
    assert loss.isfinite()
    assert (gradient[where] == 0).all()
    assert gradient[1].all()
    assert named(metrics)["sampler_capped"] == pytest.approx(1 / 15 if correction == "token_mask" else 1 / 3)


@pytest.mark.parametrize("correction", SAMPLER_CORRECTIONS)
def test_sampler_weights_by_hand(backend, device, correction):
    old = torch.tensor([[-1.0, -1.0, -1.0], [-2.0, -2.0, -2.0]])
    sampler = torch.tensor([[-1.5, NAN, -0.9], [-4.0, -2.0, -1.5]])
    inputs = dict(
        logprobs=old.to(device),
        old_logprobs=old.to(device),
        advantages=torch.ones(2, device=device),
        sampler_logprobs=sampler.to(device),
    )
    products = [math.exp(0.5 - 0.1), math.exp(2.0 - 0.5)]
    beyond = 0.0 if correction.endswith("mask") else 3.0
    wanted = {
        "token": [[math.exp(0.5), 1.0, math.exp(-0.1)], [beyond, 1.0, math.exp(-0.5)]],
        "sequence": [[products[0]] * 3, [beyond] * 3],
    }[correction.split("_")[0]]
    loss, metrics, gradient = run(policy_loss, inputs, sampler_correction=correction, aggregation="token_sum")
    torch.testing.assert_close(gradient.tolist(), [[-w for w in row] for row in wanted], rtol=1e-6, atol=0)
    assert loss.item() == pytest.approx(-sum(map(sum, wanted)), rel=1e-6)
    assert named(metrics)["sampler_weight"] == pytest.approx(sum(map(sum, wanted)) / 6, rel=1e-6)
    assert named(metrics)["sampler_capped"] == pytest.approx(1 / 6 if correction.startswith("token") else 1 / 2)


@pytest.mark.parametrize("far", [-30.0, 30.0])
def test_vespo_clamps_the_log_ratio_of_a_token(backend, device, far):
    """To 20, before the sequence's are added up: another token brings the sum back to where it counts."""
    inputs = make_inputs([2], 2, device, drop=0.0)
    near = -19.5 if far > 0 else 19.5
    inputs["logprobs"] = inputs["old_logprobs"] + torch.tensor([[far, near]], device=device)
    assert_matches_oracles(inputs, objective="vespo")


@pytest.mark.parametrize("correction", SAMPLER_CORRECTIONS)
def test_a_weight_at_the_cap_is_not_capped(backend, device, correction):
    inputs = make_inputs([3, 4], 4, device)
    wanted = run(policy_loss, inputs)
    inputs["sampler_logprobs"] = inputs["old_logprobs"].clone()
    got = run(policy_loss, inputs, sampler_correction=correction, sampler_cap=1.0)
    assert named(got[1])["sampler_capped"] == 0
    torch.testing.assert_close(got[0], wanted[0])


@pytest.mark.parametrize("objective", ["ppo", "gmpo", "vespo"])
def test_a_sampler_without_numbers_changes_nothing(backend, device, objective):
    inputs = make_inputs([7, 12, 3], 12, device)
    wanted = run(policy_loss, inputs, objective=objective)
    inputs["sampler_logprobs"] = torch.full_like(inputs["logprobs"], NAN)
    for correction in SAMPLER_CORRECTIONS:
        got = run(policy_loss, inputs, objective=objective, sampler_correction=correction)
        for one, other in zip(got, wanted, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_entropy_bonus(backend, device, aggregation):
    """Value and gradient of the same aggregation; of coefficient 0 it is only measured."""
    for packed in (False, True):
        inputs = make_inputs([7, 0, 12, 3], 12, device, torch.bfloat16, packed=packed, entropy=True)
        assert_matches_oracles(inputs, aggregation=aggregation, entropy_coef=0.02)
        loss, metrics, by_logprobs, by_entropy = run(policy_loss, inputs, aggregation=aggregation)
        plain = run(policy_loss, {k: v for k, v in inputs.items() if k != "entropy"}, aggregation=aggregation)
        assert torch.equal(loss, plain[0])
        assert torch.equal(by_logprobs, plain[2])
        assert not by_entropy.any()
        scored = inputs["mask"]
        mean = inputs["entropy"][scored].double().mean().item()
        assert named(metrics)["entropy"] == pytest.approx(mean, rel=1e-6)


def test_only_the_gradients_asked_for(backend, device):
    inputs = make_inputs([7, 12, 3], 12, device, entropy=True)
    both = run(policy_loss, inputs, entropy_coef=0.02)
    entropy = inputs["entropy"].clone().requires_grad_()
    loss, metrics = policy_loss(**(inputs | {"entropy": entropy}), entropy_coef=0.02)
    assert torch.equal(torch.autograd.grad(loss, entropy)[0], both[3])
    logprobs = inputs["logprobs"].clone().requires_grad_()
    loss, metrics = policy_loss(**(inputs | {"logprobs": logprobs}), entropy_coef=0.02)
    assert torch.equal(torch.autograd.grad(loss, logprobs)[0], both[2])
    assert not metrics.requires_grad
    with torch.no_grad():
        loss, metrics = policy_loss(**(inputs | {"logprobs": logprobs, "entropy": entropy}), entropy_coef=0.02)
    assert not loss.requires_grad
    assert torch.equal(loss, both[0])
    assert torch.equal(metrics, both[1])


@pytest.mark.only("cpu", "triton", "cuda")
def test_second_derivative_is_refused(backend, device):
    entropy = torch.rand(2, 3, device=device, requires_grad=True)
    logprobs = torch.randn(2, 3, device=device)
    loss, _ = policy_loss(logprobs, None, torch.ones(2, device=device), entropy=entropy, entropy_coef=0.1)
    gradient = torch.autograd.grad(loss, entropy, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="differentiated again"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("garbage", [NAN, thorough_emulated(INF), thorough_emulated(-INF)])
@pytest.mark.parametrize("objective", NEW)
def test_what_is_not_scored_leaves_no_trace(backend, device, objective, garbage):
    clean = make_inputs([7, 12, 3], 12, device, per_token=True, garbage=False, sampler=True, entropy=True)
    names = ("logprobs", "old_logprobs", "ref_logprobs", "sampler_logprobs", "entropy", "advantages")
    dirty = clean | {name: clean[name].masked_fill(~clean["mask"], garbage) for name in names}
    for correction in ("token_truncate", "sequence_mask"):
        options = dict(objective=objective, sampler_correction=correction, sampler_cap=0.95)
        options |= dict(aggregation="seq_mean_token_mean", kl_coef=0.1, entropy_coef=0.1)
        wanted, got = (run(policy_loss, inputs, **options) for inputs in (clean, dirty))
        for one, other in zip(got, wanted, strict=True):
            assert torch.equal(one, other)
        for gradient in got[2:]:
            assert not gradient[~clean["mask"]].any()


@pytest.mark.parametrize("objective", NEW)
def test_nothing_scored(backend, device, objective):
    shapes = [
        make_inputs(lengths, width, device, sampler=True, entropy=True) for lengths, width in (([0, 0], 4), ([], 4))
    ]
    shapes += [make_inputs(lengths, 4, device, packed=True, sampler=True, entropy=True) for lengths in ([0, 0], [])]
    for inputs in shapes:
        loss, metrics, *gradients = run(policy_loss, inputs, objective=objective, entropy_coef=0.1)
        assert loss == 0
        assert not metrics.any()
        for gradient in gradients:
            assert not gradient.any()
            assert gradient.shape == inputs["logprobs"].shape


@pytest.mark.parametrize("objective", BY_SEQUENCE)
def test_a_sequence_does_not_depend_on_the_others(backend, device, objective):
    inputs = make_inputs([40, 50, 60], 60, device, per_token=True, reference=False, sampler=True)
    options = dict(objective=objective, aggregation="token_sum", normalizer=64.0)
    _, _, together = run(policy_loss, inputs, **options)
    for row in range(3):
        alone = run(policy_loss, {name: value[row : row + 1] for name, value in inputs.items()}, **options)[2]
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("objective", BY_SEQUENCE)
@THOROUGH_EMULATED
def test_same_bits_on_every_run(backend, device, emulated, objective):
    length = 1300 if emulated else 40_000
    inputs = make_inputs([length, 1, 0], length, device, sampler=True, distance=0.02)
    first, *others = (run(policy_loss, inputs, objective=objective) for _ in range(3))
    for other in others:
        for one, two in zip(first, other, strict=True):
            assert torch.equal(one, two)


@pytest.mark.only("cpu")
def test_same_bits_for_any_number_of_threads(backend, device):
    inputs = make_inputs([30_000, 40_000, 1], 40_000, device, sampler=True, distance=0.02, entropy=True)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(policy_loss, inputs, objective="gspo", entropy_coef=0.1))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one, two)


def test_normalisations(backend, device):
    """dr_grpo, luspo and seq-mean-token-sum-norm are aggregations with a normalizer."""
    inputs = make_inputs([7, 12, 0, 3], 12, device)
    batch, width = inputs["logprobs"].shape
    scored, old = inputs["mask"], inputs["old_logprobs"]

    def by_hand(combine, objective):
        logprobs = inputs["logprobs"].clone().requires_grad_()
        raw = torch.where(scored, logprobs - old, 0.0)
        if objective == "gspo":
            raw = (raw.sum(1, keepdim=True) / scored.sum(1, keepdim=True).clamp(min=1)).expand_as(raw)
        ratio, advantage = raw.exp(), torch.where(scored, inputs["advantages"].unsqueeze(1), 0.0)
        loss = combine(-torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage))
        return loss.detach(), torch.autograd.grad(loss, logprobs)[0]

    dr_grpo = (lambda loss: loss.sum() / (batch * width)), "ppo"
    luspo = (lambda loss: loss.sum(1).mean()), "gspo"
    token_sum_norm = (lambda loss: loss.sum() / scored.any(1).sum() / 20), "ppo"
    for (combine, objective), options in (
        (dr_grpo, dict(aggregation="token_sum", normalizer=batch * width)),
        (luspo, dict(aggregation="seq_mean_token_sum", normalizer=batch)),
        (token_sum_norm, dict(aggregation="seq_mean_token_sum", normalizer=20 * scored.any(1).sum())),
    ):
        loss, _, gradient = run(policy_loss, inputs, objective=objective, **options)
        wanted, wanted_gradient = by_hand(combine, objective)
        torch.testing.assert_close(loss, wanted)
        torch.testing.assert_close(gradient, wanted_gradient)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("objective", NEW)
def test_reference_gradcheck(objective, packed):
    inputs = make_inputs([3, 0, 4], 4, "cpu", torch.float64, packed=packed, garbage=False, sampler=True, entropy=True)
    logprobs, entropy = (inputs.pop(name).requires_grad_() for name in ("logprobs", "entropy"))
    # gspo's gradient is that of its sequence's ratio where all of its tokens have one weight.
    detached = objective in ("cispo", "dppo_tv", "dppo_kl", "vespo")
    for correction in SAMPLER_CORRECTIONS:
        if objective == "gspo" and correction.startswith("token"):
            continue
        options = dict(
            objective=objective, sampler_correction=correction, kl_coef=0.1, entropy_coef=0.2, sampler_cap=1.05
        )
        options |= dict(aggregation="seq_mean_token_mean", **clips(objective))

        def loss(logprobs, entropy, options=options):
            return policy_loss(logprobs, **inputs, entropy=entropy, **options)[0]

        if detached:
            assert torch.autograd.gradcheck(lambda h: loss(logprobs.detach(), h), entropy)
        else:
            assert torch.autograd.gradcheck(loss, (logprobs, entropy))


@pytest.mark.only("cpu", "triton", "cuda")
@pytest.mark.parametrize("objective", ["gspo", "dppo_kl"])
def test_opcheck(backend, device, objective):
    inputs = make_inputs([3, 0, 4], 4, device, garbage=False, sampler=True, entropy=True)
    check_ops(
        lambda: run(policy_loss, inputs, objective=objective, kl_coef=0.1, entropy_coef=0.1),
        backend,
        "policy_loss_forward",
        *GRADIENT_OPS[backend],
        differentiable=("policy_loss_forward",),
    )


@COMPILERS_AND_LAYOUTS
def test_compile(backend, device, compiler, packed):
    torch._dynamo.reset()
    inputs = make_inputs([3, 0, 4], 4, device, packed=packed, sampler=True, entropy=True)

    def function(logprobs, entropy, **rest):
        loss, metrics = policy_loss(logprobs * 1.1, entropy=entropy * 0.9, entropy_coef=0.1, objective="gmpo", **rest)
        return loss * 2, metrics

    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    for one, other in zip(run(compiled, inputs), run(function, inputs), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("objective", NEW)
def test_nothing_is_read_back_by_the_host(backend, device, objective, packed, monkeypatch):
    monkeypatch.setattr("rlkernels.ops._checks.cu_seqlens_values", lambda *values: None)
    inputs = make_inputs([3, 0, 4], 4, device, packed=packed, sampler=True, entropy=True)
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(value) for name, value in inputs.items()}
        leaves = [fake[name].requires_grad_() for name in ("logprobs", "entropy")]
        loss, metrics = policy_loss(**fake, objective=objective, entropy_coef=0.1)
        gradients = torch.autograd.grad(loss, leaves)
    assert (loss.shape, metrics.shape) == ((), (9,))
    assert [gradient.shape for gradient in gradients] == [leaves[0].shape] * 2


class Allocations(TorchDispatchMode):
    """The storages that ops make, and the size of each while it lives."""

    def __init__(self):
        super().__init__()
        self.storages = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.storages[storage.data_ptr()] = storage.nbytes()
        return result


@pytest.mark.only("cpu", "triton", "cuda")
@pytest.mark.parametrize("objective", ["ppo", "gspo"])
def test_the_gradients_are_all_that_is_kept(backend, device, objective):
    """Beside them nothing grows with the tokens but by the block."""
    inputs = make_inputs([2000, 1900], 2000, device, garbage=False, sampler=True, entropy=True)
    inputs = {name: value.contiguous() for name, value in inputs.items()}
    size = inputs["logprobs"].numel() * 4
    inputs["logprobs"].requires_grad_()
    given_storages = {value.untyped_storage().data_ptr() for value in inputs.values()}
    for entropy_coef, gradients in ((0.0, 1), (0.1, 2)):
        inputs["entropy"].requires_grad_(entropy_coef != 0)
        with Allocations() as made:
            loss, _ = policy_loss(**inputs, objective=objective, entropy_coef=entropy_coef)
        new = {address: size for address, size in made.storages.items() if address not in given_storages}
        assert sorted(new.values())[-gradients:] == [size] * gradients
        assert sum(new.values()) < gradients * size + size / 16
        saved = [tensor for tensor in loss.grad_fn.saved_tensors if tensor.numel() > 1]
        assert sum(tensor.numel() * 4 for tensor in saved) == gradients * size
        assert not {tensor.untyped_storage().data_ptr() for tensor in saved} & given_storages
        with Allocations() as made, torch.no_grad():
            policy_loss(**inputs, objective=objective, entropy_coef=entropy_coef)
        new = {address: size for address, size in made.storages.items() if address not in given_storages}
        assert sum(new.values()) < size / 16
        del loss, saved


@pytest.mark.only("cpu")
def test_the_kernel_allocates_no_more_than_it_returns(backend, device):
    """What the C++ behind the op takes from PyTorch's allocator, which the profiler counts."""
    inputs = make_inputs([2000, 1900], 2000, device, garbage=False, sampler=True)
    inputs["logprobs"].requires_grad_()
    size = inputs["logprobs"].numel() * 4
    policy_loss(**inputs, objective="gspo")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = policy_loss(**inputs, objective="gspo")
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
    assert kept[0].requires_grad
    assert size <= allocated < size * 17 / 16


BAD_INPUT = {
    "objective": (dict(objective="grpo"), ValueError, ("objective", "ppo", "vespo", "'grpo'")),
    "objective by another name": (dict(objective="gpg"), ValueError, ("objective", "reinforce", "'gpg'")),
    "delta": (dict(delta=0.0), ValueError, ("delta", "> 0", "0.0")),
    "delta a string": (dict(delta="4"), TypeError, ("delta", "number", "str")),
    "sapo": (dict(objective="sapo", sapo_temperature_neg=0.0), ValueError, ("sapo_temperature_neg", "> 0")),
    "vespo": (dict(objective="vespo", vespo_lambda_pos=-1.0), ValueError, ("vespo_lambda_pos", "> 0", "-1")),
    "entropy shape": (dict(entropy=torch.zeros(3)), ValueError, ("entropy", "[2, 3]", "[3]")),
    "entropy integer": (dict(entropy=torch.zeros(2, 3).long()), TypeError, ("entropy", "float32", "int64")),
    "entropy_coef without entropy": (dict(entropy_coef=0.1), ValueError, ("entropy", "entropy_coef", "None")),
    "entropy_coef nan": (dict(entropy_coef=NAN), ValueError, ("entropy_coef", "finite", "nan")),
    "sampler shape": (dict(sampler_logprobs=torch.zeros(3)), ValueError, ("sampler_logprobs", "[2, 3]", "[3]")),
    "sampler gradient": (
        dict(sampler_logprobs=torch.zeros(2, 3, requires_grad=True)),
        ValueError,
        ("sampler_logprobs", "detach"),
    ),
    "sampler device": (
        dict(sampler_logprobs=torch.zeros(2, 3, device="meta")),
        ValueError,
        ("sampler_logprobs", "cpu", "meta"),
    ),
    "sampler_correction": (
        dict(sampler_correction="mask"),
        ValueError,
        ("sampler_correction", "token_truncate", "sequence_mask", "'mask'"),
    ),
    "sampler_cap": (dict(sampler_cap=0), ValueError, ("sampler_cap", "> 0", "0")),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input(backend, device, name):
    changes, error, fragments = BAD_INPUT[name]
    arguments = {"logprobs": torch.zeros(2, 3), "old_logprobs": torch.zeros(2, 3), "advantages": torch.zeros(2)}
    with pytest.raises(error) as raised:
        policy_loss(**(arguments | changes))
    for fragment in fragments:
        assert fragment in str(raised.value)


@pytest.mark.parametrize("bounds", [[1, 12], [0, 8, 4, 12], [0, -1, 12], [0, 20, 12]], ids=str)
@pytest.mark.parametrize("objective", BY_SEQUENCE)
def test_bad_cu_seqlens(backend, device, objective, bounds):
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)
    tokens = torch.zeros(12, device=device)

    def call():
        return policy_loss(tokens, tokens, tokens, cu_seqlens=cu_seqlens, objective=objective, sampler_logprobs=tokens)

    if device.type == "cpu" and backend in ("reference", "cpu"):
        with pytest.raises(ValueError, match=r"cu_seqlens.*got"):
            call()
    else:
        assert call()[0].isnan()
