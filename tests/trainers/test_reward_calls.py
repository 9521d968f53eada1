"""One call of a reward function: its time limit, in the main thread and in an event loop, and what is left of it."""

import asyncio
import contextlib
import re
import signal
import threading
import time

import pytest

import reward_functions as functions
from reward_functions import rows, values, wait_until
from rlkernels.trainers import RewardError
from rlkernels.trainers.rewards import calls as reward_calls
from rlkernels.trainers.rewards import functions as rewards
from rlkernels.trainers.rewards.calls import AsyncCalls, Call, Outcome, run_within
from rlkernels.trainers.rewards.functions import RewardFunctions

LIMIT = 0.25
TOO_LATE = "did not return within 0.25 s (reward_timeout)"


@pytest.fixture
def warned(monkeypatch):
    lines = []
    monkeypatch.setattr(rewards.logger, "warning", lines.append)
    return lines


def make(policy, *chosen, timeout=LIMIT):
    return RewardFunctions(chosen, timeout=timeout, on_error=policy)


def threads(name):
    return {thread for thread in threading.enumerate() if thread.name == name}


# In the main thread


def act(*completions):
    return Call(functions.act, rows(*completions), {})


def test_nothing_is_left_of_a_limit():
    handler = signal.getsignal(signal.SIGURG)
    for completions in (["x"], ["hangs"], ["raises"]):
        run_within(0.2, act(*completions))
        assert not threads("reward_timeout")
        assert signal.getsignal(signal.SIGURG) is handler


def test_a_limit_that_is_reached_as_the_call_returns():
    """One or the other comes of it, and no interrupt comes later."""
    call = Call(lambda completions, **kwargs: time.sleep(0.003) or [1.0], rows("x"), {})
    for _ in range(100):
        result = run_within(0.003, call)
        assert isinstance(result, Outcome) or result.timed_out


def test_an_interrupt_that_comes_when_the_call_has_returned(monkeypatch):
    class Late(threading.Event):
        def set(self):
            if threading.get_ident() == threading.main_thread().ident:
                signal.raise_signal(signal.SIGURG)
            super().set()

    monkeypatch.setattr(threading, "Event", Late)
    handler = signal.getsignal(signal.SIGURG)
    assert run_within(60.0, act("x")).timed_out
    assert signal.getsignal(signal.SIGURG) is handler


def test_functions_keep_their_own_alarm():
    def alarmed(completions, **kwargs):
        def ring(number, frame):
            raise TimeoutError

        earlier = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with contextlib.suppress(TimeoutError):
            time.sleep(60)
        signal.signal(signal.SIGALRM, earlier)
        return [2.0]

    assert run_within(5.0, Call(alarmed, rows("x"), {})).rewards == [2.0]


def test_a_function_that_goes_on_is_interrupted_again():
    interrupts = []

    def stubborn(completions, **kwargs):
        for _ in range(3):
            try:
                time.sleep(2)
            except BaseException as error:
                interrupts.append(error)
        return [1.0]

    assert run_within(0.1, Call(stubborn, rows("x"), {})).timed_out
    assert len(interrupts) == 3


def test_a_function_that_catches_its_exceptions_is_interrupted():
    went_on = []

    def careful(completions, **kwargs):
        for text in completions:
            try:
                time.sleep(60)
            except Exception:
                went_on.append(text)

    assert run_within(0.1, Call(careful, rows("x", "y"), {})).timed_out
    assert not went_on


def test_outside_the_main_thread_there_is_no_limit(monkeypatch):
    lines, results = [], []
    monkeypatch.setattr(reward_calls.logger, "warning_once", lines.append)
    call = Call(lambda completions, **kwargs: time.sleep(0.3) or [1.0], rows("x"), {})
    thread = threading.Thread(target=lambda: results.append(run_within(0.05, call)))
    thread.start()
    thread.join()
    assert results[0].rewards == [1.0]
    assert "no effect outside the main thread" in lines[0]


# Async functions


async def patient(completions, **kwargs):
    await asyncio.sleep(60)


async def blocking(completions, **kwargs):
    time.sleep(1.0)  # more than the limit and the grace
    return [1.0] * len(completions)


async def deaf(completions, **kwargs):
    while True:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(60)


async def leaving(completions, **kwargs):
    raise SystemExit(3)


async def leaving_in_a_task(completions, **kwargs):
    await asyncio.gather(leaving(completions))


async def cancels_itself(completions, **kwargs):
    asyncio.current_task().cancel()
    return [1.0] * len(completions)


async def cancels_all(completions, **kwargs):
    for task in asyncio.all_tasks():
        task.cancel()
    await asyncio.sleep(60)


async def stops_the_loop(completions, **kwargs):
    asyncio.get_running_loop().stop()
    await asyncio.sleep(60)


async def fine(completions, **kwargs):
    await asyncio.sleep(0.01)
    return [2.0] * len(completions)


@pytest.fixture
def short_grace(monkeypatch):
    monkeypatch.setattr(AsyncCalls, "grace", 0.2)


ASYNC_FAILURES = {
    patient: TOO_LATE,
    blocking: TOO_LATE,
    deaf: TOO_LATE,
    leaving: "raised SystemExit: 3",
    leaving_in_a_task: "raised SystemExit: 3",
    cancels_itself: "cancelled the task that it was called in",
    cancels_all: "cancelled the task that it was called in",
    stops_the_loop: TOO_LATE,
}


@pytest.mark.parametrize("function", ASYNC_FAILURES)
def test_async_functions_that_fail(warned, function, short_grace):
    """The other function has its rewards, then and later."""
    message = f"reward function '{function.__name__}' {ASYNC_FAILURES[function]}, at row 0: prompt 'a', completion 'x'"
    with pytest.raises(RewardError, match=f"^{re.escape(message)}$"):
        make("raise", fine, function)(rows("x"))
    called = make("none", fine, function)
    assert values(called(rows("x"))) == [[2.0], [None]]
    loop = called._loop._loop
    assert values(called(rows("x"))) == [[2.0], [None]]
    assert loop is None if function is blocking else called._loop._loop is loop
    assert warned == [f"{message}. It gives no reward there."] * 2


def test_threads_of_loops_that_were_given_up_end(warned, short_grace):
    before = threads("rewards")
    called = make("none", blocking)
    called(rows("x"))
    assert threads("rewards") - before
    wait_until(lambda: not threads("rewards") - before)


def test_async_functions_wait_for_each_other():
    """Which they could not, one after another."""
    met = {}

    def meets(mine, other):
        async def reward(completions, **kwargs):
            for name in (mine, other):
                met.setdefault(name, asyncio.Event())
            met[mine].set()
            await met[other].wait()
            return [1.0] * len(completions)

        return reward

    called = make("raise", meets("first", "second"), meets("second", "first"), timeout=30)
    assert values(called(rows("x"))) == [[1.0], [1.0]]
