"""`make gpu`: order, time limits, resuming, skipping, the summary and the archive, by tiny steps; and that all which
the real steps name exists."""

import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def load(name):
    spec = importlib.util.spec_from_file_location(f"gpu_{name}", ROOT / "tests" / "gpu" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


run = load("run")


def python(code, seconds=30, **options):
    return run.Command([sys.executable, "-c", code], seconds, **{"needs_gpu": False, **options})


@pytest.fixture
def go(tmp_path, monkeypatch):
    """Runs steps with the GPU that `gpu` says, and gives the status and the summary."""

    def call(wanted, *steps, gpu=True):
        monkeypatch.setattr(run, "gpu_is_here", lambda: gpu)
        status = run.main(wanted, list(steps), tmp_path / "gpu")
        return status, (tmp_path / "gpu" / "summary.txt").read_text()

    return call


def test_steps_run_in_order_and_report(go, tmp_path, capsys):
    steps = [run.Step(n, f"step {n}", [python(f"print('said {n}')")]) for n in (1, 2, 3)]
    status, summary = go("1-2", *steps)
    assert status == 0
    assert re.findall(r"^(\d\. .*)$", summary, re.MULTILINE) == ["1. step 1: passed", "2. step 2: passed"]
    assert summary.startswith("GPU: yes\n") and summary.endswith("s: said 2\n")
    assert not (tmp_path / "gpu" / "3-step-3.log").exists()
    status, summary = go("3", *steps)
    assert [line[0] for line in summary.splitlines() if line[0] in "123"] == ["1", "2", "3"]  # of both calls
    with tarfile.open(tmp_path / "gpu.tar.gz") as archive:
        names = archive.getnames()
    assert {"gpu/summary.txt", "gpu/1-step-1.log", "gpu/3-step-3.log"} <= set(names)


def test_a_failure_stops_neither_the_step_nor_the_next(go, tmp_path):
    steps = [
        run.Step(1, "bad", [python("print('why'); raise SystemExit(3)"), python("print('more')")]),
        run.Step(2, "good", [python("print('fine')")]),
    ]
    status, summary = go("1-2", *steps)
    assert status == 1
    assert "1. bad: FAILED" in summary and "FAILED with status 3" in summary and "why" in summary
    assert "more" in summary and "2. good: passed" in summary


def test_what_passed_is_not_run_again(go, tmp_path):
    counter = tmp_path / "counter"
    count = f"open({str(counter)!r}, 'a').write('.')"
    flag = tmp_path / "flag"
    fails_once = f"import os, sys; sys.exit(0 if os.path.exists({str(flag)!r}) else open({str(flag)!r}, 'w') and 1)"
    steps = [run.Step(1, "counted", [python(count)]), run.Step(2, "mended", [python(fails_once), python(count)])]
    assert go("1-2", *steps)[0] == 1
    status, summary = go("1-2", *steps)
    assert status == 0 and "1. counted: passed" in summary and "2. mended: passed" in summary
    assert counter.read_text() == "..."  # once of the first step, twice of the second
    assert go("1-2", *steps)[0] == 0
    assert counter.read_text() == "..."


def test_what_passed_without_a_gpu_is_run_again_with_one(go, tmp_path):
    counter = tmp_path / "counter"
    step = run.Step(1, "build", [python(f"open({str(counter)!r}, 'a').write('.')")])
    for gpu in (False, True, False, True):
        assert go("1", step, gpu=gpu)[0] == 0
    assert counter.read_text() == ".."


def test_a_command_over_its_limit_ends_with_what_it_started(go, tmp_path):
    pid = tmp_path / "pid"
    child = [sys.executable, "-c", "import time; time.sleep(60)"]
    hang = f"import subprocess; p = subprocess.Popen({child!r}); open({str(pid)!r}, 'w').write(str(p.pid)); p.wait()"
    begin = time.monotonic()
    status, summary = go("1", run.Step(1, "hang", [python(hang, seconds=2), python("print('next')")]))
    assert status == 1 and "FAILED: over its limit of 2 s" in summary and "next" in summary
    assert time.monotonic() - begin < 30
    for _ in range(100):
        stat = Path(f"/proc/{pid.read_text()}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("the child is alive")


def test_without_a_gpu_its_parts_are_skipped_and_said(go, tmp_path):
    commands = [
        python("print('on a GPU')", needs_gpu=True),
        python("raise SystemExit(1)", needs_gpu=True, on_cpu=[sys.executable, "-c", "print('tried')"]),
        python("print('anywhere')"),
    ]
    status, summary = go("1", run.Step(1, "mixed", commands), gpu=False)
    assert status == 0
    assert summary.startswith("GPU: none\n1. mixed: skipped in part\n    skipped: no GPU: ")
    assert "skipped: no GPU; on the CPU it passed" in summary and "anywhere" in summary
    assert not list((tmp_path / "gpu").glob("*.passed*"))
    status, summary = go("1", run.Step(1, "mixed", commands[:1] + commands[2:]), gpu=True)
    assert "1. mixed: passed" in summary and "on a GPU" in summary


def test_what_fails_on_the_cpu_instead_counts(go):
    command = python("", needs_gpu=True, on_cpu=[sys.executable, "-c", "raise SystemExit(1)"])
    assert go("1", run.Step(1, "bad", [command]), gpu=False)[0] == 1


def test_a_missing_tool_is_said(go):
    status, summary = go("1", run.Step(1, "tool", [python("", needs_gpu=True, tool="no-such-tool")]))
    assert status == 0 and "skipped: no no-such-tool" in summary


def test_long_logs_are_cut_and_large_files_left_out(go, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "MOST_LOG", 1000)
    monkeypatch.setattr(run, "MOST_BYTES", 20_000)
    (tmp_path / "gpu").mkdir()
    (tmp_path / "gpu" / "large").write_bytes(os.urandom(30_000))
    go("1", run.Step(1, "long", [python("print('begin'); print('x' * 5000); print('end')")]))
    log = (tmp_path / "gpu" / "1-long.log").read_text()
    assert len(log) < 1100 and "begin" in log and log.endswith("end\n")
    with tarfile.open(tmp_path / "gpu.tar.gz") as archive:
        assert "gpu/large" not in archive.getnames() and "gpu/summary.txt" in archive.getnames()
    assert "no room in the archive for large" in capsys.readouterr().out


@pytest.mark.parametrize("wanted", ["", "x", "4-", "9", "-1"])
def test_refuses_other_steps(go, wanted):
    with pytest.raises(SystemExit, match="error: STEPS must"):
        go(wanted, run.Step(1, "one", []))


def test_headers_that_travelled_are_found(tmp_path, monkeypatch):
    python_name = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    monkeypatch.setattr(run.sysconfig, "get_path", lambda name: str(tmp_path / "absent" / python_name))
    (tmp_path / "headers" / python_name).mkdir(parents=True)
    (tmp_path / "headers" / python_name / "Python.h").touch()
    monkeypatch.setenv("PYTHON_HEADERS", str(tmp_path / "headers"))
    monkeypatch.delenv("CPATH", raising=False)
    assert run.environment()["CPATH"] == f"{tmp_path / 'headers' / python_name}:{tmp_path / 'headers'}"


# The real steps


def test_numbers_and_limits():
    assert [step.number for step in run.STEPS] == list(range(1, 9))
    for half in (run.STEPS[:4], run.STEPS[4:]):
        assert sum(step.seconds for step in half) <= 8 * 60


def test_all_that_the_steps_name_exists():
    commands = [command for step in run.STEPS for command in step.commands]
    named = {word for c in commands for word in (*c.arguments, *(c.on_cpu or ())) if word.endswith(".py")}
    assert {"tests/gpu_smoke.py", "tests/gpu/timings.py", "tests/test_recurrence.py"} <= named
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


def test_every_op_test_runs_and_scans_come_first():
    files = [word for c in run.STEPS[3].commands for word in c.arguments if word.startswith("tests/test_")]
    listed = re.search(r"^OP_TESTS := .*tests/test_,(.*)\)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    assert files[0] == "tests/test_recurrence.py"
    assert sorted(files) == sorted(f"tests/test_{name}" for name in listed)


def test_the_scripts_run_without_a_gpu():
    """Timings of tiny shapes, the head's tiles and each call that is profiled. Only a GPU runs interfaces.py."""
    env = run.environment() | {"CUDA_VISIBLE_DEVICES": ""}
    code = "import one_call, timings, head_tiles; [one_call.main(name) for name in one_call.KERNELS]; "
    code += "import sys; sys.exit(timings.main('cpu') or head_tiles.main('cpu'))"
    env["PYTHONPATH"] += f":{ROOT / 'tests' / 'gpu'}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for kernel in run.PROFILED:
        assert f"{kernel} on the CPU" in done.stdout
    assert len(re.findall(r"[\d.]+ us, not in a graph: no GPU", done.stdout)) >= 6
    assert re.search(r"^4 bare products", done.stdout, re.MULTILINE) and "keep" in done.stdout


def test_interfaces_compiles():
    assert callable(load("interfaces").check_stream)


def test_make_runs_it_with_the_python_named():
    command = ["make", "-n", "gpu", f"PYTHON={sys.executable}", "STEPS=1-4"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f'"{sys.executable}" tests/gpu/run.py "1-4"' in printed
    assert "pip" not in printed
