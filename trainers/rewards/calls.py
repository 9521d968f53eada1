"""One call of a reward function in this process: what came of it, within a time limit."""

import asyncio
import concurrent.futures
import contextlib
import copy
import math
import numbers
import os
import signal
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, TypeAlias

from transformers import TrainerState
from transformers.utils import logging

from ..base.interrupts import Terminated
from .process_settings import restored

logger = logging.get_logger(__name__)

RewardFunction: TypeAlias = Callable[..., Any]

# What nobody can change.
ATOMS = {bool, bytes, float, int, str, type(None)}
# Levels of lists and dicts that a function may log; what is deeper becomes text.
DEPTH = 32


class RewardError(ValueError):
    """A reward function failed: it raised, crashed, took longer than it may, or did not return one finite number (or
    None) for each completion; or a worker process that was to call it did not start."""


@dataclass
class Outcome:
    """What a function returned for a batch of rows, and what it logged."""

    rewards: list[float]  # NaN where it does not apply
    wrong: dict[int, str]  # rows for which it returned neither a finite number nor None, and what is to be said of them
    extra: dict[str, list]  # all that it gave to log_extra, by column
    metrics: list[tuple[str, float]]


@dataclass
class Failure:
    """Why there is no `Outcome`: the end of a sentence that begins with the function's name."""

    reason: str
    error: BaseException | None = None
    timed_out: bool = False
    of_the_batch: bool = False  # no row is to blame


Result: TypeAlias = Outcome | Failure


@dataclass(frozen=True)
class Call:
    """A function and its keyword arguments: those with one value per row, and those for all rows, beside `log_extra`
    and `log_metric`, which are added."""

    function: RewardFunction
    rows: dict[str, list]
    shared: dict[str, Any]

    def begin(self, log: "_Log") -> Any:
        """Calls it with copies: what it changes, neither the training nor another function sees."""
        return self.function(**copied(self.rows), **copied(self.shared), **log.functions)


def run(call: Call) -> Result:
    """Whatever the function does: it may not end the process or stay away, and Ctrl-C and SIGTERM pass."""
    log, process = _Log(), os.getpid()
    try:
        return log.outcome(call, call.begin(log))
    except (KeyboardInterrupt, Terminated, _TimeUp):
        raise
    except BaseException as error:  # SystemExit, and what extensions raise beside Exception
        return failed(error)
    finally:
        _end_a_fork(process)


def _end_a_fork(process: int) -> None:
    if os.getpid() != process:  # the function forked, and has returned in the child too
        os._exit(0)


def copied(value: Any) -> Any:
    """`copy.deepcopy`, but fast for lists of numbers and the logs of a long run; what cannot be copied is passed on."""
    if type(value) is list:
        return value.copy() if ATOMS.issuperset(map(type, value)) else [copied(each) for each in value]
    if type(value) is dict:
        plain = ATOMS.issuperset(map(type, value.values()))
        return value.copy() if plain else {key: copied(each) for key, each in value.items()}
    if isinstance(value, TrainerState):
        other = copy.copy(value)
        vars(other).update(copied(vars(value)))
        return other
    try:
        return copy.deepcopy(value)
    except Exception:
        return value


def failed(error: BaseException) -> Failure:
    if isinstance(error, _WrongResult):
        return Failure(str(error), of_the_batch=True)
    return Failure(f"raised {type(error).__name__}: {shorten(' '.join(text_of(error).split()), 500)}", error)


def text_of(value: Any, show: Callable[[Any], str] = str) -> str:
    """Its text, that of an object which has none too, in characters that can be written."""
    try:
        return show(value).encode(errors="backslashreplace").decode()
    except (KeyboardInterrupt, Terminated, _TimeUp):
        raise
    except BaseException:
        return f"({type(value).__name__} without a text)"


