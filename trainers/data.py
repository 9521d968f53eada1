"""Turns rows of a dataset into sequences of tokens, by TRL's formats, for SFTTrainer, DPOTrainer and RewardTrainer.

`prepare` tokenizes a dataset with one of `supervised`, `preference_pair` and `reward_pair`; `Packed` puts several rows
in one place of a batch. PPOTrainer and GRPOTrainer use `check_prompts` only.

Text ends with the end-of-sequence token, which is added if it is missing. Messages end as the chat template ends them.
A row of messages may have its own `tools` and `chat_template_kwargs`. A column that is None in a row counts as missing.
"""

import contextlib
import json
import math
import re
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Rows
from functools import partial
from typing import Any

from datasets import Dataset, Features, List, Value
from datasets.fingerprint import generate_random_fingerprint
from torch.utils import data
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .base.chat import apply_chat_template, is_chat
from .base.limits import Limits
from .base.rows import check_columns
from .batch.batch import IGNORE, Sequence, sharing
from .rollouts.engine import encode

logger = logging.get_logger(__name__)

Row = dict[str, Any]

TOKENS = List(Value("int32"))
PREPARED = ("_row_id", "sequences", "num_tokens")


def prepare(
    name: str,
    dataset: Any,
    tokenize: Callable[[Row], Rows[Sequence] | None],
    *,
    columns: tuple[str, ...] = (),
    keep: tuple[str, ...] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    limits: Limits | None = None,
    num_proc: int | None = None,
) -> Dataset:
    """Applies `tokenize` to each row. Returns a dataset with the columns

        _row_id     the row's index in the given dataset
        sequences   the row's sequences, which `sequences_of` reads
        num_tokens  the number of tokens in all of them
        keep        these columns of finite numbers, unchanged; None if the dataset has no such column

    Rows for which `tokenize` gives None have nothing to learn from and are left out. All rows are read now, so that a
    wrong one is found before training starts. A dataset that `prepare` made is returned as it is. If a tokenizer is
    given, a warning tells of rows in which its first or last special token stands twice.

    Raises:
        TypeError, ValueError: if the dataset is no sequence of rows, lacks one of `columns`, or no row is left; and,
            naming the row, if `tokenize` refuses a row or it is beyond `limits`, the model's.
    """
    if set(PREPARED).issubset(getattr(dataset, "column_names", None) or ()):
        return dataset
    check_columns(name, dataset, *columns)
    present = getattr(dataset, "column_names", None) or (dataset[0] if isinstance(dataset[0], Mapping) else ())

    def read(row: Row, index: int) -> Row:
        try:
            if not isinstance(row, Mapping):
                raise ValueError(f"a row must be a dict of columns; got {type(row).__name__}")
            sequences = tokenize(row) or ()
            for sequence in sequences if limits is not None else ():
                limits.check(sequence.input_ids)
                limits.check(sequence.labels)
            kept = {column: _number(column, row.get(column)) for column in keep if column in row or column in present}
        except Exception as error:  # chat templates raise exceptions of any type
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            raise ValueError(f"{name}, row {index}: {kind}{error}") from error
        return {
            "_row_id": index,
            "sequences": [{"input_ids": each.input_ids, "labels": each.labels} for each in sequences],
            "num_tokens": sum(map(len, sequences)),
            "doubled": any(is_doubled(tokenizer, sequence.input_ids) for sequence in sequences),
            **dict.fromkeys(keep),
            **kept,
        }

    features = Features(
        _row_id=Value("int64"),
        sequences=List({"input_ids": TOKENS, "labels": TOKENS}),
        num_tokens=Value("int64"),
        doubled=Value("bool"),
        **{column: Value("float64") for column in keep},
    )
    # A dataset with the user's transform would apply it to our columns too.
    if isinstance(dataset, Dataset) and dataset.format["type"] != "custom":
        rows, function, fingerprint = dataset.with_format(None), read, None
    else:
        rows = Dataset.from_dict({"_row_id": range(len(dataset))})
        function = partial(_read_at, read, dataset)
        fingerprint = generate_random_fingerprint()  # computing one would hash the whole dataset
    rows = rows.map(
        function,
        with_indices=True,
        remove_columns=rows.column_names,
        features=features,
        num_proc=num_proc,
        # The cache identifies a function by its name, so it could return what an older version of this module made.
        load_from_cache_file=False,
        new_fingerprint=fingerprint,
        desc=f"Tokenizing {name}",
    )
    doubled = [index for index, is_one in enumerate(rows["doubled"]) if is_one]
    rows = rows.remove_columns("doubled")
    if doubled:
        logger.warning(
            f"{name}: {len(doubled)} of {len(rows)} rows, first row {doubled[0]}, begin or end with a special token "
            "twice: the text or the trainer writes it, and the tokenizer adds it."
        )
    kept = [index for index, count in enumerate(rows["num_tokens"]) if count]
    if not kept:
        raise ValueError(f"{name}: none of its {len(rows)} rows has a token to learn from within max_length")
    if len(kept) == len(rows):
        return rows
    logger.warning(f"{name}: {len(rows) - len(kept)} of {len(rows)} rows are left out, with no token to learn from")
    return rows.select(kept)


