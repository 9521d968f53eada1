"""The pytest plugin of run.py: the emulated CUDA kernels serve CPU tensors in this process."""

import os

import torch

from rlkernels import _backends

torch.ops.load_library(os.environ["CUDA_EMULATION_KERNELS"])
_backends.loaded("cuda", ("cpu",))
