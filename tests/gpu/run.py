"""Runs the steps for a machine with a GPU, in the order of what is most likely to break: run.py 1-4, then 5-8.

It needs Python with PyTorch and no network: it installs nothing. Output goes to build/gpu/: a log and, once it passed,
a stamp for each step, and summary.txt. All of it is packed into build/gpu.tar.gz. A step that passed is not run again;
remove build/gpu/ to start over. Without a GPU the parts that need one are skipped, and the summary says so.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "gpu"
MOST_BYTES = 15 * 2**20
"""Bytes of all files that are packed, so that the archive stays below 16 MiB however well it packs."""
MOST_LOG = 2**20
"""Bytes of a log that are kept, half of them from its end."""
PYTHON = sys.executable


@dataclass(frozen=True)
class Command:
    """One program of a step. Where a GPU or a tool that it needs is missing, it is skipped."""

    arguments: list[str]
    seconds: int
    needs_gpu: bool = True
    tool: str | None = None
    on_cpu: list[str] | None = None
    """What runs instead where there is no GPU, so that the script is tried."""
    name: str = ""
    """What the summary calls it; by default its words."""


@dataclass(frozen=True)
class Step:
    number: int
    name: str
    commands: list[Command]

    @property
    def seconds(self) -> int:
        return sum(command.seconds for command in self.commands)


def script(name: str, *arguments: str) -> list[str]:
    return [PYTHON, f"tests/gpu/{name}.py", *arguments]


def gpu_tests(seconds: int, *names: str) -> Command:
    workers = ["-n", "8"] if find_spec("xdist") else []
    files = [f"tests/test_{name}.py" for name in names]
    options = ["-q", "-m", "gpu and not thorough", "-p", "no:cacheprovider", "--no-header", "-rfE", "--maxfail=50"]
    return Command([PYTHON, "-m", "pytest", *options, *workers, *files], seconds, name=f"tests of {', '.join(names)}")


def sanitizer(tool: str) -> Command:
    smoke = [PYTHON, "tests/gpu_smoke.py"]
    options = ["--tool", tool, "--error-exitcode", "1"]
    return Command(["compute-sanitizer", *options, *smoke, "cuda"], 55, tool="compute-sanitizer")


def profile(kernel: str) -> Command:
    """Counters of one call's kernels. The clocks are left as they are: they may not be locked everywhere."""
    options = ["--clock-control", "none", "--section", "SpeedOfLight", "--section", "Occupancy"]
    options += ["--profile-from-start", "off"]
    return Command(["ncu", *options, *script("one_call", kernel)], 20, tool="ncu", on_cpu=script("one_call", kernel))


BOTH_SERVE = """
import sys
from rlkernels import _backends
reasons = [f"{name}: {why}" for name in ("cuda", "triton") if (why := _backends.status(name, "cuda"))]
sys.exit("; ".join(reasons) or 0)
"""

PROFILED = ("logprobs", "logprobs_backward", "gae", "gae_triton", "policy_loss", "value_loss")

STEPS = [
    Step(1, "facts", [Command(script("facts"), 20, needs_gpu=False)]),
    Step(
        2,
        "build",
        [
            Command([PYTHON, "setup.py", "build_ext", "--inplace"], 120, needs_gpu=False),
            Command([PYTHON, "-m", "rlkernels", "info"], 10, needs_gpu=False),
            Command([PYTHON, "-c", BOTH_SERVE], 10, name="both backends serve the GPU"),
        ],
    ),
    Step(3, "interfaces", [Command(script("interfaces"), 20)]),
    Step(
        4,
        "tests",
        [
            gpu_tests(60, "recurrence"),
            gpu_tests(50, "token_logprobs", "logprobs_parts"),
            gpu_tests(70, "linear_logprobs", "linear_policy_loss", "linear_preference_logps", "linear_kl_divergence"),
            gpu_tests(50, "policy_loss", "policy_objectives", "value_loss", "masked", "kl", "groups", "launches"),
            Command(
                [PYTHON, "-m", "rlkernels", "selftest", "--device", "cuda"],
                60,
                on_cpu=[PYTHON, "-m", "rlkernels", "selftest", "--device", "cpu", "--quick"],
            ),
        ],
    ),
    Step(
        5,
        "sanitizers",
        [
            Command([PYTHON, "tests/gpu_smoke.py", "cuda"], 20, on_cpu=[PYTHON, "tests/gpu_smoke.py", "cpu"]),
            sanitizer("memcheck"),
            sanitizer("racecheck"),
        ],
    ),
    Step(6, "timings", [Command(script("timings", "cuda"), 130, on_cpu=script("timings", "cpu"))]),
    Step(7, "head tiles", [Command(script("head_tiles", "cuda"), 80, on_cpu=script("head_tiles", "cpu"))]),
    Step(8, "profiles", [profile(kernel) for kernel in PROFILED]),
]


def gpu_is_here() -> bool:
    listed = shutil.which("nvidia-smi") and subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return bool(listed) and listed.returncode == 0 and "GPU" in listed.stdout


