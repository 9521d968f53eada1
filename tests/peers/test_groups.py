"""group_advantages beside verl's estimators of outcome advantages."""

import numpy as np
import pytest
import torch

import rlkernels


@pytest.fixture
def scores():
    """Two groups of four, one whose scores are equal, one of a single score."""
    torch.manual_seed(0)
    return torch.cat([torch.randn(8), torch.ones(3), torch.randn(1)]), torch.tensor([0, 1] * 4 + [2] * 3 + [3])


@pytest.mark.parametrize("scale", ["group", "none"])
def test_verl_grpo(core_algos, backend, scores, scale):
    rewards, ids = scores
    got = rlkernels.group_advantages(rewards, group_ids=ids, eps=1e-6, scale=scale, singleton="keep")
    want, _ = core_algos.compute_grpo_outcome_advantage(
        rewards.unsqueeze(1), torch.ones(12, 1), np.array(ids.tolist()), norm_adv_by_std_in_grpo=scale == "group"
    )
    torch.testing.assert_close(got, want.squeeze(1), rtol=1e-5, atol=1e-6)


def test_verl_rloo(core_algos, backend, scores):
    rewards, ids = scores
    got = rlkernels.group_advantages(rewards, group_ids=ids, scale="none", baseline="leave_one_out", singleton="keep")
    want, _ = core_algos.compute_rloo_outcome_advantage(rewards.unsqueeze(1), torch.ones(12, 1), np.array(ids.tolist()))
    torch.testing.assert_close(got, want.squeeze(1), rtol=1e-5, atol=1e-6)
