"""What a machine with a GPU and few packages runs: the smoke script, and the op tests."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import gpu_smoke
from op_cases import CASES
from rlkernels import _backends

ROOT = Path(__file__).parents[1]

WITHOUT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("accelerate", "datasets", "expecttest", "httpx2", "peft", "transformers", "trl"):
            raise ModuleNotFoundError(f"{name} is absent", name=name)

sys.meta_path.insert(0, Absent())
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


def test_it_calls_every_op():
    assert {case.op.__name__.removeprefix("inplace_") for case in CASES.values()} == set(_backends.BACKENDS_OF)


def test_it_runs_on_each_backend_and_says_which_it_skipped(capsys):
    gpu_smoke.main("cpu")
    printed = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    for name in _backends.KERNEL_BACKENDS:
        reason = _backends.status(name, "cpu")
        assert printed[name] == (f"skipped: {reason}" if reason else f"{len(CASES)} calls")


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(gpu_smoke.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no GPU is available"):
        gpu_smoke.main()


def test_the_op_tests_need_no_packages_of_the_trainers():
    """They are collected, and one of each file that puts its op through opcheck is run."""
    names = re.search(r"^OP_TESTS := .*tests/test_,(.*)\)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    files = [f"tests/test_{name}" for name in names]
    assert len(files) >= 13
    command = [sys.executable, "-c", WITHOUT, "-q", "-m", "not gpu and not thorough", "-k", "opcheck", *files]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) >= 5, result.stdout
