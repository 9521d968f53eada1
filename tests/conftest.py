"""Every op test runs once per backend that serves here, and once more on a GPU where there is one.

`--backend NAME` (repeatable) narrows the backends. TRITON_INTERPRET=1 makes Triton serve CPU tensors through its
interpreter. Property tests are the same on every run, with few examples; `--hypothesis-profile=thorough` has more, and
`--hypothesis-profile=fuzz` draws new ones. What `-m "not thorough"` leaves out stands in selection.py.
"""

import contextlib
import gc
import os
import signal

import pytest
import torch
from hypothesis import HealthCheck, settings

import forking
import rlkernels
from rlkernels import _backends
from selection import mark_thorough, params
from triton_interpreter import INTERPRETED, interpreter_counts, interpreter_rounds, interpreter_scans

__all__ = ["interpreter_counts", "interpreter_rounds", "interpreter_scans"]

EMULATED = INTERPRETED or "CUDA_EMULATION_KERNELS" in os.environ

settings.register_profile(
    "quick",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=3 if EMULATED else 20,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.register_profile("thorough", settings.get_profile("quick"), max_examples=8 if EMULATED else 60)
settings.register_profile("fuzz", settings.get_profile("quick"), derandomize=False, max_examples=1000)
settings.load_profile("quick")


def pytest_addoption(parser):
    parser.addoption("--backend", action="append", metavar="NAME", help="test this backend only (repeatable)")


def pytest_configure(config):
    # Where a shell runs the tests in the background they inherit that Ctrl-C is ignored, and so would what they start.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in config.getoption("backend") or ():
        if name not in _backends.BACKENDS:
            raise pytest.UsageError(f"--backend must be one of {', '.join(_backends.BACKENDS)}; got {name}")
        if all(_backends.status(name, device_type) for device_type in ("cpu", "cuda")):
            raise pytest.UsageError(f"--backend {name} serves nothing here: {_backends.status(name, 'cpu')}")
    config.addinivalue_line(
        "markers", "thorough_on(*backends): thorough on these; a test's own mark goes before its file's"
    )
    config.addinivalue_line("markers", "only(*backends): what is tested does not exist in the other backends")


def pytest_generate_tests(metafunc):
    if "backend" not in metafunc.fixturenames:
        return
    wanted = metafunc.config.getoption("backend") or _backends.BACKENDS
    if only := metafunc.definition.get_closest_marker("only"):
        wanted = [name for name in wanted if name in only.args]
    params = [pytest.param((name, "cpu"), id=name) for name in wanted if _backends.status(name, "cpu") is None]
    if torch.cuda.is_available():
        params += [
            pytest.param((name, "cuda"), id=f"{name}-gpu", marks=pytest.mark.gpu)
            for name in wanted
            if name != "cpu" and _backends.status(name, "cuda") is None
        ]
    elif not hasattr(metafunc.module, "_gpu_skip_counted"):
        # One line a file, rather than one a test, says what did not run.
        metafunc.module._gpu_skip_counted = True
        skip = pytest.mark.skip(reason="no GPU: none of the tests of this file ran on one")
        params.append(pytest.param(("triton", "cuda"), id="gpu", marks=[pytest.mark.gpu, skip]))
    metafunc.parametrize("backend", params or [pytest.param(None, id="no backend")], indirect=True)


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(config, items):
    # A test with no backend to run on is not one that was skipped: there is nothing that it could have shown. Nor has
    # one that takes no backend, in a file of tests that do, anything to show of those that --backend names.
    absent = [item for item in items if "backend" in params(item) and params(item)["backend"] is None]
    if config.getoption("backend"):
        files = {item.path for item in items if "backend" in params(item)}
        absent += [item for item in items if item.path in files and "backend" not in params(item)]
    if absent:
        config.hook.pytest_deselected(items=absent)
        items[:] = [item for item in items if item not in set(absent)]
    mark_thorough(items)


def pytest_collection_finish(session):
    """What was imported stays: without it the garbage collection that ends each run of a trainer is quick. The server
    makes its imports while the first tests run."""
    gc.collect()
    gc.freeze()
    if any("forked" in item.fixturenames for item in session.items) and not session.config.option.collectonly:
        stack = contextlib.ExitStack()
        stack.enter_context(forking.server())
        session.config.add_cleanup(stack.close)


@pytest.fixture(scope="session")
def forked():
    """Programs that start in a blink."""
    return forking


@pytest.fixture
def backend(request):
    """The name of the backend under test, forced for the duration; memory comes filled with NaN, so that an output
    element that a kernel forgot to write shows."""
    name, _ = request.param
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    with rlkernels.use_backend(name):
        yield name
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture
def quick(request):
    """Whether what is thorough is left out: what takes long of a test may then be smaller."""
    return "not thorough" in request.config.option.markexpr


@pytest.fixture
def emulated(request):
    """Whether GPU kernels run on a CPU here, a block of threads in milliseconds: tests of sizes take smaller ones."""
    name, device_type = request.node.callspec.params["backend"]
    return name in ("triton", "cuda") and device_type == "cpu"


@pytest.fixture
def device(backend, request):
    return torch.device(request.node.callspec.params["backend"][1])
