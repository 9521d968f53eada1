"""verl's advantage estimators, computed by our functions. `verl` registers them and puts them in its table."""

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

import rlkernels as rk
from rlkernels.integrations._verl_functional import masked_whiten, result_type


def compute_gae_advantage_return(token_level_rewards, values, response_mask, gamma, lam):
    """One scan instead of verl's loop over tokens. As in verl, an unscored token gets the advantage of the next scored
    one; rlkernels.gae gives 0."""
    with torch.no_grad():
        scored, _ = rk.gae(token_level_rewards, values, response_mask, gamma=float(gamma), lam=float(lam))
        length = response_mask.shape[1]
        places = torch.arange(length, device=scored.device)
        following = torch.where(response_mask.bool(), places, length).flip(1).cummin(1).values.flip(1)
        advantages = torch.nn.functional.pad(scored, (0, 1)).gather(1, following)
        advantages = advantages.to(result_type(token_level_rewards, values, response_mask))
        returns = advantages + values
        return masked_whiten(advantages, response_mask), returns


def compute_grpo_outcome_advantage(
    token_level_rewards, response_mask, index, epsilon=1e-6, norm_adv_by_std_in_grpo=True, config=None
):
    """A group of one keeps its score. A group of equal scores gets exactly 0."""
    scores = token_level_rewards.sum(dim=-1)
    scale = "group" if norm_adv_by_std_in_grpo else "none"
    return _per_token(_relative(scores, group_ids(index, scores.device), scale, epsilon), response_mask, scores)


def compute_grpo_vectorized_outcome_advantage(
    token_level_rewards, response_mask, index, epsilon=1e-6, norm_adv_by_std_in_grpo=True, config=None
):
    """Like compute_grpo_outcome_advantage, but verl's `as_torch_index` numbers the groups ("1" and "01" are the same
    group), and the dtype is at least float32."""
    from verl.utils import as_torch_index  # verl imports this module while it is imported

    scores = token_level_rewards.sum(dim=-1)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    scale = "group" if norm_adv_by_std_in_grpo else "none"
    return _per_token(
        _relative(scores, as_torch_index(index, device=scores.device), scale, epsilon), response_mask, scores
    )


def compute_gdpo_outcome_advantage(
    token_level_rewards,
    response_mask,
    index,
    epsilon=1e-6,
    norm_adv_by_std_in_grpo=True,
    config=None,
    non_tensor_batch=None,
    batch=None,
    **kwargs,
):
    """Normalizes each reward in its group, then their weighted sum over all scored tokens; rlkernels normalizes it over
    sequences."""
    device = token_level_rewards.device
    rewards, weights = [token_level_rewards.sum(dim=-1)], None
    if config is not None and non_tensor_batch is not None and batch is not None:
        keys = config.get("gdpo_reward_keys", None)
        assert keys, "GDPO needs algorithm.gdpo_reward_keys, the names of the rewards that compute_score returns"
        for key in keys:
            assert key in non_tensor_batch, f"the GDPO reward {key!r} is not in the batch: {list(non_tensor_batch)}"
        rewards = [torch.as_tensor([float(x) for x in non_tensor_batch[key]], device=device) for key in keys]
        weights = config.get("gdpo_reward_weights", None)
    weights = [1.0] * len(rewards) if weights is None else list(weights)
    ids = group_ids(index, device)
    scale = "group" if norm_adv_by_std_in_grpo else "none"
    total = sum(
        weight * _relative(reward, ids, scale, epsilon) for weight, reward in zip(weights, rewards, strict=False)
    )
    advantages, _ = _per_token(total, response_mask, rewards[0])
    advantages = masked_whiten(advantages, response_mask) * response_mask
    return advantages, advantages


def compute_reinforce_plus_plus_baseline_outcome_advantage(
    token_level_rewards, response_mask, index, epsilon=1e-6, config=None, **kwargs
):
    scores = token_level_rewards.sum(dim=-1)
    advantages, _ = _per_token(_relative(scores, group_ids(index, scores.device), "none"), response_mask, scores)
    advantages = masked_whiten(advantages, response_mask) * response_mask
    return advantages, advantages


def compute_rloo_outcome_advantage(token_level_rewards, response_mask, index, epsilon=1e-6, config=None, **kwargs):
    """A group of one keeps its score."""
    scores = token_level_rewards.sum(dim=-1)
    advantages = _relative(scores, group_ids(index, scores.device), "none", baseline="leave_one_out")
    return _per_token(advantages, response_mask, scores)


