"""What a public call asks of a device besides its own kernels: memory and views, and never to be waited for.

Calls are seen under a TorchDispatchMode, where one of PyTorch's own is a launch or more. Inside an op of ours the mode
sees nothing: test_triton_compiled.py calls the launchers themselves."""

import ctypes
import os
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import rlkernels
from launches import Seen
from op_cases import CASES, Case
from rlkernels import _backends

LAUNCHING = {
    "linear": "the head multiplies matrices with PyTorch, and prepares its rows with it",
    "preference_loss": "plain PyTorch",
    "reward_pair_loss": "plain PyTorch",
    "token_logprobs, in place": "the case itself multiplies its logits",
}
"""Cases, by the beginning of their names, that launch more than their kernels, and why."""
COUNTS = ("linear",)
"""Without num_scored the head must know how many rows are scored."""


def run(case: Case, device: torch.device, counted: Callable[[], int] = lambda: 0) -> Seen:
    """Forward and backward, with numbers in bfloat16 and masks of integers."""
    case = case.to(device)
    differentiable = {name: value.bfloat16().requires_grad_() for name, value in case.differentiable.items()}
    data = {name: value.bfloat16() for name, value in case.data.items()}
    others = {name: value.long() if name == "mask" else value for name, value in case.others.items()}
    case = Case(case.op, differentiable, data, others)
    upstream = [torch.ones(output.shape, device=device) for output in case() if output.requires_grad]
    before = counted()
    with Seen() as seen:
        outputs = [output for output in case() if output.requires_grad]
        if outputs:
            torch.autograd.grad(outputs, list(differentiable.values()), upstream)
    seen.launches = counted() - before
    return seen


def reason(name: str) -> str | None:
    return next((why for beginning, why in LAUNCHING.items() if name.startswith(beginning)), None)


@pytest.mark.only("triton", "cuda")
@pytest.mark.parametrize("name", [name for name in CASES if not reason(name)])
def test_a_public_call_launches_its_kernels_and_nothing_else(backend, device, name):
    if backend not in _backends.BACKENDS_OF[CASES[name].op.__name__]:
        pytest.skip("another backend serves the op")
    seen = run(CASES[name], device)
    assert seen.own and seen.launched == [], seen.launched


@pytest.mark.only("triton")
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_the_next_tokens_of_a_batch_are_taken_as_they_are(backend, device, dtype):
    logits = torch.randn(2, 5, 19, device=device, requires_grad=True)
    token_ids = torch.randint(19, (2, 5), device=device, dtype=dtype)
    upstream = torch.ones(2, 4, device=device)
    with Seen() as seen:
        logprobs = rlkernels.token_logprobs(logits[:, :-1], token_ids[:, 1:])
    assert seen.own and seen.launched == [], seen.launched
    with Seen() as seen:
        torch.autograd.backward(logprobs, upstream)
    assert seen.launched == ["slice_backward"], seen.launched


@pytest.mark.only("triton", "cuda")
@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith(COUNTS)])
def test_no_public_call_waits_for_the_device(backend, device, name):
    assert run(CASES[name], device).waited == []


@pytest.mark.only("triton")
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith(COUNTS)])
def test_no_head_waits_for_the_device_with_num_scored(backend, device, name, monkeypatch):
    """Tensors of a CPU say here that they are of no CPU: there alone a wrong num_scored is refused by its value."""
    monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda tensor: False))
    case = CASES[name]
    seen = run(replace(case, others=case.others | {"num_scored": 6}), device)
    assert seen.own and seen.waited == []


CUDA_LAUNCHES = {
    "kl_penalty": 2,
    "group_advantages": 1,
    "group_advantages, weights of a list": 2,
    "group_advantages, by id": 3,
    "policy_loss": 4,
    "policy_loss, packed": 5,
    "value_loss": 3,
    "value_loss, packed": 4,
    "gae": 1,
    "td_lambda": 1,
    "discounted_returns": 1,
    "vtrace": 1,
    "shaped_rewards": 1,
    "gae, packed": 2,
    "td_lambda, packed": 2,
    "discounted_returns, packed": 2,
    "vtrace, packed": 2,
    "shaped_rewards, packed": 2,
}
"""Kernels of a call and of its gradient; packed sequences take one more, which looks at cu_seqlens."""


@pytest.mark.only("cuda")
@pytest.mark.parametrize("name", CUDA_LAUNCHES)
def test_how_many_kernels_a_call_launches(backend, device, name):
    if "CUDA_EMULATION_KERNELS" not in os.environ:
        pytest.skip("launches are counted by the emulation")
    counted = ctypes.CDLL(os.environ["CUDA_EMULATION_KERNELS"]).cuda_emulation_launches
    counted.restype = ctypes.c_int64
    assert run(CASES[name], device, counted).launches == CUDA_LAUNCHES[name]


CAPTURABLE = {name: case for name, case in CASES.items() if not reason(name)}
_head = CASES["linear_token_logprobs"]
CAPTURABLE["linear_token_logprobs, num_scored"] = replace(_head, others=_head.others | {"num_scored": 5})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", CAPTURABLE if torch.cuda.is_available() else ["any"])
@pytest.mark.parametrize("serving", ["cuda", "triton"])
def test_a_captured_call_is_replayed_on_other_inputs(serving, name):
    """Forward and backward in one CUDA graph."""
    case = CAPTURABLE[name].to(torch.device("cuda"))
    leaves = [value.requires_grad_() for value in case.differentiable.values()]

    def call() -> list[torch.Tensor]:
        outputs = case()
        differentiable = [output for output in outputs if output.requires_grad]
        upstream = [torch.ones_like(output) for output in differentiable]
        gradients = torch.autograd.grad(differentiable, leaves, upstream) if leaves else ()
        return [value.detach() for value in (*outputs, *gradients)]

    with rlkernels.use_backend(serving):
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            call()  # compiles, and allocates what stays
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
        with torch.no_grad():
            for value in (*case.differentiable.values(), *case.data.values()):
                value.mul_(0.5)
        wanted = call()
        graph.replay()
    for one, other in zip(captured, wanted, strict=True):
        assert torch.equal(one, other)
