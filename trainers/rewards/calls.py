"""One call of a reward function in this process, within a time limit.

`Call` is a function with its arguments, `Outcome` or `Failure` is what it gave. `run_within` calls a plain function in
the main thread, `AsyncCalls` calls async functions in an event loop. `functions.RewardFunctions` uses both; a worker
process (`workers`) uses `run`.
"""

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

# Immutable types: copying a list of them need not copy its values.
ATOMS = {bool, bytes, float, int, str, type(None)}
# A function may log lists and dicts nested this deep; anything deeper is logged as text.
DEPTH = 32


class RewardError(ValueError):
    """A reward function failed: it raised, crashed, exceeded `reward_timeout`, or did not return one finite number (or
    None) for each completion. Also raised if a worker process does not start."""


@dataclass
class Outcome:
    """What a function returned for a batch of rows, and what it logged."""

    rewards: list[float]  # NaN where the reward does not apply
    wrong: dict[int, str]  # row -> error message, for rows whose value was neither a finite number nor None
    extra: dict[str, list]  # column -> values given to log_extra
    metrics: list[tuple[str, float]]


@dataclass
class Failure:
    """Why there is no `Outcome`."""

    reason: str  # completes a sentence that begins with the function's name
    error: BaseException | None = None
    timed_out: bool = False
    of_the_batch: bool = False  # the failure does not depend on single rows


Result: TypeAlias = Outcome | Failure


@dataclass(frozen=True)
class Call:
    """A function and its keyword arguments. `rows` holds one value per row, `shared` one value for all rows.
    `log_extra` and `log_metric` are added when it is called."""

    function: RewardFunction
    rows: dict[str, list]
    shared: dict[str, Any]

    def begin(self, log: "_Log") -> Any:
        """Calls the function with copies of its arguments, so that its changes reach neither training nor another
        function."""
        return self.function(**copied(self.rows), **copied(self.shared), **log.functions)


def run(call: Call) -> Result:
    """Calls a plain function. Anything that it raises, SystemExit included, becomes a `Failure`; only Ctrl-C, SIGTERM
    and the time-out pass through."""
    log, process = _Log(), os.getpid()
    try:
        return log.outcome(call, call.begin(log))
    except (KeyboardInterrupt, Terminated, _TimeUp):
        raise
    except BaseException as error:  # extensions also raise exceptions that are no Exception
        return failed(error)
    finally:
        _end_a_fork(process)


def _end_a_fork(process: int) -> None:
    if os.getpid() != process:  # the function forked and also returned in the child
        os._exit(0)


def copied(value: Any) -> Any:
    """`copy.deepcopy`, but fast for lists of numbers and the logs of a long run. A value that cannot be copied is
    returned as it is."""
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
    """`show(value)` with characters that can be encoded; a placeholder if `show` raises."""
    try:
        return show(value).encode(errors="backslashreplace").decode()
    except (KeyboardInterrupt, Terminated, _TimeUp):
        raise
    except BaseException:
        return f"({type(value).__name__} without a text)"


def plain(value: Any, within: tuple[int, ...] = ()) -> Any:
    """A logged value in a form that JSON and parquet can hold. NumPy and torch values become Python's; anything else
    becomes text, also integers of more than 64 bits and containers that contain themselves."""
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
    """The function did not return a list of one value per completion."""


@dataclass
class _Log:
    """What a function logs during a call. It is used only if the call succeeds."""

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
        if hasattr(result, "tolist") and not isinstance(result, memoryview):  # a NumPy array or a tensor
            result = result.tolist()
        if not isinstance(result, list | tuple):
            raise _WrongResult(f"must return a list of numbers; got {type(result).__name__}")
        result = list(result)  # a subclass may iterate in its own way
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
        struct.pack("<f", value)  # raises for values that are too large; native "f" does not
    except OverflowError:
        return False
    return math.isfinite(value)


def _number(value: Any) -> float:
    """The value as a float, or NaN if it is not a number that is finite in float32."""
    try:
        if hasattr(value, "item"):  # a NumPy or torch scalar
            value = value.item()
        if isinstance(value, numbers.Real | Decimal) and _is_float32(float(value)):
            return float(value)
    except (ValueError, TypeError, RuntimeError, ArithmeticError):  # an array of several values, 10**400, ...
        pass
    return math.nan


# Plain functions, in the main thread


class _TimeUp(BaseException):
    """Raised inside a function whose time is up. It is no Exception, since reward functions often catch those."""


def run_within(limit: float | None, call: Call) -> Result:
    """Calls `run` in this thread and interrupts it after `limit` seconds, and again every `limit` seconds if it goes
    on. Process settings that the function changes are restored (`process_settings`).

    The signal SIGURG interrupts the function: functions expect to run in the main thread and may use SIGALRM, and
    SIGURG is ignored by default. It stops Python code and blocking system calls. C code runs until it returns; only a
    worker process can be stopped there. Signals reach only the main thread, so in other threads there is no limit.
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
        armed = False  # the signal may have come just before run's `armed = False`
    finally:
        # In this order, so that no signal is still pending when the handler is removed.
        is_over.set()
        watcher.join()
        signal.signal(signal.SIGURG, signal.SIG_DFL if previous is None else previous)
    # A function that caught the exception and returned something is late all the same.
    return too_late(limit) if was_interrupted else result


# Async functions, in an event loop


class AsyncCalls:
    """Calls async functions concurrently in one event loop that lasts for the whole run, since HTTP clients that a
    function keeps are bound to the loop that created them. The loop has its own thread, since a notebook already runs
    a loop in the main thread. If a function blocks that thread, later calls get a new loop in a new thread."""

    #: Seconds in which a loop that is not blocked notices that the time is up.
    grace = 1.0

    def __init__(self, limit: float | None) -> None:
        self.limit = limit
        self._loop: _Loop | None = None

    @contextlib.contextmanager
    def started(self, calls: Sequence[Call]) -> Iterator[Callable[[], list[Result]]]:
        """Runs the calls during the with block. It yields a function that waits for all of them and returns their
        results."""
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
        """Repeats a call alone, after one of several calls blocked the thread or cancelled the others."""
        with self.started([call]) as results:
            return results()[0]

    async def _within_limit(self, call: Call) -> Result:
        task = asyncio.ensure_future(_run_async(call))
        try:
            # `wait_for` would go on waiting for a task that ignores its cancellation.
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
    """An event loop that goes on when a function running in it stops the loop or raises SystemExit."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._is_given_up = False

    def give_up(self) -> None:
        self._is_given_up = True
        self.loop.call_soon_threadsafe(self.loop.stop)

    def serve(self) -> None:
        while not self._is_given_up:
            with contextlib.suppress(BaseException):  # a task that a function created may raise SystemExit
                self.loop.run_forever()
        if tasks := asyncio.all_tasks(self.loop):
            for task in tasks:
                task.cancel()
            self.loop.run_until_complete(asyncio.wait(tasks, timeout=AsyncCalls.grace))
        self.loop.close()
