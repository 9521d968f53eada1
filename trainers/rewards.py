"""Reward functions, by TRL's contract: `f(prompts=, completions=, completion_ids=, **columns, trainer_state=,
log_extra=, log_metric=) -> list[float | None]`, plain or async; None where the reward does not apply."""

import asyncio
import inspect
import math
import numbers
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, NoReturn, TypeAlias

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from . import scoring
from .configs import OnlineConfig
from .packing import Sequence as Tokens
from .packing import fill_by_length, lay_out, prepare_packing
from .rollout import encode, is_chat

RewardFunction = Callable[..., Any]
RewardSource: TypeAlias = RewardFunction | str | PreTrainedModel


class RewardError(ValueError):
    """A reward function raised, or did not return one number (or None) for each completion."""


def name_of(function: RewardFunction) -> str:
    function = getattr(function, "func", function)  # functools.partial
    return getattr(function, "__name__", type(function).__name__)


def is_async(function: RewardFunction) -> bool:
    function = getattr(function, "func", function)
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


class RewardFunctions:
    """Calls each function on a batch of completions and checks what it returns."""

    def __init__(self, functions: Sequence[RewardFunction]) -> None:
        if not functions:
            raise ValueError("reward_funcs must hold at least one function; got none")
        for function in functions:
            if not callable(function) or isinstance(function, torch.nn.Module):
                raise TypeError(f"reward_funcs must be functions; got {function!r}")
        self.functions = list(functions)
        self.names = [name_of(function) for function in functions]
        self._loop: asyncio.AbstractEventLoop | None = None

    def __call__(self, rows: dict[str, list], **shared: Any) -> torch.Tensor:
        """Rewards [B, functions], NaN where one does not apply. `rows` holds one list of B per keyword argument."""
        results: list[Any] = [None] * len(self.functions)
        pending = {}
        for index, function in enumerate(self.functions):
            if is_async(function):
                pending[index] = function
                continue
            try:
                results[index] = function(**rows, **shared)
            except Exception as error:
                self._raise(function, error, rows, shared)
        if pending:
            # Called inside the coroutine, so that a wrong signature too is the function's failure.
            async def call(function: RewardFunction) -> Any:
                return await function(**rows, **shared)

            outcomes = self._gather([call(function) for function in pending.values()])
            for (index, function), outcome in zip(pending.items(), outcomes, strict=True):
                if isinstance(outcome, Exception):
                    self._raise(function, outcome, rows, shared)
                results[index] = outcome
        columns = [_numbers(name, result, rows) for name, result in zip(self.names, results, strict=True)]
        return torch.tensor(columns, dtype=torch.float32).T

    def _gather(self, coroutines: list[Coroutine]) -> list[Any]:
        # One loop for the whole run, in a thread of its own: clients that a reward function keeps are bound to the loop
        # they were made in, and a notebook already runs one in the main thread.
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, name="rewards", daemon=True).start()

        async def gather() -> list[Any]:
            return await asyncio.gather(*coroutines, return_exceptions=True)

        return asyncio.run_coroutine_threadsafe(gather(), self._loop).result()

    def _raise(self, function: RewardFunction, error: Exception, rows: dict[str, list], shared: dict) -> NoReturn:
        """The run ends here, so the function is called once more, a row at a time, to name the row that it fails on."""
        reason = " ".join(str(error).split())
        message = f"reward function '{name_of(function)}' raised {type(error).__name__}: {reason}"
        for row in range(len(rows["prompts"])):
            one = {name: values[row : row + 1] for name, values in rows.items()}
            try:
                outcome = function(**one, **shared)
                if inspect.iscoroutine(outcome) and isinstance(failed := self._gather([outcome])[0], Exception):
                    raise failed
            except Exception as alone:
                if (type(alone), str(alone)) == (type(error), str(error)):
                    raise RewardError(f"{message}, at {_show(row, rows)}") from error
        raise RewardError(f"{message}, on the whole batch but on no row alone") from error