def environment() -> dict[str, str]:
    """That of this process, in which Python finds this checkout, and compilers find Python.h.

    Where Python has no headers they are looked for in the folder PYTHON_HEADERS, or in python-headers/ in or next to
    this checkout: a copy of /usr/include with python3.12/, and x86_64-linux-gnu/python3.12/ as on Debian.
    """
    added = {"PYTHONPATH": ":".join(map(str, (ROOT, ROOT / "tests", ROOT / "benchmarks"))), "OMP_NUM_THREADS": "1"}
    # The CUDA module takes longest to build, and without a GPU nothing here would run it.
    added["RLKERNELS_CUDA"] = "1" if gpu_is_here() else "0"
    include = Path(sysconfig.get_path("include"))
    if not (include / "Python.h").exists():
        named = os.environ.get("PYTHON_HEADERS")
        for folder in filter(None, (named, ROOT / "python-headers", ROOT.parent / "python-headers")):
            if (Path(folder) / include.name / "Python.h").exists():
                paths = [str(Path(folder) / include.name), str(folder), os.environ.get("CPATH")]
                added["CPATH"] = ":".join(filter(None, paths))
                break
    return {**os.environ, **added}


def run_command(command: Command, gpu: bool, env: Mapping[str, str], log: Path) -> tuple[bool, str]:
    """Run it, append what it prints to `log`, and give whether it passed with one line for the summary."""
    arguments = command.arguments
    if command.needs_gpu and not gpu:
        if command.on_cpu is None:
            return False, f"skipped: no GPU: {title(command)}"
        arguments = command.on_cpu
    elif command.tool and shutil.which(command.tool) is None:
        return False, f"skipped: no {command.tool}: {title(command)}"
    begin = time.monotonic()
    with open(log, "a") as output:
        print(f"$ {' '.join(arguments)}", file=output, flush=True)
        # A session of its own, so that what it starts ends with it.
        process = subprocess.Popen(
            arguments, cwd=ROOT, env=dict(env), stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(command.seconds)
            outcome = "passed" if status == 0 else f"FAILED with status {status}"
        except subprocess.TimeoutExpired:
            outcome = f"FAILED: over its limit of {command.seconds} s"
        finally:
            end(process)
    if arguments is not command.arguments:
        outcome = f"skipped: no GPU; on the CPU it {outcome}"
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    taken = time.monotonic() - begin
    return outcome == "passed", f"{outcome}: {title(command)}, {taken:.0f} s: {lines[-1][:100]}"


def end(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def title(command: Command) -> str:
    """What tells it from others: its words that are neither options nor the name of Python."""
    words = [word for word in command.arguments if word != PYTHON and not word.startswith("-")]
    return command.name or " ".join(words)[:90]


def run_step(step: Step, folder: Path, gpu: bool, env: Mapping[str, str]) -> str:
    """Run a step unless it passed before, and give its lines of the summary."""
    stem = f"{step.number}-{step.name.replace(' ', '-')}"
    # What passed on a machine without a GPU is run again where there is one.
    stamp, log = folder / f"{stem}.passed{'' if gpu else '-without-gpu'}", folder / f"{stem}.log"
    if stamp.exists():
        return stamp.read_text()
    log.write_text("")
    results = [run_command(command, gpu, env, log) for command in step.commands]
    passed = all(good for good, _ in results)
    failed = any("FAILED" in line for _, line in results)
    state = "passed" if passed else "FAILED" if failed else "skipped in part"
    lines = "".join(f"    {line}\n" for _, line in results)
    report = f"{step.number}. {step.name}: {state}\n{lines}"
    shorten(log)
    if passed:
        stamp.write_text(report)
    return report


def shorten(log: Path) -> None:
    text = log.read_bytes()
    if len(text) > MOST_LOG:
        log.write_bytes(text[: MOST_LOG // 2] + b"\n...\n" + text[-MOST_LOG // 2 :])


def pack(folder: Path) -> list[str]:
    """Pack the folder, smallest files first. Gives the names of those for which there was no room."""
    left_out, packed = [], 0
    with tarfile.open(folder.parent / f"{folder.name}.tar.gz", "w:gz") as archive:
        for file in sorted((path for path in folder.iterdir() if path.is_file()), key=lambda path: path.stat().st_size):
            packed += file.stat().st_size
            if packed > MOST_BYTES:
                left_out.append(file.name)
            else:
                archive.add(file, f"{folder.name}/{file.name}")
    return left_out


def numbers(text: str) -> range:
    """1-4 or 3, as the numbers of steps."""
    first, dash, last = text.partition("-")
    if not (first.isdecimal() and (last.isdecimal() or not dash)):
        sys.exit(f"error: STEPS must be a number or a range such as 1-4; got {text!r}")
    return range(int(first), int(last or first) + 1)


def main(wanted: str, steps: list[Step] = STEPS, folder: Path = FOLDER) -> int:
    chosen = [step for step in steps if step.number in numbers(wanted)]
    if not chosen:
        sys.exit(f"error: STEPS must name some of 1 to {len(steps)}; got {wanted!r}")
    folder.mkdir(parents=True, exist_ok=True)
    gpu, env = gpu_is_here(), environment()
    for step in chosen:
        print(f"== {step.number}. {step.name}, at most {step.seconds} s", flush=True)
        report = run_step(step, folder, gpu, env)
        (folder / f"{step.number}.report").write_text(report)
        print(report, end="", flush=True)
        # Written after each step, so that there is one if the machine is taken away.
        known = [folder / f"{each.number}.report" for each in steps]
        summary = "".join(path.read_text() for path in known if path.exists())
        (folder / "summary.txt").write_text(f"GPU: {'yes' if gpu else 'none'}\n{summary}")
        if left_out := pack(folder):
            print(f"no room in the archive for {', '.join(left_out)}")
    print(f"summary: {folder / 'summary.txt'}; archive: {folder.parent / folder.name}.tar.gz")
    return int(any("FAILED" in (folder / f"{step.number}.report").read_text() for step in chosen))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
