"""Under the Triton kernels: the interpreter as mended here, the functions of _math.py, and accesses out of range."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cases import thorough
from triton_interpreter import INTERPRETED

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from rlkernels.triton import _math  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU, and TRITON_INTERPRET is not 1"),
]
pytestmark = [] if INTERPRETED else on_gpu

BLOCK = 1 << 16


@triton.jit
def _map_kernel(source, destination, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(destination + at, FUNCTION(tl.load(source + at)))


@triton.jit
def _copy_kernel(source, destination, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(destination + at, tl.load(source + at).to(destination.dtype.element_ty))


def cast(source: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    destination = torch.empty_like(source, dtype=dtype)
    _copy_kernel[(source.numel() // BLOCK,)](source, destination, BLOCK=BLOCK)
    return destination


def around_every_bfloat16() -> torch.Tensor:
    """Every bfloat16 (infinities, NaN, subnormals), with low halves on, just off and far from the tie."""
    high = torch.arange(1 << 16, dtype=torch.int64) << 16
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    bits = (high[:, None] + low).flatten()
    return bits.to(torch.uint32).view(torch.float32).to(DEVICE)


def same(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.view(torch.int16) == b.view(torch.int16)) | (a.isnan() & b.isnan())


@triton.jit
def _affine(a_before, b_before, a, b):
    return a * a_before, b + a * b_before


@triton.jit
def _scan_kernel(a, b, scanned, REVERSE: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    all_a, all_b = tl.associative_scan((tl.load(a + at), tl.load(b + at)), 0, _affine, reverse=REVERSE)
    tl.store(scanned + at, all_a)
    tl.store(scanned + SIZE + at, all_b)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("size", [1, 2, 64, 256])
def test_scans(size, reverse, interpreter_scans, monkeypatch):
    """Scans of pairs whose combination does not commute give what one element after the other gives."""
    a, b = 0.5 + torch.rand(2, size, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    scanned = torch.empty(2, size, device=DEVICE)
    _scan_kernel[(1,)](a, b, scanned, REVERSE=reverse, SIZE=size)
    all_a, all_b = torch.ones((), device=DEVICE), torch.zeros((), device=DEVICE)
    for i in reversed(range(size)) if reverse else range(size):
        all_a, all_b = a[i] * all_a, b[i] + a[i] * all_b
        torch.testing.assert_close(scanned[:, i], torch.stack([all_a, all_b]), rtol=1e-5, atol=0)
    if interpreter_scans is not None:
        from triton.runtime import interpreter

        monkeypatch.setattr(interpreter.ScanOps, "generic_scan", interpreter_scans)
        by_element = torch.empty_like(scanned)
        _scan_kernel[(1,)](a, b, by_element, REVERSE=reverse, SIZE=size)
        torch.testing.assert_close(scanned, by_element, rtol=1e-5, atol=0)


@triton.jit
def _sum_kernel(steps, total):
    summed = 0
    for step in range(steps):
        summed += step
    tl.store(total, summed)


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_loops_of_as_many_steps_as_an_argument_says(steps):
    total = torch.full((1,), -1, device=DEVICE)
    _sum_kernel[(1,)](steps, total)
    assert total.item() == sum(range(steps))


def test_cast_to_bfloat16_rounds_to_nearest_even():
    values = around_every_bfloat16()
    assert same(cast(values, torch.bfloat16), values.to(torch.bfloat16)).all()


def test_cast_from_bfloat16_is_exact():
    values = torch.arange(1 << 16).to(torch.uint16).view(torch.bfloat16).to(DEVICE)
    torch.testing.assert_close(cast(values, torch.float32), values.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(not INTERPRETED, reason="TRITON_INTERPRET is not 1")
def test_interpreter_without_the_repair_truncates(interpreter_rounds, monkeypatch):
    """Fails to reproduce, and skips, once Triton has mended it: then the repair can go."""
    from triton.runtime import interpreter

    monkeypatch.setattr(interpreter, "_convert_float", interpreter_rounds)
    values = around_every_bfloat16()
    values = values[values.isfinite() & (values.abs() > torch.finfo(torch.float32).smallest_normal)]
    values = values[: values.numel() // BLOCK * BLOCK]
    got = cast(values, torch.bfloat16)
    if same(got, values.to(torch.bfloat16)).all():
        pytest.skip(f"triton {triton.__version__} rounds: tests/triton_interpreter.py is not needed with it")
    truncated = (values.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
    assert same(got, truncated).all()


def apply(function, x: torch.Tensor) -> torch.Tensor:
    padded = torch.nn.functional.pad(x, (0, -x.numel() % BLOCK)).to(DEVICE)
    result = torch.empty_like(padded)
    _map_kernel[(padded.numel() // BLOCK,)](padded, result, FUNCTION=function, BLOCK=BLOCK)
    return result[: x.numel()].cpu()


def magnitudes(largest: float) -> torch.Tensor:
    """float32 values from 1e-30 to `largest`, evenly spread in their logarithms and evenly in themselves."""
    spread = torch.logspace(-30, 0, 20_000, dtype=torch.float64) * largest
    return torch.cat([spread, torch.linspace(0, largest, 40_000, dtype=torch.float64)]).float()


FUNCTIONS = {
    # in float64; domain; ulp: of the result, two for each of exp and its product with log2(e) where they are used
    "expm1": (torch.expm1, (-20.0, 20.0), 4),
    "expm1_minus_x": (
        lambda x: torch.where(x.abs() < 1e-3, x * x * (0.5 + x / 6 + x * x / 24), torch.expm1(x) - x),
        (-20.0, 20.0),
        6,
    ),
    "log1p": (torch.log1p, (-0.5, 1.0), 2),
    "softplus": (lambda x: torch.logaddexp(x, torch.zeros_like(x)), (-80.0, 80.0), 4),
    "tanh": (torch.tanh, (-20.0, 20.0), 4),
    "tanh_derivative": (lambda x: torch.cosh(x) ** -2, (-20.0, 20.0), 4),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_elementary_function(name):
    exact, (lowest, highest), ulps = FUNCTIONS[name]
    x = torch.cat([-magnitudes(-lowest), magnitudes(highest)] if lowest < 0 else [magnitudes(highest)])
    wanted = exact(x.double())
    error = (apply(getattr(_math, name), x).double() - wanted).abs()
    assert (error / wanted.abs().clamp(min=torch.finfo(torch.float32).smallest_normal)).max() <= ulps * 2**-23


BOUNDS = Path(__file__).with_name("triton_bounds.py")


@pytest.mark.skipif(not INTERPRETED, reason="TRITON_INTERPRET is not 1")
@pytest.mark.parametrize("how", [[], thorough(["thorough"])], ids=["", "thorough"])
@pytest.mark.parametrize("side", [thorough("before"), "after"])
def test_kernels_stay_in_range(side, how):
    """Whatever ids and cu_seqlens hold."""
    run = subprocess.run([sys.executable, BOUNDS, side, *how], capture_output=True, text=True)
    assert run.stdout.endswith("done\n"), (
        f"ended with {run.returncode} in: {run.stdout.splitlines()[-1:]}\n{run.stderr}"
    )


@pytest.mark.parametrize(("after", "offset"), [(True, "tensor.nbytes"), (False, "-1")])
def test_access_out_of_range_would_be_noticed(after, offset):
    program = f"""
import ctypes, torch, triton_bounds
tensor = triton_bounds.guarded(torch.zeros(5), after={after})
print("begun", flush=True)
ctypes.c_char.from_address(tensor.data_ptr() + {offset}).value
print("noticed nothing")
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=BOUNDS.parent, capture_output=True, text=True)
    assert run.stdout == "begun\n" and run.returncode < 0
