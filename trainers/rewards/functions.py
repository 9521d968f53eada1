"""The reward functions of a run, called by PPOTrainer and GRPOTrainer on each batch of completions.

A reward function follows TRL's contract: `f(prompts=, completions=, completion_ids=, **columns, trainer_state=,
log_extra=, log_metric=) -> list[float | None]`, plain or async; None where the reward does not apply.
"""

import functools
import inspect
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

import torch
from transformers.utils import logging

from ..base.metrics import unique
from .calls import AsyncCalls, Call, Failure, Outcome, Result, RewardError, RewardFunction, run_within, shorten, text_of
from .model import RewardModel
from .process_settings import restored
from .workers import WorkerPool

logger = logging.get_logger(__name__)


def name_of(function: RewardFunction) -> str:
    function = _without_arguments(function)
    return text_of(getattr(function, "__name__", type(function).__name__))


def _without_arguments(function: RewardFunction) -> RewardFunction:
    while isinstance(function, functools.partial):
        function = function.func
    return function


def is_async(function: RewardFunction) -> bool:
    function = _without_arguments(function)
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


class RewardFunctions:
    """Calls each function on a batch of completions and handles calls that fail.

    Args:
        functions: plain or async functions, or reward models.
        timeout: seconds that a call may take; None means no limit.
        workers: number of processes that call the plain functions, each on whole groups of the batch. With 0 they are
            called in this process, one after another, before the async ones. Async functions run concurrently with
            one another and with the workers.
        on_error: what happens if a call fails. "raise" ends the run with a `RewardError`. "none" gives no reward to
            the rows on which the function fails, with a warning, and keeps all other rewards. These rows are found by
            calling the function again on single rows, until the second time-out.
        taken: names that the logs use for something else. A function with such a name, or with the name of an earlier
            function, is logged as name_2.

    Raises:
        TypeError: if a function is not callable, or is a class or a module.
    """

    def __init__(
        self,
        functions: Sequence[RewardFunction],
        *,
        timeout: float | None = None,
        workers: int = 0,
        on_error: str = "raise",
        taken: Iterable[str] = (),
    ) -> None:
        if not functions:
            raise ValueError("reward_funcs must hold at least one function; got none")
        for function in functions:
            if not callable(function) or isinstance(function, torch.nn.Module | type):
                raise TypeError(f"reward_funcs must be functions; got {function!r}")
        self.functions = list(functions)
        self.names: list[str] = []
        for function in functions:
            self.names.append(unique(name_of(function), [*taken, *self.names]))
        #: Names of our metrics about the functions; a function cannot log under them.
        self.metrics = {f"rewards/{name}/failed" for name in self.names}
        self.on_error = on_error
        self.timeout = None if timeout == math.inf else timeout
        self._async = [index for index, function in enumerate(functions) if is_async(function)]
        self._loop = AsyncCalls(self.timeout)
        plain = [index for index in range(len(functions)) if index not in self._async]
        self._pooled = [index for index in plain if workers and not isinstance(functions[index], RewardModel)]
        self._pool = None
        if self._pooled:
            pooled = [(self.names[index], functions[index]) for index in self._pooled]
            self._pool = WorkerPool(pooled, workers, self.timeout)

    def close(self) -> None:
        """Ends the worker processes, if there are any. A later call starts new ones."""
        if self._pool is not None:
            self._pool.close()

    def __call__(
        self,
        rows: dict[str, list],
        *,
        log_extra: Callable[[str, list], Any] | None = None,
        log_metric: Callable[[str, float, float], Any] | None = None,
        **shared: Any,
    ) -> torch.Tensor:
        """Rewards [B, functions], NaN where one does not apply. `rows` holds a list of B values per keyword argument.

        What the functions log is passed on after all have returned. `log_extra` gets a column and its B values, None
        for rows without one. `log_metric` gets a name, a value and a weight: the share of the rows in that call. If
        on_error is "none" it also gets `rewards/{name}/failed`, the share of the rows on which a function failed.
        """
        size = len(rows["prompts"])
        calls = [(index, part) for index in range(len(self.functions)) for part in self._parts(index, rows["prompts"])]
        results = self._run(calls, rows, shared)
        rewards = torch.full((size, len(self.functions)), math.nan)
        settled = []
        for index, name in enumerate(self.names):
            own = [(part, result) for (other, part), result in zip(calls, results, strict=True) if other == index]
            outcomes, failed = self._settle(index, own, rows, shared)
            for part, outcome in outcomes:
                rewards[part, index] = torch.tensor(outcome.rewards)
            if failed:
                logger.warning(f"{_tell(name, failed, rows)}. It gives no reward there.")
            settled.append((name, outcomes, failed))
        for name, outcomes, failed in settled:
            if log_extra is not None:
                for column, values in _columns(outcomes, size).items():
                    log_extra(column, values)
            if log_metric is not None:
                for part, outcome in outcomes:
                    for metric, value in outcome.metrics:
                        log_metric(unique(metric, self.metrics), value, len(part) / size)
                if self.on_error == "none":
                    log_metric(f"rewards/{name}/failed", len(failed) / size, 1.0)
        return rewards

    def _parts(self, index: int, prompts: list) -> list[list[int]]:
        return whole_groups(prompts, self._pool.count if index in self._pooled else 1)

    def _run(self, calls: Sequence[tuple[int, list[int]]], rows: dict[str, list], shared: dict) -> list[Result]:
        """Results of calls, each given as (index of the function, row numbers)."""
        made = [
            Call(self.functions[index], {name: [values[row] for row in part] for name, values in rows.items()}, shared)
            for index, part in calls
        ]
        places = defaultdict(list)
        for place, (index, _) in enumerate(calls):
            places["pool" if index in self._pooled else "loop" if index in self._async else "here"].append(place)
        results = {place: run_within(self.timeout, made[place]) for place in places["here"]}
        with restored(), self._loop.started([made[place] for place in places["loop"]]) as wait:
            if places["pool"]:
                pooled = [(self._pooled.index(calls[place][0]), made[place].rows, shared) for place in places["pool"]]
                results |= zip(places["pool"], self._pool.run(pooled), strict=True)
            results |= zip(places["loop"], wait(), strict=True)
        return [results[place] for place in range(len(calls))]

    def _settle(
        self, index: int, results: list[tuple[list[int], Result]], rows: dict[str, list], shared: dict
    ) -> tuple[list[tuple[list[int], Outcome]], dict[int, str]]:
        """The outcomes of one function, and a reason for each row on which it fails. Failed calls are repeated without
        these rows."""
        failures = [(part, result) for part, result in results if isinstance(result, Failure)]
        if failures and self.on_error == "raise":
            self._raise(index, failures[0][1], self._search(index, failures[:1], rows, shared), rows)
        failed = self._search(index, failures, rows, shared)
        again = []
        for part, failure in failures:
            rest = [row for row in part if row not in failed]
            if rest and len(rest) < len(part):
                again.append(rest)
            else:
                failed |= dict.fromkeys(rest, failure.reason)
        repeated = list(zip(again, self._run([(index, rest) for rest in again], rows, shared), strict=True))
        failed |= {row: result.reason for part, result in repeated if isinstance(result, Failure) for row in part}
        outcomes = [(part, result) for part, result in [*results, *repeated] if isinstance(result, Outcome)]
        for part, outcome in outcomes:
            wrong = {part[place]: reason for place, reason in outcome.wrong.items()}
            if wrong and self.on_error == "raise":
                raise RewardError(_tell(self.names[index], wrong, rows))
            failed |= wrong
        return sorted(outcomes, key=lambda each: each[0]), failed

    def _search(
        self, index: int, failures: list[tuple[list[int], Failure]], rows: dict[str, list], shared: dict
    ) -> dict[int, str]:
        """Calls the function on single rows of the failed calls; returns the rows that fail alone too, with reasons.

        Rows are taken from each call in turn, as many at once as there are workers. A time-out costs the whole
        `timeout`, so the search ends after the second round with one. With on_error "raise" it also ends at the first
        row that fails for the same reason as its call.
        """
        found = {part[0]: failure.reason for part, failure in failures if len(part) == 1}
        parts = [part for part, failure in failures if len(part) > 1 and not failure.of_the_batch]
        searched = [row for rows_of_each in itertools.zip_longest(*parts) for row in rows_of_each if row is not None]
        reasons = {failure.reason for _, failure in failures} if self.on_error == "raise" else set()
        at_once = self._pool.count if index in self._pooled else 1
        time_outs = 0
        for start in range(0, len(searched), at_once):
            some = searched[start : start + at_once]
            results = self._run([(index, [row]) for row in some], rows, shared)
            alone = {row: result for row, result in zip(some, results, strict=True) if isinstance(result, Failure)}
            found |= {row: failure.reason for row, failure in alone.items()}
            time_outs += any(failure.timed_out for failure in alone.values())
            if time_outs == 2 or not reasons.isdisjoint(found.values()):
                break
        return found

    def _raise(self, index: int, failure: Failure, found: dict[int, str], rows: dict[str, list]) -> NoReturn:
        alike = {row: reason for row, reason in found.items() if reason == failure.reason}
        message = f"reward function '{self.names[index]}' {failure.reason}"
        if alike:
            message = _tell(self.names[index], alike, rows)
        elif not failure.of_the_batch:
            message += ", on the whole batch but on no row alone"
        raise RewardError(message) from failure.error


