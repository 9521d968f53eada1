"""What a benchmark is: a function and its implementations on identical inputs, each checked before it is timed."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

import rlkernels
from peak_memory import peak_memory
from rlkernels import _backends

BUDGET = 1.0
"""Seconds that the rounds of one implementation take, about."""
ROUNDS = (5, 1000)
"""The fewest rounds, for long calls, and the most, for short ones."""
SLOW = (3.0, 2)
"""Calls that take more seconds than the first number have only the second number of rounds: what they are compared
with is several times faster."""
COPIED = 256 * 2**20
"""Bytes, several times what caches hold."""
METRICS = 16
"""A result of at most this many numbers holds metrics. Each is compared by itself, because they are means of
differences that eager PyTorch cancels."""
METRICS_TOLERANCE = 1e-3


class WrongResult(AssertionError):
    """An implementation is off by more than rounding: it is not timed."""


@dataclass(frozen=True)
class Peer:
    """Another project's own function."""

    load: Callable[[], Callable]
    """Gives the function. ModuleNotFoundError: the project is not installed here."""
    adapt: Callable[..., tuple] = lambda *inputs: inputs
    """Brings the inputs into the layout that the project asks for. Not timed."""
    devices: tuple[str, ...] = ("cpu", "cuda")


@dataclass(frozen=True)
class Bar:
    """The most that ours may take, as a multiple of what an implementation takes."""

    time: float | None = None
    memory: float | None = None


@dataclass(frozen=True, eq=False)
class Case:
    """One function at one shape.

    `ours` is the public function. The float64 reference serves it on float64 inputs, and gives what every
    implementation is checked against. `eager` is timed as it is and under torch.compile.
    """

    op: str
    shape: tuple[int, ...]
    inputs: Callable[[], tuple]
    """Made under a fixed seed and on the default device of the moment."""
    ours: Callable
    eager: Callable | None = None
    peers: dict[str, Peer] = field(default_factory=dict)
    label: str = "forward, float32"
    gradient: int = 0
    """Time the gradient with respect to this many of the first inputs too, for upstream gradients other than 1."""
    overwrites: bool = False
    """The first input is overwritten, and restored between rounds, which is not timed."""
    moved: int = 0
    """Bytes: each input read once, each output written once, forward and backward; a statistic that must come first
    reads once more."""
    mask: int | None = None
    """Position of the input that says which elements are compared."""
    compared: Callable[[tuple], tuple] = lambda outputs: outputs
    """What of the outputs every implementation gives."""
    rows: int | None = None
    """Compare the first rows alone, where float64 for all would not fit. For functions of rows."""
    whole: tuple[int, ...] = ()
    """Positions of inputs that are not cut to those rows."""
    ulps: int = 16
    """How far an implementation may be off, in ulp of the largest value of an output."""
    precision: torch.dtype | None = None
    """Whose ulp that is, where it is not the output's: that of the products on the way."""
    wanted: dict[str, float] = field(default_factory=dict)
    """How many times as fast as an implementation ours is meant to be."""
    bars: dict[str, Bar] = field(default_factory=dict)
    """What ours may take of an implementation, or of the fastest of those whose names begin with a word."""
    most_bytes: int | None = None
    """The most bytes of memory that ours may take."""
    floors: dict[str, Callable[..., Callable[[], object]]] = field(default_factory=dict)
    """Work that no implementation can do without. Each makes from the inputs a function that does it on memory that is
    ready. It is timed next to the implementations, and has no result to check."""
    with_reference: bool = True
    """Time the reference too, which for large inputs takes longer than all the others."""
    once: bool = False
    """Run once after the check, for the memory, what takes many seconds."""

    @property
    def name(self) -> str:
        return f"{self.op} {list(self.shape)} {self.label}"


def backends(device: str) -> tuple[str, ...]:
    """Under its interpreter Triton serves CPU tensors too, at no speed worth timing."""
    return ("reference", "cpu") if device == "cpu" else ("reference", "triton", "cuda")


def implementations(case: Case, device: str) -> list[str]:
    ours = backends(device)[0 if case.with_reference else 1 :]
    plain = ["eager", "torch.compile"] if case.eager else []
    return [*ours, *plain, *(name for name, peer in case.peers.items() if device in peer.devices), *case.floors]


def bar(case: Case, name: str) -> dict[str, Any] | None:
    """What ours may take of the implementation `name`, and which of its kind share the bar."""
    for kind, most in case.bars.items():
        if name == kind or name.startswith(f"{kind} "):
            return {"of": kind, "time": most.time, "memory": most.memory}
    return None


def function_of(case: Case, name: str, device: str) -> Callable:
    """Raises LookupError, with the reason, where an implementation does not exist here."""
    if name in case.peers:
        try:
            return case.peers[name].load()
        except ModuleNotFoundError as error:
            raise LookupError(f"{error.name} is not installed: make test-peers") from error
    if name == "eager":
        return case.eager
    if name == "torch.compile":
        return torch.compile(case.eager, dynamic=False)
    if reason := _backends.status(name, device):
        raise LookupError(reason)

    def ours(*inputs):
        with rlkernels.use_backend(name):
            return case.ours(*inputs)

    return ours


def map_tensors(function: Callable[[Tensor], Tensor], values: tuple) -> tuple:
    return tuple(function(value) if isinstance(value, Tensor) else value for value in values)


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return tuple(outputs) if isinstance(outputs, (tuple, list)) else (outputs,)


