"""The ops as Triton kernels, for NVIDIA and AMD GPUs. Importing this package registers them."""

from rlkernels.triton import groups, kl, logprobs, policy_loss

__all__ = ["groups", "kl", "logprobs", "policy_loss"]
