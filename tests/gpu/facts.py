"""Prints what this machine is: GPU, versions, compilers, Python's headers."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sysconfig
from pathlib import Path

PACKAGES = ("torch", "triton", "numpy", "setuptools", "pybind11", "pytest", "pytest-xdist", "pytest-timeout")
PACKAGES += ("pytest-benchmark", "hypothesis", "transformers", "accelerate")
COMMANDS = (["nvidia-smi"], ["nvcc", "--version"], ["c++", "--version"], ["ncu", "--version"])
COMMANDS += (["compute-sanitizer", "--version"], ["lscpu"])


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def main() -> None:
    print(f"python {platform.python_version()}")
    for package in PACKAGES:
        print(f"{package} {version(package)}")
    for command in COMMANDS:
        print(f"$ {' '.join(command)}")
        if shutil.which(command[0]):
            subprocess.run(command, check=False)
        else:
            print("absent", flush=True)
    folders = [sysconfig.get_path("include"), *os.environ.get("CPATH", "").split(":")]
    found = [folder for folder in folders if folder and Path(folder, "Python.h").exists()]
    print(f"Python.h: {', '.join(found) or 'absent'}", flush=True)
    import torch

    print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, GPU available: {torch.cuda.is_available()}")


if __name__ == "__main__":
    main()
