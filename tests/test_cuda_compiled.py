"""The CUDA extension as nvcc builds it, without a GPU: what is in its machine code, and what it registers. For one
architecture, and where the tests of `make test-all` run for all."""

import re
import shutil
import subprocess
import sys

import pytest

from build_tools.compile import build
from build_tools.modules import CUDA_TARGETS, cuda_module
from gpu_assembly import addressed, count, dump, loops_of, resource_usage, widest_loop

if shutil.which("nvcc") is None:
    pytest.skip("no nvcc", allow_module_level=True)

ARCHITECTURES = [
    pytest.param(f"sm_{number}", marks=[] if number == 90 else pytest.mark.thorough) for number in CUDA_TARGETS
]


@pytest.fixture(scope="module")
def architectures(request):
    items = [item for item in request.session.items if item.path == request.path]
    return CUDA_TARGETS if any(item.get_closest_marker("thorough") for item in items) else (90,)


@pytest.fixture(scope="module")
def extension(architectures):
    return str(build(cuda_module(architectures)))


@pytest.fixture(scope="module")
def resources(extension):
    return resource_usage(extension)


@pytest.fixture(scope="module")
def code(extension):
    """{(architecture, kernel): [(address, instruction)]}"""
    found, architecture = {}, None
    for section in re.split(r"^\s*Function : ", dump(extension, "-sass"), flags=re.MULTILINE):
        kernel, _, body = section.partition("\n")
        if architecture:
            found[architecture, kernel] = addressed(body)
        if match := re.findall(r"^arch = (\w+)", section, flags=re.MULTILINE):
            architecture = match[-1]
    return found


@pytest.fixture(scope="module")
def loops(code):
    """{(architecture, kernel): [the instructions of each loop]}"""
    return {key: loops_of(listed) for key, listed in code.items()}


def kernels_of(table, architecture, name):
    kernels = {kernel: entry for (arch, kernel), entry in table.items() if arch == architecture and name in kernel}
    assert kernels, f"no {name} for {architecture}"
    return kernels


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_spills(resources, architecture):
    kernels = kernels_of(resources, architecture, "rlk::")
    assert len(kernels) >= 49
    for kernel, usage in kernels.items():
        assert (usage["STACK"], usage["LOCAL"]) == (0, 0), kernel


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("name", "inputs"), [("kl_penalty_forward_kernel", 2), ("kl_penalty_backward_kernel", 3)])
def test_elements_are_read_and_written_16_bytes_at_a_time(code, architecture, name, inputs):
    """Once a thread, outside any loop."""
    (instructions,) = kernels_of(code, architecture, f"{name}<true>").values()
    texts = [text for _, text in instructions]
    assert widest("LDG", texts) >= inputs
    assert widest("STG", texts) >= 1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rewards_are_read_and_written_16_bytes_at_a_time(code, architecture):
    """Once a thread, outside any loop."""
    (instructions,) = kernels_of(code, architecture, "shaped_rewards_kernel<true>").values()
    texts = [text for _, text in instructions]
    assert widest("LDG", texts) >= 2
    assert widest("STG", texts) >= 1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("kind", "inputs", "outputs"), [(0, 2, 2), (1, 1, 1), (2, 2, 1), (3, 4, 2)])
def test_tokens_are_read_and_written_16_bytes_at_a_time(loops, architecture, kind, inputs, outputs):
    """In the loop of recurrence_kernel that goes through a sequence."""
    kernels = {}
    for dense in ("false", "true"):
        kernels |= kernels_of(loops, architecture, f"recurrence_kernel<{kind}, true, {dense}, ")
    for kernel, bodies in kernels.items():
        assert any(widest("LDG", body) >= inputs and widest("STG", body) >= outputs for body in bodies), kernel


@pytest.mark.parametrize("architecture", [each for each in ARCHITECTURES if each.values != ("sm_80",)])
def test_a_warp_scans_tokens_in_few_instructions_and_waits_for_no_other(loops, architecture):
    """gae of sequences without a mask: four runs of four tokens for each thread."""
    ((kernel, bodies),) = kernels_of(loops, architecture, "recurrence_kernel<0, true, true, false>").items()
    counts = count(widest_loop(bodies))
    assert counts.loads == {16: 4 * 2} and counts.stores == {16: 4 * 2}, kernel
    assert counts.instructions <= 4 * 140
    assert counts.shuffles <= 4 * 22
    assert counts.barriers == 0


@pytest.mark.parametrize("architecture", [each for each in ARCHITECTURES if each.values != ("sm_80",)])
@pytest.mark.parametrize(
    ("name", "inputs", "most"),
    [("policy_loss_kernel<0, true, false>", 3, 132), ("value_loss_kernel<true, false>", 3, 80)],
)
def test_a_token_of_a_loss_takes_few_instructions(loops, architecture, name, inputs, most):
    """ppo with advantages of either kind, and value_loss: runs of four tokens."""
    ((kernel, bodies),) = kernels_of(loops, architecture, name).items()
    counts = count(widest_loop(bodies))
    assert counts.loads[16] == inputs and counts.stores == {16: 1}, kernel
    assert counts.instructions <= 4 * most
    assert counts.barriers == 0


def widest(instruction, body):
    """How many of some move 16 bytes."""
    return sum(bool(re.search(rf"\b{instruction}\.E\.[\w.]*128", text)) for text in body)


def test_newer_gpus_find_code_to_compile(extension, architectures):
    assert f"sm_{architectures[-1]}.ptx" in dump(extension, "--list-ptx")


def test_every_op_is_registered(extension):
    """Beside a PyTorch without CUDA too."""
    program = (
        "import importlib.util, sys, torch, rlkernels\n"
        "spec = importlib.util.spec_from_file_location('_C_cuda', sys.argv[1])\n"
        "spec.loader.exec_module(importlib.util.module_from_spec(spec))\n"
        "names = [n for n in torch._C._dispatch_get_all_op_names() if n[:11] == 'rlkernels::' and n[-5:] == '.cuda']\n"
        "assert len(names) >= 9\n"
        "print(*(n for n in names if not torch._C._dispatch_has_kernel_for_dispatch_key(n, 'CUDA')))"
    )
    result = subprocess.run([sys.executable, "-c", program, extension], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []
