"""A pytest plugin for OpenRLHF's own tests: `pytest -p patched_openrlhf` runs them on our kernels.

These tests load OpenRLHF's files by path, under names of their own, some in a fixture. So what was loaded is rebound
before each test: every function that comes from the file of a row's target, under its name.

Writes how often each function of ours and each kernel was called to the file that CALLS names.
"""

import inspect
import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from types import FunctionType, ModuleType

import pytest

import openrlhf_modules
from counting import patched_and_counted
from rlkernels.integrations.openrlhf import PATCH

_open = ExitStack()


def pytest_configure(config):
    before = set(sys.modules)
    openrlhf_modules.load()
    loaded = {name: sys.modules[name] for name in set(sys.modules) - before if name.split(".")[0] == "openrlhf"}
    config.calls = _open.enter_context(patched_and_counted(PATCH))
    config.ours = {_source(PATCH.original(row.target)): row.ours for row in openrlhf_modules.rows()}
    # The tests put modules of their own in these places.
    for name in loaded:
        del sys.modules[name]
    _open.callback(sys.modules.update, loaded)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item):
    root = Path(item.path).parents[1]
    folders = f"{root / 'openrlhf'}{os.sep}", f"{root / 'tests'}{os.sep}"
    for module in [*sys.modules.values(), *item.funcargs.values()]:
        if isinstance(module, ModuleType) and str(getattr(module, "__file__", None)).startswith(folders):
            rebind(module, item.config.ours)


def rebind(owner: ModuleType | type, ours: dict) -> None:
    for name, value in list(vars(owner).items()):
        if isinstance(value, FunctionType) and _source(value) in ours:
            setattr(owner, name, ours[_source(value)])
        elif isinstance(value, type) and value.__module__ == getattr(owner, "__name__", None):
            rebind(value, ours)


def _source(function: FunctionType) -> tuple[str, str] | None:
    """The file and name of a function, under its decorators."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return code and (code.co_filename, code.co_qualname)


def pytest_unconfigure(config):
    _open.close()
    if hasattr(config, "calls"):
        Path(os.environ["CALLS"]).write_text(json.dumps(config.calls))
