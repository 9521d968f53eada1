"""What a call costs before any work is done: eight numbers, where k1 is one subtraction."""

import torch

import rlkernels
from rlkernels import _backends, _registry
from suite import Case, Peer

NO_CLAMP = float("inf")


def kernel_alone():
    """The op below the public function: PyTorch's dispatcher and the kernel, without the checks."""
    backend = "cuda" if torch.cuda.is_available() and _backends.status("cuda", "cuda") is None else "cpu"
    op = _registry.op("kl_penalty_forward", backend)
    return lambda logprobs, ref: op(logprobs, ref, 0, False, NO_CLAMP, NO_CLAMP)


CASES = [
    Case(
        "call_overhead",
        (8,),
        lambda: (torch.randn(8), torch.randn(8)),
        ours=lambda logprobs, ref: rlkernels.kl_penalty(logprobs, ref, estimator="k1"),
        eager=torch.sub,
        peers={"kernel alone": Peer(kernel_alone)},
        label="kl_penalty k1, float32",
        moved=3 * 4 * 8,
        rows=8,
    ),
]


def test_call_overhead(case, implementation, measure):
    measure(case, implementation)
