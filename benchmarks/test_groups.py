"""group_advantages of one reward, in groups of eight."""

import numpy as np
import torch
from suite import Case, Peer

import peer_modules
import rlkernels

COUNT, GROUP, EPS = 8192, 8, 1e-6


def trl_formula(rewards):
    """Of GRPOTrainer, whose means and deviations leave out NaN, a reward that does not apply."""
    groups = rewards.view(-1, GROUP)
    mean = groups.nanmean(1, keepdim=True)
    scored = (~groups.isnan()).sum(1, keepdim=True)
    deviation = ((groups - mean).square().nansum(1, keepdim=True) / (scored - 1).clamp(min=1)).sqrt()
    return ((groups - mean) / (deviation + EPS)).view(-1).nan_to_num(0.0)


def verl_layout(rewards):
    """One token each, and the name of each row's group."""
    return rewards.unsqueeze(1), rewards.new_ones(len(rewards), 1), np.arange(len(rewards)) // GROUP


def first_of(function):
    return lambda *inputs: function(*inputs)[0]


CASES = [
    Case(
        "group_advantages",
        (COUNT,),
        lambda: (torch.rand(COUNT),),
        ours=lambda rewards: rlkernels.group_advantages(rewards, group_size=GROUP, eps=EPS),
        eager=trl_formula,
        peers={
            "verl": Peer(lambda: first_of(peer_modules.verl().compute_grpo_outcome_advantage), verl_layout),
            "verl vectorized": Peer(
                lambda: first_of(peer_modules.verl().compute_grpo_vectorized_outcome_advantage), verl_layout
            ),
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
