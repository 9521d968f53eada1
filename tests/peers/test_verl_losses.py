"""Our policy losses, value loss, KL penalty and aggregation beside verl's: loss, gradient, metrics and errors."""

import importlib.metadata

import pytest
import torch

import verl_rows
from beside import assert_as_theirs
from counting import patched_and_counted
from verl_rows import DTYPES, MASK_DTYPES, pair, slack

verl_rows.rows()

MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")
# Counts of the whole step, as verl's trainer gives them to a process that has a part of it.
COUNTS = (
    {},
    dict(dp_size=2, batch_num_tokens=301, global_batch_size=17, loss_scale_factor=50),
    dict(dp_size=4, batch_num_tokens=torch.tensor(99), global_batch_size=torch.tensor(8.0), loss_scale_factor=None),
)
TIGHT = dict(clip_ratio=0.3, clip_ratio_low=0.1, clip_ratio_high=0.15)
LOSSES = {
    "vanilla": (
        TIGHT,
        dict(clip_ratio=0.2, clip_ratio_low=None, clip_ratio_high=None),
        dict(clip_ratio_c=1.2, **TIGHT),
    ),
    "dppo_tv": (
        dict(clip_ratio_low=0.02, clip_ratio_high=0.03, clip_ratio_c=1.3),
        dict(clip_ratio=0.05, clip_ratio_low=None, clip_ratio_high=None),
    ),
    "dppo_kl": (
        dict(clip_ratio_low=0.004, clip_ratio_high=0.006, clip_ratio_c=1.3),
        dict(clip_ratio=0.01, clip_ratio_low=None, clip_ratio_high=None),
    ),
    "gspo": (
        dict(clip_ratio=0.3, clip_ratio_low=0.02, clip_ratio_high=0.03),
        dict(clip_ratio=0.05, clip_ratio_low=None, clip_ratio_high=None),
    ),
    "sapo": ({}, dict(tau_pos=0.5, tau_neg=2.0)),
    "gpg": ({},),
    "cispo": (TIGHT, dict(clip_ratio=0.2, clip_ratio_low=None, clip_ratio_high=None)),
    "geo_mean": (TIGHT, dict(clip_ratio=0.2, clip_ratio_low=None, clip_ratio_high=None)),
    "dro": (dict(dro_beta=0.7),),
    "reinforce": ({},),
}
CASES = [(name, options) for name, all_options in LOSSES.items() for options in all_options]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def inputs(dtype=torch.float32, mask_dtype=torch.float32):
    """Advantages of both signs and 0; ratios on both sides of every bound."""
    old = -3 * torch.rand(8, 24) - 0.01
    logprobs = (old + 0.2 * torch.randn(8, 24)).clamp(max=-0.01)
    advantages = torch.randn(8, 24)
    advantages[2, ::3] = 0.0
    return old.to(dtype), logprobs.to(dtype), advantages.to(dtype), verl_rows.mask(dtype=mask_dtype)


def rollout_weights(dtype=torch.float32):
    weights = 2 * torch.rand(8, 24)
    weights[2, :3] = 0.0
    return weights.to(dtype)


def config(counts=None, **options):
    from verl.workers.config import ActorConfig, PolicyLossConfig

    policy_loss = PolicyLossConfig(dro_beta=options.pop("dro_beta", None))
    required = dict(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1)
    return ActorConfig(policy_loss=policy_loss, global_batch_info=dict(counts or {}), **required, **options)


def caller(function, mode, actor, metrics):
    def call(*tensors):
        tensors, weights = tensors[:4], tensors[4] if len(tensors) > 4 else None
        loss, found = function(*tensors, mode, actor, weights)
        metrics.append(found)
        return loss

    return call


