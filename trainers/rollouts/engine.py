"""Rollouts: prompts and sampling options in; token ids, the sampler's log-probabilities and a loss mask out.

An engine is any function of the shape of `Engine`. The default one is transformers `generate`; one that calls it for
several turns, with tools in between, is another.
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
    """A rollout engine did not return one sound Rollout for each prompt."""


@dataclass(frozen=True)
class SamplingOptions:
    """How completions are sampled: from the model's own distribution at a temperature, nothing cut off, with random
    numbers that are the same again for the same seed, step, row and position in the row's sequence."""

    temperature: float  # logits are divided by it
    max_completion_length: int  # in tokens; with several turns, an engine may give each turn less
    logprobs: bool = False  # whether the sampler's log-probabilities are wanted
    seed: int = 0
    step: int = 0  # optimizer steps taken before; in evaluation -1
    rows: tuple[int, ...] | None = None  # each prompt's number among those of all processes; None: 0, 1, 2, ...

    def of(self, indices: Iterable[int]) -> "SamplingOptions":
        """Those for some of the prompts, such as the ones that go on to another turn."""
        return replace(self, rows=tuple(index if self.rows is None else self.rows[index] for index in indices))

    def row_seeds(self, count: int) -> list[int]:
        """A seed of 63 bits for each of so many prompts."""
        rows = range(count) if self.rows is None else self.rows
        if len(rows) != count:
            raise ValueError(f"options.rows must have one number for each of the {count} prompts; got {len(rows)}")
        return [row_seed(self.seed, self.step, row) for row in rows]


@dataclass
class Rollout:
    """One completion of one prompt. With several turns it is all that follows the prompt: the model's turns, and what
    tools and the chat template put between them."""

    prompt_ids: list[int]
    completion_ids: list[int]  # at least one
    ended: bool  # by itself, not at max_completion_length
    logprobs: list[float] | None = None  # of each completion token, as the sampler had them; NaN where it had none
    mask: list[bool] | None = None  # False where a token is a tool's, not the model's; None: all are the model's

    @property
    def own(self) -> list[bool]:
        """Which completion tokens are the model's."""
        return [True] * len(self.completion_ids) if self.mask is None else self.mask

    def extend(self, token_ids: list[int], logprobs: list[float] | None = None, *, own: bool) -> None:
        """Appends the tokens of a further turn, the model's own or a tool's."""
        self.mask = self.own + [own] * len(token_ids)
        if self.logprobs is not None:
            self.logprobs = self.logprobs + ([math.nan] * len(token_ids) if logprobs is None else logprobs)
        self.completion_ids = self.completion_ids + token_ids

    def sequence(self) -> Sequence:
        """With the model's own tokens in the loss."""
        labels = [token if own else IGNORE for token, own in zip(self.completion_ids, self.own, strict=True)]
        return Sequence(self.prompt_ids + self.completion_ids, [IGNORE] * len(self.prompt_ids) + labels)


Engine = Callable[[list, SamplingOptions], list[Rollout]]
"""Takes prompts as the dataset has them, text or messages, and gives one rollout of each, in their order."""


def check_rollouts(rollouts: Any, prompts: list, options: SamplingOptions, vocab_size: int) -> list[Rollout]:
    """What an engine returned, with numbers of Python's own, or a RolloutError that names what was wrong with it."""
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
                raise ValueError(f"{name} holds {token}, which is none of the model's {vocab_size} tokens")
        setattr(rollout, name, ids)
    count = len(rollout.completion_ids)
    if not isinstance(rollout.ended, bool):
        raise ValueError(f"ended must be a bool; got {rollout.ended!r}")
    if options.logprobs and rollout.logprobs is None:
        raise ValueError("logprobs is None, where options.logprobs asks for them")
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
    if is_chat(prompts[0]):
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, **(chat_template_kwargs or {})}
        try:
            encoded = apply_chat_template(tokenizer, prompts, **options)
        except Exception as error:  # templates raise what they like
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
    """Token ids that end a completion: the tokenizer's, and those that the model's own generation config lists."""
    listed = model.generation_config.eos_token_id
    listed = [] if listed is None else [listed] if isinstance(listed, int) else listed
    return sorted({*listed, tokenizer.eos_token_id} - {None})
