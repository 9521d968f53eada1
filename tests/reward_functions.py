"""Reward functions that fail in every way, in a module that worker processes can import, and what their tests share."""

import itertools
import math
import os
import signal
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
    log_extra("functions", [lambda: 0] * len(completions))
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


# Of the tests


def rows(*completions, **columns):
    """Of two prompts, with half of the completions each."""
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
