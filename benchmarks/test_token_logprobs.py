"""token_logprobs beside what people use today, and beside a plain copy of the logits.

    pytest benchmarks/test_token_logprobs.py

Every implementation is first checked against the float64 reference on a few rows. Timings are never asserted.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from trl.trainer.utils import selective_log_softmax

import rlkernels
from rlkernels.ops import _registry

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
# Vocabularies of SmolLM2 and Qwen2.5, with as many rows as keep the logits near 200 and 300 MB in float32.
SHAPES = [(1024, 49152), (512, 151936)]
CHECKED_ROWS = 8
ROUNDS = 7


def eager(logits: Tensor, token_ids: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)


def ours(backend: str) -> Callable[[Tensor, Tensor], Tensor]:
    def run(logits: Tensor, token_ids: Tensor) -> Tensor:
        with rlkernels.use_backend(backend):
            return rlkernels.token_logprobs(logits, token_ids, inplace_backward=True)

    return run


def implementations(device: str) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    backends = [name for name in _registry.BACKENDS if _registry.status(name, device) is None]
    return {
        **{backend: ours(backend) for backend in backends},
        "eager": eager,
        "torch.compile": torch.compile(eager, dynamic=False),
        "trl": selective_log_softmax,
    }


class Producer(torch.autograd.Function):
    """Stands for the model: its output is `logits`, and its backward pass keeps the gradient that reaches it."""

    @staticmethod
    def forward(ctx, parameter, logits, received):
        ctx.received = received
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx, grad):
        ctx.received.append(grad)
        return torch.zeros((), device=grad.device), None, None


@pytest.fixture(scope="module")
def inputs():
    """Logits of the shape, dtype and device asked for, kept until others are; and tokens sampled from them."""
    kept = {}

    def make(shape, dtype, device):
        key = (shape, dtype, device)
        if key not in kept:
            kept.clear()
            torch.manual_seed(0)
            logits = torch.randn(shape, device=device).mul_(3).to(dtype)
            token_ids = torch.cat([torch.multinomial(rows.float().softmax(-1), 1)[:, 0] for rows in logits.split(64)])
            kept[key] = logits, token_ids, torch.randn(shape[0], device=device)
        return kept[key]

    return make


def check(got: Tensor, want: Tensor, what: str) -> None:
    """A wrong implementation is not worth timing: within 16 ulp of the largest value, in the dtype of the result."""
    error = (got.double() - want).abs().max().item()
    bound = 16 * torch.finfo(got.dtype).eps * want.abs().max().item()
    assert error <= bound, f"{what} is off by {error:.3g}; at most {bound:.3g} was expected"


def synchronized(function: Callable[[], object], device: str) -> Callable[[], None]:
    def run() -> None:
        function()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def name_of(shape, dtype, device, what) -> str:
    return f"{what} {shape[0]}x{shape[1]} {str(dtype).removeprefix('torch.')} {device}"


CASES = pytest.mark.parametrize(
    ("device", "shape", "dtype"),
    [(device, shape, dtype) for device in DEVICES for shape in SHAPES for dtype in (torch.float32, torch.bfloat16)],
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else str(value).removeprefix("torch."),
)
NAMES = ["reference", "cpu", "triton", "cuda", "eager", "torch.compile", "trl"]


@CASES
@pytest.mark.parametrize("name", [*NAMES, "copy"])
def test_forward(benchmark, record, inputs, name, device, shape, dtype):
    logits, token_ids, _ = inputs(shape, dtype, device)
    benchmark.group = name_of(shape, dtype, device, "forward")
    size = logits.numel() * logits.element_size()
    if name == "copy":
        destination = torch.empty_like(logits)
        run, moved = lambda: destination.copy_(logits), 2 * size
    else:
        function = implementations(device).get(name)
        if function is None:
            pytest.skip(f"{name}: {_registry.status(name, device)}")
        run, moved = lambda: function(logits, token_ids), size
        with torch.no_grad():
            want = eager(logits[:CHECKED_ROWS].double(), token_ids[:CHECKED_ROWS])
            check(run()[:CHECKED_ROWS], want, "log-probabilities")
    with torch.no_grad():
        benchmark.pedantic(synchronized(run, device), rounds=ROUNDS, warmup_rounds=1)
    record(benchmark.group, name, device, moved)


@CASES
@pytest.mark.parametrize("name", NAMES)
def test_forward_backward(benchmark, record, inputs, name, device, shape, dtype):
    """Ours writes the gradient over the logits, which are restored between rounds, outside the timing."""
    source, token_ids, upstream = inputs(shape, dtype, device)
    function = implementations(device).get(name)
    if function is None:
        pytest.skip(f"{name}: {_registry.status(name, device)}")
    parameter = torch.zeros((), device=device, requires_grad=True)
    logits = torch.empty_like(source)
    received: list[Tensor] = []

    def restore() -> None:
        received.clear()
        logits.copy_(source)

    def run() -> None:
        logprobs = function(Producer.apply(parameter, logits, received), token_ids)
        logprobs.backward(upstream.to(logprobs.dtype))

    restore()
    run()
    rows = source[:CHECKED_ROWS].double().requires_grad_()
    eager(rows, token_ids[:CHECKED_ROWS]).backward(upstream[:CHECKED_ROWS].double())
    check(received[0][:CHECKED_ROWS], rows.grad, "gradient")

    benchmark.group = name_of(shape, dtype, device, "forward+backward")
    benchmark.pedantic(synchronized(run, device), setup=restore, rounds=ROUNDS, warmup_rounds=1)
    record(benchmark.group, name, device, 3 * source.numel() * source.element_size())