def _read_at(read: Callable[[Row, int], Row], dataset: Any, row: Row, index: int) -> Row:
    return read(dataset[index], index)


def is_doubled(tokenizer: PreTrainedTokenizerBase | None, ids: list[int]) -> bool:
    """Whether tokens begin with two beginning-of-sequence tokens, or end with two end-of-sequence tokens."""
    if tokenizer is None or len(ids) < 2:
        return False
    return ids[0] == ids[1] == tokenizer.bos_token_id or ids[-2] == ids[-1] == tokenizer.eos_token_id


def _number(column: str, value: Any) -> float:
    plain = value.item() if hasattr(value, "item") else value  # NumPy and PyTorch scalars
    if isinstance(plain, str):  # all values of a CSV file are text
        with contextlib.suppress(ValueError):
            plain = float(plain)
    if isinstance(plain, bool) or not isinstance(plain, int | float) or not math.isfinite(plain):
        raise ValueError(f"{column} must be a finite number; got {_short(value)}")
    return float(plain)


def sequences_of(row: Row, share_prefix: bool = False) -> list[Sequence]:
    """The sequences of a row that `prepare` made, which share their prefix if they should."""
    sequences = [Sequence(**sequence) for sequence in row["sequences"]]
    return sharing(sequences) if share_prefix else sequences


def check_rows(name: str, rows: Dataset, limits: Limits) -> None:
    """Raises ValueError for a row of `prepare` that is beyond the limits of another model."""
    for row in rows:
        try:
            for sequence in row["sequences"]:
                limits.check(sequence["input_ids"])
                limits.check(sequence["labels"])
        except ValueError as error:
            raise ValueError(f"{name}, row {row['_row_id']}: {error}") from None


def check_prompts(
    name: str,
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
    completion: int,
    chat_template_kwargs: Any = None,
    others: Rows[Callable[[Any], None]] = (),
) -> None:
    """Raises ValueError, naming the row, if a prompt

        is neither text nor messages, or is not of the same kind as the first row's,
        is beyond `limits` with a completion of `completion` tokens, or
        is refused by one of `others`.

    The first prompt is encoded; the others are only if some could be beyond the limits. A warning tells of text that
    already begins with the token that the tokenizer adds, and of a tokenizer that adds an end token to prompts."""
    ids = tokenizer("a")["input_ids"]
    begins, ends = (len(ids) > 1 and ids[0] == tokenizer.bos_token_id), ids[1:][-1:] == [tokenizer.eos_token_id]
    doubled: list[int] = []
    ended: list[int] = []
    is_plain = isinstance(dataset, Dataset) and dataset.format["type"] != "custom"
    prompts = dataset.with_format(None)["prompt"] if is_plain else (dataset[i]["prompt"] for i in range(len(dataset)))
    chat = None
    for index, prompt in enumerate(prompts):
        try:
            if not isinstance(prompt, str) and not _messages("prompt", prompt):
                raise ValueError("prompt must have messages; got none")
            if isinstance(prompt, str):
                doubled += [index] * (begins and prompt.startswith(tokenizer.bos_token))
                ended += [index] * ends
            chat = is_chat(prompt) if chat is None else chat
            if is_chat(prompt) != chat:
                raise ValueError(f"prompt must be {'messages' if chat else 'text'}, as row 0 has; got {_short(prompt)}")
            if index == 0 or prompt == "" or not limits.fit(tokenizer):
                limits.check(encode(tokenizer, [prompt], chat_template_kwargs)[0], completion)
            for check in others:
                check(prompt)
        except Exception as error:  # chat templates raise exceptions of any type
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            raise ValueError(f"{name}, row {index}: {kind}{error}") from error

    for rows, fault in (
        (doubled, f"begin with {tokenizer.bos_token!r} twice: the text holds it, and the tokenizer adds it"),
        (ended, f"end with {tokenizer.eos_token!r}, which the tokenizer adds: completions follow an end token"),
    ):
        if rows:
            logger.warning(f"{name}: {len(rows)} of {len(dataset)} prompts, first row {rows[0]}, {fault}.")


