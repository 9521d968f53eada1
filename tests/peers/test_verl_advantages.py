"""Our advantage estimators beside verl's, in every dtype, with groups in any order."""

import ast
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import verl_rows
from beside import assert_as_theirs
from verl_rows import DTYPES, MASK_DTYPES, pair, slack

verl_rows.rows()

# Not sorted; one alone in its group, one group whose scores are all equal.
NAMES = np.array(["b", "a", "b", "solo", "c", "even", "c", "a", "b", "even", "c", "even"], dtype=object)
GROUPED = {
    "compute_grpo_outcome_advantage": {},
    "compute_grpo_vectorized_outcome_advantage": {},
    "compute_rloo_outcome_advantage": {},
    "compute_rloo_vectorized_outcome_advantage": {},
    "compute_reinforce_plus_plus_baseline_outcome_advantage": {},
    "compute_gdpo_outcome_advantage": {},
    "compute_gpg_outcome_advantage": dict(f_norm=2.0, alpha=7.0),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def outcomes(dtype=torch.float32, rows=12, length=24):
    """A score at a token of each row. 0 in some rows, which GPG counts."""
    rewards = torch.zeros(rows, length, dtype=dtype)
    scores = torch.randn(rows).to(dtype)
    scores[::4] = 0.0
    scores[np.flatnonzero(NAMES[:rows] == "even")] = 0.5
    rewards[torch.arange(rows), torch.randint(length, (rows,))] = scores
    return rewards


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask_dtype", MASK_DTYPES)
@pytest.mark.parametrize("name", GROUPED)
def test_group_estimators(name, dtype, mask_dtype):
    if name == "compute_rloo_vectorized_outcome_advantage" and dtype in (torch.bfloat16, torch.float16):
        pytest.skip("verl's is in float64 here: torch.bincount takes no weights of 16 bits")
    ours, theirs = pair(name)
    rewards, mask = outcomes(dtype), verl_rows.mask((12, 24), mask_dtype)

    def call(function):
        return lambda rewards, mask: function(rewards, mask, NAMES, **GROUPED[name])

    # Theirs, a step at a time in 16 bits, rounds each of them; ours once.
    advantages, returns = assert_as_theirs(call(ours), call(theirs), rewards, mask, leaves=(), slack=slack(dtype))
    assert advantages is returns
    assert not advantages[1].any()
    assert_as_theirs(
        call(ours), call(theirs), rewards.T.contiguous().T, mask.T.contiguous().T, leaves=(), slack=slack(dtype)
    )
    assert not rewards.requires_grad


@pytest.mark.parametrize("epsilon", [1e-6, 0.5])
@pytest.mark.parametrize("by_std", [True, False])
@pytest.mark.parametrize("name", [name for name in GROUPED if "grpo" in name or "gdpo" in name])
def test_epsilon_and_scale(name, epsilon, by_std):
    ours, theirs = pair(name)
    rewards, mask = outcomes(), verl_rows.mask((12, 24))

    def call(function):
        return lambda *inputs: function(*inputs, NAMES, epsilon=epsilon, norm_adv_by_std_in_grpo=by_std)

    assert_as_theirs(call(ours), call(theirs), rewards, mask, leaves=())


@pytest.mark.parametrize("names", [np.arange(12) % 3, [f"{i % 5:02}" for i in range(12)], np.arange(12.0) % 4])
@pytest.mark.parametrize("name", GROUPED)
def test_names_of_groups(name, names):
    ours, theirs = pair(name)
    rewards, mask = outcomes(), verl_rows.mask((12, 24))
    assert_as_theirs(lambda *i: ours(*i, names), lambda *i: theirs(*i, names), rewards, mask, leaves=())


def test_names_that_are_numbers_to_the_vectorized():
    ours, theirs = pair("compute_grpo_vectorized_outcome_advantage")
    names = np.array(["1", "01", "2", "02"], dtype=object)
    rewards, mask = outcomes(rows=4), torch.ones(4, 24)
    assert_as_theirs(lambda *i: ours(*i, names), lambda *i: theirs(*i, names), rewards, mask, leaves=())


@pytest.mark.parametrize("weights", [None, [0.3, 2.0]])
def test_gdpo_of_several_rewards(weights):
    ours, theirs = pair("compute_gdpo_outcome_advantage")
    rewards, mask = outcomes(), verl_rows.mask((12, 24))
    mask[:, 0] = True  # verl puts a reward at the last token of each
    batch = dict(prompts=torch.zeros(12, 3), attention_mask=torch.cat([torch.ones(12, 3), mask], 1).long())
    components = dict(right=np.random.default_rng(0).normal(size=12), short=np.arange(12) % 2)
    config = dict(gdpo_reward_keys=["right", "short"], gdpo_reward_weights=weights)
    given = dict(config=config, non_tensor_batch=components, batch=batch)
    assert_as_theirs(
        lambda *i: ours(*i, NAMES, **given), lambda *i: theirs(*i, NAMES, **given), rewards, mask, leaves=()
    )
    for wrong in (dict(gdpo_reward_keys=[]), dict(gdpo_reward_keys=["right", "tall"])):
        for function in (ours, theirs):
            with pytest.raises(AssertionError, match=r"gdpo_reward_keys|tall"):
                function(rewards, mask, NAMES, **(given | dict(config=wrong)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask_dtype", MASK_DTYPES[1:])  # theirs subtracts the mask, which a bool refuses
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.99, 0.95), (0.9, 0.0), (torch.tensor(0.5), 0.5)])
def test_gae(dtype, mask_dtype, gamma, lam):
    ours, theirs = pair("compute_gae_advantage_return")
    rewards, values = torch.randn(2, 8, 24).to(dtype)
    mask = verl_rows.mask(dtype=mask_dtype)

    def call(function):
        return lambda *inputs: function(*inputs, gamma, lam)

    assert_as_theirs(call(ours), call(theirs), rewards, values, mask, leaves=(), slack=slack(dtype))
    assert_as_theirs(call(ours), call(theirs), rewards.T[:8], values.T[:8], mask[:, :8], leaves=(), slack=slack(dtype))
    advantages, returns = ours(rewards, values.requires_grad_(), mask, gamma, lam)
    assert not advantages.requires_grad and not returns.requires_grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_reinforce_plus_plus(dtype, gamma):
    ours, theirs = pair("compute_reinforce_plus_plus_outcome_advantage")
    config = SimpleNamespace(gamma=gamma)
    rewards, mask = torch.randn(8, 24).to(dtype), verl_rows.mask(dtype=torch.float32)
    mask = mask.to(dtype)
    assert_as_theirs(
        lambda *i: ours(*i, config=config),
        lambda *i: theirs(*i, config=config),
        rewards,
        mask,
        leaves=(),
        slack=slack(dtype),
    )
    for function in (ours, theirs):
        with pytest.raises(AssertionError):
            function(rewards, mask)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask_dtype", MASK_DTYPES)
