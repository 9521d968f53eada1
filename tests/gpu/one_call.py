"""Calls one kernel once, between cudaProfilerStart and Stop, for ncu: one_call.py NAME."""

import sys
from collections.abc import Callable
from contextlib import ExitStack

import calls
import torch

import rlkernels
from rlkernels import _backends

GPU = torch.cuda.is_available()
ROWS, VOCABULARY, TOKENS = (2048, calls.VOCABULARY, 16384) if GPU else (4, 97, 16)

KERNELS: dict[str, tuple[str, Callable[[], calls.Call]]] = {
    "logprobs": ("triton", lambda: calls.token_logprobs(ROWS, VOCABULARY, 0.7, True)),
    "logprobs_backward": ("triton", lambda: calls.token_logprobs_backward(ROWS, VOCABULARY, 0.7)),
    "gae": ("cuda", lambda: calls.gae(8, 2 * TOKENS)),
    "gae_triton": ("triton", lambda: calls.gae(8, 2 * TOKENS)),
    "policy_loss": ("cuda", lambda: calls.policy_loss(512 if GPU else 3, TOKENS)),
    "value_loss": ("cuda", lambda: calls.value_loss(512 if GPU else 3, TOKENS)),
}


def main(name: str) -> None:
    backend, make = KERNELS[name]
    torch.set_default_device("cuda" if GPU else "cpu")
    with ExitStack() as stack:
        if GPU and _backends.status(backend, "cuda") is None:
            stack.enter_context(rlkernels.use_backend(backend))
        call = make()
        for _ in range(2):  # the first compiles
            call.run()
        if GPU:
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            call.run()
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
    print(f"{name} on {backend if GPU else 'the CPU'}")


if __name__ == "__main__":
    main(*sys.argv[1:])
