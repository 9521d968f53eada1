"""What every Triton and CUDA kernel takes of a GPU, and the occupancy that allows. Compiled for GPUs, without one.

    python benchmarks/resources.py > docs/resources.md

The table shows the greatest value of each figure over the variants of a kernel that tests/test_triton_compiled.py
compiles, and the least and the greatest width of the widest load. Occupancy is the share of a multiprocessor's warps
that registers, shared memory and the number of blocks leave room for, in the variant with the smallest share.

The ceiling of a kernel is what it could move if nothing but its instructions took time: each of the four parts of
every multiprocessor issues one for a warp in each cycle of the boost clock. Instructions per element are those of the
loop over elements, counted in the machine code (sm_90 / sm_100, which is for the B200): each once, also those that not
every turn runs. Bytes are those that each element must move. Where the ceiling is above the bandwidth of the memory (in
the head of the column, from the data sheets), memory is the limit; where it is below, instructions are. No GPU has
measured any of this.
"""

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import triton  # noqa: E402

from build_tools.compile import build  # noqa: E402
from build_tools.modules import CUDA_TARGETS, CannotBuild, cuda_module  # noqa: E402
from gpu_assembly import (  # noqa: E402
    LOAD,
    TARGETS,
    addressed,
    compile_for,
    count,
    disassemble,
    dump,
    innermost_loops_with_loads,
    instructions,
    loops_of,
    resource_usage,
    widest_loop,
)

THREADS_UNBOUND = 256
"""Threads of a block of a CUDA kernel without __launch_bounds__, whose launch chooses them."""
LOAD_BYTES = {".256": 32, ".128": 16, ".64": 8, ".U16": 2, ".S16": 2, ".U8": 1, ".S8": 1}
LOAD_BYTES |= {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "short": 2, "byte": 1}
"""By what stands in an instruction's name; 4 without any."""


@dataclass(frozen=True)
class Limits:
    """What a multiprocessor (CUDA C++ Programming Guide, compute capabilities) or a compute unit (CDNA 3 ISA guide)
    holds. It has four parts with registers of their own."""

    warps: int
    blocks: int
    registers: int
    """Registers of a part, for each of a warp's threads."""
    granule: int
    shared_memory: int
    reserved: int
    """Shared memory that the system takes of every block."""


NVIDIA = dict(warps=64, blocks=32, registers=512, granule=8, reserved=1024)
LIMITS = {
    "sm_80": Limits(**NVIDIA, shared_memory=164 * 1024),
    "sm_90": Limits(**NVIDIA, shared_memory=228 * 1024),
    "sm_100": Limits(**NVIDIA, shared_memory=228 * 1024),
    "gfx942": Limits(warps=32, blocks=32, registers=512, granule=8, shared_memory=64 * 1024, reserved=0),
}


@dataclass(frozen=True)
class Gpu:
    """From NVIDIA's data sheets."""

    architecture: str
    multiprocessors: int
    boost_clock: float  # Hz
    bandwidth: float  # bytes a second


GPUS = {
    "H100 SXM": Gpu("sm_90", 132, 1.98e9, 3.35e12),
    "H200": Gpu("sm_90", 132, 1.98e9, 4.8e12),
    "B200": Gpu("sm_100", 148, 1.965e9, 8.0e12),
}


@dataclass(frozen=True)
class HotLoop:
    """A kernel's loop over elements, and the bytes that it reads and writes for each of them."""

    what: str
    case: str  # of tests/test_triton_compiled.py
    triton: str
    cuda: str  # short name; "" where there is none
    reads: int
    writes: int


HOT_LOOPS = (
    HotLoop("token_logprobs, bfloat16", "token_logprobs bfloat16 plain", "logprobs._forward_kernel", "", 2, 0),
    HotLoop("with entropy", "token_logprobs bfloat16 entropy", "logprobs._forward_kernel", "", 2, 0),
    HotLoop("its gradient", "token_logprobs bfloat16 plain", "logprobs._backward_kernel", "", 2, 2),
    HotLoop(
        *("gae without a mask", "gae unmasked", "recurrence._sequence_kernel"),
        *("recurrence_kernel<0, true, true, false>", 8, 8),
    ),
    HotLoop(
        *("gae with a mask", "gae ", "recurrence._sequence_kernel", "recurrence_kernel<0, true, false, false>", 9, 8),
    ),
    HotLoop(
        *("policy_loss, ppo", "policy_loss", "policy_loss._token_kernel", "policy_loss_kernel<0, true, false>", 9, 4),
    ),
    HotLoop("value_loss", "value_loss", "value_loss._token_kernel", "value_loss_kernel<true, false>", 13, 4),
)


