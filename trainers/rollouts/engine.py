"""The contract between the trainers and an engine, the function that samples completions.

An engine takes prompts and `SamplingOptions` and gives a `Rollout` per prompt (`Engine`). The default engine runs
transformers `generate`; a user's engine may call it for several turns, with tools in between. `check_rollouts` checks
what came back; `encode`, `decode` and `end_tokens` are what engines and trainers share.
"""

import math
import numbers
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..base.chat import apply_chat_template, is_chat
from ..batch.batch import IGNORE, Sequence
from .sampling import row_seed


class RolloutError(ValueError):
    """An engine did not return a valid Rollout for each prompt."""


@dataclass(frozen=True)
class SamplingOptions:
    """How completions are sampled: from the model's full distribution at a temperature, without top-k or top-p. The
    random numbers depend only on seed, step, row and position in the row's sequence."""

    temperature: float  # logits are divided by it
    max_completion_length: int  # in tokens; with several turns, an engine may give each turn less
    logprobs: bool = False  # whether the engine must return the sampler's log-probabilities
    seed: int = 0
    step: int = 0  # optimizer steps taken before; -1 in evaluation
    rows: tuple[int, ...] | None = None  # number of each prompt over all processes; None means 0, 1, 2, ...

    def of(self, indices: Iterable[int]) -> "SamplingOptions":
        """Options for some of the prompts, such as those that go on to another turn."""
        return replace(self, rows=tuple(index if self.rows is None else self.rows[index] for index in indices))

    def row_seeds(self, count: int) -> list[int]:
        """A 63-bit seed for each of `count` prompts."""
        rows = range(count) if self.rows is None else self.rows
        if len(rows) != count:
            raise ValueError(f"options.rows must have one number for each of the {count} prompts; got {len(rows)}")
        return [row_seed(self.seed, self.step, row) for row in rows]


@dataclass
class Rollout:
    """What an engine gives for one prompt. With several turns the completion is everything that follows the prompt: the
    model's turns, and what tools and the chat template put between them."""

    prompt_ids: list[int]
    completion_ids: list[int]  # at least one
    ended: bool  # True if the completion ended with an end token, False if at max_completion_length
    logprobs: list[float] | None = None  # the sampler's, one per completion token; NaN where it had none
    mask: list[bool] | None = None  # one per completion token: False for a tool's tokens; None: all are the model's

    @property
    def own(self) -> list[bool]:
        """One bool per completion token: whether the model sampled it."""
        return [True] * len(self.completion_ids) if self.mask is None else self.mask

    def extend(self, token_ids: list[int], logprobs: list[float] | None = None, *, own: bool) -> None:
        """Appends the tokens of another turn, the model's own or a tool's."""
        self.mask = self.own + [own] * len(token_ids)
        if self.logprobs is not None:
            self.logprobs = self.logprobs + ([math.nan] * len(token_ids) if logprobs is None else logprobs)
        self.completion_ids = self.completion_ids + token_ids

    def sequence(self, shares_prefix: bool = False) -> Sequence:
        """Prompt and completion as a training sequence, whose loss covers the model's own tokens. It shares its prompt
        but for the last token, which predicts the completion's first."""
        labels = [token if own else IGNORE for token, own in zip(self.completion_ids, self.own, strict=True)]
        prefix = len(self.prompt_ids) - 1 if shares_prefix else 0
        return Sequence(self.prompt_ids + self.completion_ids, [IGNORE] * len(self.prompt_ids) + labels, prefix)


Engine = Callable[[list, SamplingOptions], list[Rollout]]
"""Takes prompts as they stand in the dataset, text or messages, and returns a Rollout per prompt, in their order."""


def check_rollouts(rollouts: Any, prompts: list, options: SamplingOptions, vocab_size: int) -> list[Rollout]:
    """Checks what an engine returned and converts its numbers to Python's. Raises RolloutError that names the fault."""
    if not isinstance(rollouts, list | tuple):
        raise RolloutError(f"rollout must return a list of Rollout; got {type(rollouts).__name__}")
    if len(rollouts) != len(prompts):
        raise RolloutError(
            f"rollout must return one Rollout for each of the {len(prompts)} prompts; got {len(rollouts)}"
        )
    for row, rollout in enumerate(rollouts):
        if not isinstance(rollout, Rollout):
            raise RolloutError(f"rollout must return a list of Rollout; got {type(rollout).__name__} at row {row}")
        try:
            _check(rollout, options, vocab_size)
        except ValueError as error:
            raise RolloutError(f"rollout, row {row}: {error}") from None
    return list(rollouts)


def _check(rollout: Rollout, options: SamplingOptions, vocab_size: int) -> None:
    for name in ("prompt_ids", "completion_ids"):
        try:
            ids = [operator.index(token) for token in getattr(rollout, name)]
        except TypeError:
            raise ValueError(f"{name} must be a list of token ids; got {getattr(rollout, name)!r:.80}") from None
        if not ids:
            raise ValueError(f"{name} is empty")
        for token in ids:
            if not 0 <= token < vocab_size:
                raise ValueError(f"{name} holds {token}, but the model's token ids are 0 to {vocab_size - 1}")
        setattr(rollout, name, ids)
    count = len(rollout.completion_ids)
    if not isinstance(rollout.ended, bool):
        raise ValueError(f"ended must be a bool; got {rollout.ended!r}")
    if options.logprobs and rollout.logprobs is None:
        raise ValueError("logprobs is None, but options.logprobs asks for log-probabilities")
    for name in ("logprobs", "mask"):
        values = getattr(rollout, name)
        if values is not None and (not isinstance(values, list) or len(values) != count):
            got = len(values) if isinstance(values, list) else type(values).__name__
            raise ValueError(f"{name} must be a list of one value for each of the {count} completion tokens; got {got}")
    for value in rollout.logprobs or []:
        if not isinstance(value, numbers.Real) or math.isinf(value):
            raise ValueError(f"logprobs must be finite numbers, or NaN where the sampler had none; got {value!r}")
    if rollout.logprobs is not None:
        rollout.logprobs = [float(value) for value in rollout.logprobs]
    for value in rollout.mask or []:
        if not isinstance(value, bool):
            raise ValueError(f"mask must hold bools; got {value!r}")


def encode(tokenizer: PreTrainedTokenizerBase, prompts: list, chat_template_kwargs: Any) -> list[list[int]]:
    """Token ids of prompts. Messages go through the chat template, with the generation prompt added."""
    if is_chat(prompts[0]):
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, **(chat_template_kwargs or {})}
        try:
            encoded = apply_chat_template(tokenizer, prompts, **options)
        except Exception as error:  # chat templates raise exceptions of any type
            raise RolloutError(f"{type(error).__name__}: {error}") from error
    else:
        encoded = tokenizer(prompts)
    for prompt, ids in zip(prompts, encoded["input_ids"], strict=True):
        if not ids:
            raise ValueError(f"prompt {prompt!r} has no tokens")
    return encoded["input_ids"]


def decode(tokenizer: PreTrainedTokenizerBase, completion_ids: list[list[int]], chat: bool) -> list:
    """Completions as reward functions see them: text, or for chat prompts a list of one assistant message."""
    texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
    return [[{"role": "assistant", "content": text}] for text in texts] if chat else texts


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids that end a completion: the tokenizer's end token and those in the model's generation config."""
    listed = model.generation_config.eos_token_id
    listed = [] if listed is None else [listed] if isinstance(listed, int) else listed
    return sorted({*listed, tokenizer.eos_token_id} - {None})
