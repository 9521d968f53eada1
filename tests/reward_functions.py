"""Reward functions that fail in every way, in a module that worker processes can import, and what their tests share."""

import builtins
import contextlib
import itertools
import math
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path


class Odd(Exception):
    """Can be pickled, but not be read again."""

    def __init__(self, first, second):
        super().__init__(first)


def swallow():
    try:
        time.sleep(60)
    except BaseException:
        return 1.0


def raise_odd():
    raise Odd("odd", 2)


def close_all():
    os.closerange(3, 256)
    time.sleep(60)


ACTIONS = {
    "raises": lambda: int("six"),
    "exits": lambda: sys.exit(3),
    "odd": raise_odd,
    "hangs": lambda: time.sleep(60),
    "swallows": swallow,
    "nan": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "text": lambda: "good",
    "none": lambda: None,
    # Only a process can be stopped from these.
    "quits": lambda: os._exit(3),
    "crashes": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "closes": close_all,
    "stuck": lambda: sum(itertools.repeat(0)),
}


def act(completions, **kwargs):
    """What each completion says; 1 for other ones, and more if the function sees more rows at once."""
    return [ACTIONS[text]() if text in ACTIONS else float(len(completions)) for text in completions]


def pipes():
    """The numbers of the files that a worker talks to the trainer by."""
    found = []
    for number in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{number}").startswith("socket:"):
                found.append(number)
    return found


def write_to_pipes(content):
    for number in pipes():
        with contextlib.suppress(OSError):
            os.write(number, content)


def without_builtins():
    builtins.len = lambda value: 0
    builtins.isinstance = None
    return 1.0


def keep_the_pipe_open():
    if not os.fork():
        os.setsid()
        time.sleep(2)
        os._exit(0)
    os._exit(3)


def write_without_end():
    while True:
        write_to_pipes(struct.pack("!QQ", 0, 2**16) + bytes(2**16))


SABOTAGE = {
    "garbage": lambda: write_to_pipes(b"\xff" * 1000),
    "part": lambda: (write_to_pipes(struct.pack("!QQ", 1, 100) + b"{"), time.sleep(60)),
    "oversize": lambda: (write_to_pipes(struct.pack("!QQ", 1, 2**62)), time.sleep(60)),
    "no answer": lambda: write_to_pipes(struct.pack("!QQ", 1, 2) + b"[]"),
    "another's": lambda: write_to_pipes(struct.pack("!QQ", 99, 2) + b"{}") or 1.0,
    "another's size": lambda: write_to_pipes(
        struct.pack("!QQ", 1, 60) + b'{"rewards": [], "wrong": {}, "extra": {}, "metrics": []}'.ljust(60)
    ),
    "endless": write_without_end,
    "no builtins": without_builtins,
    "no stdout": lambda: sys.stdout.close() or 1.0,
    "child keeps the pipe": keep_the_pipe_open,
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
}


def sabotages(completions, **kwargs):
    """What each completion says."""
    return [SABOTAGE[text]() if text in SABOTAGE else 2.0 for text in completions]


def forks(completions, **kwargs):
    """Returns twice: the child what is wrong, and later than the parent."""
    wrong = 0.0 if os.fork() else 0.5
    time.sleep(wrong / 5)
    return [wrong + len(text) for text in completions]


async def forks_async(**kwargs):
    return forks(**kwargs)


def stops_in_the_end(completions, **kwargs):
    """The process, when this call has returned."""
    if "stop" in completions:
        subprocess.Popen(["sh", "-c", f"sleep 0.2; kill -STOP {os.getpid()}"])
    return [1.0] * len(completions)


def length(completions, **kwargs):
    return [float(len(text)) for text in completions]


def process(completions, **kwargs):
    return [float(os.getpid())] * len(completions)


def short(completions, **kwargs):
    return [0.0] * (len(completions) - 1)


def in_company(completions, **kwargs):
    if len(completions) > 1:
        raise MemoryError("too many")
    return [0.0]


def logs(prompts, completions, log_extra, log_metric, **kwargs):
    for text in completions:
        log_extra("one by one", [text])
    log_extra("letters", [len(text) for text in completions])
    log_metric("size", len(completions))
    return act(completions)


def logs_a_function(completions, log_extra, **kwargs):
    log_extra("functions", [len] * len(completions))
    return [0.0] * len(completions)


def sees_step(completions, trainer_state, **kwargs):
    return [float(trainer_state.global_step)] * len(completions)


def answers_file(completions, folder, **kwargs):
    """Returns once another function has written `asked`, which waits for what is written then."""
    while not (Path(folder[0]) / "asked").exists():
        time.sleep(0.01)
    (Path(folder[0]) / "answered").touch()
    return [1.0] * len(completions)


def write(file, pid):
    """Who sees the file, sees all of it."""
    file.with_name("part").write_text(str(pid))
    file.with_name("part").rename(file)


def starts_a_process(folder, **kwargs):
    other = subprocess.Popen(["sleep", "61"])
    write(Path(folder[0]) / "pid", other.pid)
    other.wait()


def starts_a_process_and_is_stuck(folder, **kwargs):
    other = subprocess.Popen(["sleep", "61"])
    write(Path(folder[0]) / "pid_of_other", other.pid)
    write(Path(folder[0]) / "pid_of_worker", os.getpid())
    sum(itertools.repeat(0))


class Loaded:
    """A callable that does something when a worker reads it."""

    def __init__(self, action):
        self.action = action

    def __setstate__(self, state):
        ACTIONS[state["action"]]()

    def __call__(self, completions, **kwargs):
        return [0.0] * len(completions)


# What the tests share


def rows(*completions, **columns):
    """The rows of two prompts, with half of the completions each."""
    size = len(completions)
    prompts = ["a" if row < size / 2 else "b" for row in range(size)]
    columns = {name: [value] * size for name, value in columns.items()}
    return {"prompts": prompts, "completions": list(completions), "completion_ids": [[0]] * size, **columns}


def values(tensor):
    """None where there is no reward."""
    return [[None if math.isnan(value) else value for value in column] for column in tensor.T.tolist()]


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    assert condition()