def whole_groups(prompts: list, count: int) -> list[list[int]]:
    """Splits the row numbers into at most `count` runs of similar length. Consecutive rows with the same prompt stay
    together."""
    parts: list[list[int]] = [[]]
    for row, prompt in enumerate(prompts):
        if row and prompt != prompts[row - 1] and row >= len(parts) * len(prompts) / count:
            parts.append([])
        parts[-1].append(row)
    return parts


def _columns(outcomes: list[tuple[list[int], Outcome]], size: int) -> dict[str, list]:
    columns: dict[str, list] = {}
    for part, outcome in outcomes:
        for column, values in outcome.extra.items():
            whole = columns.setdefault(column, [None] * size)
            for row, value in zip(part, values, strict=False):
                whole[row] = value
    return columns


def _tell(name: str, failed: dict[int, str], rows: dict[str, list]) -> str:
    """One line that says which function failed, why, and on which rows."""
    places = defaultdict(list)
    for row, reason in sorted(failed.items()):
        places[reason].append(row)
    told = [f"{reason}, at {_show(where, rows)}" for reason, where in list(places.items())[:3]]
    others = [str(row) for where in list(places.values())[3:] for row in where]
    return f"reward function '{name}' {'; '.join(told)}" + (f"; and at rows {', '.join(others)}" if others else "")


def _show(where: list[int], rows: dict[str, list]) -> str:
    prompt, completion = (shorten(repr(rows[column][where[0]])) for column in ("prompts", "completions"))
    first = f"row {where[0]}: prompt {prompt}, completion {completion}"
    return first if len(where) == 1 else f"rows {', '.join(map(str, where))} ({first})"