def assert_loss_as_theirs(name, tensors, mode, actor, **options):
    ours, theirs = pair(f"compute_policy_loss_{name}")
    our_metrics, their_metrics = [], []
    loss = assert_as_theirs(
        caller(ours, mode, actor, our_metrics),
        caller(theirs, mode, actor, their_metrics),
        *tensors,
        leaves=(1,),
        **options,
    )
    got, truth = our_metrics[0], their_metrics[1]
    assert list(got) == list(truth)
    assert all(type(value) is float for value in got.values())
    if tensors[1].dtype in (torch.float32, torch.float64):
        assert got == pytest.approx(truth, rel=1e-5, abs=1e-6)
    return loss[0], got


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "options"), CASES)
def test_policy_losses(name, options, mode, weighted):
    for counts in COUNTS:
        tensors = (*inputs(), *([rollout_weights()] if weighted else []))
        # Sums over 140 tokens of both signs, larger on the way than in the end.
        _, metrics = assert_loss_as_theirs(name, tensors, mode, config(counts, **options), slack=16)
        if "actor/pg_clipfrac" in metrics and name != "sapo" and options is LOSSES[name][0]:
            assert 0 < metrics["actor/pg_clipfrac"] < 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask_dtype", MASK_DTYPES)
@pytest.mark.parametrize("name", LOSSES)
def test_dtypes_and_layouts(name, dtype, mask_dtype):
    actor = config(**LOSSES[name][0])
    # Tokens that lie where rounding alone decides are no measure: none lies near a bound in 16 bits.
    tensors = tuple(t.double() if dtype == torch.float64 and t.is_floating_point() else t for t in inputs(dtype))
    tensors = (*tensors[:3], tensors[3].to(mask_dtype))
    for mode in ("token-mean", "seq-mean-token-mean"):
        assert_loss_as_theirs(name, tensors, mode, actor, slack=slack(dtype))
        strided = tuple(t.T.contiguous().T for t in tensors)
        assert_loss_as_theirs(name, strided, mode, actor, slack=slack(dtype))


@pytest.mark.parametrize("name", ["vanilla", "gspo", "sapo", "cispo", "dppo_tv", "dppo_kl", "geo_mean"])
@pytest.mark.parametrize("apart", [-25.0, 12.0, 25.0])
def test_ratios_beyond_the_clamps(name, apart):
    """A whole sequence far off: its ratio is clamped, and its gradient with it."""
    for sign in (1.0, -1.0):
        old, logprobs, advantages, mask = inputs()
        old[2], logprobs[2], advantages[2] = -30.0, -30.0 + apart, sign
        assert_loss_as_theirs(name, (old, logprobs, advantages, mask), "seq-mean-token-mean", config(**LOSSES[name][0]))


def test_clamp_of_vanilla():
    """Its other bounds lie nearer, unless one asks otherwise."""
    old, logprobs, advantages, mask = inputs()
    old[2], logprobs[2], advantages[2] = -30.0, -5.0, -1.0
    actor = config(clip_ratio_c=1e10, **TIGHT)
    loss, _ = assert_loss_as_theirs("vanilla", (old, logprobs, advantages, mask), "seq-mean-token-mean", actor)
    assert loss > 1e7


@pytest.mark.parametrize("name", LOSSES)
def test_one_kernel_a_loss(core_algos, name):
    """What is for the log alone costs passes over the tokens, and no kernels: these would make ours the slower one."""
    from rlkernels.integrations.verl import PATCH

    with patched_and_counted(PATCH) as calls:
        getattr(core_algos, f"compute_policy_loss_{name}")(*inputs(), config=config(**LOSSES[name][0]))
    assert {kernel: n for kernel, n in calls.items() if "::" in kernel} == {"rlkernels::policy_loss_forward": 1}


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_scored(name):
    old, logprobs, advantages, mask = inputs()
    for mode in MODES:
        for counts in COUNTS:
            tensors = old, logprobs, advantages, mask * 0
            assert_loss_as_theirs(name, tensors, mode, config(counts, **LOSSES[name][0]))


