"""policy_loss and value_loss beside verl's registered losses and OpenRLHF's, value and gradient."""

import pytest
import torch

from rlkernels import policy_loss, value_loss

AGGREGATIONS = {
    "token-mean": "token_mean",
    "token-sum": "token_sum",
    "seq-mean-token-sum": "seq_mean_token_sum",
    "seq-mean-token-mean": "seq_mean_token_mean",
}


@pytest.fixture
def inputs():
    """Log-probabilities with ratios on both sides of every bound, one beyond every clamp, an empty row, and advantages
    of both signs, one a sequence, as verl has them at every token."""
    torch.manual_seed(0)
    logprobs = -3 * torch.rand(8, 40)
    old = -(logprobs + 0.3 * torch.randn(8, 40)).abs()
    mask = torch.rand(8, 40) < 0.8
    mask[3] = False
    old[0, 0], logprobs[0, 0], mask[0, 0] = -30.0, -1.0, True
    return logprobs.requires_grad_(), old, torch.randn(8), mask


def value_and_gradient(loss, leaf):
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def assert_equal(ours, theirs, leaf, scored):
    value, gradient = value_and_gradient(ours, leaf)
    wanted, wanted_gradient = value_and_gradient(theirs, leaf)
    assert wanted_gradient.any()
    torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6)
    # Theirs multiplies by the mask, 0 times infinity included: only scored tokens have a gradient that is one.
    torch.testing.assert_close(gradient[scored], wanted_gradient[scored], rtol=2e-5, atol=1e-7)


@pytest.fixture
def verl_loss(core_algos, inputs):
    from verl.workers.config import ActorConfig

    def call(name, mode, weights=None, **options):
        options = dict(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1) | options
        logprobs, old, advantages, mask = inputs
        loss, metrics = core_algos.get_policy_loss_fn(name)(
            old_log_prob=old,
            log_prob=logprobs,
            advantages=advantages.unsqueeze(1).expand_as(logprobs),
            response_mask=mask.float(),
            loss_agg_mode=mode,
            config=ActorConfig(**options),
            rollout_is_weights=weights,
        )
        return loss, metrics

    return call


# verl's name: its options, and ours.
CLIPS = dict(clip_ratio_low=0.2, clip_ratio_high=0.28), dict(clip_low=0.2, clip_high=0.28)
CASES = {
    "vanilla": (*CLIPS, dict(objective="ppo", dual_clip=3.0, log_ratio_clamp=20.0)),
    "gspo": (*CLIPS, dict(objective="gspo")),
    "sapo": ({}, {}, dict(objective="sapo", log_ratio_clamp=20.0)),
    "gpg": ({}, {}, dict(objective="reinforce")),
    "cispo": (*CLIPS, dict(objective="cispo", log_ratio_clamp=20.0)),
    "dppo_tv": (
        dict(clip_ratio_low=0.05, clip_ratio_high=0.06, clip_ratio_c=1.2),
        dict(clip_low=0.05, clip_high=0.06),
        dict(objective="dppo_tv", delta=1.2, log_ratio_clamp=20.0),
    ),
    "dppo_kl": (
        dict(clip_ratio_low=0.005, clip_ratio_high=0.006, clip_ratio_c=20.0),
        dict(clip_low=0.005, clip_high=0.006),
        dict(objective="dppo_kl", log_ratio_clamp=20.0),
    ),
}


@pytest.mark.parametrize(
    ("name", "mode"),
    # verl aggregates sapo in one way alone.
    [(name, mode) for name in CASES for mode in AGGREGATIONS if name != "sapo" or mode == "seq-mean-token-mean"],
)
def test_verl_policy_losses(verl_loss, inputs, backend, name, mode):
    logprobs, old, advantages, mask = inputs
    theirs, clips, ours = CASES[name]
    theirs, metrics = verl_loss(name, mode, **theirs)
    got, got_metrics = policy_loss(logprobs, old, advantages, mask, aggregation=AGGREGATIONS[mode], **clips, **ours)
    assert_equal(got, theirs, logprobs, mask)
    named = dict(zip(policy_loss.metrics, got_metrics.tolist(), strict=True))
    if name not in ("sapo", "gpg"):
        assert 0 < metrics["actor/pg_clipfrac"] < 1
        # In gspo verl compares the two products, which the last digit of the ratio may tell apart where they are equal.
        clipped = named["clip_fraction_low"] + named["clip_fraction_high"]
        assert clipped == pytest.approx(metrics["actor/pg_clipfrac"], abs=1e-6)


def test_verl_seq_mean_token_sum_norm(verl_loss, inputs, backend):
    logprobs, old, advantages, mask = inputs
    theirs, _ = verl_loss("vanilla", "seq-mean-token-sum-norm", global_batch_info=dict(loss_scale_factor=64))
    ours, _ = policy_loss(
        logprobs,
        old,
        advantages,
        mask,
        aggregation="seq_mean_token_sum",
        normalizer=64 * mask.any(1).sum(),
        dual_clip=3.0,
        log_ratio_clamp=20.0,
    )
    assert_equal(ours, theirs, logprobs, mask)


