"""Builds what runs on the emulation: the CUDA kernels as a library that registers them for CPU tensors; programs."""

import os
import shlex
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))  # run.py is started as a script
from build_tools.compile import ROOT, Module, Step, build  # noqa: E402

OUTPUT = Path("build/cuda_emulation")
CXX = shlex.split(os.environ.get("CXX", "g++"))
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
FLAGS = [
    *("-std=c++20", "-g", "-fPIC", "-fvisibility=hidden", "-fno-omit-frame-pointer"),
    *("-Wall", "-Wextra", "-Wno-unknown-pragmas"),
    *("-isystem", "tests/cuda_emulation/include", "-Icsrc/include", "-Icsrc/cuda"),
]


def kernels() -> Path:
    """The library with the `.cuda` overloads of every op, implemented for CPU tensors."""
    import torch

    root = Path(torch.__file__).parent
    torch_flags = ["-isystem", str(root / "include"), "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DRLK_CUDA_KEY=CPU"]
    cuda = ROOT / "csrc" / "cuda"
    steps = [_step(path, "-DRLK_FEW_SEQUENCES=6", "-DRLK_LONGEST_OF_FEW=1000") for path in sorted(cuda.glob("*.cu"))]
    ops = [path for path in sorted(cuda.glob("*.cpp")) if path.stem != "module"]
    steps += [_step(path, *torch_flags) for path in (*ops, HERE / "torch_stubs.cpp")]
    return _library("kernels.so", steps, ["-shared"], [f"-L{root / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"])


def program(source: Path) -> Path:
    return _library(source.stem, [_step(source)], [], [])


def _step(source: Path, *flags: str) -> Step:
    command = [*CXX, *FLAGS, "-O1", *SANITIZERS, *flags, "-x", "c++"]
    return Step(command, str(source.relative_to(ROOT)), OUTPUT / f"{source.name}.o")


def _library(name: str, steps: list[Step], link: list[str], libraries: list[str]) -> Path:
    # The emulation itself is not what is tested, and at -O2 without the sanitizers three times as fast.
    emulation = Step([*CXX, *FLAGS, "-O2"], "tests/cuda_emulation/emulation.cpp", OUTPUT / "emulation.cpp.o")
    return build(Module(OUTPUT / name, [emulation, *steps], [*CXX, *SANITIZERS, *link], libraries))


if __name__ == "__main__":
    print(kernels())
