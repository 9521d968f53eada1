"""kl_penalty and shaped_rewards over a million tokens."""

from functools import partial

import torch

import peer_modules
import rlkernels
from suite import Case, Peer, response_mask

SHAPE = (1024, 1024)
SIZE = 4 * SHAPE[0] * SHAPE[1]
KL_COEF = 0.05


def policies():
    logprobs = -3 * torch.rand(SHAPE)
    return logprobs, logprobs + 0.2 * torch.randn(SHAPE)


def k3(logprobs, ref_logprobs):
    difference = ref_logprobs - logprobs
    return torch.exp(difference) - difference - 1


def shaped(scores, logprobs, ref_logprobs, mask):
    rewards = -KL_COEF * (logprobs - ref_logprobs) * mask
    last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1, keepdim=True)
    return rewards.scatter_add(1, last, scores.unsqueeze(1))


def openrlhf_k3():
    return partial(peer_modules.openrlhf("models.utils").compute_approx_kl, kl_estimator="k3")


def openrlhf_shaped():
    models = peer_modules.openrlhf("models.utils")

    def function(scores, logprobs, ref_logprobs, mask):
        return models.compute_reward(scores, KL_COEF, models.compute_approx_kl(logprobs, ref_logprobs), mask)

    return function


CASES = [
    Case(
        "kl_penalty",
        SHAPE,
        policies,
        ours=lambda logprobs, ref: rlkernels.kl_penalty(logprobs, ref, estimator="k3"),
        eager=k3,
        peers={
            "verl": Peer(lambda: partial(peer_modules.verl().kl_penalty, kl_penalty="k3")),
            "openrlhf": Peer(
                lambda: partial(peer_modules.openrlhf("models.utils").compute_approx_kl, kl_estimator="k3")
            ),
        },
        label="forward+backward, float32",
        gradient=True,
        moved=7 * SIZE,
        wanted={"eager": 3, "torch.compile": 1},
    ),
    Case(
        "shaped_rewards",
        SHAPE,
        lambda: (torch.randn(SHAPE[0]), *policies(), response_mask(SHAPE)),
        ours=lambda *inputs: rlkernels.shaped_rewards(*inputs, kl_coef=KL_COEF, estimator="k1"),
        eager=shaped,
        peers={"openrlhf": Peer(openrlhf_shaped)},
        moved=3 * SIZE + SIZE // 4,
        mask=3,
    ),
]


def test_kl(case, implementation, measure):
    measure(case, implementation)