def plain(value: Any, within: tuple[int, ...] = ()) -> Any:
    """What a reward function logs, as JSON and parquet can keep it: numbers and arrays of numpy and torch as Python's,
    and what has no place there as text, such as integers of more than 64 bits and what holds itself."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, float):
        return float(value)
    if isinstance(value, int):
        return int(value) if -(2**63) <= value < 2**63 else text_of(value)
    if isinstance(value, dict | list | tuple) and id(value) not in within and len(within) < DEPTH:
        within = (*within, id(value))
        if isinstance(value, dict):
            return {text_of(key): plain(each, within) for key, each in value.items()}
        return [plain(each, within) for each in value]
    return plain(value.tolist(), within) if hasattr(value, "tolist") else text_of(value)


def too_late(limit: float) -> Failure:
    return Failure(f"did not return within {limit:g} s (reward_timeout)", timed_out=True)


def shorten(text: str, length: int = 200) -> str:
    return text if len(text) <= length else f"{text[:length]}..."


class _WrongResult(Exception):
    """Not a list of one value per completion."""


@dataclass
class _Log:
    """What a function logs, which counts only if the call comes to a good end."""

    extra: dict[str, list] = field(default_factory=dict)
    metrics: list[tuple[str, float]] = field(default_factory=list)

    @property
    def functions(self) -> dict[str, Callable]:
        return {"log_extra": self.add_extra, "log_metric": self.add_metric}

    def add_extra(self, column: str, values: Sequence) -> None:
        _check_name("log_extra", column)
        self.extra.setdefault(text_of(column), []).extend([plain(each) for each in values])

    def add_metric(self, name: str, value: Any) -> None:
        _check_name("log_metric", name)
        number = float(value)
        if math.isfinite(number) and not _is_float32(number):
            raise ValueError(f"log_metric: value must be a number that float32 can hold; got {number}")
        self.metrics.append((text_of(name), number))

    def outcome(self, call: Call, result: Any) -> Outcome:
        expected = len(call.rows["prompts"])
        if hasattr(result, "tolist") and not isinstance(result, memoryview):  # of numpy or torch
            result = result.tolist()
        if not isinstance(result, list | tuple):
            raise _WrongResult(f"must return a list of numbers; got {type(result).__name__}")
        result = list(result)  # of a subclass, what it gives
        if len(result) != expected:
            raise _WrongResult(f"must return one reward for each of the {expected} completions; got {len(result)}")
        rewards, wrong = [], {}
        for row, value in enumerate(result):
            rewards.append(_number(value))
            if value is not None and math.isnan(rewards[row]):
                got = shorten(text_of(value, repr))
                wrong[row] = f"must return finite numbers, or None where it does not apply; got {got}"
        return Outcome(rewards, wrong, self.extra, self.metrics)


def _check_name(function: str, name: Any) -> None:
    if not isinstance(name, str):
        raise TypeError(f"{function}: its first argument must be a name; got {name!r}")


def _is_float32(value: float) -> bool:
    try:
        struct.pack("<f", value)  # which refuses what is too large, as "f" does not
    except OverflowError:
        return False
    return math.isfinite(value)


def _number(value: Any) -> float:
    """The finite number that it is, NaN if it is none, also for float32."""
    try:
        if hasattr(value, "item"):  # one of numpy or torch
            value = value.item()
        if isinstance(value, numbers.Real | Decimal) and _is_float32(float(value)):
            return float(value)
    except (ValueError, TypeError, RuntimeError, ArithmeticError):  # several of numpy or torch, 10**400, ...
        pass
    return math.nan


# In the main thread


class _TimeUp(BaseException):
    """Raised in a function whose time is up; no Exception, since many a reward function catches those."""


def run_within(limit: float | None, call: Call) -> Result:
    """`run`, in this thread, interrupted after so many seconds, and again after as many more if it goes on; what the
    function changes of the process is put back (`settings`).

    A signal interrupts it, SIGURG, which does no harm elsewhere: functions expect to run in the main thread and to have
    SIGALRM for themselves. That ends Python code and waiting system calls. Code in C goes on until it returns: only a
    worker process can be stopped there. In any thread but the main one, which signals do not reach, there is no limit.
    """
    with restored():
        return _run_within(limit, call)


def _run_within(limit: float | None, call: Call) -> Result:
    if limit is None:
        return run(call)
    if threading.current_thread() is not threading.main_thread():
        logger.warning_once("reward_timeout has no effect outside the main thread, but with reward_workers.")
        return run(call)
    armed, was_interrupted, is_over = True, False, threading.Event()
    result: Result = too_late(limit)

    def interrupt(number: int, frame: Any) -> None:
        nonlocal was_interrupted
        was_interrupted = True
        if armed:
            raise _TimeUp

    def watch() -> None:
        while not is_over.wait(limit):
            signal.pthread_kill(main, signal.SIGURG)

    main = threading.get_ident()
    previous = signal.signal(signal.SIGURG, interrupt)
    watcher = threading.Thread(target=watch, name="reward_timeout", daemon=True)
    try:
        watcher.start()
        try:
            result = run(call)
        finally:
            armed = False
    except _TimeUp:
        armed = False  # it may have come right before that line
    finally:
        # In this order: no signal is on its way when the handler goes.
        is_over.set()
        watcher.join()
        signal.signal(signal.SIGURG, signal.SIG_DFL if previous is None else previous)
    # Also where the function caught the exception and returned something.
    return too_late(limit) if was_interrupted else result


# In an event loop


class AsyncCalls:
    """Calls async functions, all at once, in one event loop for the whole run: clients that a reward function keeps are
    bound to the loop that they were made in. It has a thread of its own, since a notebook already runs one in the main
    thread. A function that blocks that thread keeps it: later calls have a new loop in a new one."""

    #: What a loop that is not blocked takes at most to notice that the time is up, in seconds.
    grace = 1.0

    def __init__(self, limit: float | None) -> None:
        self.limit = limit
        self._loop: _Loop | None = None

    @contextlib.contextmanager
    def started(self, calls: Sequence[Call]) -> Iterator[Callable[[], list[Result]]]:
        """They run inside; calling what it gives waits for them all."""
        if calls and self._loop is None:
            self._loop = _Loop()
            threading.Thread(target=self._loop.serve, name="rewards", daemon=True).start()
        began = time.monotonic()
        futures = [asyncio.run_coroutine_threadsafe(self._within_limit(call), self._loop.loop) for call in calls]

        def result(call: Call, future: concurrent.futures.Future, is_late: bool) -> Result:
            if not is_late and not future.cancelled():
                return future.result()
            if len(calls) > 1:
                return self._alone(call)
            return too_late(self.limit) if is_late else Failure("cancelled the task that it was called in")

        def results() -> list[Result]:
            left = None if self.limit is None else max(began + self.limit + self.grace - time.monotonic(), 0)
            late = concurrent.futures.wait(futures, left).not_done
            if late:
                self._loop.give_up()
                self._loop = None
            return [result(call, future, future in late) for call, future in zip(calls, futures, strict=True)]

        try:
            yield results
        finally:
            for future in futures:
                future.cancel()

    def _alone(self, call: Call) -> Result:
        """Calls again, alone, what did not end since one of several blocked the thread or cancelled all."""
        with self.started([call]) as results:
            return results()[0]

    async def _within_limit(self, call: Call) -> Result:
        task = asyncio.ensure_future(_run_async(call))
        try:
            # Not `wait_for`, which waits for what ignores that it was cancelled.
            await asyncio.wait({task}, timeout=self.limit)
        finally:
            task.cancel()
        return task.result() if task.done() else too_late(self.limit)


async def _run_async(call: Call) -> Result:
    log, process = _Log(), os.getpid()
    try:
        return log.outcome(call, await call.begin(log))
    except BaseException as error:  # SystemExit would end the loop
        return failed(error)
    finally:
        _end_a_fork(process)


class _Loop:
    """An event loop, which no function that runs in it can stop."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._is_given_up = False

    def give_up(self) -> None:
        self._is_given_up = True
        self.loop.call_soon_threadsafe(self.loop.stop)

    def serve(self) -> None:
        while not self._is_given_up:
            with contextlib.suppress(BaseException):  # SystemExit of a task that a function made
                self.loop.run_forever()
        if tasks := asyncio.all_tasks(self.loop):
            for task in tasks:
                task.cancel()
            self.loop.run_until_complete(asyncio.wait(tasks, timeout=AsyncCalls.grace))
        self.loop.close()
