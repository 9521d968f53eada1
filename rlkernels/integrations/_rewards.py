"""What the adapters in `rewards` share: calling other projects' functions for one completion, and ours from them."""

import asyncio
import copy
import functools
import inspect
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

# The largest float32, since trainers keep rewards in float32.
LARGEST = (2**24 - 1) * 2**104


def check_callable(argument: str, function: Any) -> None:
    if not callable(function):
        raise TypeError(f"{argument} must be a function; got {function!r}")


def name_of(function: Any) -> str:
    while isinstance(function, functools.partial) and not hasattr(function, "__name__"):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def named(made: functools.partial, after: Any) -> Callable:
    made.__name__ = name_of(after)  # type: ignore[attr-defined]
    return made


def is_async(function: Any) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def text_of(completion: str | list[dict]) -> str:
    if isinstance(completion, str):
        return completion
    return "\n".join(_text_of_message(message.get("content")) for message in completion)


def _text_of_message(content: str | list[dict] | None) -> str:
    """The text of a message's content, or of its text blocks. A message with only tool calls has none."""
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(block.get("text", "") for block in content)


def column_of(row: dict[str, Any], column: str) -> Any:
    if column not in row:
        raise ValueError(f"column must be one of the rows', {sorted(row)}; got {column!r}")
    return row[column]


def plain(value: Any) -> Any:
    """Tensors and arrays as Python values; a tensor, array or list of one element as that element."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    while isinstance(value, list | tuple) and len(value) == 1:
        value = plain(value[0])
    return value


def _own(value: Any) -> Any:
    """A copy, since a function may change its arguments. A value that cannot be copied is returned as it is."""
    if type(value) is dict:
        return {key: _own(each) for key, each in value.items()}
    try:
        return copy.deepcopy(value)
    except Exception:
        return value


def number_or_none(value: Any) -> float | None:
    value = plain(value)
    return float(value) if isinstance(value, numbers.Real) else None


# Other projects' functions, called by our trainers


class PerCompletion:
    """A reward function for our trainers that calls another project's function for each completion. It can be pickled.

    call: (prompt, completion, completion ids, row's columns) -> what their function returns.
    read: what their function returned -> (reward, entries to log).
    """

    def __init__(self, call: Callable, read: Callable, name: str) -> None:
        self.call, self.read, self.__name__ = call, read, name

    def __call__(self, prompts, completions, completion_ids=None, **kwargs) -> list:
        calls = self._each(prompts, completions, completion_ids, kwargs)
        return self.rewards([self.call(*each) for each in calls], kwargs)

    def _each(self, prompts, completions, completion_ids, kwargs):
        size = len(prompts)
        columns = kwargs.keys() - {"trainer_state", "log_extra", "log_metric"}
        rows = [{key: kwargs[key][row] for key in columns} for row in range(size)]
        return list(zip(prompts, completions, completion_ids or [None] * size, rows, strict=True))

    def rewards(self, results: list, kwargs: dict[str, Any]) -> list:
        read = [self.read(result) for result in results]
        logged: dict[str, list] = {}
        for row, (_, entries) in enumerate(read):
            for key, value in entries.items():
                logged.setdefault(key, [None] * len(read))[row] = plain(value)
        for key, values in logged.items():
            if log_extra := kwargs.get("log_extra"):
                log_extra(f"{self.__name__}/{key}", values)
            found = [value for value in values if value is not None]
            if (log_metric := kwargs.get("log_metric")) and found and all(isinstance(x, numbers.Real) for x in found):
                log_metric(f"{self.__name__}/{key}", sum(found) / len(found))
        return [plain(reward) for reward, _ in read]


class AsyncPerCompletion(PerCompletion):
    async def __call__(self, prompts, completions, completion_ids=None, **kwargs) -> list:  # type: ignore[override]
        calls = [self.call(*each) for each in self._each(prompts, completions, completion_ids, kwargs)]
        return self.rewards(await asyncio.gather(*calls), kwargs)


# Our reward functions, called by other projects


@dataclass(frozen=True)
class Ours:
    """A reward function of our contract, and how another project calls it."""

    reward: Callable
    column: str  # the keyword under which it takes the ground truth
    chat: bool  # whether it takes completions as messages
    default: float | None  # the reward in place of None

    def start(self, prompts: list, texts: list[str], columns: dict[str, list], **shared: Any) -> tuple[Any, "Called"]:
        """Calls the function. Returns its result, to be awaited if it is async, and a `Called` that reads it."""
        called = Called(name_of(self.reward), len(texts), self.default)
        completions = [[{"role": "assistant", "content": text}] for text in texts] if self.chat else texts
        given: dict[str, Any] = {**_own(columns), **shared, "prompts": _own(prompts), "completions": completions}
        given |= {"completion_ids": [None] * len(texts), "trainer_state": None}
        return self.reward(**given | {"log_extra": called.log_extra, "log_metric": called.log_metric}), called


@dataclass
class Called:
    """One call of `Ours`: collects what the function logs, and checks and reads its result."""

    name: str
    size: int
    default: float | None
    columns: dict[str, list] = field(default_factory=dict)
    values: dict[str, list[float]] = field(default_factory=dict)
    """Metric name -> logged values."""

    @property
    def metrics(self) -> dict[str, float]:
        return {name: sum(values) / len(values) for name, values in self.values.items()}

    def log_extra(self, column: str, values: Sequence) -> None:
        self.columns.setdefault(column, []).extend(plain(value) for value in values)

    def log_metric(self, name: str, value: Any) -> None:
        self.values.setdefault(name, []).append(float(value))

    def rewards(self, result: Any) -> list[float]:
        result = result.tolist() if hasattr(result, "tolist") else result
        if not isinstance(result, list | tuple) or len(result) != self.size:
            raise ValueError(f"reward '{self.name}' must give a list of {self.size} numbers; got {result!r}")
        for column, values in self.columns.items():
            if len(values) != self.size:
                raise ValueError(
                    f"reward '{self.name}' must log {self.size} values as '{column}', one for each completion; "
                    f"got {len(values)}"
                )
        return [self._number(plain(value)) for value in result]

    def _number(self, value: Any) -> float:
        if value is None and self.default is None:
            raise ValueError(f"default must say what reward '{self.name}' is worth where it gives None")
        value = self.default if value is None else value
        if not (isinstance(value, numbers.Real) and abs(value) <= LARGEST):  # type: ignore[operator]
            raise ValueError(f"reward '{self.name}' must give finite numbers or None; got {value!r}")
        return float(value)


def finished(result: Any) -> Any:
    """The result of a function that may be async. Call it in a thread without a running event loop."""

    async def wait():
        return await result

    return asyncio.run(wait()) if inspect.isawaitable(result) else result
