"""kl_penalty beside the functions of verl and OpenRLHF, each with its own clamps."""

import pytest
import torch

import rlkernels
from rlkernels._codes import KL_ESTIMATORS, STRAIGHT_THROUGH


@pytest.fixture
def logprobs():
    torch.manual_seed(0)
    policy, reference = torch.randn(2, 6, 50) * 4
    policy[0, 0] += 30  # beyond every clamp
    return policy.requires_grad_(), reference


def value_and_gradient(function, policy, reference):
    value = function(policy, reference)
    return value, *torch.autograd.grad(value, policy, torch.arange(value.numel()).view_as(value).float())


@pytest.mark.parametrize("estimator", [*KL_ESTIMATORS, *STRAIGHT_THROUGH])
def test_verl(core_algos, backend, logprobs, estimator):
    if estimator.endswith("+"):
        logprobs = [values / 10 for values in logprobs]  # verl's clamps leave these gradients alone; ours stop them
    clamps = dict(log_ratio_clamp=20.0, value_clamp=10.0) if estimator.startswith("k3") else {}
    got = value_and_gradient(lambda p, r: rlkernels.kl_penalty(p, r, estimator=estimator, **clamps), *logprobs)
    want = value_and_gradient(lambda p, r: core_algos.kl_penalty(p, r, estimator), *logprobs)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_openrlhf(openrlhf, backend, logprobs, estimator):
    theirs = openrlhf("models.utils").compute_approx_kl
    clamps = dict(value_clamp=10.0)
    got = value_and_gradient(lambda p, r: rlkernels.kl_penalty(p, r, estimator=estimator, **clamps), *logprobs)
    want = value_and_gradient(lambda p, r: theirs(p, r, kl_estimator=estimator), *logprobs)
    torch.testing.assert_close(got, want)
