"""Triton's interpreter, its casts between float32 and bfloat16 repaired.

To bfloat16 it drops the low half of the float (seen in 3.7.1 and 3.9.0), where GPUs round to nearest even: gradients
come out biased towards zero, and a tolerance wide enough to admit that would admit such a kernel too. From bfloat16 it
garbles subnormals.

Its fused multiply-add rounds the product too. The kernels that use one mean what a GPU does.

Its matrix product takes the bits of bfloat16 for integers.

Its scans go element by element, in Python. Here they go in steps over 1, 2, 4 ... elements, as a GPU's do: of whole
arrays, a hundred times as fast, and in an order of additions like a GPU's.

In 3.6 a loop over as many steps as an argument says fails with NumPy 2.4, which makes no integer of an array of one.
"""

import os

import numpy as np
import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The bits of float32 `values` as bfloat16, rounded to nearest even; a NaN stays a NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    last_kept_bit = (bits >> 16) & 1
    rounded = (bits + 0x7FFF + last_kept_bit) >> 16
    quiet_nan = (bits >> 16) | 0x0040
    return np.where(np.isnan(values), quiet_nan, rounded).astype(np.uint16)


def fused_multiply_add(builder, x, y, z):
    """In place of the interpreter's InterpreterBuilder.create_fma, for float32: float64 holds the product exactly."""
    from triton.runtime import interpreter

    assert x.data.dtype == np.float32
    result = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
    return interpreter.TensorHandle(result.astype(np.float32), x.dtype.scalar)


def widened_dot(dot):
    """In place of the interpreter's InterpreterBuilder.create_dot, which is given: bfloat16 factors as float32."""
    import triton.language as tl
    from triton.runtime import interpreter

    def widened(factor):
        if factor.dtype.scalar != tl.bfloat16:
            return factor
        return interpreter.TensorHandle((factor.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(builder, a, b, *rest):
        return dot(builder, widened(a), widened(b), *rest)

    return create_dot


@pytest.fixture(scope="session", autouse=True)
def interpreter_rounds():
    """Round casts to bfloat16, and compute silently, as a GPU does, with infinities and NaN. Gives what it replaced."""
    if not INTERPRETED:
        yield None
        return
    import triton.language as tl
    from triton.runtime import interpreter

    truncating = interpreter._convert_float

    def rounding(values, from_dtype, to_dtype, rounding_mode):
        towards_zero = rounding_mode == interpreter._ir.ROUNDING_MODE.RTZ
        if (from_dtype, to_dtype) == (tl.float32, tl.bfloat16) and not towards_zero:
            return to_bfloat16(values)
        if (from_dtype, to_dtype) == (tl.bfloat16, tl.float32):
            return values.astype(np.uint32) << 16
        return truncating(values, from_dtype, to_dtype, rounding_mode)

    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
        patch.setattr(interpreter, "_convert_float", rounding)
        patch.setattr(interpreter.InterpreterBuilder, "create_fma", fused_multiply_add)
        patch.setattr(
            interpreter.InterpreterBuilder, "create_dot", widened_dot(interpreter.InterpreterBuilder.create_dot)
        )
        yield truncating


def scan_in_steps(scan, tensors):
    """In place of the interpreter's ScanOps.generic_scan, whose `self` is `scan`."""
    arrays = [tensor.handle.data for tensor in tensors]
    size = arrays[0].shape[scan.axis]
    index = np.arange(size).reshape([-1 if axis == scan.axis else 1 for axis in range(arrays[0].ndim)])

    def to_tensors(arrays):
        return [scan.to_tensor(array, tensor.dtype) for array, tensor in zip(arrays, tensors, strict=True)]

    distance = 1
    while distance < size:
        before = to_tensors([np.roll(array, distance, scan.axis) for array in arrays])
        combined = scan.combine_fn.fn(*before, *to_tensors(arrays))
        combined = combined if isinstance(combined, tuple) else (combined,)
        pairs = zip(combined, arrays, strict=True)
        arrays = [np.where(index >= distance, tensor.handle.data, array) for tensor, array in pairs]
        distance *= 2
    return to_tensors(arrays)


@pytest.fixture(scope="session", autouse=True)
def interpreter_scans():
    """Scan in logarithmically many steps. Gives what it replaced."""
    if not INTERPRETED:
        yield None
        return
    from triton.runtime import interpreter

    with pytest.MonkeyPatch.context() as patch:
        by_element = interpreter.ScanOps.generic_scan
        patch.setattr(interpreter.ScanOps, "generic_scan", scan_in_steps)
        yield by_element


def scalars_count(patch_tensor):
    """What stands in for the interpreter's `_patch_lang_tensor`, which is given."""

    def patch(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    return patch


@pytest.fixture(scope="session", autouse=True)
def interpreter_counts():
    """Let a scalar be a number of steps."""
    if not INTERPRETED:
        yield
        return
    from triton.runtime import interpreter

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang_tensor", scalars_count(interpreter._patch_lang_tensor))
        yield
