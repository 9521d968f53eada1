"""A pytest plugin for another project's own tests: `pytest -p patched` with PATCHED=verl runs them on our kernels.

Writes how often each function of ours and each kernel was called to the file that CALLS names.
"""

import importlib
import json
import os
from contextlib import ExitStack
from pathlib import Path

from counting import patched_and_counted

_open = ExitStack()


def pytest_configure(config):
    module = importlib.import_module(f"rlkernels.integrations.{os.environ['PATCHED']}")
    config.calls = _open.enter_context(patched_and_counted(module.PATCH))


def pytest_unconfigure(config):
    _open.close()
    if hasattr(config, "calls"):
        Path(os.environ["CALLS"]).write_text(json.dumps(config.calls))
