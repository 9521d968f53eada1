import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rlkernels
from cases import COMPILERS, THOROUGH_EMULATED
from op_calls import check_ops
from rlkernels import _registry, group_advantages
from rlkernels._codes import BASELINES, SCALES
from rlkernels.ops import groups
from tolerance import assert_as_accurate_as_torch

NAN = float("nan")
INF = float("inf")


def brute_force(
    rewards,
    group_ids,
    baseline="mean",
    scale="group",
    eps=1e-4,
    weights=None,
    normalize="after_sum",
    singleton="zero",
):
    """Python loops over lists of floats, one group and one reward at a time. Returns (advantages, signal)."""
    weights = weights or [1.0] * len(rewards[0])

    def spread_of(values):
        mean = math.fsum(values) / len(values)
        return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))

    def advantages_of(scores, ids, baseline, scale):
        known = {}
        for score, one in zip(scores, ids, strict=True):
            if not math.isnan(score):
                known.setdefault(one, []).append(score)
        everything = [score for score in scores if not math.isnan(score)]
        advantages = []
        for score, one in zip(scores, ids, strict=True):
            if math.isnan(score):
                advantages.append(NAN)
                continue
            group = known[one]
            others = list(group)
            others.remove(score)
            if baseline == "none":
                advantage = score
            elif not others:
                advantage = score if singleton == "keep" else 0.0
            elif len(set(group)) == 1:
                advantage = 0.0
            else:
                compared = group if baseline == "mean" else others
                advantage = score - math.fsum(compared) / len(compared)
            if scale != "none":
                spread = group if scale == "group" else everything
                advantage /= (spread_of(spread) if len(spread) > 1 else 1.0) + eps
            advantages.append(advantage)
        return advantages, [len(set(known.get(one, ()))) > 1 for one in ids]

    unscored = [all(math.isnan(value) for value in row) for row in rewards]

    def weighted_sum(rows):
        return [
            NAN if skip else sum(w * value for w, value in zip(weights, row, strict=True) if not math.isnan(value))
            for row, skip in zip(rows, unscored, strict=True)
        ]

    if normalize == "after_sum":
        advantages, signal = advantages_of(weighted_sum(rewards), group_ids, baseline, scale)
    else:
        columns = [advantages_of(column, group_ids, baseline, scale) for column in zip(*rewards, strict=True)]
        sums = weighted_sum(zip(*(advantages for advantages, _ in columns), strict=True))
        advantages, _ = advantages_of(sums, [0] * len(sums), "mean", "group")
        signal = [any(row) for row in zip(*(signal for _, signal in columns), strict=True)]
    signal = [differs and not skip for differs, skip in zip(signal, unscored, strict=True)]
    return [0.0 if math.isnan(advantage) else advantage for advantage in advantages], signal


def trl_nanstd(values, **where):
    mean = torch.nanmean(values, keepdim=True, **where)
    count = (~values.isnan()).sum(keepdim=True, **where)
    variance = torch.nanmean((values - mean).square(), keepdim=True, **where) * (count / (count - 1))
    return torch.where(count > 1, variance, NAN).sqrt()


def trl(rewards, weights, group_size, scale, normalize):
    """GRPOTrainer of TRL 1.16, `scale_rewards` and `multi_objective_aggregation`."""
    unscorable = rewards.isnan().all(1)
    if normalize == "after_sum":
        scores = (rewards * weights).nansum(1)
        scores[unscorable] = NAN
        grouped = scores.view(-1, group_size)
        advantages = (grouped - grouped.nanmean(1, keepdim=True)).flatten()
        if scale == "group":
            advantages = advantages / (trl_nanstd(grouped, dim=1).expand_as(grouped).flatten() + 1e-4)
        elif scale == "batch":
            advantages = advantages / (trl_nanstd(scores, dim=0) + 1e-4)
    else:
        grouped = rewards.view(-1, group_size, rewards.shape[1])
        normalized = (grouped - grouped.nanmean(1, keepdim=True)) / (trl_nanstd(grouped, dim=1) + 1e-4)
        scores = (normalized.flatten(0, 1) * weights).nansum(1)
        scores[unscorable] = NAN
        advantages = (scores - scores.nanmean()) / (trl_nanstd(scores, dim=0) + 1e-4)
    return advantages.nan_to_num(nan=0.0)


