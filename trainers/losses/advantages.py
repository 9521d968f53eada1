"""From the rewards of completions to their advantages, by `GRPOConfig.advantage`."""

import math
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

import rlkernels

from ..batch.batch import Batch

if TYPE_CHECKING:
    from ..grpo import GRPOConfig


def with_overlong(rewards: Tensor, weights: Tensor, lengths: Tensor, args: "GRPOConfig") -> tuple[Tensor, Tensor]:
    """Rewards [B, R] and their weights [R]. With overlong_buffer_length both gain one entry for the length of the
    completions: DAPO's soft overlong punishment (arXiv 2503.14476, equation 13),

        min(0, max(-1, (max_completion_length - overlong_buffer_length - length) / overlong_buffer_length))

    It is NaN where no other reward applies.
    """
    buffer = args.overlong_buffer_length
    if buffer is None:
        return rewards, weights
    punishment = ((args.max_completion_length - buffer - lengths) / buffer).clamp(-1.0, 0.0)
    punishment = punishment.masked_fill(rewards.isnan().all(1), math.nan)
    weight = weights.new_tensor([args.overlong_penalty])
    return torch.cat([rewards, punishment.unsqueeze(1)], 1), torch.cat([weights, weight])


def signal(rewards: Tensor, weights: Tensor, group_size: int) -> Tensor:
    """bool [B]: which rows of rewards [B, R] belong to a group whose scores differ."""
    return rlkernels.group_advantages(rewards, group_size=group_size, weights=weights, return_signal=True)[1]


def grpo(rewards: Tensor, weights: Tensor, args: "GRPOConfig") -> Tensor:
    """[B]: the score minus the mean of its group, divided by the standard deviation that args.scale_rewards names
    (arXiv 2402.03300)."""
    values = rlkernels.group_advantages(
        rewards,
        group_size=args.num_generations,
        scale=args.scale_rewards,
        weights=weights,
        normalize="after_sum" if args.multi_objective_aggregation == "sum_then_normalize" else "before_sum",
    )
    return cast(Tensor, values)  # with return_signal it would be a pair


def scores(rewards: Tensor, weights: Tensor) -> Tensor:
    """[B]: the weighted sum of each row of rewards [B, R]; NaN where no reward applies."""
    return (rewards * weights).nansum(1).masked_fill(rewards.isnan().all(1), math.nan)


def rloo(scores: Tensor, kl: Tensor, beta: float, group_size: int) -> Tensor:
    """[B]: score - beta * kl, minus the mean of the others of its group (arXiv 2402.14740). kl [B] is the sum of
    log p - log p_ref over the completion's tokens."""
    values = rlkernels.group_advantages(
        scores - beta * kl, group_size=group_size, baseline="leave_one_out", scale="none"
    )
    return cast(Tensor, values)


def reinforce_plus_plus(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, batch: Batch, beta: float, group: Any = None
) -> Tensor:
    """[N]: the return of each token, whitened over the tokens of all completions and processes (arXiv 2501.03262).

        return[t] = score - beta * (sum over s >= t of log p[s] - log p_ref[s])
        advantage = (return - mean) / std

    scores are [S], one per completion; log-probabilities are [N]. The result is 0 where the batch's mask is. As in the
    authors' OpenRLHF the standard deviation has ddof 0.
    """
    rewards = rlkernels.shaped_rewards(
        scores.nan_to_num(0.0),
        logprobs,
        ref_logprobs,
        batch.mask,
        kl_coef=beta,
        estimator="k1",
        cu_seqlens=batch.cu_seqlens,
    )
    returns = rlkernels.discounted_returns(rewards, batch.mask, cu_seqlens=batch.cu_seqlens)
    return rlkernels.masked_whiten(returns, batch.mask, unbiased=False, eps_floor=True, group=group)
