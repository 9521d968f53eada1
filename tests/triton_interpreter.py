"""Triton's interpreter, its casts between float32 and bfloat16 repaired.

To bfloat16 it drops the low half of the float (seen in 3.7.1 and 3.9.0), where GPUs round to nearest even: gradients
come out biased towards zero, and a tolerance wide enough to admit that would admit such a kernel too. From bfloat16 it
garbles subnormals.
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
        yield truncating