def verl(scores, group_ids, epsilon=1e-6):
    """compute_grpo_outcome_advantage of verl 0.9.1."""
    advantages = scores.clone()
    for one in group_ids.unique():
        rows = group_ids == one
        group = scores[rows]
        mean, std = (group.mean(), group.std()) if len(group) > 1 else (0.0, 1.0)
        advantages[rows] = (group - mean) / (std + epsilon)
    return advantages


def random_rewards(shape, seed, kind="plain"):
    generator = torch.Generator().manual_seed(seed)
    if kind == "binary":
        return torch.randint(2, shape, generator=generator).float()
    rewards = torch.randn(shape, generator=generator)
    if kind == "missing":
        rewards[torch.rand(shape, generator=generator) < 0.4] = NAN
    if kind == "all equal":
        # 0.1 has no exact binary form: a mean of seven of them, computed by summing, is not 0.1.
        rewards[:] = 0.1
    if kind == "far from zero":
        rewards += 1e4
    return rewards


KINDS = ("plain", "binary", "missing", "all equal")


def assert_matches_reference(rewards, device, group_ids=None, **options):
    on_device = None if group_ids is None else group_ids.to(device)
    got, signal = group_advantages(rewards.to(device), group_ids=on_device, return_signal=True, **options)
    oracle, oracle_signal = group_advantages(rewards.double(), group_ids=group_ids, return_signal=True, **options)
    with rlkernels.use_backend("reference"):
        naive = group_advantages(rewards, group_ids=group_ids, **options)
    assert_as_accurate_as_torch(got, oracle, naive)
    assert torch.equal(signal.cpu(), oracle_signal)
    return oracle, oracle_signal


def assert_matches_oracles(rewards, device, group_size=None, group_ids=None, **options):
    """The backend against the reference in float64, and that against loops."""
    oracle, signal = assert_matches_reference(rewards, device, group_size=group_size, group_ids=group_ids, **options)
    count = rewards.shape[0]
    ids = [row // (group_size or count) for row in range(count)] if group_ids is None else group_ids.tolist()
    wanted, wanted_signal = brute_force(rewards.double().reshape(count, -1).tolist(), ids, **options)
    torch.testing.assert_close(oracle, torch.tensor(wanted, dtype=torch.float64), rtol=1e-8, atol=1e-9)
    assert signal.tolist() == wanted_signal


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    kinds=st.integers(1, 3),
    content=st.sampled_from(KINDS),
    baseline=st.sampled_from(BASELINES),
    scale=st.sampled_from(SCALES),
    eps=st.sampled_from([1e-4, 1e-6, 0.1]),
    weighted=st.booleans(),
    normalize=st.sampled_from(["after_sum", "before_sum"]),
    singleton=st.sampled_from(["zero", "keep"]),
    seed=st.integers(0, 99),
)
def test_ragged_groups_in_any_order(
    backend, device, sizes, kinds, content, baseline, scale, eps, weighted, normalize, singleton, seed
):
    generator = torch.Generator().manual_seed(seed)
    names = torch.randint(-(2**40), 2**40, (len(sizes),), generator=generator)
    group_ids = names.repeat_interleave(torch.tensor(sizes))
    group_ids = group_ids[torch.randperm(len(group_ids), generator=generator)]
    rewards = random_rewards((len(group_ids), kinds), seed, content)
    # Halves and quarters, so that which sums are equal does not depend on the precision.
    weights = [0.5, -0.25, 2.0][:kinds] if weighted else None
    assert_matches_oracles(
        rewards,
        device,
        group_ids=group_ids,
        weights=weights,
        baseline=baseline,
        scale=scale,
        eps=eps,
        normalize=normalize,
        singleton=singleton,
    )