class Packed(data.Dataset):
    """Rows of `prepare`, packed into places of at most `size` tokens, for SFT's `packing`. Rows go in from the longest
    to the shortest, each into the place that it fills best (best-fit decreasing)."""

    column_names = list(PREPARED)

    def __init__(self, rows: Dataset, size: int) -> None:
        self.rows = rows
        self.places: list[list[int]] = []
        lengths = rows["num_tokens"][:]
        rooms: list[int] = []  # the free tokens of places that are not full, without repeats, in ascending order
        with_room: dict[int, list[int]] = defaultdict(list)
        for index in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
            fits = bisect_left(rooms, lengths[index])
            if fits == len(rooms):
                place, room = len(self.places), size
                self.places.append([])
            else:
                room = rooms[fits]
                place = with_room[room].pop()
                if not with_room[room]:
                    del rooms[fits]
            self.places[place].append(index)
            room -= lengths[index]
            if not with_room[room]:
                insort(rooms, room)
            with_room[room].append(place)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Row:
        rows = [self.rows[each] for each in self.places[index]]
        sequences = [sequence for row in rows for sequence in row["sequences"]]
        return {
            "_row_id": [row["_row_id"] for row in rows],
            "sequences": sequences,
            "num_tokens": sum(row["num_tokens"] for row in rows),
        }


def supervised(
    tokenizer: PreTrainedTokenizerBase,
    row: Row,
    *,
    max_length: int | None = None,
    truncation_mode: str = "keep_start",
    completion_only_loss: bool | None = None,
    assistant_only_loss: bool = False,
    text_field: str = "text",
) -> list[Sequence] | None:
    """The one sequence of a row for supervised fine-tuning, or None if truncation leaves no token in the loss. Rows:

        prompt, completion   text or messages
        messages             or conversations: dicts of role and content, or of from and value
        text                 in the column `text_field`
        input_ids            tokens, optionally with labels, or with completion_mask and assistant_masks

    The loss covers the completion, if there is one and completion_only_loss is not False; with assistant_only_loss, the
    tokens that the chat template marks as the assistant's; with labels, those that are not -100; else all tokens.
    """
    row = _normalized(row)
    masks: dict[str, list[int]] = {}
    if "input_ids" in row:
        ids = _tokens(tokenizer, "input_ids", row["input_ids"])
        masks = {column: row[column] for column in ("completion_mask", "assistant_masks") if column in row}
    elif "prompt" in row and "completion" in row:
        prompt, completion = _ended_alike(tokenizer, row, "prompt", "completion")
        ids, masks = _encode_marked(tokenizer, prompt + completion, row, assistant_only_loss)
        start = _shared(_encode(tokenizer, prompt, row, add_generation_prompt=True), [ids], tokenizer)
        masks["completion_mask"] = [0] * start + [1] * (len(ids) - start)
    elif "messages" in row or "conversations" in row:
        column = "messages" if "messages" in row else "conversations"
        ids, masks = _encode_marked(tokenizer, _messages(column, row[column]), row, assistant_only_loss)
    elif text_field in row:
        (text,) = _ended_alike(tokenizer, row, text_field)
        ids, masks = _encode_marked(tokenizer, text, row, assistant_only_loss)
    else:
        raise ValueError(
            f"wanted the columns prompt and completion, messages, {text_field} or input_ids; got {_names(row)}"
        )
    if "input_ids" in row and "labels" in row:
        masks = {}
        labels = _tokens(tokenizer, "labels", row["labels"], IGNORE)
    else:
        if completion_only_loss and "completion_mask" not in masks:
            raise ValueError("completion_only_loss needs a prompt and a completion; got neither")
        if assistant_only_loss and "assistant_masks" not in masks:
            raise ValueError("assistant_only_loss needs messages; got text or tokens")
        if completion_only_loss is False:
            masks.pop("completion_mask", None)
        labels = ids
    for column, values in {"labels": labels, **masks}.items():
        if len(values) != len(ids):
            raise ValueError(f"{column} must have one entry for each of the {len(ids)} input_ids; got {len(values)}")
    labels = [label if all(marks) else IGNORE for label, *marks in zip(labels, *masks.values(), strict=True)]
    return _truncate([Sequence(ids, labels)], max_length, truncation_mode)


