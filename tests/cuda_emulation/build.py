"""Builds what runs on the emulation: the CUDA kernels as a library that registers them for CPU tensors; programs."""

import fcntl
import hashlib
import os
import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
OUTPUT = ROOT / "build" / "cuda_emulation"
CXX = shlex.split(os.environ.get("CXX", "g++"))
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
FLAGS = [
    *("-std=c++20", "-g", "-fPIC", "-fvisibility=hidden", "-fno-omit-frame-pointer"),
    *("-Wall", "-Wextra", "-Wno-unknown-pragmas"),
    *("-isystem", str(HERE / "include"), "-I", str(ROOT / "csrc/include"), "-I", str(ROOT / "csrc/cuda")),
]


def kernels() -> Path:
    """The library with the `.cuda` overloads of every op, implemented for CPU tensors."""
    import torch

    root = Path(torch.__file__).parent
    flags = ["-isystem", str(root / "include"), "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DRLK_CUDA_KEY=CPU"]
    flags.append("-DRLK_LONGEST_SERIAL=3000")
    sources = [*sorted((ROOT / "csrc/cuda").glob("*.cu")), HERE / "torch_stubs.cpp"]
    link = ["-shared", f"-L{root / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    return _link(OUTPUT / "kernels.so", sources, flags, link)


def program(source: Path) -> Path:
    return _link(OUTPUT / source.stem, [source], [], [])


def _link(output: Path, sources: list[Path], compile_flags: list[str], link_flags: list[str]) -> Path:
    kernel_flags = ["-O1", *SANITIZERS, *compile_flags, "-x", "c++"]
    # The emulation itself is not what is tested, and at -O2 without the sanitizers three times as fast.
    jobs = [(HERE / "emulation.cpp", ["-O2"]), *((source, kernel_flags) for source in sources)]
    OUTPUT.mkdir(parents=True, exist_ok=True)
    with open(OUTPUT / "lock", "w") as lock, ThreadPoolExecutor(os.cpu_count()) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several processes of one test run ask for the same files
        objects = list(pool.map(lambda job: _compile(*job), jobs))
        _run([*CXX, *SANITIZERS, *map(str, objects), *link_flags], output, objects)
    return output


def _compile(source: Path, flags: list[str]) -> Path:
    output = OUTPUT / f"{source.stem}.o"
    _run([*CXX, *FLAGS, *flags, "-c", str(source)], output, [source, *_headers()])
    return output


def _headers() -> list[Path]:
    folders = (ROOT / "csrc/include/rlkernels", ROOT / "csrc/cuda", HERE / "include")
    return sorted(path for folder in folders for path in folder.iterdir() if path.suffix in (".h", ".cuh"))


def _run(command: list[str], output: Path, inputs: list[Path]) -> None:
    """Make `output`, unless it was made by the same command of the same inputs."""
    digest = hashlib.sha256(shlex.join(command).encode())
    for path in inputs:
        digest.update(path.read_bytes())
    stamp = output.with_name(output.name + ".inputs")
    if output.exists() and stamp.exists() and stamp.read_text() == digest.hexdigest():
        return
    subprocess.run([*command, "-o", str(output)], check=True)
    stamp.write_text(digest.hexdigest())


if __name__ == "__main__":
    print(kernels())
