"""Triton kernels for GPUs. Importing this registers them; nothing else of the package needs triton."""

import rlkernels.triton.groups
import rlkernels.triton.kl
import rlkernels.triton.kl_divergence
import rlkernels.triton.lm_head
import rlkernels.triton.logprobs
import rlkernels.triton.masked
import rlkernels.triton.policy_loss
import rlkernels.triton.recurrence
import rlkernels.triton.value_loss  # noqa: F401
