"""Forked programs are as those that are started."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest


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