@pytest.mark.parametrize("correction", [None, "token_truncate", "sequence_truncate"])
def test_verl_geo_mean(verl_loss, inputs, backend, correction):
    """Over all rows, the empty one included; weights of tokens enter by their geometric mean."""
    logprobs, old, advantages, mask = inputs
    sampler = (old + 0.1 * torch.randn_like(old)).detach()
    weights, options = None, {}
    if correction is not None:
        options = dict(sampler_logprobs=sampler, sampler_correction=correction, sampler_cap=1.1)
        log_weights = torch.where(mask, old - sampler, 0.0)
        if correction == "sequence_truncate":
            log_weights = log_weights.sum(1, keepdim=True).expand_as(old)
        weights = log_weights.exp().clamp(max=1.1)
    theirs, metrics = verl_loss("geo_mean", "token-mean", weights, clip_ratio_low=0.2, clip_ratio_high=0.28)
    ours, got = policy_loss(
        logprobs,
        old,
        advantages,
        mask,
        objective="gmpo",
        clip_low=0.2,
        clip_high=0.28,
        aggregation="seq_mean_token_mean",
        normalizer=len(logprobs),
        **options,
    )
    assert_equal(ours, theirs, logprobs, mask)
    assert 0 < got[1] <= metrics["actor/pg_clipfrac_lower"] + 1e-6
    assert 0 < got[2] <= metrics["actor/pg_clipfrac"] + 1e-6


@pytest.mark.parametrize("name", ["vanilla", "gspo", "sapo", "cispo", "dppo_tv"])
def test_verl_rollout_weights(verl_loss, inputs, backend, name):
    logprobs, old, advantages, mask = inputs
    sampler = (old + 0.1 * torch.randn_like(old)).detach()
    theirs, clips, ours = CASES[name]
    weights = (old - sampler).exp().clamp(max=1.1)
    theirs, _ = verl_loss(name, "seq-mean-token-mean", weights, **theirs)
    options = dict(sampler_logprobs=sampler, sampler_correction="token_truncate", sampler_cap=1.1)
    got, _ = policy_loss(logprobs, old, advantages, mask, aggregation="seq_mean_token_mean", **clips, **ours, **options)
    assert_equal(got, theirs, logprobs, mask)


@pytest.mark.parametrize("token_level", [True, False])
@pytest.mark.parametrize("dual_clip", [None, 1.5])
@pytest.mark.parametrize("kind", ["ppo", "gspo"])
def test_openrlhf_policy_loss(openrlhf, inputs, backend, kind, dual_clip, token_level):
    logprobs, old, advantages, mask = inputs
    function = openrlhf("models.loss").PolicyLoss(
        clip_eps_low=0.2,
        clip_eps_high=0.28,
        dual_clip=dual_clip,
        token_level_loss=token_level,
        policy_loss_type=kind,
    )
    # Its sequences' ratios are multiplied by the mask.
    theirs, clipped, *_ = function(logprobs, old, advantages.unsqueeze(1).expand_as(old), mask.float())
    ours, metrics = policy_loss(
        logprobs,
        old,
        advantages,
        mask,
        objective=kind,
        aggregation="token_mean" if token_level and kind == "ppo" else "seq_mean_token_mean",
        clip_low=0.2,
        clip_high=0.28,
        dual_clip=dual_clip,
        log_ratio_clamp=20.0,
    )
    assert_equal(ours, theirs, logprobs, mask)
    assert (metrics[1] + metrics[2]).item() == pytest.approx(clipped.item(), abs=1e-6)


@pytest.mark.parametrize("mode", ["clip", "mask"])
def test_openrlhf_correction(openrlhf, inputs, backend, mode):
    """By token; theirs by sequence is of the mean, and ours of the product."""
    logprobs, old, advantages, mask = inputs
    sampler = (old + 0.1 * torch.randn_like(old)).detach()
    function = openrlhf("models.loss").PolicyLoss(
        is_correction_level="token", is_correction_mode=mode, is_correction_threshold=(0.0, 1.1)
    )
    theirs, *_, filtered = function(
        logprobs, old, advantages.unsqueeze(1).expand_as(old), mask.float(), rollout_log_probs=sampler
    )
    ours, metrics = policy_loss(
        logprobs,
        old,
        advantages,
        mask,
        log_ratio_clamp=20.0,
        sampler_logprobs=sampler,
        sampler_correction="token_truncate" if mode == "clip" else "token_mask",
        sampler_cap=1.1,
    )
    assert_equal(ours, theirs, logprobs, mask)
    assert metrics[policy_loss.metrics.index("sampler_capped")].item() == pytest.approx(filtered.item(), abs=1e-6)


@pytest.fixture
def values():
    torch.manual_seed(0)
    values = torch.randn(8, 40)
    mask = torch.rand(8, 40) < 0.8
    mask[3] = False
    return values.requires_grad_(), (values + 0.4 * torch.randn(8, 40)).detach(), torch.randn(8, 40), mask


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_verl_value_loss(core_algos, values, backend, mode):
    value, old, returns, mask = values
    theirs, clipped = core_algos.compute_value_loss(value, returns, old, mask.float(), 0.2, mode)
    ours, metrics = value_loss(value, old, returns, mask, clip=0.2, aggregation=AGGREGATIONS[mode])
    assert_equal(ours, theirs, value, mask)
    assert metrics[0].item() == pytest.approx(clipped.item(), abs=1e-6)


@pytest.mark.parametrize("token_level", [True, False])
@pytest.mark.parametrize("clip", [None, 0.3])
def test_openrlhf_value_loss(openrlhf, values, backend, clip, token_level):
    value, old, returns, mask = values
    theirs = openrlhf("models.loss").ValueLoss(clip, token_level)(value, old, returns, mask.float())
    aggregation = "token_mean" if token_level else "seq_mean_token_mean"
    ours, _ = value_loss(value, old, returns, mask, clip=clip, aggregation=aggregation)
    assert_equal(ours, theirs, value, mask)