@given(
    groups=st.integers(1, 6),
    group_size=st.sampled_from([1, 2, 3, 8, 63, 130]),
    kinds=st.integers(1, 3),
    content=st.sampled_from(KINDS),
    baseline=st.sampled_from(BASELINES),
    scale=st.sampled_from(SCALES),
    normalize=st.sampled_from(["after_sum", "before_sum"]),
    seed=st.integers(0, 99),
)
def test_equal_groups(backend, device, groups, group_size, kinds, content, baseline, scale, normalize, seed):
    rewards = random_rewards((groups * group_size, kinds), seed, content)
    if kinds == 1 and seed % 2:
        rewards = rewards[:, 0]
    options = dict(baseline=baseline, scale=scale, normalize=normalize)
    assert_matches_oracles(rewards, device, group_size=group_size, **options)
    # The same groups by id are the same numbers.
    ids = torch.arange(groups * group_size, device=device) // group_size
    by_size = group_advantages(rewards.to(device), group_size=group_size, **options)
    by_id = group_advantages(rewards.to(device), group_ids=ids, **options)
    assert torch.equal(by_size, by_id)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("normalize", ["after_sum", "before_sum"])
@pytest.mark.parametrize("content", ["plain", "missing", "binary"])
def test_equals_trl(backend, device, content, normalize, scale):
    if normalize == "before_sum" and scale != "group":
        scale = "group"  # TRL's normalize_then_sum has no other
    rewards = random_rewards((40, 2), 1, content)
    rewards[7] = NAN
    # In a group with one score TRL's standard deviation is undefined, and its advantage 0 by nan_to_num.
    rewards[8:16] = NAN
    rewards[9] = 2.0
    weights = torch.tensor([1.0, 0.5])
    wanted = trl(rewards.double(), weights.double(), 8, scale, normalize)
    got = group_advantages(
        rewards.to(device), group_size=8, weights=weights.to(device), scale=scale, normalize=normalize
    )
    torch.testing.assert_close(got.cpu().double(), wanted, rtol=1e-5, atol=1e-5)


def test_equals_verl(backend, device):
    scores = random_rewards((30,), 2)
    group_ids = torch.randint(12, (30,), generator=torch.Generator().manual_seed(2))
    assert 1 in group_ids.bincount()
    wanted = verl(scores.double(), group_ids)
    got = group_advantages(scores.to(device), group_ids=group_ids.to(device), eps=1e-6, singleton="keep")
    torch.testing.assert_close(got.cpu().double(), wanted, rtol=1e-5, atol=1e-6)


