"""Forked programs are as those that are started."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

import forking


@pytest.fixture
def start(forked, tmp_path):
    def start(text: str) -> subprocess.Popen:
        script = tmp_path / "program.py"
        script.write_text(text)
        pipe = subprocess.PIPE
        return subprocess.Popen([*forked.FORKED, str(script)], cwd=tmp_path, stdout=pipe, stderr=pipe, text=True)

    return start


def test_a_program_that_ends_with_a_text_says_it(start):
    program = start("import sys; print('out'); sys.exit('what is wrong')")
    assert program.communicate() == ("out\n", "what is wrong\n")
    assert program.returncode == 1


def test_each_draws_numbers_of_its_own(start):
    drawn = [
        start("import random, numpy; print(random.random()); print(numpy.random.rand())").communicate()[0].split()
        for _ in range(2)
    ]
    assert len(drawn[0]) == 2 and not set(drawn[0]) & set(drawn[1])


def test_a_program_ends_where_what_stands_for_it_is_killed(start):
    program = start("import os, time; print(os.getpid(), flush=True); time.sleep(600)")
    number = int(program.stdout.readline())
    program.send_signal(signal.SIGKILL)
    program.wait()
    deadline = time.monotonic() + 10
    while is_there := Path(f"/proc/{number}").exists():
        if time.monotonic() > deadline:
            os.kill(number, signal.SIGKILL)
            break
        time.sleep(0.01)
    assert not is_there


def test_packages_of_the_trainers_may_be_absent(tmp_path, monkeypatch):
    (tmp_path / "accelerate.py").write_text("raise ModuleNotFoundError('accelerate is absent', name='accelerate')")
    (tmp_path / "program.py").write_text("print('ran')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv(forking.ADDRESS, "")  # and put back afterwards
    with forking.server():
        assert forking.run_together(1, str(tmp_path / "program.py")) == (0, "ran\n")