def test_remax(dtype, mask_dtype):
    ours, theirs = pair("compute_remax_outcome_advantage")
    rewards, baselines = torch.randn(8, 24).to(dtype), torch.randn(8).to(dtype)
    assert_as_theirs(ours, theirs, rewards, baselines, verl_rows.mask(dtype=mask_dtype), leaves=(), slack=slack(dtype))


@pytest.mark.parametrize("number", [0, 1])
def test_too_few_tokens_to_whiten(number):
    mask = torch.zeros(12, 24)
    mask.view(-1)[:number] = 1
    rewards = outcomes()
    for function in pair("compute_gae_advantage_return"):
        with pytest.raises(ValueError, match="mask"):
            function(rewards, rewards, mask, 1.0, 1.0)
    for function in pair("compute_reinforce_plus_plus_baseline_outcome_advantage"):
        with pytest.raises(ValueError, match="mask"):
            function(rewards, mask, NAMES)


@pytest.fixture
def compute_advantage(core_algos):
    """verl's trainer's. Its module asks for what a server of models needs: the function is taken out of its source."""
    from importlib.util import find_spec

    from verl import DataProto
    from verl.trainer.config import AlgoConfig

    with open(find_spec("verl.trainer.ppo.ray_trainer").origin) as file:
        tree = ast.parse(file.read())
    tree.body = [part for part in tree.body if getattr(part, "name", "") == "compute_advantage"]
    names = dict(core_algos=core_algos, DataProto=DataProto, AlgoConfig=AlgoConfig)
    names |= dict(AdvantageEstimator=core_algos.AdvantageEstimator, Optional=__import__("typing").Optional)
    exec(compile(tree, "ray_trainer.py", "exec"), names)

    def call(name, **options):
        tensors = dict(token_level_rewards=outcomes(), response_mask=verl_rows.mask((12, 24), torch.float32))
        torch.manual_seed(1)
        tensors["values"] = torch.randn(12, 24)
        for key in options.pop("without", ()):
            del tensors[key]
        data = DataProto.from_dict(tensors=tensors, non_tensors=dict(uid=NAMES))
        by_std = options.get("norm_adv_by_std_in_grpo", True)
        config = AlgoConfig(adv_estimator=name, **options)
        data = names["compute_advantage"](
            data, name, gamma=config.gamma, lam=config.lam, norm_adv_by_std_in_grpo=by_std, config=config
        )
        return data.batch["advantages"], data.batch["returns"]

    return call


@pytest.mark.parametrize("options", [{}, dict(gamma=0.9, lam=0.8, norm_adv_by_std_in_grpo=False)])
@pytest.mark.parametrize(
    "name",
    [
        "gae",
        "grpo",
        "grpo_vectorized",
        "rloo",
        "rloo_vectorized",
        "reinforce_plus_plus",
        "reinforce_plus_plus_baseline",
        "gpg",
    ],
)
def test_registered_estimators_in_verls_trainer(compute_advantage, name, options):
    def results(name):
        torch.manual_seed(0)
        return compute_advantage(name, **options)

    for ours, theirs in zip(results(f"rk_{name}"), results(name), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        assert ours.any()


def test_rk_gae_refuses_what_verl_does_after_gae_alone(compute_advantage):
    with pytest.raises(ValueError, match="use_pf_ppo"):
        compute_advantage("rk_gae", use_pf_ppo=True)


def test_rk_gae_without_a_critic(compute_advantage, core_algos):
    with pytest.raises(ValueError, match=r"critic\.enable=True"):
        compute_advantage("rk_gae", without=["values"])
    with pytest.raises(ValueError, match=r"critic\.enable=True"):
        core_algos.get_adv_estimator_fn("rk_gae")(outcomes(), torch.ones(12, 24), gamma=1.0, lam=1.0)
    values, mask = torch.randn(12, 24), torch.ones(12, 24)
    ours = core_algos.get_adv_estimator_fn("rk_gae")(outcomes(), mask, values=values, gamma=0.5, lam=0.5)
    assert ours[0].shape == (12, 24)
