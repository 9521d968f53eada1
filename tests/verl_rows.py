"""verl's functions beside ours, by the rows of the table, and what their tests share."""

import importlib.metadata

import pytest
import torch

MASK_DTYPES = (torch.bool, torch.int64, torch.float32)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def slack(dtype):
    """verl adds 1e-8 to numbers of tokens, and takes the deviation of a group of one, and all statistics of its
    vectorized GRPO, in float32: float64 can tell."""
    return 3e7 if dtype == torch.float64 else 4


def rows():
    """The table's rows for the installed version, by name; skips the test where verl is not installed."""
    try:
        version = importlib.metadata.version("verl")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("verl is not installed: make test-peers", allow_module_level=True)
    from packaging.specifiers import SpecifierSet

    from rlkernels.integrations.verl import PATCH

    return {row.target.partition(":")[2]: row for row in PATCH.rows if version in SpecifierSet(row.versions)}


def pair(name):
    """Ours and theirs, whether patched or not."""
    from rlkernels.integrations.verl import PATCH

    row = rows()[name]
    return row.ours, PATCH.original(row.target)


def mask(shape=(8, 24), dtype=torch.bool):
    """Gaps, an empty row, a full one and one with a single token."""
    scored = torch.rand(shape) < 0.75
    scored[1] = False
    scored[2] = True
    scored[3] = False
    scored[3, 5] = True
    scored[4, -6:] = False
    return scored.to(dtype)
