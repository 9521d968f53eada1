"""Calls each op once, forward and backward, on every backend that serves a device: gpu_smoke.py [DEVICE]. It needs only
the package and PyTorch, so that compute-sanitizer can run it.

    compute-sanitizer --tool memcheck python tests/gpu_smoke.py cuda
"""

import sys

import torch

import rlkernels
from op_cases import CASES, Case
from rlkernels import _backends


def call(case: Case) -> None:
    inputs = {name: value.detach().requires_grad_() for name, value in case.differentiable.items()}
    losses = [result.sum() for result in case(**inputs) if result.requires_grad]
    if losses:
        torch.autograd.backward(losses)


def main(device_type: str = "cuda") -> None:
    if device_type == "cuda" and not torch.cuda.is_available():
        sys.exit("gpu_smoke.py: no GPU is available; name another device, such as cpu")
    for backend in _backends.KERNEL_BACKENDS:
        if reason := _backends.status(backend, device_type):
            print(f"{backend}: skipped: {reason}")
            continue
        with rlkernels.use_backend(backend):
            for case in CASES.values():
                call(case.to(torch.device(device_type)))
        if device_type == "cuda":
            torch.cuda.synchronize()
        print(f"{backend}: {len(CASES)} calls")


if __name__ == "__main__":
    main(*sys.argv[1:])
