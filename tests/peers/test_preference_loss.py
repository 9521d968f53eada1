"""preference_loss beside OpenRLHF's DPOLoss."""

import pytest
import torch

from rlkernels import preference_loss


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("ipo", [False, True])
def test_openrlhf(openrlhf, label_smoothing, ipo):
    """Its ipo is of sums over tokens: ours of completions of one token."""
    torch.manual_seed(0)
    values = list(-3 * torch.rand(4, 7, dtype=torch.float64))
    values[0].requires_grad_()
    values[1].requires_grad_()
    theirs = openrlhf("models.loss").DPOLoss(0.3, label_smoothing, ipo)
    want, chosen_rewards, rejected_rewards = theirs(*values)
    if ipo:
        one = torch.ones(7)
        got, metrics = preference_loss(*values, loss="ipo", beta=0.3, chosen_lengths=one, rejected_lengths=one)
    else:
        got, metrics = preference_loss(*values, beta=0.3, label_smoothing=label_smoothing)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(metrics[0], chosen_rewards.mean())
    torch.testing.assert_close(metrics[1], rejected_rewards.mean())
    for one, other in zip(torch.autograd.grad(got, values[:2]), torch.autograd.grad(want, values[:2]), strict=True):
        torch.testing.assert_close(one, other)