@pytest.mark.parametrize("name", LOSSES)
def test_refused_configs(name):
    from verl.trainer.config import AlgoConfig

    unsuitable = {"gspo": object(), "sapo": object(), "cispo": object(), "dro": config(dro_beta=-1.0)}
    aggregated_in_one_way = {"geo_mean", "sapo"} | (
        {"gspo"} if importlib.metadata.version("verl") == "0.9.0" else set()
    )
    unsuitable |= {name: AlgoConfig() for name in ("vanilla", "dppo_tv", "dppo_kl", "geo_mean")}
    for function in pair(f"compute_policy_loss_{name}"):
        with pytest.raises(AssertionError):
            function(*inputs(), config=None)
        if name in unsuitable:
            with pytest.raises((AssertionError, ValueError)):
                function(*inputs(), config=unsuitable[name])
        if name == "vanilla":
            with pytest.raises(AssertionError, match="clip_ratio_c"):
                function(*inputs(), config=config(clip_ratio_c=1.0))
        if name not in aggregated_in_one_way:
            with pytest.raises(ValueError, match="Invalid loss_agg_mode"):
                function(*inputs(), "mean", config(**LOSSES[name][0]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask_dtype", MASK_DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_agg_loss(mode, dtype, mask_dtype):
    ours, theirs = pair("agg_loss")
    losses, mask = torch.randn(8, 24).to(dtype), verl_rows.mask(dtype=mask_dtype)
    for counts in COUNTS:
        for tensors in ((losses, mask), (losses.T[:8], mask.T[:8]), (losses, mask * 0)):
            assert_as_theirs(
                lambda *i, counts=counts: ours(*i, mode, **counts),
                lambda *i, counts=counts: theirs(*i, mode, **counts),
                *tensors,
                slack=slack(dtype),
            )


@pytest.mark.parametrize("mode", MODES)
def test_counts_that_are_missing(mode):
    values, mask = torch.randn(8, 24), verl_rows.mask()
    for name, given in (("agg_loss", (values, mask)), ("compute_value_loss", (values, values, values, mask, 0.2))):
        for function in pair(name):
            with pytest.raises(ValueError, match="Invalid loss_agg_mode"):
                function(*given, "mean")
            if mode != "token-sum":
                with pytest.raises(ValueError, match="required when dp_size > 1"):
                    function(*given, mode, dp_size=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask_dtype", MASK_DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_value_loss(mode, dtype, mask_dtype):
    ours, theirs = pair("compute_value_loss")
    predicted, returns, values = torch.randn(3, 8, 24).to(dtype)
    mask = verl_rows.mask(dtype=mask_dtype)
    for counts in COUNTS:

        def call(function, counts=counts):
            return lambda *inputs: function(*inputs, 0.3, mode, **counts)

        fractions = call(ours)(predicted, returns, values, mask)[1], call(theirs)(predicted, returns, values, mask)[1]
        assert fractions[0].item() == pytest.approx(fractions[1].item(), rel=1e-2 if dtype.itemsize == 2 else 1e-5)
        assert 0 < fractions[0] < 1
        for scored in (mask, mask * 0):
            assert_as_theirs(
                lambda *i, call=call: call(ours)(*i)[0],
                lambda *i, call=call: call(theirs)(*i)[0],
                *(predicted, returns, values, scored),
                slack=slack(dtype),
            )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3"])
@pytest.mark.parametrize("plus", ["", "+"])
def test_kl_penalty(name, plus, dtype):
    ours, theirs = pair("kl_penalty")
    logprobs, ref = -3 * torch.rand(2, 8, 24).to(dtype)
    ref[0, :8] = logprobs[0, :8] + torch.tensor([-25.0, -12.0, 2.0, 2.7, 2.9, 12.0, 21.0, 25.0]).to(dtype)
    ref[1, 0] = logprobs[1, 0]
    for tensors in ((logprobs, ref), (logprobs.T, ref.T), (logprobs[:0], ref[:0]), (logprobs, ref[:1])):
        assert_as_theirs(lambda *i: ours(*i, name + plus), lambda *i: theirs(*i, name + plus), *tensors, leaves=(0, 1))


@pytest.mark.parametrize("name", ["full", "full+", "k4", ""])
def test_kl_penalty_that_is_not_there(name):
    for function in pair("kl_penalty"):
        with pytest.raises(NotImplementedError):
            function(torch.zeros(2, 3), torch.zeros(2, 3), name)
