import contextlib
import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import rlkernels
from rlkernels import _backends, kl_penalty, token_logprobs
from rlkernels.ops import linear_logprobs

LOGPROBS = torch.tensor([-1.0, -2.0, -0.5])
REFERENCE = torch.tensor([-1.5, -1.0, -0.5])


@pytest.fixture(autouse=True)
def restored():
    with rlkernels.use_backend("auto"):
        yield


def run_python(code, **environment):
    """Run `code` in a process of its own, where `import rlkernels` has not happened yet."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("RLKERNELS_")}
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", code],
        env=variables | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_fastest_that_serves_is_chosen():
    serving = [name for name in _backends.KERNEL_BACKENDS if _backends.status(name, "cpu") is None]
    assert _backends.select(LOGPROBS, "kl_penalty") == (serving or ["reference"])[0]
    assert "reference" not in serving
    assert _backends.status("reference", "cpu") is None
    for name in set(_backends.KERNEL_BACKENDS) - set(serving):
        assert _backends.status(name, "cpu"), f"{name} does not say why it does not serve"


def test_the_backend_chosen_is_the_one_that_runs(backend, device, monkeypatch):
    """Not merely the one reported: the reference's function is called for the reference and for no other."""
    from rlkernels.ops import kl

    calls = []
    original = kl.reference.kl_penalty
    monkeypatch.setattr(
        kl.reference, "kl_penalty", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs)
    )
    kl_penalty(LOGPROBS, REFERENCE)
    assert bool(calls) == (backend == "reference")


def test_the_preference_is_one_of_each_op(monkeypatch):
    """Where CUDA's and Triton's kernels both serve; logits have none in CUDA."""
    for name, devices in (("cuda", ("meta",)), ("triton", ("meta",)), ("cpu", ())):
        monkeypatch.setitem(_backends._devices, name, devices)
    tensor = torch.empty(0, device="meta")
    assert _backends.select(tensor, "token_logprobs") == "triton"
    assert _backends.select(tensor, "policy_loss") == "cuda"
    with rlkernels.use_backend("cuda"):
        assert _backends.select(tensor, "token_logprobs") == "triton"
    monkeypatch.setitem(_backends._devices, "triton", ())
    assert _backends.select(tensor, "token_logprobs") == "reference"


def test_each_backend_loaded_implements_the_ops_that_it_is_recorded_for():
    defined = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("rlkernels::")]
    for device_type, key in (("cpu", "CPU"), ("cuda", "CUDA")):
        for name in defined:
            backend = name.rpartition(".")[2]
            if _backends.status(backend, device_type) is None:
                assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key), f"{name} on {device_type}"
    assert {name.rpartition(".")[2] for name in defined} == set(_backends.KERNEL_BACKENDS)


# What a machine with an NVIDIA GPU has, and CUDA's library, whose first call would leave every fork without CUDA.
WITH_A_GPU = """
import ctypes, os, sys, torch

def asked(*args, **kwargs):
    raise AssertionError("CUDA was asked something at import")

for name in ("is_available", "device_count", "_lazy_init", "init", "current_device", "get_device_properties"):
    setattr(torch.cuda, name, asked)
torch._C._cuda_getDeviceCount = torch._C._cuda_init = asked
load = ctypes.CDLL

class Driver:
    __getattr__ = asked

ctypes.CDLL = lambda name, *args, **kwargs: Driver() if name == "libcuda.so.1" else load(name, *args, **kwargs)
torch.version.cuda = torch.version.cuda or "13.0"
import rlkernels
from rlkernels import _backends
"""


