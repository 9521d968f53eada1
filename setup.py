"""Builds the extension modules by build_tools/, and finds the packages; all else is in pyproject.toml.

`rlkernels._C` holds the CPU kernels and is built wherever there is a C++20 compiler; `rlkernels._C_cuda` the CUDA
kernels, wherever there is nvcc, unless RLKERNELS_CUDA=0 or 1 says otherwise. RLKERNELS_BUILD=0 builds neither.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).parent))  # where pip runs this file, its folder is not there
from build_tools.compile import CompileError, build
from build_tools.modules import CannotBuild, cpu_module, cuda_module


class BuildModules(build_ext):
    """A module that cannot be built is left out with a warning, for another backend serves instead. C++ that does not
    compile where the compiler is good enough ends the build: it is a mistake in this project."""

    def build_extension(self, extension: Extension) -> None:
        cuda = extension.name == "rlkernels._C_cuda"
        target, inplace = Path(self.get_ext_fullpath(extension.name)), Path(self.get_ext_filename(extension.name))

        def remove_earlier() -> None:
            for earlier in (target, inplace):  # which must not pass for this build's
                earlier.unlink(missing_ok=True)

        if cuda and not cuda_is_wanted():
            return remove_earlier()
        try:
            library = build(cuda_module() if cuda else cpu_module())
        except (CannotBuild, CompileError) as error:
            remove_earlier()
            if isinstance(error, CompileError) and not cuda:
                sys.exit(f"{error.output}\nerror: {extension.name} is not built: {error}")
            serving = "Triton's kernels serve" if cuda else "the reference serves"
            print(f"warning: {extension.name} is not built: {error}; {serving} instead", file=sys.stderr)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(library, target)


def cuda_is_wanted() -> bool:
    return os.environ.get("RLKERNELS_CUDA", "1" if shutil.which("nvcc") else "0") != "0"


def extensions() -> list[Extension]:
    if os.environ.get("RLKERNELS_BUILD") == "0":
        return []
    return [Extension(name, sources=[], optional=True) for name in ("rlkernels._C", "rlkernels._C_cuda")]


def packages() -> list[str]:
    """Every folder with an __init__.py; those of trainers/ are installed as rlkernels.trainers."""
    found = find_packages(include=["rlkernels", "rlkernels.*", "trainers", "trainers.*"])
    return sorted({name if name.startswith("rlkernels") else f"rlkernels.{name}" for name in found})


setup(
    packages=packages(),
    package_dir={"rlkernels.trainers": "trainers"},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildModules},
)
