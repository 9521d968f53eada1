"""One call of a reward function in this process: what came of it, within a time limit."""

import asyncio
import concurrent.futures
import contextlib
import math
import numbers
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from transformers.utils import logging

from .interrupts import Terminated

logger = logging.get_logger(__name__)

RewardFunction: TypeAlias = Callable[..., Any]


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


def run(call: Call) -> Result:
    """Whatever the function does: it may not end the process or stay away, and Ctrl-C and SIGTERM pass."""
    log = _Log()
    try:
        return log.outcome(call, call.function(**call.rows, **call.shared, **log.functions))
    except (KeyboardInterrupt, Terminated, _TimeUp):
        raise
    except BaseException as error:  # SystemExit, and what extensions raise beside Exception
        return failed(error)


def failed(error: BaseException) -> Failure:
    if isinstance(error, _WrongResult):
        return Failure(str(error), of_the_batch=True)
    return Failure(f"raised {type(error).__name__}: {shorten(' '.join(str(error).split()), 500)}", error)


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
        self.extra.setdefault(column, []).extend(values)

    def add_metric(self, name: str, value: Any) -> None:
        self.metrics.append((name, float(value)))

    def outcome(self, call: Call, result: Any) -> Outcome:
        expected = len(call.rows["prompts"])
        if hasattr(result, "tolist"):  # of numpy or torch
            result = result.tolist()
        if isinstance(result, str) or not hasattr(result, "__len__") or not hasattr(result, "__iter__"):
            raise _WrongResult(f"must return a list of numbers; got {type(result).__name__}")
        if len(result) != expected:
            raise _WrongResult(f"must return one reward for each of the {expected} completions; got {len(result)}")
        rewards, wrong = [], {}
        for row, value in enumerate(result):
            if getattr(value, "ndim", None) == 0:  # a scalar of numpy or torch
                value = value.item()
            is_number = isinstance(value, numbers.Real) and math.isfinite(value)
            rewards.append(float(value) if is_number else math.nan)
            if value is not None and not is_number:
                got = shorten(repr(value))
                wrong[row] = f"must return finite numbers, or None where it does not apply; got {got}"
        return Outcome(rewards, wrong, self.extra, self.metrics)


# In the main thread


class _TimeUp(BaseException):
    """Raised in a function whose time is up; no Exception, since many a reward function catches those."""


def run_within(limit: float | None, call: Call) -> Result:
    """`run`, in this thread, interrupted after so many seconds, and again after as many more if it goes on.

    A signal interrupts it, SIGURG, which does no harm elsewhere: functions expect to run in the main thread and to have
    SIGALRM for themselves. That ends Python code and waiting system calls. Code in C goes on until it returns: only a
    worker process can be stopped there. In any thread but the main one, which signals do not reach, there is no limit.
    """
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
        self._loop: asyncio.AbstractEventLoop | None = None

    @contextlib.contextmanager
    def started(self, calls: Sequence[Call]) -> Iterator[Callable[[], list[Result]]]:
        """They run inside; calling what it gives waits for them all."""
        if calls and self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=_serve, args=(self._loop,), name="rewards", daemon=True).start()
        began = time.monotonic()
        futures = [asyncio.run_coroutine_threadsafe(self._within_limit(call), self._loop) for call in calls]

        def results() -> list[Result]:
            left = None if self.limit is None else max(began + self.limit + self.grace - time.monotonic(), 0)
            late = concurrent.futures.wait(futures, left).not_done
            if late:
                self._loop.call_soon_threadsafe(self._loop.stop)
                self._loop = None
            return [
                self._alone(call, len(calls)) if future in late else future.result()
                for call, future in zip(calls, futures, strict=True)
            ]

        try:
            yield results
        finally:
            for future in futures:
                future.cancel()

    def _alone(self, call: Call, among: int) -> Result:
        """Of a call that did not end since one of so many, itself or another, blocked the thread."""
        if among == 1:
            return too_late(self.limit)
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
    log = _Log()
    try:
        return log.outcome(call, await call.function(**call.rows, **call.shared, **log.functions))
    except BaseException as error:  # SystemExit would end the loop
        return failed(error)


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    is_stopped = False
    while not is_stopped:
        try:
            loop.run_forever()
            is_stopped = True
        except BaseException:  # SystemExit of a task that a function made
            continue
    if tasks := asyncio.all_tasks(loop):
        for task in tasks:
            task.cancel()
        loop.run_until_complete(asyncio.wait(tasks, timeout=AsyncCalls.grace))
    loop.close()