def test_nothing_asks_cuda_at_import_and_a_fork_works_afterwards():
    code = f"""{WITH_A_GPU}
print(_backends.status("triton", "cuda"), "triton" in sys.modules, flush=True)
child = os.fork()
value = rlkernels.kl_penalty(torch.tensor([-1.0]), torch.tensor([-1.5]), estimator="k1").item()
assert not torch.cuda._is_in_bad_fork()
if child == 0:
    print(value, flush=True)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print(value, flush=True)
"""
    done = run_python(code, TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["None True", "0.5", "0.5"]


@pytest.mark.parametrize("visible", ["", "-1"])
def test_without_a_gpu_its_backends_say_so(visible):
    """Or where the environment hides it."""
    code = WITH_A_GPU + "print(_backends.status('triton', 'cuda'), '|', _backends.status('cuda', 'cuda'))"
    done = run_python(code, TRITON_INTERPRET="0", CUDA_VISIBLE_DEVICES=visible)
    assert done.stdout == "no GPU is available | no NVIDIA GPU is available\n", done.stderr


def test_as_a_function_it_lasts():
    rlkernels.use_backend("reference")
    assert _backends.select(LOGPROBS, "kl_penalty") == "reference"
    rlkernels.use_backend("auto")
    assert _backends._forced is None


def test_as_a_context_manager_it_is_undone_also_by_an_error():
    before = _backends.select(LOGPROBS, "kl_penalty")
    with rlkernels.use_backend("reference"):
        assert _backends.select(LOGPROBS, "kl_penalty") == "reference"
        with rlkernels.use_backend("auto"):
            assert _backends.select(LOGPROBS, "kl_penalty") == before
        assert _backends.select(LOGPROBS, "kl_penalty") == "reference"
    assert _backends.select(LOGPROBS, "kl_penalty") == before
    with pytest.raises(KeyError), rlkernels.use_backend("reference"):
        raise KeyError
    assert _backends.select(LOGPROBS, "kl_penalty") == before


@pytest.mark.parametrize("name", ["cudnn", "", "CPU", None])
def test_an_unknown_name_lists_the_valid_ones(name):
    before = _backends.select(LOGPROBS, "kl_penalty")
    with pytest.raises(ValueError, match="backend") as raised:
        rlkernels.use_backend(name)
    for valid in ("auto", "reference", "cpu", "triton", "cuda", repr(name)):
        assert valid in str(raised.value)
    assert _backends.select(LOGPROBS, "kl_penalty") == before


def test_a_backend_that_cannot_serve_here_says_why():
    absent = [name for name in _backends.KERNEL_BACKENDS if not _backends._devices[name]]
    if not absent:
        pytest.skip("every backend serves in this process")
    for name in absent:
        with pytest.raises(ValueError, match="cannot serve") as raised:
            rlkernels.use_backend(name)
        assert name in str(raised.value)
        assert _backends.status(name, "cpu") in str(raised.value)


def test_a_forced_backend_refuses_tensors_of_another_device(monkeypatch):
    monkeypatch.setitem(_backends._devices, "cuda", ("cuda",))
    with rlkernels.use_backend("cuda"), pytest.raises(ValueError, match=r"'cuda'.*cpu tensor.*cuda tensors only"):
        kl_penalty(LOGPROBS, REFERENCE)


def test_float64_goes_to_the_reference_whatever_is_forced(backend, device):
    logprobs, ref_logprobs = (value.to(device, torch.float64) for value in (LOGPROBS, REFERENCE))
    assert _backends.select(logprobs, "kl_penalty") == "reference"
    assert kl_penalty(logprobs, ref_logprobs).dtype == torch.float64


def test_the_environment_chooses():
    code = (
        "import torch, rlkernels\n"
        "from rlkernels import _backends\n"
        "print(_backends.select(torch.zeros(1), 'kl_penalty'))\n"
        "with rlkernels.use_backend('auto'): pass\n"
        "print(_backends.select(torch.zeros(1), 'kl_penalty'))"
    )
    assert run_python(code, RLKERNELS_BACKEND="reference").stdout.split() == ["reference"] * 2
    default = run_python(code).stdout.split()
    assert default == [_backends.select(LOGPROBS, "kl_penalty")] * 2
    assert run_python(code, RLKERNELS_BACKEND="").stdout.split() == default


def test_the_environment_names_no_other_backend():
    wrong = run_python("import rlkernels", RLKERNELS_BACKEND="metal")
    assert wrong.returncode != 0
    last = wrong.stderr.strip().splitlines()[-1]
    for fragment in ("ValueError", "RLKERNELS_BACKEND", "metal", "reference", "cpu", "triton", "cuda"):
        assert fragment in last


def test_the_environment_checks_values():
    """On a CPU ids are checked in any case; here the check must come before the kernel, in Python."""
    code = (
        "import torch, rlkernels\n"
        "from rlkernels.ops import _checks\n"
        "print(_checks.CHECK_VALUES)\n"
        "rlkernels.token_logprobs(torch.zeros(2, 5), torch.tensor([0, 7]))"
    )
    for value in ("1", "0"):
        done = run_python(code, RLKERNELS_CHECK=value)
        assert done.stdout.strip() == str(value == "1")
        assert "ValueError" in done.stderr
        assert "token_ids" in done.stderr


BROKEN_EXTENSION = """
import sys

class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "rlkernels._C":
            raise ImportError("libtorch.so: cannot open shared object file")

sys.meta_path.insert(0, Broken())
import torch, rlkernels
from rlkernels import _backends
for _ in range(2):
    print(rlkernels.kl_penalty(torch.tensor([-1.0]), torch.tensor([-1.5]), estimator="k1").item())
print(_backends.select(torch.zeros(1), 'kl_penalty'), "|", _backends.status("cpu", "cpu"))
"""


def test_an_extension_that_fails_to_load_warns_once_and_something_else_serves():
    done = run_python(BROKEN_EXTENSION, TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:2] == ["0.5", "0.5"]
    assert done.stdout.splitlines()[2].startswith("reference | ")
    assert done.stdout.count("cannot open shared object file") == 1
    assert done.stderr.count("RuntimeWarning") == 1
    assert "cannot open shared object file" in done.stderr


def test_an_extension_that_was_not_built_is_no_reason_to_warn():
    code = BROKEN_EXTENSION.replace(
        'ImportError("libtorch.so: cannot open shared object file")', "ModuleNotFoundError(name, name=name)"
    )
    done = run_python(code, TRITON_INTERPRET="0")
    assert done.stdout.splitlines()[:2] == ["0.5", "0.5"]
    assert "not built" in done.stdout.splitlines()[2]
    assert "RuntimeWarning" not in done.stderr


@pytest.mark.parametrize("order", ["reference first", "reference last"])
def test_a_compiled_function_follows_the_choice(order):
    """It recompiles; it does not go on with the backend that it was compiled with."""
    kernels = [name for name in _backends.KERNEL_BACKENDS if _backends.status(name, "cpu") is None]
    if not kernels:
        pytest.skip("only the reference serves in this process")
    torch._dynamo.reset()
    used = []

    def note_ops(graph, inputs):
        targets = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
        used.append({target.split(".")[-1] for target in targets if "rlkernels" in target} or {"reference"})
        return graph.forward

    compiled = torch.compile(lambda a, b: kl_penalty(a, b), fullgraph=True, backend=note_ops)
    names = ["reference", *kernels] if order == "reference first" else [*kernels, "reference"]
    for name in names:
        with rlkernels.use_backend(name):
            torch.testing.assert_close(compiled(LOGPROBS, REFERENCE), kl_penalty(LOGPROBS, REFERENCE))
    assert used == [{name} for name in names]
    with rlkernels.use_backend(names[0]):
        compiled(LOGPROBS, REFERENCE)
    assert len(used) == len(names), "each choice is compiled once, not at every switch"


def test_the_backend_of_the_forward_pass_is_that_of_the_backward_pass(backend, device):
    """Also where the choice has changed in between."""
    logits = torch.zeros(2, 5, device=device, requires_grad=True)
    logprobs = token_logprobs(logits, torch.tensor([0, 1], device=device))
    with rlkernels.use_backend("reference" if backend != "reference" else "auto"):
        logprobs.sum().backward()
    torch.testing.assert_close(logits.grad.sum(1), torch.zeros(2, device=device))
    assert logits.grad.any()


@pytest.fixture
def head_on_a_gpu(monkeypatch):
    """Calls the fused head on tensors that say they are a GPU's, for which no backend serves."""
    monkeypatch.setitem(_backends._devices, "triton", ())
    monkeypatch.setitem(_backends._reasons, "triton", "triton is not installed")
    _backends._warn_of_stored_logits.cache_clear()

    def values(*inputs, **options):  # there is no GPU to compute on
        return torch.empty(3), torch.empty(3)

    monkeypatch.setattr(linear_logprobs.reference, "linear_token_logprobs", values)

    def call(dtype=torch.float32):
        with FakeTensorMode():
            hidden, weight = (torch.empty(size, 8, device="cuda", dtype=dtype) for size in (3, 16))
            rlkernels.linear_token_logprobs(hidden, weight, torch.zeros(3, dtype=torch.int64, device="cuda"))

    return call


def test_the_fused_head_says_once_that_the_reference_stores_all_logits(head_on_a_gpu):
    with pytest.warns(RuntimeWarning, match="stores all logits.*on cuda.*triton is not installed") as warned:
        head_on_a_gpu()
        head_on_a_gpu()
    assert len(warned) == 1


@pytest.mark.filterwarnings("error")
def test_who_asked_for_the_reference_is_not_warned(head_on_a_gpu):
    head_on_a_gpu(torch.float64)
    with rlkernels.use_backend("reference"):
        head_on_a_gpu()


@pytest.mark.parametrize("index", [0, 1])
def test_the_current_device_is_not_made_current_again(index, monkeypatch):
    launch = pytest.importorskip("rlkernels.triton._launch")
    made = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: made.append(device.index) or contextlib.nullcontext())
    with launch.current(torch.device("cuda", index)):
        assert made == ([] if index == 0 else [1])
    with launch.current(torch.device("cpu")):
        assert len(made) == index
