import torch
from torch import Tensor

from rlkernels.reference._units import unit_of


def group_advantages(
    rewards: Tensor,
    *,
    weights: Tensor | None,
    order: Tensor | None,
    offsets: Tensor | None,
    group_size: int,
    baseline: str,
    scale: str,
    eps: float,
    normalize_before_sum: bool,
    keep_singleton: bool,
) -> tuple[Tensor, Tensor]:
    """rewards [B, R] -> advantages [B], signal bool [B].

    Groups are consecutive rows of `group_size`, or, with `order` [B] and `offsets` [B + 1],
    `order[offsets[g]:offsets[g + 1]]`.
    """
    count = rewards.shape[0]
    weights = torch.ones(rewards.shape[1], dtype=rewards.dtype, device=rewards.device) if weights is None else weights
    if order is None or offsets is None:
        group = torch.arange(count, device=rewards.device) // max(group_size, 1)
    else:
        position = torch.arange(count, device=rewards.device)
        group = torch.empty_like(order).scatter(0, order, torch.searchsorted(offsets[1:], position, right=True))

    unscored = rewards.isnan().all(1)
    if normalize_before_sum:
        columns = [
            _advantages(rewards[:, r], group, baseline, scale, eps, keep_singleton) for r in range(rewards.shape[1])
        ]
        normalized = torch.stack([advantage for advantage, _ in columns], 1)
        signal = torch.stack([differs for _, differs in columns], 1).any(1)
        total = (normalized * weights).nan_to_num(0.0).sum(1).masked_fill(unscored, float("nan"))
        advantages, _ = _advantages(total, torch.zeros_like(group), "mean", "group", eps, keep_singleton)
    else:
        total = (rewards * weights).nansum(1).masked_fill(unscored, float("nan"))
        advantages, signal = _advantages(total, group, baseline, scale, eps, keep_singleton)
    return advantages.nan_to_num(nan=0.0, posinf=float("inf"), neginf=float("-inf")), signal & ~unscored


def _advantages(
    scores: Tensor, group: Tensor, baseline: str, scale: str, eps: float, keep_singleton: bool
) -> tuple[Tensor, Tensor]:
    """(score - baseline) / (std + eps) of one column [B], NaN where the score is NaN; and whether its group differs."""
    size, mean, std, differs = _statistics(scores, group)
    if baseline == "none":
        advantages = scores
    else:
        advantages = scores - mean
        if baseline == "leave_one_out":
            # score - mean of the others = (score - mean of all) * n / (n - 1)
            advantages = advantages * (size / (size - 1).clamp(min=1))
        alone = scores if keep_singleton else torch.zeros_like(scores)
        advantages = torch.where(size == 1, alone, advantages)
    if scale == "batch":
        size, _, std, _ = _statistics(scores, torch.zeros_like(group))
    if scale != "none":
        # One score has no standard deviation: it is not scaled by what would be eps alone, but as if it were 1.
        advantages = advantages / (torch.where(size > 1, std, torch.ones_like(std)) + eps)
    return advantages.masked_fill(scores.isnan(), float("nan")), differs


def _statistics(scores: Tensor, group: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For each row the size, mean and sample standard deviation of its group's scores, those that are NaN left out, and
    whether these differ. Where they do not, the mean is the score itself, so that score - mean is exactly 0."""
    there = ~scores.isnan()
    known = scores.masked_fill(~there, 0.0)
    slots = torch.zeros_like(known)
    size = slots.scatter_add(0, group, there.to(scores.dtype))[group]
    low = slots.scatter_reduce(0, group, scores.masked_fill(~there, float("inf")), "amin", include_self=False)[group]
    high = slots.scatter_reduce(0, group, scores.masked_fill(~there, float("-inf")), "amax", include_self=False)[group]
    differs = (size > 1) & (high > low)
    unit = unit_of(torch.maximum(low.abs(), high.abs()))
    known = known / unit
    mean = torch.where(differs, slots.scatter_add(0, group, known)[group] / size.clamp(min=1), low / unit)
    squares = (known - mean).square().masked_fill(~there, 0.0)
    variance = slots.scatter_add(0, group, squares)[group] / (size - 1).clamp(min=1)
    std = torch.where(differs, variance.sqrt(), torch.zeros_like(variance))
    return size, mean * unit, std * unit, differs
