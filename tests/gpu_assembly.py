"""Compiles Triton kernels for GPUs without one, and reads what is in the machine code of Triton and CUDA kernels.

The launchers run as they are, on tensors without memory; a stand-in for the GPU's driver makes Triton compile each
launch with the specialisation that it would have on a GPU, and go no further.
"""

import functools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

from rlkernels.triton import _config

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

# SASS, or GCN.
LOAD = re.compile(r"\bLDG\.[\w.]+|\b(?:global|buffer)_load_\w+")
WIDE_LOAD = re.compile(r"\bLDG\.E\.128\b|\b(?:global|buffer)_load_dwordx4\b")
STORE = re.compile(r"\bSTG\.[\w.]+|\b(?:global|buffer)_store_\w+")
WIDE_STORE = re.compile(r"\bSTG\.E\.128\b|\b(?:global|buffer)_store_dwordx4\b")
SPILL = re.compile(r"\b(?:LDL|STL)\b|\bscratch_(?:load|store)_|\.[sv]gpr_spill_count: *[1-9]")
MEMORY_SPILL = re.compile(r"\b(?:LDL|STL)\b|\bscratch_(?:load|store)_|\.vgpr_spill_count: *[1-9]")
"""Without AMD's scalars that go to lanes of vector registers."""
BARRIER = re.compile(r"\bBAR\.|\bs_barrier\b")
LABEL = re.compile(r"\.L(?:_x_|BB\d+_)\d+")


class CompilingDriver:
    """As much of a driver as choosing what to compile needs."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self):
        return self  # a key of the kernels' caches: compiled kernels are shared between no two drivers

    def get_current_stream(self, device) -> int:
        return 0


def compile_for(target: GPUTarget, launch: Callable[[], None]) -> dict[str, list]:
    """What running `launch` compiles, by the kernels' names."""
    compiled: dict[str, list] = {}

    def compile_only(run, name, *args, **kwargs):
        kernel = run(*args, **kwargs)
        if kernel not in compiled.setdefault(name, []):
            compiled[name].append(kernel)

    _launch_on(target, launch, compile_only)
    return compiled


def variants_for(target: GPUTarget, launch: Callable[[], None]) -> dict[str, set]:
    """What tells apart the variants of each kernel that running `launch` would compile, by the kernels' names."""
    variants: dict[str, set] = {}

    def note(run, name, *args, **kwargs):
        seen = variants.setdefault(name, set())

        def hook(*, key, **_):
            seen.add(key)
            return True  # do not compile

        with mock.patch.object(knobs.runtime, "jit_cache_hook", hook):
            run(*args, **kwargs)

    _launch_on(target, launch, note)
    return variants


def grids_for(target: GPUTarget, launch: Callable[[], None]) -> list[tuple[str, tuple[int, ...]]]:
    """The launches that running `launch` makes: each kernel's name and its programs."""
    grids: list[tuple[str, tuple[int, ...]]] = []
    _launch_on(target, launch, lambda run, name, *args, **kwargs: grids.append((name, run.keywords["grid"])))
    return grids


def _launch_on(target: GPUTarget, launch: Callable[[], None], instead: Callable) -> None:
    """Runs `launch` with `instead(compile, name of the kernel, *arguments)` in the place of each launch of a kernel."""
    run = jit.JITFunction.run

    def replaced(self, *args, grid, warmup, **kwargs):
        name = f"{self.module.rpartition('.')[2]}.{self.__name__}"
        return instead(functools.partial(run, self, grid=grid, warmup=True), name, *args, **kwargs)

    with (
        mock.patch.object(driver, "_active", CompilingDriver(target)),
        mock.patch.object(jit.JITFunction, "run", replaced),
        mock.patch.object(_config, "PLATFORM", target.backend),
    ):
        launch()


class Assembly(NamedTuple):
    """What one kernel was compiled to."""

    text: str
    registers: int
    """Registers of a thread; on AMD vector registers, those for matrices included."""
    bytes_of_stack: int
    shared_memory: int


