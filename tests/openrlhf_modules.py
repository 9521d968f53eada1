"""OpenRLHF's modules with arithmetic, loaded beside stand-ins, and what its versions call differently."""

import importlib.metadata

import pytest
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import peer_modules
from rlkernels.integrations._patch import Replacement
from rlkernels.integrations.openrlhf import MAKER, PATCH

MODULES = ("models.utils", "models.loss", "trainer.ppo_utils.experience_maker")


def load() -> None:
    for module in MODULES:
        peer_modules.openrlhf(module)


def version() -> Version:
    return Version(importlib.metadata.version("openrlhf"))


def version_or_skip() -> Version:
    for package in ("openrlhf", "ray"):
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"{package} is not installed: make test-peers", allow_module_level=True)
    return version()


def rows() -> list[Replacement]:
    """The rows of the table that the installed version has."""
    return [row for row in PATCH.rows if SpecifierSet(row.versions).contains(version())]


def pair(name: str):
    """Ours and theirs: of "loss:ValueLoss.forward", say, or "maker:get_cumulative_returns"."""
    module, _, path = name.partition(":")
    target = f"{MAKER}.{path}" if module == "maker" else f"openrlhf.models.{module}:{path}"
    (row,) = (row for row in rows() if row.target == target)
    return row.ours, PATCH.original(target)