def preference_pair(
    tokenizer: PreTrainedTokenizerBase,
    row: Row,
    max_length: int | None = None,
    truncation_mode: str = "keep_start",
    chat_template_kwargs: dict[str, Any] | None = None,
) -> list[Sequence] | None:
    """The sequences (prompt + chosen, prompt + rejected) of a preference row, text or messages. Without a `prompt`, the
    common beginning of chosen and rejected is the prompt. The loss covers the tokens after the prompt. None if
    truncation leaves no such token in one of the sequences; the row is then left out."""
    row = _with_prompt(_normalized(row, chat_template_kwargs))
    prompt, chosen, rejected = _ended_alike(tokenizer, row, "prompt", "chosen", "rejected")
    both = [_encode(tokenizer, prompt + completion, row) for completion in (chosen, rejected)]
    start = _shared(_encode(tokenizer, prompt, row, add_generation_prompt=True), both, tokenizer)
    pair = [Sequence(ids, [IGNORE] * start + ids[start:]) for ids in both]
    return _truncate(pair, max_length, truncation_mode)


def reward_pair(
    tokenizer: PreTrainedTokenizerBase,
    row: Row,
    max_length: int | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> list[Sequence] | None:
    """The two sequences that a reward model compares, from the same rows as `preference_pair`. No token is in the loss.
    None if one is longer than max_length, since only complete sequences have a score; the row is then left out."""
    row = _normalized(row, chat_template_kwargs)
    names = ("prompt", "chosen", "rejected") if "prompt" in row else ("chosen", "rejected")
    *prompt, chosen, rejected = _ended_alike(tokenizer, row, *names)
    pair = []
    for completion in (chosen, rejected):
        ids = _encode(tokenizer, prompt[0] + completion if prompt else completion, row)
        if not ids:
            raise ValueError("chosen and rejected must have tokens; got none")
        pair.append(Sequence(ids, [IGNORE] * len(ids)))
    return None if max_length is not None and max(map(len, pair)) > max_length else pair


# Shared by the formats


def _normalized(row: Row, chat_template_kwargs: dict[str, Any] | None = None) -> Row:
    row = {column: value for column, value in row.items() if value is not None}
    if chat_template_kwargs:
        row["chat_template_kwargs"] = {**chat_template_kwargs, **row.get("chat_template_kwargs", {})}
    if isinstance(row.get("prompt"), str) and isinstance(row.get("chosen"), list):
        del row["prompt"]  # chosen and rejected also begin with it
    return row


def _tokens(tokenizer: PreTrainedTokenizerBase, column: str, values: Any, *others: int) -> list[int]:
    tokens, size = [int(token) for token in values], len(tokenizer)
    wrong = next((token for token in tokens if not (0 <= token < size or token in others)), None)
    if wrong is not None:
        raise ValueError(f"{column} must be tokens of the tokenizer, 0 to {size - 1}; got {wrong}")
    return tokens


def _messages(column: str, value: Any) -> list[dict[str, Any]]:
    if isinstance(value, list) and all(isinstance(turn, dict) and "from" in turn and "value" in turn for turn in value):
        value = [{"role": turn["from"], "content": turn["value"]} for turn in value]
    if not is_chat(value):
        raise ValueError(f"{column} must be messages, a list of dicts with a role and a content; got {_short(value)}")
    for number, turn in enumerate(value):
        role, content = turn["role"], turn.get("content")
        if not isinstance(role, str):
            raise ValueError(f"{column}, message {number}: role must be text; got {_short(role)}")
        # A message that calls tools, or only thinks, may have no content.
        says_nothing = content is None and any(turn[name] for name in turn.keys() - {"role", "content"})
        parts = content if isinstance(content, list) else [content]
        if not (says_nothing or all(map(_is_part, parts))):
            raise ValueError(
                f"{column}, message {number}: content must be text, or a list of parts; got {_short(content)}"
            )
    return value


def _is_part(part: Any) -> bool:
    is_text = isinstance(part, dict) and part.get("type") == "text"
    return isinstance(part["text"] if is_text and "text" in part else part, str if is_text else str | dict)


def _ended_alike(tokenizer: PreTrainedTokenizerBase, row: Row, *columns: str) -> list[Any]:
    """The columns, all text or all messages. Text gets the end-of-sequence token at its end, but not a prompt."""
    for column in columns:
        if column not in row:
            raise ValueError(f"wanted the columns {', '.join(columns)}; got {_names(row)}")
    last = columns[-1]
    if isinstance(row[last], list):
        return [_messages(column, row[column]) for column in columns]
    for column in (last, *columns):
        if not isinstance(row[column], str):
            wanted = "text or messages" if column == last else f"text, as {last} is"
            raise ValueError(f"{column} must be {wanted}; got {_short(row[column])}")
    end = tokenizer.eos_token or ""
    return [row[name] if name == "prompt" or row[name].endswith(end) else row[name] + end for name in columns]


def _with_prompt(row: Row) -> Row:
    """The row with a prompt. If it has none, the common beginning of chosen and rejected is cut off as the prompt, by
    TRL's rule."""
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if "prompt" in row or not chosen or not rejected:
        return row
    same = _common(chosen, rejected)
    start = min(same, len(chosen) - 1, len(rejected) - 1)
    if start == same and start and chosen[start - 1] == " ":
        start -= 1
    return row | {"prompt": chosen[:start], "chosen": chosen[start:], "rejected": rejected[start:]}


def _encode(tokenizer: PreTrainedTokenizerBase, value: Any, row: Row, **options: Any) -> Any:
    if isinstance(value, str):
        return tokenizer(value)["input_ids"]
    return _apply_template(tokenizer, value, row, **options)["input_ids"]


def _encode_marked(
    tokenizer: PreTrainedTokenizerBase, value: Any, row: Row, mark: bool
) -> tuple[list[int], dict[str, list[int]]]:
    """Token ids, and with `mark` a mask of the tokens that the assistant said, for messages."""
    if isinstance(value, str) or not mark:
        return _encode(tokenizer, value, row), {}
    template = row.get("chat_template_kwargs", {}).get("chat_template") or tokenizer.get_chat_template()
    if not re.search(r"\{%-?\s*generation\s*-?%\}", template):
        raise ValueError(
            "assistant_only_loss needs a chat template that puts what the assistant says between {% generation %} and "
            "{% endgeneration %}; that of the tokenizer does not"
        )
    found = _apply_template(tokenizer, value, row, return_assistant_tokens_mask=True)
    return found["input_ids"], {"assistant_masks": found["assistant_masks"]}


def _apply_template(tokenizer: PreTrainedTokenizerBase, messages: list[dict], row: Row, **options: Any) -> Any:
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    options |= {"tools": tools, **row.get("chat_template_kwargs", {})}
    return apply_chat_template(tokenizer, messages, tokenize=True, return_dict=True, **options)


def _common(one: Any, other: Any) -> int:
    """The length of the common beginning of two lists or texts."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))


def _shared(prompt: list[int], whole: list[list[int]], tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens of the prompt stand at the start of all `whole` sequences. The completions start after them."""
    start = min(_common(prompt, ids) for ids in whole)
    if start < len(prompt):
        logger.warning_once(
            "A prompt alone has other tokens than the beginning of prompt and completion together, because of the chat "
            "template or because tokens merge across the boundary. The completion starts where they differ, before "
            f"{tokenizer.decode(prompt[start:])!r}. This warning comes once; other rows may have the same."
        )
    return start


def _truncate(sequences: list[Sequence], max_length: int | None, mode: str) -> list[Sequence] | None:
    """Keeps max_length tokens at the start or end of each sequence. None if one has no token in the loss left."""
    if max_length is not None:
        cut = slice(max_length) if mode == "keep_start" else slice(-max_length, None)
        sequences = [Sequence(sequence.input_ids[cut], sequence.labels[cut]) for sequence in sequences]
    learned = [any(label != IGNORE for label in sequence.labels[1:]) for sequence in sequences]
    return sequences if all(learned) else None


def _names(row: Row) -> str:
    return ", ".join(row) or "none"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
