"""Shows that the tests find faults: makes each mutation in a scratch copy of the tree, and runs tests until one fails.

    python tests/mutants/run.py                      all that have no result for this commit yet, two at a time
    python tests/mutants/run.py NAME ...             these, whether they have one or not
    python tests/mutants/run.py --tree DIR NAME ...  in another checkout, by its own tests

First come the tests that a mutation names, then the parts of `make test` that hold the file it is in. Results are kept
in build/mutants of the tree, by its commit; a run that was stopped goes on where it was. The exit status is 1 if a
mutation survives that is not said to be equivalent, and 2 if the tests fail on the tree as it is.
"""

import argparse
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mutations import ROOT, Mutation, mutations, source_files

WORKERS = 2
# Seconds that a command may take, which then has found the fault. Far more than any does: each test has its own limit.
LIMIT = 2 * 3600
# What holds a file: parts of `make test`. The named tests are run as those of the first part are.
PARTS = {
    r"csrc/include/": ("test-cpu", "test-cuda-host"),
    r"csrc/cuda/": ("test-cuda-host", "test-compile"),
    r"csrc/": ("test-cpu",),
    r"rlkernels/triton/": ("test-triton", "test-compile"),
    r"rlkernels/ops/": ("test-cpu", "test-triton", "test-cuda-host"),
    r"rlkernels/integrations/.*(verl|openrlhf)": ("test-peers",),
    r"": ("test-cpu",),
}
# How the named tests of a part are run, as in a part as the Makefile has it.
COMMANDS = {
    "test-cpu": [".venv/bin/python", "-m", "pytest"],
    "test-triton": ["env", "TRITON_INTERPRET=1", ".venv/bin/python", "-m", "pytest", "--backend=triton"],
    "test-cuda-host": [".venv/bin/python", "tests/cuda_emulation/run.py"],
    "test-peers": [".venv-peers/bin/python", "-m", "pytest"],
}
REPORTS = "build/reports"
# No mutation at all: every part must pass, or what fails in the others says nothing.
UNCHANGED = Mutation("unchanged", "", "", [])

RUNNING: set[subprocess.Popen] = set()
STOPPED, WRITING = threading.Event(), threading.Lock()


def make_scratch(tree: Path, scratch: Path) -> None:
    """A copy of the tree with what was built. It serves one mutation after the other, so that little is compiled."""
    caches = ("__pycache__", ".*_cache", ".hypothesis", ".benchmarks")
    others = shutil.ignore_patterns("build", "runs", ".venv*", *caches)
    shutil.copytree(tree, scratch, symlinks=True, ignore=others)
    (scratch / "tests/mutants/test_mutants.py").write_text("")  # it would fail where a text has been replaced
    shutil.copytree(tree / "build", scratch / "build", ignore=shutil.ignore_patterns("mutants", "reports", "cuda"))
    # Where an editable install would else find them in the tree.
    (scratch / "rlkernels/trainers").symlink_to("../trainers")
    for venv in tree.glob(".venv*"):
        (scratch / venv.name).mkdir()
        for path in venv.iterdir():
            if path.name == "stamps":  # what make notes as done here is not done there
                shutil.copytree(path, scratch / venv.name / "stamps")
            else:
                (scratch / venv.name / path.name).symlink_to(path)