def ceiling(gpu: Gpu, instructions: float, size: int) -> float:
    """Bytes a second, of a kernel that takes so many instructions of a thread, and moves `size` bytes, per element."""
    threads_a_cycle = 4 * 32 * gpu.multiprocessors
    return threads_a_cycle * gpu.boost_clock / instructions * size


def per_element(loop: list[str], kernel: HotLoop) -> float:
    """Instructions of a loop for each element: results are written 16 bytes at a time, or else inputs so read."""
    counts = count(loop)
    wide, size = (counts.stores, kernel.writes) if kernel.writes else (counts.loads, kernel.reads)
    return counts.instructions * size / (16 * wide[16])


def round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def occupancy(limits: Limits, warps: int, registers: int, shared_memory: int) -> float:
    """The share of the warps of a multiprocessor that can be resident at once, in blocks of `warps` warps."""
    resident = 4 * (limits.registers // round_up(max(registers, 1), limits.granule))
    blocks = min(limits.blocks, limits.warps // warps, resident // warps)
    if taken := round_up(shared_memory, 128) + limits.reserved:
        blocks = min(blocks, limits.shared_memory // taken)
    return blocks * warps / limits.warps


@dataclass
class Kernel:
    """One variant of a kernel."""

    name: str
    threads: int
    registers: int
    stack: int
    shared_memory: int
    load_bytes: int
    occupancy: float


def widest_load(text: str) -> int:
    """In bytes."""

    def width(load: str) -> int:
        return next((size for name, size in LOAD_BYTES.items() if name in load), 4)

    return max(map(width, LOAD.findall(text)), default=0)


def triton_kernels(architecture: str, only: str = "") -> Iterator[Kernel]:
    """The kernels of every case, or of the one that `only` names."""
    from test_triton_compiled import CASES

    target, limits = TARGETS[architecture], LIMITS[architecture]
    for launch, _ in [CASES[only]] if only else CASES.values():
        for name, variants in compile_for(target, launch).items():
            for variant in variants:
                assembly, warps = disassemble(variant), variant.metadata.num_warps
                yield Kernel(
                    name,
                    warps * target.warp_size,
                    assembly.registers,
                    assembly.bytes_of_stack,
                    assembly.shared_memory,
                    widest_load(assembly.text),
                    occupancy(limits, warps, assembly.registers, assembly.shared_memory),
                )


def cuda_sections(extension: str, option: str, heading: str) -> Iterator[tuple[str, str, str]]:
    """(architecture, kernel, text) of a listing in sections that begin with `heading` and the kernel's name."""
    architecture = ""
    for section in re.split(heading, dump(extension, option), flags=re.MULTILINE):
        kernel, _, text = section.partition("\n")
        if architecture:
            yield architecture, kernel.strip(), text
        if match := re.findall(r"^arch = (\w+)", section, flags=re.MULTILINE):
            architecture = match[-1]


def short_name(kernel: str) -> str:
    """Without namespace, parameters, and template arguments that are not types."""
    name = re.sub(r"^void |rlk::|\([\w:]+\)(?=\d)", "", kernel).partition("(")[0]
    return re.sub(r", \d+(?=[,>])", "", name)


def cuda_kernels(extension: str) -> dict[str, list[Kernel]]:
    """By architecture."""
    texts = {(arch, kernel): text for arch, kernel, text in cuda_sections(extension, "-sass", r"^\s*Function : ")}
    bounds = {}
    for architecture, kernel, text in cuda_sections(extension, "-elf", r"^\.nv\.info\."):
        if match := re.search(r"EIATTR_MAX_THREADS\s+Format:.*\s+Value:\s+0x([0-9a-f]+)", text):
            bounds[architecture, kernel] = int(match[1], 16)
    found: dict[str, list[Kernel]] = {}
    for (architecture, kernel), usage in resource_usage(extension).items():
        limits, threads = LIMITS[architecture], bounds.get((architecture, kernel), THREADS_UNBOUND)
        # From sm_90 on, cuobjdump adds what the system takes.
        shared = usage["SHARED"] - (limits.reserved if architecture != "sm_80" and usage["SHARED"] else 0)
        entry = Kernel(
            short_name(kernel),
            threads,
            usage["REG"],
            usage["STACK"] + usage["LOCAL"],
            shared,
            widest_load(texts[architecture, kernel]),
            occupancy(limits, threads // 32, usage["REG"], shared),
        )
        found.setdefault(architecture, []).append(entry)
    return found


def table(kernels: list[Kernel]) -> str:
    lines = [
        "| kernel | variants | threads | registers | spilled, B | shared memory, B | widest load, B | occupancy |",
        "|---|---|---|---|---|---|---|---|",
    ]
    by_name: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        by_name.setdefault(kernel.name, []).append(kernel)
    for name, variants in sorted(by_name.items()):
        loads = {kernel.load_bytes for kernel in variants}
        cells = (
            f"`{name}`",
            len(variants),
            max(kernel.threads for kernel in variants),
            max(kernel.registers for kernel in variants),
            max(kernel.stack for kernel in variants),
            max(kernel.shared_memory for kernel in variants),
            " - ".join(map(str, sorted({min(loads), max(loads)}))),
            f"{min(kernel.occupancy for kernel in variants):.0%}",
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def hot_loops(architecture: str, listings: dict[str, list[tuple[int, str]]]) -> Iterator[tuple[HotLoop, str, float]]:
    """Each kernel, its backend, and its instructions per element. `listings` are those of the CUDA kernels."""
    from test_triton_compiled import CASES

    for kernel in HOT_LOOPS:
        variants = compile_for(TARGETS[architecture], CASES[kernel.case][0])[kernel.triton]
        loops = map(instructions, innermost_loops_with_loads(disassemble(variants[0]).text))
        yield kernel, "Triton", per_element(widest_loop(loops), kernel)
        if kernel.cuda in listings:
            yield kernel, "CUDA", per_element(widest_loop(loops_of(listings[kernel.cuda])), kernel)


def ceilings(extension: str | None) -> str:
    heads = [f"{name} ({gpu.bandwidth / 1e12:.3g} TB/s)" for name, gpu in GPUS.items()]
    lines = [f"| kernel | backend | instructions per element | bytes per element | {' | '.join(heads)} |"]
    lines.append("|---" * (4 + len(heads)) + "|")
    listings: dict[str, dict[str, list[tuple[int, str]]]] = {}
    if extension:
        for architecture, kernel, text in cuda_sections(extension, "-sass", r"^\s*Function : "):
            listings.setdefault(architecture, {})[short_name(kernel)] = addressed(text)
    found: dict[tuple[HotLoop, str], dict[str, float]] = {}
    for architecture in dict.fromkeys(gpu.architecture for gpu in GPUS.values()):
        for kernel, backend, number in hot_loops(architecture, listings.get(architecture, {})):
            found.setdefault((kernel, backend), {})[architecture] = number
    for (kernel, backend), numbers in found.items():
        size = kernel.reads + kernel.writes
        rates = [f"{ceiling(gpu, numbers[gpu.architecture], size) / 1e12:.1f} TB/s" for gpu in GPUS.values()]
        counted = " / ".join(f"{number:.1f}" for number in numbers.values())
        lines.append(f"| {kernel.what} | {backend} | {counted} | {size} | {' | '.join(rates)} |")
    return "\n".join(lines)


def main() -> int:
    paragraphs = (__doc__ or "").strip().split("\n\n")
    print("# What the kernels take of a GPU\n")
    print(f"Printed by `python benchmarks/resources.py`, with Triton {triton.__version__}.\n{paragraphs[2]}\n")
    extension = None
    try:
        extension = str(build(cuda_module(CUDA_TARGETS)))
        print(f"CUDA kernels without launch bounds are given {THREADS_UNBOUND} threads a block.")
    except CannotBuild as error:
        print(f"The CUDA extension is not built: {error}.")
    by_architecture = cuda_kernels(extension) if extension else {}
    print(f"\n## What they could move\n\n{paragraphs[3]}\n\n{ceilings(extension)}", flush=True)
    for architecture in TARGETS:
        print(f"\n## {architecture}: Triton\n\n{table(list(triton_kernels(architecture)))}", flush=True)
        if kernels := by_architecture.get(architecture):
            print(f"\n## {architecture}: CUDA\n\n{table(kernels)}", flush=True)
    return 0


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        sys.exit(main())
