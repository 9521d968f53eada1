"""Fused kernels for the arithmetic between a language model and its optimizer in reinforcement learning.

    token_logprobs           log-probabilities and entropy of sampled tokens, from logits
    linear_token_logprobs    the same from hidden states and the LM head, whose logits are never stored
    linear_policy_loss       policy_loss of these, with the head's gradient made on the way
    linear_preference_logps  these summed over sequences, as preference_loss takes them
    linear_kl_divergence     divergence from a teacher over the whole vocabulary, from both heads
    wrap_lm_head             makes a Hugging Face causal LM give these; unwrap_lm_head undoes it
    kl_penalty               per-token estimates of the KL divergence from a reference model
    shaped_rewards           per-token rewards: a score at the end of each sequence, less a KL penalty
    group_advantages         rewards relative to their group: GRPO, RLOO, Dr. GRPO
    gae                      advantages and returns, skipping masked tokens; so do discounted_returns,
                             td_lambda, vtrace
    masked_mean              mean of scored elements
    masked_whiten            scored elements to mean 0 and variance 1, over one process or many
    policy_loss              the PPO and GRPO family of losses with KL penalty, gradient and metrics in one pass
    value_loss               PPO's clipped value loss, the same way
    preference_loss          DPO and its relatives, on log-probabilities of pairs
    reward_pair_loss         Bradley-Terry, on scores of pairs

Each is a function on tensors that serves CPUs (C++ SIMD) and GPUs (Triton, CUDA C++), is differentiable where its
docstring says so, and works under torch.compile. `use_backend` chooses the implementation; by default the tensors'
device does.

All take dense tensors that hold their values themselves: sparse, nested, quantised and complex ones, wrappers such as
DTensor and tensors on the meta device are refused. Options that are numbers may be NumPy's, but no bools, tensors or
text. They are 0 or of a magnitude that float32 holds in full (1.2e-38 to 3.4e38), also where the tensors are float64: a
number that would be rounded to 0 or infinity is refused. Each error is a TypeError or ValueError of one line, which
names the argument, what came and what was wanted.
"""

from rlkernels import _backends
from rlkernels._backends import use_backend
from rlkernels.lm_head import unwrap_lm_head, wrap_lm_head
from rlkernels.ops.groups import group_advantages
from rlkernels.ops.kl import kl_penalty, shaped_rewards
from rlkernels.ops.linear_kl_divergence import linear_kl_divergence
from rlkernels.ops.linear_logprobs import linear_token_logprobs
from rlkernels.ops.linear_policy_loss import linear_policy_loss
from rlkernels.ops.linear_preference_logps import linear_preference_logps
from rlkernels.ops.logprobs import token_logprobs
from rlkernels.ops.masked import masked_mean, masked_whiten
from rlkernels.ops.policy_loss import policy_loss
from rlkernels.ops.preference_loss import preference_loss, reward_pair_loss
from rlkernels.ops.recurrence import discounted_returns, gae, td_lambda, vtrace
from rlkernels.ops.value_loss import value_loss

__version__ = "0.1.0"
__all__ = [
    "discounted_returns",
    "gae",
    "group_advantages",
    "kl_penalty",
    "linear_kl_divergence",
    "linear_policy_loss",
    "linear_preference_logps",
    "linear_token_logprobs",
    "masked_mean",
    "masked_whiten",
    "policy_loss",
    "preference_loss",
    "reward_pair_loss",
    "shaped_rewards",
    "td_lambda",
    "token_logprobs",
    "unwrap_lm_head",
    "use_backend",
    "value_loss",
    "vtrace",
    "wrap_lm_head",
]

_backends.load()
