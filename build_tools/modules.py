"""The two extension modules: what each is compiled from, with which flags, and what a machine needs for that.

Both use PyTorch's stable ABI. Nothing here needs more than Python itself before a module is asked for, so that
`make` can look for a compiler before anything is installed.
"""

import functools
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from build_tools.compile import ROOT, CompileError, Module, Step, build, first_error

CXX = shlex.split(os.environ.get("CXX") or "c++")
if len(CXX) > 1 and Path(CXX[0]).name == "ccache":
    del CXX[0]  # build_tools/compile.py runs it where it is installed
CUDA_TARGETS = (80, 90, 100)
# Each CPU kernel is compiled once for each of these; cpu/bindings/module.cpp chooses when the module is loaded.
INSTRUCTION_SETS = {"kBaseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS["kAvx2"] = ["-mavx2", "-mfma", "-mf16c"]
    INSTRUCTION_SETS["kAvx512"] = [*INSTRUCTION_SETS["kAvx2"], "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
# Vector operators become fused multiply-adds only where contraction may cross function calls.
CPU_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-Wall"]
CPU_FLAGS += ["-Icsrc/include", "-Icsrc"]


# What the kernels use that a compiler or its library may be too old for.
PROBE = """
#include <bit>
#include <concepts>
#ifdef __x86_64__
#include <immintrin.h>
#endif
using Floats = float __attribute__((vector_size(16)));
using Ints = int __attribute__((vector_size(16)));
Ints bits(Floats x) { return std::bit_cast<Ints>(x); }
template <std::integral T> T same(T x) { return x; }
template int same(int);
#ifdef __AVX512F__
__m512i widened(__m256i halves) { return _mm512_maskz_cvtepu16_epi32(0xffff, halves); }
#endif
"""


class CannotBuild(Exception):
    """Why a module cannot be built on this machine, in one line."""


def instruction_set_flags(isa: str) -> list[str]:
    return [*INSTRUCTION_SETS[isa], f"-DRLK_ISA={isa}"]


@functools.cache
def compiler_fault() -> str | None:
    """Why the C++ of this project cannot be compiled on this machine, or None."""
    if shutil.which(CXX[0]) is None:
        return f"there is no C++ compiler {CXX[0]!r}; install g++ or clang, or name one: CXX=..."
    # Not a file of this project: a mistake in one must not pass for a fault of the compiler.
    command = [*CXX, *CPU_FLAGS, *instruction_set_flags(list(INSTRUCTION_SETS)[-1]), "-fsyntax-only", "-x", "c++", "-"]
    probe = subprocess.run(
        command, cwd=ROOT, input=PROBE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8"
    )
    if probe.returncode != 0:
        name = shlex.join(CXX)
        return f"{name!r} cannot compile the C++20 of the kernels ({first_error(probe)}); g++ can from version 11 on"
    folders = [sysconfig.get_path("include"), *os.environ.get("CPATH", "").split(":")]
    if not any(folder and Path(folder, "Python.h").exists() for folder in folders):
        header = Path(folders[0], "Python.h")
        return f"{header} is missing; install Python's headers (Debian: python3-dev), or name their folder in CPATH"
    return None


def binding_flags() -> tuple[list[str], list[str]]:
    """The flags that compile and those that link a module: for PyTorch's stable ABI, and for pybind11."""
    if fault := compiler_fault():
        raise CannotBuild(fault)
    folders = {}
    for package in ("torch", "pybind11"):
        # Found, not imported: where nothing changed, to import torch would take longer than all the rest.
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise CannotBuild(f"{package} is not installed")
        folders[package] = Path(spec.origin).parent
    root = folders["torch"]
    includes = (root / "include", folders["pybind11"] / "include", sysconfig.get_path("include"))
    torch_flags = [*(f"-I{path}" for path in includes), "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    return torch_flags, [f"-L{root / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]


def sources(folder: str, pattern: str) -> list[Path]:
    return sorted(path.relative_to(ROOT) for path in (ROOT / "csrc" / folder).glob(pattern))


def object_of(folder: str | Path, source: Path) -> Path:
    return Path(folder, f"{source.name}.o")


def cpu_module() -> Module:
    torch_flags, libraries = binding_flags()
    command = [*CXX, *CPU_FLAGS]
    steps = [
        Step([*command, *torch_flags], str(path), object_of("build/cpu", path))
        for path in sources("cpu/bindings", "*.cpp")
    ]
    for isa in INSTRUCTION_SETS:
        isa_command, folder = [*command, *instruction_set_flags(isa)], Path("build/cpu", isa)
        steps += [Step(isa_command, str(path), object_of(folder, path)) for path in sources("cpu", "*.cpp")]
    return Module(Path("build/_C.so"), steps, [*CXX, "-shared"], libraries)


def own_architectures() -> tuple[int, ...]:
    """The compute capabilities of the GPUs in this machine, 90 for 9.0."""
    if shutil.which("nvidia-smi") is None:
        return ()
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    listed = subprocess.run(query, capture_output=True, text=True).stdout
    return tuple(sorted({int(major + minor) for major, minor in re.findall(r"^(\d+)\.(\d)$", listed, re.MULTILINE)}))


def cuda_module(architectures: tuple[int, ...] = ()) -> Module:
    """For the architectures named, else for those of the GPUs that are here, else for CUDA_TARGETS."""
    if shutil.which("nvcc") is None:
        raise CannotBuild("there is no nvcc")
    torch_flags, libraries = binding_flags()
    listed = subprocess.run(["nvcc", "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    wanted = architectures or own_architectures() or CUDA_TARGETS
    known = [number for number in wanted if f"compute_{number}" in listed]
    if not known:
        raise CannotBuild(f"this nvcc does not compile for compute capability {', '.join(map(str, wanted))}")
    targets = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in known]
    targets.append(targets[-1].replace("code=sm", "code=compute"))  # newer GPUs compile this themselves
    host = [f"-ccbin={CXX[0]}", "-forward-unknown-to-host-compiler"]
    command = ["nvcc", *host, "-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Icsrc/include"]
    folder = Path("build", "-".join(["cuda", *map(str, known)]))
    # nvcc hands C++ to its host compiler, with the folder of CUDA's headers.
    steps = [
        Step([*command, *torch_flags], str(path), object_of("build/cuda", path)) for path in sources("cuda", "*.cpp")
    ]
    steps += [
        Step([*command, "--expt-relaxed-constexpr", *targets], str(path), object_of(folder, path))
        for path in sources("cuda", "*.cu")
    ]
    # The runtime is linked in, since a machine without a GPU has none to load.
    link = ["nvcc", "-shared", "-nodlink", *host, "-cudart=static"]
    return Module(folder / "_C_cuda.so", steps, link, libraries)


# python -m build_tools.modules 90: the CUDA module, for the tests that read its machine code.
if __name__ == "__main__":
    try:
        build(cuda_module(tuple(map(int, sys.argv[1:]))))
    except CannotBuild as error:
        sys.exit(f"error: the CUDA extension is not built: {error}")
    except CompileError as error:
        sys.exit(f"{error.output}\nerror: the CUDA extension is not built: {error}")