def upstream(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The same gradients for the same elements, whatever the dtype and the number of rows; 1 for a loss."""
    return [torch.arange(output.numel()).double().cos().view(output.shape).to(output) for output in outputs]


class Producer(torch.autograd.Function):
    """Stands for the model: what it gives may be overwritten, as a leaf and its views may not."""

    @staticmethod
    def forward(ctx, parameter: Tensor, output: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[None, None]:
        return None, None


class Call:
    """One implementation on its inputs: `run()` is what is timed, `restore()` what must come before each run."""

    def __init__(self, function: Callable, inputs: tuple, *, gradient: int, overwrites: bool = False) -> None:
        self.function, self.inputs = function, inputs
        self.gradient, self.overwrites = gradient, overwrites
        self.source = inputs[0]
        self.leaves = [leaf.detach().requires_grad_() for leaf in inputs[:gradient]]
        self.parameter = torch.zeros((), device=inputs[0].device, requires_grad=True)
        self.upstream: list[Tensor] | None = None

    def restore(self) -> None:
        if self.overwrites:
            if self.inputs[0] is self.source:
                self.inputs = (torch.empty_like(self.source), *self.inputs[1:])
            self.inputs[0].copy_(self.source)

    def run(self) -> tuple[Tensor, ...]:
        if not self.gradient:
            with torch.no_grad():
                return as_tuple(self.function(*self.inputs))
        # The stand-in is a Python function, whose time is as much as a small op's own: only where it is needed.
        produced = [Producer.apply(self.parameter, self.inputs[0])] if self.overwrites else self.leaves
        outputs = as_tuple(self.function(*produced, *self.inputs[len(produced) :]))
        differentiable = [output for output in outputs if output.requires_grad]
        if self.upstream is None:
            self.upstream = upstream(tuple(differentiable))
        gradients = torch.autograd.grad(differentiable, produced, self.upstream)
        return (*(output.detach() for output in outputs), *gradients)


@lru_cache(maxsize=1)
def prepared(case: Case, device: str) -> tuple[tuple, tuple[Tensor, ...]]:
    """The inputs of a case, and the float64 reference's outputs."""
    torch.manual_seed(0)
    with torch.device(device):
        inputs = case.inputs()
    rows = slice(case.rows)
    cut = tuple(
        value[rows] if isinstance(value, Tensor) and value.dim() and position not in case.whole else value
        for position, value in enumerate(inputs)
    )
    exact = map_tensors(lambda t: t.double() if t.is_floating_point() else t, cut)
    call = Call(case.ours, exact, gradient=case.gradient, overwrites=case.overwrites)
    call.restore()
    return inputs, call.run()


def check(case: Case, inputs: tuple, got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    """Raises WrongResult unless every output is that of the float64 reference, up to rounding."""
    got, want = case.compared(got), case.compared(want)
    if len(got) < len(want):
        raise WrongResult(f"{len(got)} outputs, wanted {len(want)}")
    for number, (output, exact) in enumerate(zip(got, want, strict=False)):
        if case.rows is not None:
            output = output[: case.rows]
        if output.numel() != exact.numel():
            raise WrongResult(f"output {number} has the shape {list(output.shape)}, wanted {list(exact.shape)}")
        output = output.reshape(exact.shape)
        error = (output.double() - exact).abs()
        if case.rows is None and exact.dim() == 1 and exact.numel() <= METRICS:
            bound = METRICS_TOLERANCE * exact.abs()
        else:
            if case.mask is not None and exact.shape == inputs[case.mask].shape:
                scored = inputs[case.mask] != 0
                error, exact = error[scored], exact[scored]
            eps = max(torch.finfo(dtype).eps for dtype in (output.dtype, case.precision or output.dtype))
            bound = case.ulps * eps * exact.abs().max()
        if not bool((error <= bound).all()):
            raise WrongResult(f"output {number} is off by {error.max():.3g}; at most {bound.max():.3g} was expected")


def prepare(case: Case, name: str, device: str) -> Call:
    """An implementation that has been checked, and is warm."""
    if name in case.floors:
        inputs, _ = prepared(case, device)
        work = case.floors[name](*inputs)
        return Call(lambda *_: work(), inputs, gradient=0)
    function = function_of(case, name, device)
    inputs, want = prepared(case, device)
    adapt = case.peers[name].adapt if name in case.peers else Peer.adapt
    call = Call(function, adapt(*inputs), gradient=case.gradient, overwrites=case.overwrites)
    call.restore()
    check(case, inputs, call.run(), want)
    return call


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak_bytes(call: Call, device: str) -> int:
    """The most bytes that one run holds in tensors of its own. A run apart from the timing."""
    call.restore()
    if device == "cpu":
        return peak_memory(call.run)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call.run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def rounds(expected: float) -> int:
    """The number of rounds for a call that is expected to take this many seconds."""
    fewest, most = ROUNDS
    if expected > SLOW[0]:
        fewest = SLOW[1]
    return min(max(int(BUDGET / expected), fewest), most)


def percentiles(seconds: list[float]) -> dict[str, float]:
    if len(seconds) == 1:
        return dict.fromkeys(("p20", "p50", "p80"), seconds[0])
    tenths = statistics.quantiles(seconds, n=10, method="inclusive")
    return {"p20": tenths[1], "p50": tenths[4], "p80": tenths[7]}


def copy_bandwidth(device: str) -> float:
    """Bytes a second, read and written, of a plain copy that no cache holds."""
    source = torch.zeros(COPIED, dtype=torch.uint8, device=device)
    destination = torch.empty_like(source)
    seconds = []
    for _ in range(10):
        synchronize(device)
        begin = time.perf_counter()
        destination.copy_(source)
        synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return 2 * COPIED / statistics.median(seconds[2:])


def response_mask(shape: tuple[int, int]) -> Tensor:
    """Responses of 30 to 100 % of the longest length, right-padded."""
    lengths = (shape[1] * (0.3 + 0.7 * torch.rand(shape[0], 1))).long()
    return torch.arange(shape[1]) < lengths
