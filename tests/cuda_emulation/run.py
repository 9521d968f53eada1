"""Runs pytest with the CUDA kernels serving CPU tensors through the emulation: once per schedule of the warps.

    python tests/cuda_emulation/run.py [--schedules random:1,backward] tests/test_kl.py

The other arguments are pytest's. An access out of range, an unaligned vector or a divergent barrier ends the run with a
report; a missing barrier changes the answer under one of the schedules.
"""

import argparse
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import build

SCHEDULES = "forward,backward,random:1"
ASAN_OPTIONS = {
    "detect_leaks": "0",  # Python's own
    # Fresh memory is NaN, so that reading what no kernel wrote shows.
    "max_malloc_fill_size": str(1 << 30),
    "malloc_fill_byte": str(0xFF),
    # Freed memory kept from reuse: more would only be slower.
    "quarantine_size_mb": "64",
}


def environment(schedule: str) -> dict[str, str]:
    def runtime(name: str) -> str:
        return subprocess.check_output([*build.CXX, f"-print-file-name={name}"], text=True).strip()

    return {
        **os.environ,
        # The sanitizer must be loaded before anything that allocates, and the library whose exceptions it watches.
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libstdc++.so')}",
        "ASAN_OPTIONS": ":".join(f"{name}={value}" for name, value in ASAN_OPTIONS.items()),
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "CUDA_EMULATION_SCHEDULE": schedule,
        "CUDA_EMULATION_KERNELS": str(build.kernels()),
        "PYTHONPATH": os.pathsep.join([str(build.HERE), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "OMP_NUM_THREADS": "1",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--schedules", default=SCHEDULES, help=f"orders of the warps; by default {SCHEDULES}")
    options, arguments = parser.parse_known_args()
    report = next((Path(a.removeprefix("--junitxml=")) for a in arguments if a.startswith("--junitxml=")), None)
    suites = ElementTree.Element("testsuites")
    status = 0
    for schedule in options.schedules.split(","):
        print(f"CUDA kernels on the host, warps scheduled {schedule}", flush=True)
        command = [sys.executable, "-m", "pytest", "-p", "emulated_backend", "--backend", "cuda", *arguments]
        if report:
            report.unlink(missing_ok=True)  # else a crash would count the schedule before once more
        status = subprocess.run(command, env=environment(schedule), cwd=build.ROOT).returncode or status
        if report and report.exists():
            for suite in ElementTree.parse(report).getroot().iter("testsuite"):
                suite.set("name", schedule)
                suites.append(suite)
    if report:
        ElementTree.ElementTree(suites).write(report)
    return status


if __name__ == "__main__":
    sys.exit(main())