def disassemble(kernel) -> Assembly:
    """A kernel compiled by Triton."""
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]

        def entry(name: str) -> int:
            return int(re.search(rf"\.{name}: *(\d+)", text)[1])

        return Assembly(text, entry("vgpr_count"), entry("private_segment_fixed_size"), kernel.metadata.shared)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        ((_, usage),) = resource_usage(file.name).items()
        text = run_tool(knobs.nvidia.nvdisasm.path, "-c", file.name)
    return Assembly(text, usage["REG"], usage["STACK"] + usage["LOCAL"], kernel.metadata.shared)


def run_tool(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def dump(file: str, *options: str) -> str:
    """What cuobjdump says of a file, with C++ names."""
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    listing = run_tool(str(cuobjdump), *options, file)
    return subprocess.run(["c++filt"], input=listing, capture_output=True, text=True, check=True).stdout


def resource_usage(file: str) -> dict[tuple[str, str], dict[str, int]]:
    """{(architecture, kernel): {"REG": 40, "STACK": 0, ...}}"""
    found, architecture, kernel = {}, "", ""
    for line in dump(file, "--dump-resource-usage").splitlines():
        if match := re.match(r"arch = (\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function (.*):$", line):
            kernel = match[1]
        elif "STACK:" in line:
            found[architecture, kernel] = {name: int(value) for name, value in re.findall(r"([A-Z]+):(\d+)", line)}
    return found


class Counts(NamedTuple):
    """What stands in a stretch of SASS, each instruction once however often it runs."""

    instructions: int
    barriers: int
    shuffles: int
    loads: Counter[int]
    """How many loads there are from global memory, by their width in bytes."""
    stores: Counter[int]


def instructions(text: str) -> list[str]:
    """The instructions of SASS as nvdisasm and cuobjdump print it; padding after the last one is left out."""
    found = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", text, flags=re.MULTILINE)
    return [instruction for instruction in found if not re.match(r"(@\S+ )?NOP\b", instruction)]


def count(listed: Iterable[str]) -> Counts:
    listed = list(listed)
    opcodes = [re.sub(r"^@\S+\s+", "", instruction).split()[0] for instruction in listed]

    def widths(operation: str) -> Counter[int]:
        return Counter(_width(opcode) for opcode in opcodes if opcode.split(".")[0] == operation)

    return Counts(
        len(opcodes),
        sum(opcode.startswith("BAR.") for opcode in opcodes),
        sum(opcode.startswith("SHFL.") for opcode in opcodes),
        widths("LDG"),
        widths("STG"),
    )


def _width(opcode: str) -> int:
    for part, size in (("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1)):
        if part in opcode.split(".")[1:]:
            return size
    return 4


def addressed(listing: str) -> list[tuple[int, str]]:
    """The instructions of SASS as cuobjdump prints it, with their addresses."""
    found = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", listing, flags=re.MULTILINE)
    return [(int(address, 16), instruction) for address, instruction in found]


def loops_of(listed: list[tuple[int, str]]) -> list[list[str]]:
    """The instructions of each loop, where branches name addresses."""
    backward = [
        (int(match[1], 16), address)
        for address, instruction in listed
        if (match := re.search(r"\bBRA.* (?:`\(.*\)|0x([0-9a-f]+))", instruction)) and int(match[1], 16) < address
    ]
    return [[text for address, text in listed if first <= address <= last] for first, last in backward]


def widest_loop(loops: Iterable[list[str]]) -> list[str]:
    """The one with most loads of 16 bytes, the shortest if there are several: that over elements."""
    return min(loops, key=lambda loop: (-count(loop).loads[16], len(loop)))


def innermost_loop_with_loads(text: str) -> str:
    """The shortest of `innermost_loops_with_loads`."""
    return min(innermost_loops_with_loads(text), key=len)


def innermost_loops_with_loads(text: str) -> list[str]:
    """The stretches with loads between a label and the last branch back to it that no other stretch lies in."""
    lines = text.splitlines()
    labels: dict[str, int] = {}
    bodies: dict[str, str] = {}
    for number, line in enumerate(lines):
        for label in LABEL.findall(line):
            if line.lstrip().startswith(f"{label}:"):
                labels[label] = number
            elif label in labels:
                bodies[label] = "\n".join(lines[labels[label] : number])
    loops = {body for body in bodies.values() if LOAD.search(body)}
    return [body for body in loops if not any(other in body for other in loops - {body})]