def test_leave_one_out_is_rloo(backend, device):
    rewards = random_rewards((24,), 3).to(device)
    got = group_advantages(rewards, group_size=4, baseline="leave_one_out", scale="none")
    grouped = rewards.view(-1, 4)
    wanted = grouped - (grouped.sum(1, keepdim=True) - grouped) / 3
    torch.testing.assert_close(got, wanted.flatten(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("missing", [slice(0, 64), slice(64, 128), slice(128, 200)], ids=["first", "middle", "last"])
def test_a_whole_block_of_missing_rewards(backend, device, missing):
    """Groups longer than what a kernel holds at once are described block by block."""
    rewards = random_rewards((400,), 4)
    rewards[missing] = NAN
    rewards[200:][missing] = NAN
    for normalize in ("after_sum", "before_sum"):
        assert_matches_oracles(rewards, device, group_size=200, normalize=normalize)


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("value", [0.1, 1e6 + 0.1, -3.3e-7])
def test_equal_rewards_give_exactly_zero_and_no_signal(backend, device, value, scale, baseline):
    """Also where summing and dividing would miss the mean by an ulp, which / (0 + eps) would magnify."""
    rewards = torch.full((21,), value)
    rewards[14:] = torch.arange(7.0)
    advantages, signal = group_advantages(
        rewards.to(device), group_size=7, baseline=baseline, scale=scale, return_signal=True
    )
    assert not advantages[:14].any()
    assert advantages[14:].count_nonzero() == 6
    assert signal.tolist() == [False] * 14 + [True] * 7


def test_rewards_far_from_zero_keep_their_differences(backend, device):
    """A variance from sums of squares would cancel at 1e4 +- 1."""
    assert_matches_oracles(random_rewards((64,), 5, "far from zero"), device, group_size=8)
    assert_matches_oracles(random_rewards((64,), 5, "far from zero"), device, group_size=8, scale="batch")


@pytest.mark.parametrize(
    ("dtype", "power"),
    [*((torch.float32, power) for power in (-120, -60, 60, 123)), (torch.float64, -600), (torch.float64, 600)],
    ids=str,
)
def test_the_size_of_rewards_is_divided_out(backend, device, dtype, power):
    """Also where the squares of their deviations overflow, or are 0. A power of two rounds nothing."""
    rewards = random_rewards((40, 2), 7).clamp(-3, 3).to(device, dtype)
    rewards[3, 0] = rewards[7] = NAN
    far = rewards * 2.0**power
    for options in (
        *(
            dict(scale=scale, baseline=baseline)
            for scale in ("group", "batch")
            for baseline in ("mean", "leave_one_out")
        ),
        dict(normalize="before_sum", weights=[0.5, 2.0]),
    ):
        near = group_advantages(rewards, group_size=8, eps=0.0, **options)
        torch.testing.assert_close(
            group_advantages(far, group_size=8, eps=0.0, **options),
            near,
            rtol=1e-6 if dtype == torch.float32 else 1e-14,
            atol=0,
        )
    assert near.isfinite().all() and near.count_nonzero() > 30


@pytest.mark.parametrize("size", [1e-38, 1e-25, 1.8e19, 1e30, 1e38])
def test_rewards_of_any_size_as_in_pytorch(backend, device, size):
    rewards = size * random_rewards((8,), 0).clamp(-3, 3)
    wanted = (rewards - rewards.mean()) / rewards.std()
    torch.testing.assert_close(group_advantages(rewards.to(device), eps=0.0).cpu(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", BASELINES)
def test_missing_rewards(backend, device, baseline, scale):
    rewards = torch.tensor(
        [[1.0, NAN], [NAN, 2.0], [NAN, NAN], [0.5, 0.25]]  # one row without any reward
        + [[NAN, NAN]] * 4  # a group without any
        + [[NAN, NAN]] * 3
        + [[1.0, 1.0]]  # a group with one score
    )
    assert_matches_oracles(rewards, device, group_size=4, baseline=baseline, scale=scale)
    advantages, signal = group_advantages(
        rewards.to(device), group_size=4, baseline=baseline, scale=scale, return_signal=True
    )
    missing = rewards.isnan().all(1)
    assert not advantages.cpu()[missing].any()
    assert signal.tolist() == [True, True, False, True] + [False] * 8


@pytest.mark.parametrize("normalize", ["after_sum", "before_sum"])
@pytest.mark.parametrize("shape", [(0,), (0, 3), (1,), (1, 3)], ids=str)
def test_empty_and_single(backend, device, shape, normalize):
    for options in ({}, {"group_size": 1}, {"group_ids": torch.zeros(shape[0], dtype=torch.int64, device=device)}):
        advantages, signal = group_advantages(
            torch.ones(shape, device=device), normalize=normalize, return_signal=True, **options
        )
        assert (advantages.shape, signal.shape) == (shape[:1], shape[:1])
        assert (advantages.dtype, signal.dtype) == (torch.float32, torch.bool)
        assert not advantages.any()
        assert not signal.any()


def test_one_group_is_the_default(backend, device):
    rewards = random_rewards((13,), 0).to(device)
    assert torch.equal(group_advantages(rewards), group_advantages(rewards, group_size=13))


def test_large(backend, device, emulated):
    """More rows in one group than a block holds, and more groups of about two rows than there are blocks at once."""
    count = 200 if emulated else 5000
    rewards = random_rewards((count,), 4)
    assert_matches_reference(rewards, device)
    ids = torch.randint(count // 2, (count,), generator=torch.Generator().manual_seed(0))
    assert_matches_reference(rewards, device, group_ids=ids)
    assert_matches_reference(rewards, device, group_ids=ids, scale="batch", baseline="leave_one_out")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(backend, device, dtype):
    rewards = random_rewards((16, 2), 0).to(dtype)
    got = group_advantages(rewards.to(device), group_size=4)
    working = torch.float64 if dtype == torch.float64 else torch.float32
    assert got.dtype == working
    assert torch.equal(got, group_advantages(rewards.to(device, working), group_size=4))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8], ids=str)
def test_group_ids_of_any_integer_dtype(backend, device, dtype):
    rewards = random_rewards((16,), 0).to(device)
    ids = torch.randint(5, (16,), generator=torch.Generator().manual_seed(0)).to(device)
    assert torch.equal(group_advantages(rewards, group_ids=ids.to(dtype)), group_advantages(rewards, group_ids=ids))


def test_strides(backend, device):
    rewards = random_rewards((16, 3), 0).to(device)
    wanted = group_advantages(rewards, group_size=4)
    assert torch.equal(group_advantages(rewards.t().contiguous().t(), group_size=4), wanted)
    assert torch.equal(group_advantages(torch.stack([rewards] * 2, 1)[:, 1], group_size=4), wanted)


def test_groups_do_not_depend_on_each_other_and_bits_repeat(backend, device):
    rewards = random_rewards((70,), 0).to(device)
    together = group_advantages(rewards, group_size=7)
    assert torch.equal(group_advantages(rewards, group_size=7), together)
    for start in range(0, 70, 7):
        assert torch.equal(group_advantages(rewards[start : start + 7], group_size=7), together[start : start + 7])


@pytest.mark.parametrize("scale", SCALES)
@THOROUGH_EMULATED
def test_same_bits_on_every_run(backend, device, emulated, scale):
    count = 40 if emulated else 3000
    rewards = random_rewards((count, 2), 0, "missing").to(device)
    ids = torch.randint(count // 4, (count,), generator=torch.Generator().manual_seed(0)).to(device)
    for normalize in ("after_sum", "before_sum"):
        first, *others = (group_advantages(rewards, group_ids=ids, scale=scale, normalize=normalize) for _ in range(3))
        for other in others:
            assert torch.equal(first, other)


@pytest.mark.only("cpu", "triton", "cuda")
def test_opcheck(backend, device):
    rewards = random_rewards((12, 2), 0).to(device)
    ids = torch.arange(12, device=device) % 5
    weights = torch.tensor([1.0, 0.5], device=device)
    check_ops(lambda: group_advantages(rewards, group_size=4), backend, "group_advantages")
    prepared = ["group_segments", "numbers_on_device"] if backend in ("triton", "cuda") else []
    for either, ops in ((weights, prepared[:1]), (weights.tolist(), prepared)):
        check_ops(
            lambda either=either: group_advantages(rewards, group_ids=ids, weights=either, normalize="before_sum"),
            backend,
            "group_advantages",
            *ops,
        )


@pytest.mark.parametrize("compiler", COMPILERS)
def test_compile(backend, device, compiler):
    torch._dynamo.reset()
    rewards = random_rewards((12, 2), 0, "missing").to(device)
    ids = (torch.arange(12) % 5).to(device)

    def function(rewards, ids):
        advantages, signal = group_advantages(rewards * 2, group_ids=ids, weights=[1.0, 0.5], return_signal=True)
        return advantages * signal, group_advantages(rewards, group_size=4, scale="batch")

    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    for one, other in zip(compiled(rewards, ids), function(rewards, ids), strict=True):
        torch.testing.assert_close(one, other)


BAD_INPUT = {
    "rewards no tensor": (dict(rewards=[1.0] * 6), TypeError, ("rewards", "list")),
    "rewards integer": (dict(rewards=torch.ones(6, dtype=torch.int64)), TypeError, ("rewards", "float32", "int64")),
    "rewards 0-d": (dict(rewards=torch.tensor(1.0)), ValueError, ("rewards", "[B, R]", "[]")),
    "rewards 3-d": (dict(rewards=torch.ones(6, 1, 1)), ValueError, ("rewards", "[B, R]", "[6, 1, 1]")),
    "no reward functions": (dict(rewards=torch.ones(6, 0)), ValueError, ("rewards", "R", "[6, 0]")),
    "rewards with a gradient": (dict(rewards=torch.ones(6, requires_grad=True)), ValueError, ("rewards", "detach")),
    "group_size 0": (dict(group_size=0), ValueError, ("group_size", "6", "0")),
    "group_size negative": (dict(group_size=-2), ValueError, ("group_size", "6", "-2")),
    "group_size does not divide": (dict(group_size=4), ValueError, ("group_size", "6", "4")),
    "group_size a float": (dict(group_size=2.0), TypeError, ("group_size", "integer", "float")),
    "both": (dict(group_size=2, group_ids=torch.zeros(6, dtype=torch.int64)), ValueError, ("group_size", "group_ids")),
    "group_ids shape": (dict(group_ids=torch.zeros(5, dtype=torch.int64)), ValueError, ("group_ids", "[6]", "[5]")),
    "group_ids float": (dict(group_ids=torch.zeros(6)), TypeError, ("group_ids", "int64", "float32")),
    "group_ids a list": (dict(group_ids=[0] * 6), TypeError, ("group_ids", "list")),
    "group_ids device": (
        dict(group_ids=torch.zeros(6, dtype=torch.int64, device="meta")),
        ValueError,
        ("group_ids", "cpu", "meta"),
    ),
    "baseline": (dict(baseline="median"), ValueError, ("baseline", "leave_one_out", "median")),
    "scale": (dict(scale="std"), ValueError, ("scale", "group", "batch", "std")),
    "scale True": (dict(scale=True), ValueError, ("scale", "group", "True")),
    "normalize": (dict(normalize="never"), ValueError, ("normalize", "before_sum", "never")),
    "singleton": (dict(singleton="drop"), ValueError, ("singleton", "keep", "drop")),
    "eps negative": (dict(eps=-1e-4), ValueError, ("eps", ">= 0", "-0.0001")),
    "eps nan": (dict(eps=NAN), ValueError, ("eps", "nan")),
    "weights shape": (dict(weights=torch.ones(2)), ValueError, ("weights", "[1]", "[2]")),
    "weights a longer list": (dict(weights=[1.0, 2.0]), ValueError, ("weights", "[1]", "[2]")),
    "weights of strings": (dict(weights=["1"]), TypeError, ("weights", "number", "str")),
    "weights integer": (dict(weights=torch.ones(1, dtype=torch.int64)), TypeError, ("weights", "float32", "int64")),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input(backend, device, name):
    changes, error, fragments = BAD_INPUT[name]
    with pytest.raises(error) as raised:
        group_advantages(**({"rewards": torch.ones(6)} | changes))
    for fragment in fragments:
        assert fragment in str(raised.value)


@pytest.mark.only("triton", "cuda")
@pytest.mark.parametrize("count", [1, 2, 63, 129, 1100])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
def test_rows_are_sorted_by_group_as_pytorch_sorts_them(backend, device, count, dtype):
    """Rows of one group stay in their order; ids may be negative, and far apart."""
    generator = torch.Generator().manual_seed(count)
    info = torch.iinfo(dtype)
    ids = torch.tensor([info.min, info.max, 0, 7, 100, *range(8, 40)])
    ids = ids[torch.randint(len(ids), (count,), generator=generator)].to(dtype).to(device)
    order, offsets = _registry.op("group_segments", backend)(ids)
    wanted_order, wanted_offsets = groups._segments(ids)
    assert torch.equal(order, wanted_order) and torch.equal(offsets, wanted_offsets)


@pytest.mark.only("triton", "cuda")
def test_more_rows_than_are_counted_are_sorted(backend, device, monkeypatch):
    monkeypatch.setattr("rlkernels.ops.groups.MOST_COUNTED", 3)
    ids, rewards = torch.tensor([5, -1, 5, 2], device=device), torch.tensor([1.0, 2.0, 4.0, 8.0], device=device)
    sorted_by_pytorch = group_advantages(rewards, group_ids=ids)
    monkeypatch.undo()
    assert torch.equal(group_advantages(rewards, group_ids=ids), sorted_by_pytorch)
