"""Compiles what changed of a module since the last time, one file per processor at once, and links it."""

import fcntl
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


class CompileError(Exception):
    """The first line in which a compiler says what is wrong; `output` is all that it said."""

    def __init__(self, line: str, output: str) -> None:
        super().__init__(line)
        self.output = output


@dataclass
class Step:
    """One run of a compiler: `command` reads `source` and what it includes, and writes `output`."""

    command: list[str]
    source: str
    output: Path


@dataclass
class Module:
    """A library: the steps that compile its objects, and the command that links them, before and after their names."""

    library: Path
    steps: list[Step]
    link: list[str]
    libraries: list[str]


def build(module: Module) -> Path:
    """Give the library's path, after making what is not up to date. Paths start at the project's root, where commands
    run."""
    lock = ROOT / module.steps[0].output.parent / "lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "w") as file, ThreadPoolExecutor(os.cpu_count()) as pool:
        fcntl.flock(file, fcntl.LOCK_EX)  # processes of one test run ask for the same files
        list(pool.map(compile_step, module.steps))
        objects = [str(step.output) for step in module.steps]
        run([*module.link, *objects, *module.libraries, "-o", str(module.library)], module.library, objects)
    return ROOT / module.library


def compile_step(step: Step) -> None:
    dependencies = step.output.with_suffix(".d")
    command = [*step.command, "-MD", "-MF", str(dependencies), "-c", step.source, "-o", str(step.output)]
    inputs = [step.source]
    if (ROOT / dependencies).exists():
        # The compiler wrote these as a make rule: "output: input my\\ input \\\n input".
        rule = (ROOT / dependencies).read_text().split(":", 1)[1]
        inputs = [re.sub(r"\\(.)", r"\1", name) for name in re.findall(r"(?:\\.|[^\s\\])+", rule)]
    run(command, step.output, inputs, before=["ccache"] if shutil.which("ccache") else [])


def run(command: list[str], output: Path, inputs: list[str], before: list[str] | None = None) -> None:
    """Make `output` by `command`, unless this very command made it of inputs that are no newer. `before`: a program
    that runs the command without having a say in what comes out."""
    line = shlex.join(command)
    stamp = ROOT / output.with_suffix(".command")
    if up_to_date(ROOT / output, inputs) and stamp.exists() and stamp.read_text() == line:
        return
    stamp.parent.mkdir(parents=True, exist_ok=True)
    stamp.unlink(missing_ok=True)  # else what a killed command leaves half-written would count as made
    done = subprocess.run(
        [*(before or []), *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode != 0:
        raise CompileError(first_error(done), done.stdout)
    print(done.stdout, end="", file=sys.stderr)
    stamp.write_text(line)


def first_error(failed: subprocess.CompletedProcess[str]) -> str:
    errors = (said.strip() for said in failed.stdout.splitlines() if "error" in said)
    return next(errors, f"the compiler ended with status {failed.returncode}")


def up_to_date(output: Path, inputs: list[str]) -> bool:
    if not output.exists():
        return False
    made = output.stat().st_mtime
    return all((ROOT / path).exists() and (ROOT / path).stat().st_mtime <= made for path in inputs)