class RewardModel:
    """A sequence classifier with one label as a reward function: what it says of prompt and completion.

    It reads the policy's own tokens, also the one that ends the completion, if its tokenizer has the same vocabulary or
    it has none; else the text, in its own tokens.
    """

    def __init__(self, model: Any, args: OnlineConfig) -> None:
        self.model, self.args = model, args
        self.path = model.config._name_or_path
        self.__name__ = self.path.rstrip("/").split("/")[-1] or type(model).__name__

    def prepare(self, accelerator: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        """Before the first call: on what it runs, and the policy's tokenizer."""
        self.accelerator, self.tokenizer = accelerator, tokenizer
        own = _tokenizer(self.path)
        self.own_tokenizer = None if own is None or own.get_vocab() == tokenizer.get_vocab() else own
        self.model.to(accelerator.device).eval()
        if self.model.config.pad_token_id is None:
            # Without one, classifiers of transformers refuse padded batches.
            self.model.config.pad_token_id = (own or tokenizer).pad_token_id
        self.padding_free = self.args.padding_free and prepare_packing(self.model, accelerator.device)

    @torch.no_grad()
    def __call__(self, prompts: list, completions: list, completion_ids: list[list[int]], **columns: Any) -> list:
        rows = self._token_ids(prompts, completions, completion_ids)
        scores = [0.0] * len(rows)
        for chunk in fill_by_length([len(ids) for ids in rows], self.args.token_budget):
            sequences = [Tokens(rows[row], rows[row]) for row in chunk]
            batch = lay_out(sequences, self.accelerator.device, padding_free=self.padding_free)
            with self.accelerator.autocast():
                last = scoring.last_scores(scoring.token_scores(self.model, batch), batch)
            for row, score in zip(chunk, last.tolist(), strict=True):
                scores[row] = score
        return scores

    def _token_ids(self, prompts: list, completions: list, completion_ids: list[list[int]]) -> list[list[int]]:
        if self.own_tokenizer is None:
            prompt_ids = encode(self.tokenizer, prompts, self.args.chat_template_kwargs)
            return [prompt + completion for prompt, completion in zip(prompt_ids, completion_ids, strict=True)]
        pairs = list(zip(prompts, completions, strict=True))
        if is_chat(prompts[0]):
            messages = [prompt + completion for prompt, completion in pairs]
            return self.own_tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
        rows = self.own_tokenizer([prompt + completion for prompt, completion in pairs])["input_ids"]
        end = self.own_tokenizer.eos_token_id
        ended = [ids[-1] == self.tokenizer.eos_token_id and end is not None for ids in completion_ids]
        return [[*row, end] if add and row[-1] != end else row for row, add in zip(rows, ended, strict=True)]


def _tokenizer(path: str) -> PreTrainedTokenizerBase | None:
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True) if path else None
    except (OSError, ValueError):
        return None


def _numbers(name: str, result: Any, rows: dict[str, list]) -> list[float]:
    expected = len(rows["prompts"])
    if isinstance(result, torch.Tensor):
        result = result.tolist()
    if isinstance(result, str) or not hasattr(result, "__len__") or not hasattr(result, "__iter__"):
        raise RewardError(f"reward function '{name}' must return a list of numbers; got {type(result).__name__}")
    if len(result) != expected:
        raise RewardError(
            f"reward function '{name}' must return one reward for each of the {expected} completions; got {len(result)}"
        )
    return [_number(name, value, row, rows) for row, value in enumerate(result)]


def _number(name: str, value: Any, row: int, rows: dict[str, list]) -> float:
    if value is None:
        return math.nan
    if getattr(value, "ndim", None) == 0:  # a scalar of numpy or torch
        value = value.item()
    if not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise RewardError(
            f"reward function '{name}' must return finite numbers, or None where it does not apply; got {value!r} at "
            f"{_show(row, rows)}"
        )
    return float(value)


def _show(row: int, rows: dict[str, list]) -> str:
    def short(value: Any) -> str:
        text = repr(value)
        return text if len(text) <= 200 else f"{text[:200]}..."

    return f"row {row}: prompt {short(rows['prompts'][row])}, completion {short(rows['completions'][row])}"