def compute_rloo_vectorized_outcome_advantage(
    token_level_rewards, response_mask, index, epsilon=1e-6, config=None, **kwargs
):
    """A group of one gets 0, unlike in compute_rloo_outcome_advantage."""
    scores = token_level_rewards.sum(dim=-1)
    ids = group_ids(index, scores.device)
    advantages = _relative(scores, ids, "none", baseline="leave_one_out", singleton="zero")
    return _per_token(advantages, response_mask, scores)


def compute_reinforce_plus_plus_outcome_advantage(token_level_rewards, response_mask, config=None, **kwargs):
    assert config is not None
    with torch.no_grad():
        returns = rk.discounted_returns(token_level_rewards, response_mask, gamma=float(config.gamma))
        returns = returns.to(token_level_rewards.dtype)
        return masked_whiten(returns, response_mask) * response_mask, returns


def compute_remax_outcome_advantage(token_level_rewards, reward_baselines, response_mask, config=None, **kwargs):
    """Unscored tokens have returns too: the sum of the rewards after them."""
    with torch.no_grad():
        rewards = token_level_rewards * response_mask
        returns = rk.discounted_returns(rewards).to(rewards.dtype)
        return returns - reward_baselines.unsqueeze(-1) * response_mask, returns


def compute_gpg_outcome_advantage(
    token_level_rewards, response_mask, index, epsilon=1e-6, f_norm=1.0, alpha=1.0, config=None, **kwargs
):
    """Divides by the share of nonzero scores. As in verl, the argument `alpha` has no effect."""
    scores = token_level_rewards.sum(dim=-1)
    advantages = _relative(scores, group_ids(index, scores.device), "none")
    alpha = len(scores) / torch.count_nonzero(scores).clamp(min=1)
    return _per_token(alpha * advantages / f_norm, response_mask, scores)


def rk_gae(token_level_rewards, response_mask, values=None, gamma=None, lam=None, config=None, **kwargs):
    """GAE as a registered estimator, with gamma and lam from verl's `algorithm` config."""
    if values is None:
        values = _values_of_trainer()
    if config is not None and config.get("use_pf_ppo", False):
        raise ValueError(
            "algorithm.use_pf_ppo: verl resamples the batch after adv_estimator=gae alone, not after rk_gae"
        )
    gamma = config.gamma if gamma is None else gamma
    lam = config.lam if lam is None else lam
    return compute_gae_advantage_return(token_level_rewards, values, response_mask, gamma, lam)


def rk_grpo(
    token_level_rewards, response_mask, index, epsilon=1e-6, norm_adv_by_std_in_grpo=None, config=None, **kwargs
):
    """GRPO as a registered estimator. It reads norm_adv_by_std_in_grpo from the config, since verl's trainer passes it
    to "grpo" only."""
    if norm_adv_by_std_in_grpo is None:
        norm_adv_by_std_in_grpo = True if config is None else config.get("norm_adv_by_std_in_grpo", True)
    return compute_grpo_outcome_advantage(token_level_rewards, response_mask, index, epsilon, norm_adv_by_std_in_grpo)


def group_ids(index: Iterable[Any], device: torch.device) -> Tensor:
    """Group numbers for group names, which may be any hashable values."""
    names = index.tolist() if hasattr(index, "tolist") else index
    numbers: dict[Any, int] = {}
    return torch.tensor([numbers.setdefault(name, len(numbers)) for name in names], dtype=torch.int64, device=device)


def _relative(
    scores: Tensor, ids: Tensor, scale: str, epsilon: float = 0.0, baseline: str = "mean", singleton: str = "keep"
) -> Tensor:
    advantages = rk.group_advantages(
        scores.detach(), group_ids=ids, baseline=baseline, scale=scale, eps=epsilon, singleton=singleton
    )
    assert isinstance(advantages, Tensor)
    return advantages


def _per_token(advantages: Tensor, response_mask: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    advantages = (advantages.unsqueeze(-1) * response_mask).to(result_type(scores, response_mask))
    return advantages, advantages


def _values_of_trainer() -> Tensor:
    # verl's compute_advantage passes the critic's values to "gae" only, but the batch in its frame has them.
    frame = sys._getframe(1).f_back
    while frame is not None:
        if frame.f_code.co_name == "compute_advantage" and "data" in frame.f_locals:
            values = frame.f_locals["data"].batch.get("values", None)
            if values is not None:
                return values
            break
        frame = frame.f_back
    raise ValueError("rk_gae needs the critic's values: set critic.enable=True with algorithm.adv_estimator=rk_gae")
