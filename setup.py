"""Builds the extension modules; everything else about the package is in pyproject.toml.

`rlkernels._C` holds the CPU kernels and is built wherever there is a C++20 compiler; `rlkernels._C_cuda` the CUDA
kernels, wherever there is nvcc, unless RLKERNELS_CUDA=0 or 1 says otherwise. Both use PyTorch's stable ABI.
RLKERNELS_BUILD=0 builds neither.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CXX = shlex.split(os.environ.get("CXX", "c++"))
CUDA_TARGETS = (80, 90, 100)
# Each CPU kernel is compiled once for each of these; bindings/module.cpp chooses when the module is loaded.
INSTRUCTION_SETS = {"kBaseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS["kAvx2"] = ["-mavx2", "-mfma", "-mf16c"]
    INSTRUCTION_SETS["kAvx512"] = [*INSTRUCTION_SETS["kAvx2"], "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]


@dataclass
class Step:
    """One run of a compiler: `command` reads `source` and what it includes, and writes `output`."""

    command: list[str]
    source: str
    output: Path


@dataclass
class Module:
    """An extension module: the steps that compile its objects, and the command that links them."""

    name: str
    steps: list[Step]
    link: list[str] = field(default_factory=list)


def binding_flags() -> tuple[list[str], list[str]]:
    """What compiling and what linking a module takes: PyTorch's stable ABI, and pybind11 for Python's."""
    import pybind11
    import torch

    root = Path(torch.__file__).parent
    includes = ("csrc/include", root / "include", pybind11.get_include(), sysconfig.get_path("include"))
    compile_flags = [*(f"-I{path}" for path in includes), "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    return compile_flags, [f"-L{root / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]


def cpu_module() -> Module | None:
    if shutil.which(CXX[0]) is None:
        print(f"rlkernels._C is not built: no C++ compiler ({CXX[0]}); the reference serves instead")
        return None
    compile_flags, link_flags = binding_flags()
    # Vector operators become fused multiply-adds only where contraction may cross function calls.
    flags = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-Wall"]
    command, build = [*CXX, *flags, "-Icsrc/include", "-Icsrc"], Path("build/cpu")
    bindings, kernels = (sorted(Path("csrc", folder).glob("*.cpp")) for folder in ("bindings", "cpu"))
    steps = [Step([*command, *compile_flags], str(s), build / f"{s.stem}.o") for s in bindings]
    for isa, isa_flags in INSTRUCTION_SETS.items():
        isa_command = [*command, *isa_flags, f"-DRLK_ISA={isa}"]
        steps += [Step(isa_command, str(s), build / isa / f"{s.stem}.o") for s in kernels]
    return Module("rlkernels._C", steps, [*CXX, "-shared", *link_flags])


def cuda_module() -> Module | None:
    if os.environ.get("RLKERNELS_CUDA", "1" if shutil.which("nvcc") else "0") == "0":
        return None
    compile_flags, link_flags = binding_flags()
    known = subprocess.check_output(["nvcc", "--list-gpu-arch"], text=True).split()
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in CUDA_TARGETS if f"compute_{a}" in known]
    targets.append(targets[-1].replace("code=sm", "code=compute"))  # newer GPUs compile this themselves
    host = [f"-ccbin={CXX[0]}", "-forward-unknown-to-host-compiler"]
    flags = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-fPIC", "-fvisibility=hidden", *compile_flags]
    command = ["nvcc", *host, *flags, *targets]
    sources = sorted(Path("csrc/cuda").glob("*.c*"))
    steps = [Step(command, str(s), Path("build/cuda", s.stem + ".o")) for s in sources if s.suffix != ".cuh"]
    # The runtime is linked in, since a machine without a GPU has none to load.
    return Module("rlkernels._C_cuda", steps, ["nvcc", "-shared", "-nodlink", *host, "-cudart=static", *link_flags])


def up_to_date(output: Path, command: str, inputs: list[str]) -> bool:
    """Whether `output` was made by `command` and is newer than its inputs."""
    stamp = output.with_suffix(".command")
    if not (output.exists() and stamp.exists() and stamp.read_text() == command):
        return False
    return all(os.path.exists(i) and os.path.getmtime(i) <= output.stat().st_mtime for i in inputs)


def run(output: Path, command: list[str], inputs: list[str]) -> None:
    line = shlex.join(command)
    if up_to_date(output, line, inputs):
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    print(line, flush=True)
    subprocess.run(command, check=True)
    output.with_suffix(".command").write_text(line)


def compile_step(step: Step) -> None:
    dependencies = step.output.with_suffix(".d")
    # The compiler wrote these as a make rule: "output: input input \\\n input".
    listed = dependencies.read_text().replace("\\\n", " ").split(":", 1)[1].split() if dependencies.exists() else []
    command = [*step.command, "-MD", "-MF", str(dependencies), "-c", step.source, "-o", str(step.output)]
    run(step.output, command, listed or [step.source])


class BuildModules(build_ext):
    """Compiles what changed since the last build, objects in parallel."""

    def build_extension(self, extension: Extension) -> None:
        module = extension.module
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_step, module.steps))
        objects = [str(step.output) for step in module.steps]
        library = Path("build") / self.get_ext_filename(module.name.rsplit(".", 1)[-1])
        link, libraries = module.link[:2], module.link[2:]
        run(library, [*link, *objects, *libraries, "-o", str(library)], objects)
        target = Path(self.get_ext_fullpath(module.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(library, target)


def extensions() -> list[Extension]:
    if os.environ.get("RLKERNELS_BUILD") == "0":
        return []
    found = []
    for module in (cpu_module(), cuda_module()):
        if module is not None:
            extension = Extension(module.name, [step.source for step in module.steps])
            extension.module = module
            found.append(extension)
    return found


setup(
    package_dir={"rlkernels.trainers": "trainers"},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildModules},
)
