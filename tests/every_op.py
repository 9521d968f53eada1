"""Runs every public op of the installed package on CPU tensors and compares it with the reference: every_op.py FOLDER,
where the package must lie."""

import sys

import torch

import rlkernels
import rlkernels.trainers
from rlkernels import _backends

for module in (rlkernels, rlkernels.trainers):
    assert module.__file__.startswith(sys.argv[1]), module.__file__
assert _backends.status("cpu", "cpu") is None

generator = torch.Generator().manual_seed(0)


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator)


rows, others, scores, mask = numbers(4, 6), numbers(4, 6), numbers(4), torch.ones(4, 6, dtype=torch.bool)
hidden, weight, ids = numbers(4, 6, 8), numbers(16, 8), torch.randint(16, (4, 6), generator=generator)
CALLS = {
    "token_logprobs": lambda: rlkernels.token_logprobs(hidden @ weight.T, ids),
    "kl_penalty": lambda: rlkernels.kl_penalty(rows, others),
    "shaped_rewards": lambda: rlkernels.shaped_rewards(scores, rows, others, mask, kl_coef=0.1),
    "group_advantages": lambda: rlkernels.group_advantages(scores, group_size=2),
    "gae": lambda: rlkernels.gae(rows, others, mask),
    "discounted_returns": lambda: rlkernels.discounted_returns(rows, mask, gamma=0.9),
    "td_lambda": lambda: rlkernels.td_lambda(rows, others, mask),
    "vtrace": lambda: rlkernels.vtrace(rows, others, rows, others, mask),
    "policy_loss": lambda: rlkernels.policy_loss(rows, others, scores, mask),
    "value_loss": lambda: rlkernels.value_loss(rows, None, others, mask),
    "masked_mean": lambda: rlkernels.masked_mean(rows, mask),
    "masked_whiten": lambda: rlkernels.masked_whiten(rows, mask),
    "linear_token_logprobs": lambda: rlkernels.linear_token_logprobs(hidden, weight, ids),
    "linear_policy_loss": lambda: rlkernels.linear_policy_loss(hidden, weight, ids, None, scores, mask),
    "linear_preference_logps": lambda: rlkernels.linear_preference_logps(hidden, weight, ids, mask),
    "linear_kl_divergence": lambda: rlkernels.linear_kl_divergence(hidden, weight, 2 * hidden, weight),
    "preference_loss": lambda: rlkernels.preference_loss(*rows),
    "reward_pair_loss": lambda: rlkernels.reward_pair_loss(*rows[:2]),
}
assert CALLS.keys() == _backends.BACKENDS_OF.keys()
for name, call in CALLS.items():
    assert _backends.select(rows, name) == ("cpu" if _backends.BACKENDS_OF[name] else "reference"), name
    with rlkernels.use_backend("reference"):
        expected = call()
    torch.testing.assert_close(call(), expected, msg=lambda text, name=name: f"{name}: {text}")
print(len(CALLS), "ops")
