"""Parameters that tests of several ops share, and those that `make test` leaves out."""

import pytest

THOROUGH_EMULATED = pytest.mark.thorough_on("triton", "cuda")
"""Marks what shows little more, and takes long, where kernels are interpreted or emulated."""


ALSO_EMULATED = pytest.mark.thorough_on()
"""Exempts a test from the THOROUGH_EMULATED of its file."""


def thorough(*values, **options):
    """Values of a parameter that `make test` leaves out."""
    return pytest.param(*values, marks=pytest.mark.thorough, **options)


def by_turns(names: str, values, others):
    """Every first value with every other. `make test` has each first value once, with the others by turns."""
    return pytest.mark.parametrize(
        names,
        [
            (value, other) if (place - turn) % len(others) == 0 else thorough(value, other)
            for place, value in enumerate(values)
            for turn, other in enumerate(others)
        ],
    )


def thorough_emulated(*values, **options):
    """Values of a parameter that `make test` leaves out where kernels are interpreted or emulated."""
    return pytest.param(*values, marks=THOROUGH_EMULATED, **options)


# That an op can be traced has nothing to do with how its kernel is run. Inductor takes seconds, the first time many.
COMPILERS = [thorough_emulated("aot_eager"), thorough("inductor")]
COMPILERS_AND_LAYOUTS = pytest.mark.parametrize(
    ("compiler", "packed"),
    [
        thorough_emulated("aot_eager", False, id="aot_eager-padded"),
        thorough_emulated("aot_eager", True, id="aot_eager-packed"),
        thorough("inductor", False, id="inductor-padded"),
        thorough("inductor", True, id="inductor-packed"),
    ],
)
