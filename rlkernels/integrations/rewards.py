"""Converts reward functions of verl, OpenRLHF and reasoning-gym for our trainers, and ours for these projects.

    reward = from_verl(compute_score)                  compute_score = to_verl(reward)
    reward = from_openrlhf(reward_func)                reward_func = to_openrlhf(reward)
    rows, reward = from_reasoning_gym(dataset)         dataset.score_answer = to_reasoning_gym(reward)

`reward` is a function of TRL's contract, `f(prompts, completions, completion_ids, **columns) -> list[float | None]`,
plain or async. No project is imported. The results can be pickled if the given function can. Put them into the module
of `--reward module:name`, into the file and under the name of verl's `custom_reward_function`, or as `reward_func` into
the file of OpenRLHF's `remote_rm_url`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from rlkernels.integrations._rewards import (
    AsyncPerCompletion,
    Ours,
    PerCompletion,
    check_callable,
    column_of,
    finished,
    is_async,
    name_of,
    named,
    number_or_none,
    text_of,
)

__all__ = ["from_openrlhf", "from_reasoning_gym", "from_verl", "to_openrlhf", "to_reasoning_gym", "to_verl"]

# verl


def from_verl(
    compute_score: Callable,
    *,
    column: str = "reward_model",
    data_source: str | None = None,
    reward_kwargs: dict[str, Any] | None = None,
    name: str | None = None,
) -> Callable:
    """Turns verl's `compute_score(data_source, solution_str, ground_truth, extra_info) -> float | dict` into a reward
    function. It is called for each completion; an async compute_score is called for all concurrently.

    If it returns a dict, "score" is the reward. Every other entry is logged as a column "name/key", and its mean as a
    metric if it is a number.

    Args:
        compute_score: verl's own default or a custom_reward_function.
        column: the column of the rows with the ground truth, or with a dict that has a "ground_truth", as in verl.
        data_source: the argument data_source, for rows without such a column.
        reward_kwargs: further keyword arguments, as in verl's config.
        name: the function's name in the logs; its own by default.

    extra_info is the row's, if it has one, with num_turns None and empty rollout_reward_scores.

    Raises (when called):
        ValueError: if rows lack the column, or a dict lacks a score.
    """
    check_callable("compute_score", compute_score)
    kind = AsyncPerCompletion if is_async(compute_score) else PerCompletion
    call = partial(_call_verl, compute_score, column, data_source, reward_kwargs or {})
    return kind(call, _read_verl, name or name_of(compute_score))


def _call_verl(compute_score, column, data_source, reward_kwargs, prompt, completion, ids, row):
    truth = column_of(row, column)
    if isinstance(truth, dict) and "ground_truth" in truth:
        truth = truth["ground_truth"]
    return compute_score(
        data_source=row.get("data_source", data_source),
        solution_str=text_of(completion),
        ground_truth=truth,
        # verl's default reward manager adds the same keys.
        extra_info={**(row.get("extra_info") or {}), "num_turns": None, "rollout_reward_scores": {}},
        **reward_kwargs,
    )


def _read_verl(result):
    if not isinstance(result, dict):
        return result, {}
    if "score" not in result:
        raise ValueError(f"compute_score must give a number, or a dict with a 'score'; got {sorted(result)}")
    return result["score"], {key: value for key, value in result.items() if key != "score"}


def to_verl(
    reward: Callable, *, column: str = "ground_truth", chat: bool = False, default: float | None = None
) -> Callable:
    """Turns a reward function into verl's `compute_score(data_source, solution_str, ground_truth, extra_info)`.
    An async reward gives an async compute_score.

    The reward is called with one completion. data_source, the ground truth and the entries of extra_info are its
    columns; other keyword arguments (reward_kwargs) are passed on. verl gives no prompts, completion_ids or
    trainer_state, so these are None. What the reward logs becomes entries of a dict with the "score".

    Args:
        reward: plain or async.
        column: the keyword under which it takes the ground truth.
        chat: whether it takes completions as messages, not as text.
        default: the score in place of None, which verl does not know.

    Raises (when called):
        ValueError: if the reward gives anything but one finite number, or None without a default.
    """
    check_callable("reward", reward)
    function = _async_compute_score if is_async(reward) else _compute_score
    # A partial, since inspect.iscoroutinefunction, which verl calls, looks into partials.
    return named(partial(function, Ours(reward, column, chat, default)), reward)


def _compute_score(ours, data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    result, called = _start(ours, data_source, solution_str, ground_truth, extra_info, kwargs)
    return _as_verls(result, called)


async def _async_compute_score(ours, data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    result, called = _start(ours, data_source, solution_str, ground_truth, extra_info, kwargs)
    return _as_verls(await result, called)


def _start(ours, data_source, solution_str, ground_truth, extra_info, shared):
    row = {**(extra_info or {}), "data_source": data_source, ours.column: ground_truth}
    return ours.start([None], [solution_str], {key: [value] for key, value in row.items()}, **shared)


def _as_verls(result, called):
    (score,) = called.rewards(result)
    logged = {key: values[0] for key, values in called.columns.items()} | called.metrics
    return {**logged, "score": score} if logged else score


# OpenRLHF


def from_openrlhf(
    reward_func: Callable, *, column: str | None = "label", tokenizer: Any = None, name: str | None = None
) -> Callable:
    """Turns OpenRLHF's `reward_func(queries, prompts, labels)` into a reward function. Like OpenRLHF, it calls
    reward_func for each completion, with lists of one.

    If reward_func returns a dict, "rewards" is the reward, and "scores" and all of "extra_logs" are logged as columns
    "name/key" with their means as metrics. Otherwise the reward is what it returns.

    Args:
        reward_func: returns numbers, or tensors or lists of one.
        column: the column of the rows with the label. None gives the label "", as OpenRLHF does without a label_key.
        tokenizer: turns prompts of messages into text, and adds special tokens to queries. Without it prompts must be
            text, and queries have no special tokens in the completion.
        name: the function's name in the logs; its own by default.

    Raises (when called):
        ValueError: if rows lack the column, prompts need a tokenizer, or a dict lacks rewards.
    """
    check_callable("reward_func", reward_func)
    call = partial(_call_openrlhf, reward_func, column, tokenizer)
    return PerCompletion(call, _read_openrlhf, name or name_of(reward_func))


def _call_openrlhf(reward_func, column, tokenizer, prompt, completion, ids, row):
    if not isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError("tokenizer must be given to from_openrlhf, since prompts are messages")
        prompt = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    text = text_of(completion) if tokenizer is None or ids is None else tokenizer.decode(ids)
    label = "" if column is None else column_of(row, column)
    return reward_func([prompt + text], [prompt], [label])


def _read_openrlhf(result):
    if not isinstance(result, dict):
        return result, {}
    if "rewards" not in result:
        raise ValueError(f"reward_func must give a number, or a dict with 'rewards'; got {sorted(result)}")
    scores = {} if result.get("scores") is None else {"scores": result["scores"]}
    return result["rewards"], {**scores, **(result.get("extra_logs") or {})}


def to_openrlhf(
    reward: Callable,
    *,
    column: str = "label",
    chat: bool = False,
    default: float | None = None,
    special_tokens: Sequence[str] = (),
) -> Callable:
    """Turns a reward function into OpenRLHF's `reward_func(queries, prompts, labels)`.

    The completion is what follows the prompt in the query. OpenRLHF gives no completion_ids or trainer_state, so these
    are None. "rewards" and "scores" are float32 [B]; numbers that the reward logs become "extra_logs". An async reward
    runs to its end in its own event loop.

    Args:
        reward: plain or async.
        column: the keyword under which it takes the labels.
        chat: whether it takes completions as messages, not as text. Prompts are always text.
        default: the reward in place of None, which OpenRLHF does not know.
        special_tokens: removed from completions, as our trainers do: `tokenizer.all_special_tokens`.

    Raises (when called):
        ValueError: if a query begins neither with its prompt nor, as for truncated prompts, with an end of it, or if
            the reward gives anything but finite numbers, or None without a default.
    """
    check_callable("reward", reward)
    return named(partial(_reward_func, Ours(reward, column, chat, default), tuple(special_tokens)), reward)


def _reward_func(ours, special_tokens, queries, prompts, labels):
    texts = [_after(prompt, query) for prompt, query in zip(prompts, queries, strict=True)]
    for token in special_tokens:
        texts = [text.replace(token, "") for text in texts]
    result, called = ours.start(prompts, texts, {ours.column: labels})
    rewards = called.rewards(finished(result))
    logged = called.columns | {key: [value] * len(texts) for key, value in called.metrics.items()}
    numbers = {key: [number_or_none(value) for value in values] for key, values in logged.items()}
    return {
        "rewards": torch.tensor(rewards, dtype=torch.float32),
        "scores": torch.tensor(rewards, dtype=torch.float32),
        "extra_logs": {key: torch.tensor(values) for key, values in numbers.items() if None not in values},
    }


def _after(prompt: str, query: str) -> str:
    # The whole prompt first, then ever shorter ends of it: OpenRLHF cuts off the beginning of one that is too long.
    for start in range(max(len(prompt), 1)):
        if query.startswith(prompt[start:]):
            return query[len(prompt) - start :]
    raise ValueError(f"queries must begin with their prompts; got {query[:80]!r} for the prompt {prompt[:80]!r}")


# reasoning-gym


def from_reasoning_gym(
    dataset: Any,
    *,
    system_prompt: str | None = None,
    chat: bool = True,
    extract: Callable[[str], str | None] = str.strip,
    name: str | None = None,
) -> tuple[list[dict[str, Any]], Callable]:
    """(rows, reward) of a reasoning-gym dataset: rows for our trainers, and its score_answer as a reward function.

    Rows have the columns prompt, answer, task, and index, which is the place in the dataset. Rows of several datasets
    may be combined: a reward is None for rows of another task.

    Args:
        dataset: made by `reasoning_gym.create_dataset`. Each of its entries is generated once, here.
        system_prompt: comes before the question.
        chat: whether prompts are messages, or text.
        extract: gets a completion's text and returns the answer, or None if there is none, which scores 0. For answers
            between tags use `functools.partial(reasoning_gym.utils.extract_answer, tag_name="answer")`.
        name: the task's name; reasoning-gym's by default.

    Raises:
        TypeError: if `dataset` is not such a dataset.
    """
    if not all(hasattr(dataset, each) for each in ("score_answer", "__len__", "__getitem__")):
        raise TypeError(f"dataset must be one of reasoning-gym's, with a length; got {type(dataset).__name__}")
    check_callable("extract", extract)
    entries = [dataset[index] for index in range(len(dataset))]
    if name is None:
        name = (entries[0].get("metadata") or {}).get("source_dataset") if entries else None
        name = name or type(dataset).__name__
    rows = [
        {"prompt": _prompt(entry["question"], system_prompt, chat), "answer": entry["answer"], "task": name, "index": i}
        for i, entry in enumerate(entries)
    ]
    return rows, PerCompletion(partial(_score_answer, dataset, entries, extract, name), _as_it_is, name)


def _prompt(question, system_prompt, chat):
    if chat:
        system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
        return [*system, {"role": "user", "content": question}]
    return question if system_prompt is None else f"{system_prompt}\n\n{question}"


def _score_answer(dataset, entries, extract, name, prompt, completion, ids, row):
    if column_of(row, "task") != name:
        return None
    return dataset.score_answer(extract(text_of(completion)), entries[column_of(row, "index")])


def _as_it_is(result):
    return result, {}


def to_reasoning_gym(
    reward: Callable, *, column: str = "answer", chat: bool = False, default: float | None = None
) -> Callable:
    """Turns a reward function into reasoning-gym's `score_answer(answer, entry) -> float`, which gives 0 without an
    answer.

    The reward is called with the answer as the completion and the question as the prompt. The entry's question, answer
    and metadata are its columns. What it logs is lost. For column, chat, default and Raises see `to_verl`.
    """
    check_callable("reward", reward)
    return named(partial(_our_score_answer, Ours(reward, column, chat, default)), reward)


def _our_score_answer(ours, answer, entry):
    if answer is None:
        return 0.0
    columns = {key: [value] for key, value in {**entry, ours.column: entry["answer"]}.items()}
    result, called = ours.start([entry["question"]], [answer], columns)
    return called.rewards(finished(result))[0]