def run(scratch: Path, *command: str) -> tuple[int | None, str]:
    """Exit status, None where it took too long, and the last line of what it said."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    environment |= {
        "PYTHONPATH": str(scratch),
        "PYTEST_ADDOPTS": "-x -p no:cacheprovider",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "RLKERNELS_CUDA": "0",
    }
    shutil.rmtree(scratch / REPORTS, ignore_errors=True)
    output = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    with subprocess.Popen(command, cwd=scratch, env=environment, start_new_session=True, **output) as process:
        RUNNING.add(process)
        try:
            said, _ = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return None, f"{LIMIT} s"
        finally:
            RUNNING.discard(process)
    return process.returncode, next((line for line in reversed(said.splitlines()) if line.strip()), "")


def failed_test(scratch: Path) -> str | None:
    for report in sorted((scratch / REPORTS).glob("*.xml")):
        for case in ElementTree.parse(report).iter("testcase"):
            if case.find("failure") is not None or case.find("error") is not None:
                return f"{case.get('classname')}::{case.get('name')}"
    return None


def named_tests(mutation: Mutation, scratch: Path, part: str) -> list[str]:
    found = [path.relative_to(scratch) for name in mutation.tests for path in sorted(scratch.glob(f"tests/**/{name}"))]
    return [str(path) for path in found if ("peers" in path.parts) == (part == "test-peers")]


def attempts(mutation: Mutation, scratch: Path) -> tuple[list[list[str]], list[list[str]]]:
    """Commands that compile the mutation, and those that may find it."""
    if mutation == UNCHANGED:
        return [], [["make", "-s", part] for part in sorted({part for parts in PARTS.values() for part in parts})]
    files = source_files(scratch)
    path = mutation.place(files)
    path.write_text(files[path].replace(mutation.text, mutation.replacement))
    place = path.relative_to(scratch).as_posix()
    parts = next(parts for pattern, parts in PARTS.items() if re.match(pattern, place))
    compiling = [["make", "-s", "build"]]
    if place.startswith("csrc/") and parts[0] == "test-cuda-host":
        compiling.append([".venv/bin/python", "tests/cuda_emulation/build.py"])
    tests = named_tests(mutation, scratch, parts[0])
    select, schedules = "not gpu", []
    if "thorough:" in (scratch / "pyproject.toml").read_text():  # an older checkout has no such marker
        select += " and not thorough"
        schedules = ["--schedules=random:1"] if parts[0] == "test-cuda-host" else []
    options = ["-q", "-m", select, f"--junitxml={scratch / REPORTS}/named.xml"]
    named = [[*COMMANDS[parts[0]], *schedules, *options, *tests]] if tests else []
    return compiling, [*named, *(["make", "-s", part] for part in parts)]


def verdict(mutation: Mutation, tree: Path, scratch: Path) -> tuple[str, str]:
    if not scratch.exists():
        make_scratch(tree, scratch)
    before = source_files(scratch)
    try:
        return tried(mutation, scratch)
    finally:
        for path, text in before.items():
            if path.read_text() != text:
                path.write_text(text)


def tried(mutation: Mutation, scratch: Path) -> tuple[str, str]:
    compiling, testing = attempts(mutation, scratch)
    where = "from importlib.util import find_spec as f; print(f('rlkernels').origin, f('rlkernels.trainers').origin)"
    _, found = run(scratch, ".venv/bin/python", "-c", where)
    if found.count(f"{scratch}/rlkernels/") != 2:
        raise SystemExit(f"the scratch copy is not what is imported, but {found}")
    for command in compiling:
        status, said = run(scratch, *command)
        if status:
            return "does not compile", said
    for command in testing:
        status, said = run(scratch, *command)
        if status is None:
            return "killed", f"time-out of {said}: {' '.join(command)}"
        if status not in (0, 5):  # 5: of the named tests none was selected
            return "killed", failed_test(scratch) or f"exit status {status}: {said}"
    return "survived", ""


def results(file: Path) -> dict[str, dict]:
    """The last one of each mutation."""
    lines = file.read_text().splitlines() if file.exists() else []
    return {row["name"]: row for row in map(json.loads, lines)}


def run_all(wanted: list[Mutation], tree: Path, folder: Path, record: Path) -> None:
    scratches: queue.SimpleQueue[Path] = queue.SimpleQueue()
    for number in range(1, WORKERS + 1):
        scratch = folder / f"tree-{number}"
        shutil.rmtree(scratch, ignore_errors=True)
        scratches.put(scratch)

    def attempt(mutation: Mutation) -> None:
        scratch, since = scratches.get(), time.monotonic()
        try:
            what, by = verdict(mutation, tree, scratch)
        finally:
            scratches.put(scratch)
        row = {"name": mutation.name, "verdict": what, "by": by, "seconds": round(time.monotonic() - since)}
        with WRITING, record.open("a") as file:
            if not STOPPED.is_set():  # else it was not the mutation that ended it
                print(f"{row['seconds']:6} s  {what:8}  {mutation.name}  {by}", flush=True)
                file.write(json.dumps(row) + "\n")

    with ThreadPoolExecutor(WORKERS) as pool:
        try:
            list(pool.map(attempt, wanted))
        except BaseException:
            STOPPED.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(RUNNING):
                os.killpg(process.pid, signal.SIGKILL)
            raise


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of mutations, or 'unchanged' for the tree as it is")
    parser.add_argument("--tree", type=Path, default=ROOT, help="the checkout, after its `make test-setup`")
    options = parser.parse_args()
    tree, known = options.tree.resolve(), {each.name: each for each in (UNCHANGED, *mutations())}
    if unknown := set(options.names) - known.keys():
        parser.error(f"there is no mutation named {', '.join(sorted(unknown))}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = tree / "build" / "mutants"
    folder.mkdir(parents=True, exist_ok=True)
    # What was found of other tests or sources says nothing of these.
    commit = subprocess.check_output(["git", "-C", tree, "describe", "--always", "--dirty"], text=True).strip()
    record = folder / f"{commit}.jsonl"
    # For the copies, which otherwise would each compile the emulation.
    subprocess.run(
        [".venv/bin/python", "tests/cuda_emulation/build.py"], cwd=tree, check=True, stdout=subprocess.DEVNULL
    )
    done = results(record)
    wanted = [known[name] for name in options.names or known if options.names or name not in done]
    wanted = [each for each in wanted if not each.equivalent]
    if UNCHANGED in wanted:
        run_all([UNCHANGED], tree, folder, record)
    done = results(record)
    if done.get(UNCHANGED.name, {}).get("verdict") == "killed":
        print(f"the tests fail on the tree as it is: {done[UNCHANGED.name]['by']}")
        return 2
    run_all([each for each in wanted if each != UNCHANGED], tree, folder, record)

    done, survivors = results(record), []
    print()
    for name, mutation in known.items():
        row = done.get(name, {"verdict": "not run", "by": ""})
        what, by = ("equivalent", mutation.equivalent) if mutation.equivalent else (row["verdict"], row["by"])
        survivors += [name] if what in ("survived", "does not compile") and mutation != UNCHANGED else []
        print(f"{what:16}  {name:48}  {by}")
    print(f"\nsurvivors: {' '.join(survivors) or 'none'}")
    return 1 if survivors else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped; what was found is kept")
