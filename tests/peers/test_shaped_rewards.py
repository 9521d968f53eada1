"""shaped_rewards beside verl's and OpenRLHF's rewards: theirs put the score on the last token that is scored."""

import pytest
import torch

from rlkernels import shaped_rewards
from rlkernels._codes import KL_ESTIMATORS


@pytest.fixture
def inputs():
    """Responses of 9, 4 and 1 tokens; differences within every clamp."""
    torch.manual_seed(0)
    logprobs = -torch.rand(3, 9)
    mask = torch.arange(9) < torch.tensor([[9], [4], [1]])
    return torch.randn(3), logprobs, logprobs - 0.5 * torch.randn(3, 9), mask


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_verl(core_algos, backend, inputs, estimator):
    scores, logprobs, ref_logprobs, mask = inputs
    # As its reward managers do: at the last token of the response.
    token_scores = torch.zeros_like(logprobs)
    token_scores[torch.arange(3), mask.sum(1) - 1] = scores
    want = token_scores - 0.2 * core_algos.kl_penalty(logprobs, ref_logprobs, estimator) * mask
    torch.testing.assert_close(shaped_rewards(*inputs, kl_coef=0.2, estimator=estimator), want)
    if estimator == "k1":
        theirs = core_algos.compute_rewards(token_scores, logprobs, ref_logprobs, 0.2) * mask
        torch.testing.assert_close(shaped_rewards(*inputs, kl_coef=0.2), theirs)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_openrlhf(openrlhf, backend, inputs, estimator):
    theirs = openrlhf("models.utils")
    scores, logprobs, ref_logprobs, mask = inputs
    kl = theirs.compute_approx_kl(logprobs, ref_logprobs, kl_estimator=estimator)
    want = theirs.compute_reward(scores, 0.2, kl, action_mask=mask).masked_fill(~mask, 0.0)
    torch.testing.assert_close(shaped_rewards(*inputs, kl_coef=0.2, estimator=estimator), want)
