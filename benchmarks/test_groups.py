"""group_advantages of one reward, in groups of eight."""

import numpy as np
import torch
from trl.trainer.utils import nanstd

import peer_modules
import rlkernels
from suite import Case, Peer

COUNT, GROUP, EPS = 8192, 8, 1e-4


def trl_formula(rewards):
    """The formula of GRPOTrainer, with its own nanstd: rewards may be NaN, where they do not apply."""
    rewards = rewards.nansum(1)
    groups = rewards.view(-1, GROUP)
    mean = torch.nanmean(groups, dim=1).repeat_interleave(GROUP, dim=0)
    deviation = nanstd(groups, dim=1).repeat_interleave(GROUP, dim=0)
    return torch.nan_to_num((rewards - mean) / (deviation + EPS), nan=0.0)


def verl_layout(rewards):
    """One token each, and the name of each row's group."""
    return rewards, torch.ones_like(rewards), np.arange(len(rewards)) // GROUP


def verl(name):
    def load():
        function = getattr(peer_modules.verl(), name)
        return lambda *inputs: function(*inputs, epsilon=EPS)[0]

    return load


CASES = [
    Case(
        "group_advantages",
        (COUNT, 1),
        lambda: (torch.rand(COUNT, 1),),
        ours=lambda rewards: rlkernels.group_advantages(rewards, group_size=GROUP, eps=EPS),
        eager=trl_formula,
        peers={
            "verl": Peer(verl("compute_grpo_outcome_advantage"), verl_layout),
            "verl vectorized": Peer(verl("compute_grpo_vectorized_outcome_advantage"), verl_layout),
        },
        label="groups of 8, float32",
        moved=2 * 4 * COUNT,
        # A score may stand close to its group's mean: what is left of it then carries the mean's rounding.
        ulps=64,
        wanted={"verl": 500, "eager": 2},
    ),
]


def test_groups(case, implementation, measure):
    measure(case, implementation)
