"""Parameters that tests of several ops share, and those that `make test` leaves out."""

import pytest


def thorough(*values, **options):
    """Values of a parameter that `make test` leaves out."""
    return pytest.param(*values, marks=pytest.mark.thorough, **options)


# Inductor takes seconds: `make test` has it once an op, on the kernels that a CPU runs. That an op can be traced,
# aot_eager shows on every backend.
_inductor = pytest.mark.thorough_on("reference", "triton", "cuda")
COMPILERS = ["aot_eager", pytest.param("inductor", marks=_inductor)]
COMPILERS_AND_LAYOUTS = pytest.mark.parametrize(
    ("compiler", "packed"),
    [
        pytest.param("aot_eager", False, id="aot_eager-padded"),
        pytest.param("aot_eager", True, id="aot_eager-packed"),
        pytest.param("inductor", True, id="inductor-packed", marks=_inductor),
        thorough("inductor", False, id="inductor-padded"),
    ],
)
