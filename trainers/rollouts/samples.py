"""Completions with their rewards, and what is logged and shown of them."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from ..base.metrics import Metrics
from ..rewards.calls import copied
from .engine import Rollout


@dataclass
class Samples:
    """The rollouts of a batch of rows on this process, with their rewards: a list entry per row."""

    prompts: list
    rollouts: list[Rollout]
    completions: list  # as reward functions see them
    rewards: Tensor  # [rows, reward functions], NaN where one does not apply
    extra: dict[str, list]  # columns that reward functions logged

    def replace(self, rows: list[int], others: "Samples") -> None:
        """Puts others in the place of these rows."""
        for name in ("prompts", "rollouts", "completions"):
            for row, value in zip(rows, getattr(others, name), strict=True):
                getattr(self, name)[row] = value
        self.rewards[rows] = others.rewards
        for column, values in others.extra.items():
            own = self.extra.setdefault(column, [])
            own += [None] * (len(self.prompts) - len(own))
            for row, value in zip(rows, values, strict=False):
                own[row] = value

    def num_tokens(self, rows: list[int] | None = None) -> int:
        """Tokens of the prompts and completions of these rows, or of all."""
        rollouts = self.rollouts if rows is None else [self.rollouts[row] for row in rows]
        return sum(len(rollout.prompt_ids) + len(rollout.completion_ids) for rollout in rollouts)

    def outcomes(self, accelerator: Any) -> Tensor:
        """Over all processes, [rows, functions + 2]: the rewards, the number of the completion's tokens that are the
        model's own, and whether it ended."""
        lengths = [[float(sum(rollout.own)), float(rollout.ended)] for rollout in self.rollouts]
        return accelerator.gather(torch.cat([self.rewards, torch.tensor(lengths, device=self.rewards.device)], 1))

    def table(self, names: list[str], advantages: list[float]) -> list[dict[str, Any]]:
        """Over all processes, a row to show for each completion. `names` are those of the reward functions."""
        rewards = zip(*self.rewards.T.tolist(), strict=True)
        rows = [
            {
                "prompt": copied(self.prompts[row]),
                "completion": self.completions[row],
                **{column_of(name): reward for name, reward in zip(names, values, strict=True)},
                "advantage": advantages[row],
                **{column: logged[row] for column, logged in self.extra.items() if row < len(logged)},
            }
            for row, values in enumerate(rewards)
        ]
        return gather_object(rows)


def column_of(reward: str) -> str:
    """The column of the table that holds this reward."""
    return f"rewards/{reward}"


def record(outcomes: Tensor, names: list[str], weights: Tensor, metrics: Metrics) -> None:
    """Logs lengths, rewards and their weighted sum, from `Samples.outcomes`."""
    rewards, lengths, ended = outcomes[:, :-2], outcomes[:, -2], outcomes[:, -1]
    metrics.add("completions/mean_length", lengths.mean())
    metrics.add("completions/min_length", lengths.min())
    metrics.add("completions/max_length", lengths.max())
    metrics.add("completions/clipped_ratio", 1 - ended.mean())

    def std(values: Tensor) -> Tensor | float:
        return values.std() if len(values) > 1 else math.nan

    for name, column in zip(names, rewards.T, strict=True):
        applies = column[~column.isnan()]
        metrics.add(f"rewards/{name}/mean", applies.mean())
        metrics.add(f"rewards/{name}/std", std(applies))
    total = (rewards * weights).nansum(1)[~rewards.isnan().all(1)]
    metrics.add("reward", total.mean())
    metrics.add("reward_std", std(total))
