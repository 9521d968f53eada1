"""Rows of each format to token ids and labels: those of TRL, and what is left out or refused."""

import copy
import math
import os
import signal
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from tokenizers.processors import TemplateProcessing

from rlkernels.trainers import data
from rlkernels.trainers.base import chat as templates
from rlkernels.trainers.base.limits import Limits
from rlkernels.trainers.batch.batch import Sequence
from rlkernels.trainers.data import check_prompts, preference_pair, prepare, reward_pair, sequences_of, supervised

GENERATION = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ 'a:' }}{% generation %}{{ m['content'] + '.' }}"
    "{% endgeneration %}{% else %}{{ m['role'][0] + ':' + m['content'] }}{% endif %}{% endfor %}"
    "{% if tools %}{{ tools[0]['name'] }}{% endif %}{% if loud %}{{ 'LOUD' }}{% endif %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def say(*turns):
    """Messages of the user and the assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


def answer(text):
    return [{"role": "assistant", "content": text}]


SUPERVISED = {
    "text": [{"text": "abc"}, {"text": "abc<eos>"}, {"text": "a" * 30}],
    "prompt and completion": [
        {"prompt": "ab ", "completion": "cd"},
        {"prompt": "ab", "completion": ""},
        {"prompt": "a" * 14, "completion": "bcdefg"},
        {"prompt": "a" * 30, "completion": "left out"},
        {"prompt": "", "completion": "xyz<eos>"},
    ],
    "messages": [{"messages": say("hi", "yes", "so", "no")}, {"messages": say("abcdefghijklm", "cut off")}],
    "conversations": [{"conversations": [{"from": "user", "value": "hi"}, {"from": "assistant", "value": "yes"}]}],
    "prompt and completion as messages": [
        {"prompt": say("hi"), "completion": answer("yes")},
        {"prompt": say("hi", "yes", "so"), "completion": [*answer("no"), *say("why", "so")]},
    ],
    "tools": [
        {"messages": say("hi", "yes"), "tools": [{"name": "calc"}], "chat_template_kwargs": {"loud": True}},
        {"messages": say("hi", "no"), "tools": [{"name": "find"}], "chat_template_kwargs": {"loud": False}},
    ],
    "tokens": [{"input_ids": [5, 6, 7, 8]}, {"input_ids": [9] * 20}],
    "tokens and labels": [{"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}],
    "tokens and assistant masks": [{"input_ids": [5, 6, 7, 8], "assistant_masks": [0, 1, 0, 1]}],
}
PREFERENCE = {
    "prompt": [
        {"prompt": "ab ", "chosen": "cd", "rejected": "e"},
        {"prompt": "ab", "chosen": "cd<eos>", "rejected": ""},
        {"prompt": "a" * 14, "chosen": "bcdefg", "rejected": "x"},
        {"prompt": "a" * 14, "chosen": "b", "rejected": "c"},
        {"prompt": "a" * 16, "chosen": "left", "rejected": "out"},
    ],
    "implicit prompt": [
        {"chosen": "ab cd", "rejected": "ab ef"},
        {"chosen": "abc", "rejected": "abcd"},
        {"chosen": "same", "rejected": "same"},
    ],
    "messages": [
        {"prompt": say("hi"), "chosen": answer("yes"), "rejected": answer("no")},
        {"prompt": say("hi", "yes", "so"), "chosen": answer("no"), "rejected": answer("abcdefghijklmno")},
    ],
    "messages, implicit prompt": [{"chosen": say("hi", "yes"), "rejected": say("hi", "no")}],
}


@pytest.fixture
def tokenizer(tokenizer):
    """With a template that marks what the assistant says; a prompt's tokens start those of prompt and completion."""
    own, tokenizer.chat_template = tokenizer.chat_template, GENERATION
    yield tokenizer
    tokenizer.chat_template = own


def theirs(trainer, rows, tokenizer, tmp_path, options, **attributes):
    """TRL's own preparation, without the rest of its trainer."""
    trl = pytest.importorskip("trl")
    config = getattr(trl, f"{trainer}Config")(output_dir=str(tmp_path), use_cpu=True, bf16=False, **options)
    itself = SimpleNamespace(_tokenizer=tokenizer, chat_template=None, **attributes)
    extra = (False, None) if trainer == "SFT" else ()
    prepare = getattr(trl, f"{trainer}Trainer")._prepare_dataset
    return prepare(itself, Dataset.from_list(rows), tokenizer, config, *extra, "train")


def ours(rows, function, tokenizer, **options):
    prepared = prepare("train_dataset", Dataset.from_list(rows), partial(function, tokenizer, **options))
    return [[(sequence.input_ids, sequence.labels) for sequence in sequences_of(row)] for row in prepared]


@pytest.mark.parametrize("truncation_mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize(
    "form, loss",
    [(form, loss) for form in SUPERVISED for loss in ("default", "everything")]
    + [(form, "assistant") for form in SUPERVISED if "messages" in form or form in ("conversations", "tools")],
)
def test_supervised_as_in_trl(form, loss, truncation_mode, tokenizer, tmp_path):
    rows = SUPERVISED[form]
    options = {
        "max_length": 16,
        "truncation_mode": truncation_mode,
        "completion_only_loss": False if loss == "everything" else None,
        "assistant_only_loss": loss == "assistant",
    }
    completion_only = "prompt" in rows[0] and loss != "everything"
    expected = theirs("SFT", rows, tokenizer, tmp_path, options, completion_only_loss=completion_only)
    found = ours(rows, supervised, tokenizer, **options)
    assert found == [[(row["input_ids"], row["labels"])] for row in expected]


def test_a_completion_mask_is_the_completion(tokenizer):
    """TRL drops it unless completion_only_loss is set."""
    row = {"input_ids": [5, 6, 7], "completion_mask": [0, 0, 1]}
    assert supervised(tokenizer, row)[0].labels == [-100, -100, 7]
    assert supervised(tokenizer, row, completion_only_loss=False)[0].labels == [5, 6, 7]


@pytest.mark.parametrize("truncation_mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("form", PREFERENCE)
def test_preference_as_in_trl(form, truncation_mode, tokenizer, tmp_path):
    rows = PREFERENCE[form]
    options = {"max_length": 16, "truncation_mode": truncation_mode}
    cut = slice(16) if truncation_mode == "keep_start" else slice(-16, None)
    expected = [
        [
            ((row["prompt_ids"] + row[name])[cut], ([-100] * len(row["prompt_ids"]) + row[name])[cut])
            for name in ("chosen_ids", "rejected_ids")
        ]
        for row in theirs("DPO", rows, tokenizer, tmp_path, options)
    ]
    assert ours(rows, preference_pair, tokenizer, **options) == expected


@pytest.mark.parametrize("form", PREFERENCE)
def test_reward_as_in_trl(form, tokenizer, tmp_path):
    rows = PREFERENCE[form]
    expected = theirs("Reward", rows, tokenizer, tmp_path, {"max_length": 16})
    found = ours(rows, reward_pair, tokenizer, max_length=16)
    expected = [[row["chosen_ids"], row["rejected_ids"]] for row in expected]
    assert [[ids for ids, _ in pair] for pair in found] == expected


def test_a_prompt_beside_messages_that_hold_it(tokenizer):
    """As in UltraFeedback: the prompt as text, and once more as what chosen and rejected start with."""
    row = PREFERENCE["messages, implicit prompt"][0]
    assert preference_pair(tokenizer, {"prompt": "hi", **row}) == preference_pair(tokenizer, row)
    assert reward_pair(tokenizer, {"prompt": "hi", **row}) == reward_pair(tokenizer, row)


@pytest.mark.parametrize("kind", [list, Dataset.from_list])
def test_prepare(kind, tokenizer):
    """Rows keep their number and the columns asked for; those that nothing can be learned from are left out."""
    rows = [
        {"prompt": "a" * 30, "chosen": "b", "rejected": "c", "margin": 1.0, "other": "x"},
        {"prompt": "a", "chosen": "b", "rejected": "cd", "margin": 2.0, "other": "x"},
        {"prompt": "a", "chosen": "b", "rejected": "c", "margin": -1, "other": "x"},
    ]
    tokenize = partial(preference_pair, tokenizer, max_length=16)
    prepared = prepare("train_dataset", kind(rows), tokenize, keep=("margin",))
    assert prepared["_row_id"] == [1, 2] and prepared["margin"] == [2.0, -1.0] and prepared["num_tokens"] == [7, 6]
    assert "other" not in prepared.column_names
    assert sequences_of(prepared[0]) == preference_pair(tokenizer, rows[1])
    assert prepare("train_dataset", prepared, tokenize) is prepared


@pytest.mark.parametrize("kind", [list, Dataset.from_list])
def test_several_processes_prepare(kind, tokenizer):
    rows, pids = [{"text": letter} for letter in "abc"], set()

    def tokenize(row):
        return [Sequence([os.getpid(), ord(row["text"])], [0, 0])]

    prepared = prepare("train_dataset", kind(rows), tokenize, num_proc=2)
    for row in prepared:
        (sequence,) = sequences_of(row)
        pids.add(sequence.input_ids[0])
        assert sequence.input_ids[1] == ord("abc"[row["_row_id"]])
    assert prepared["_row_id"] == [0, 1, 2] and len(pids) == 2 and os.getpid() not in pids


def test_numbers_of_csv_are_text(tokenizer):
    rows = [{"chosen": "ab", "rejected": "ac", "margin": margin} for margin in ("0.5", "-1e-3")]
    tokenize = partial(reward_pair, tokenizer)
    assert prepare("train_dataset", rows, tokenize, keep=("margin",))["margin"] == [0.5, -1e-3]
    for margin in ("much", ""):
        with pytest.raises(
            ValueError, match=rf"^train_dataset, row 2: margin must be a finite number; got '{margin}'$"
        ):
            prepare("train_dataset", [*rows, {**rows[0], "margin": margin}], tokenize, keep=("margin",))


def test_a_column_of_the_same_name(tokenizer):
    rows = [{"sequences": "ACGT", "text": "abc"}]
    assert prepare("train_dataset", Dataset.from_list(rows), partial(supervised, tokenizer))["num_tokens"] == [4]


@pytest.mark.parametrize("kind", ["torch", "numpy", "transform", "arrays"])
def test_rows_of_other_types(kind, tokenizer):
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8, 9], "labels": [8, 9]}]
    dataset = Dataset.from_list(rows)
    if kind == "transform":
        other = {5: 15, 6: 16, 7: 17, 8: 18, 9: 19, -100: -100}
        dataset = dataset.with_transform(
            lambda batch: {name: [[other[i] for i in row] for row in rows] for name, rows in batch.items()}
        )
        rows = [{name: [other[i] for i in row[name]] for name in row} for row in rows]
    elif kind == "arrays":
        dataset = [{name: torch.tensor(values) for name, values in row.items()} for row in rows]
    else:
        dataset = dataset.with_format(kind)
    prepared = prepare("train_dataset", dataset, partial(supervised, tokenizer))
    assert [sequence for row in prepared for sequence in sequences_of(row)] == [Sequence(**row) for row in rows]


def test_first_rows_left_out(tokenizer):
    """What a column holds is not guessed from rows that hold nothing."""
    rows = [{"text": ""}] * 1001 + [{"text": "abc"}]
    assert prepare("train_dataset", Dataset.from_list(rows), partial(supervised, tokenizer))["_row_id"] == [1001]


def test_a_column_may_be_none(tokenizer):
    row = {"prompt": None, "messages": None, "text": "abc", "tools": None, "chat_template_kwargs": None}
    assert supervised(tokenizer, row) == supervised(tokenizer, {"text": "abc"})


def test_tools_as_json(tokenizer):
    row = {"messages": say("hi", "yes")}
    as_list = supervised(tokenizer, {**row, "tools": [{"name": "calc"}]})
    assert supervised(tokenizer, {**row, "tools": '[{"name": "calc"}]'}) == as_list != supervised(tokenizer, row)


@pytest.mark.parametrize(
    "function, row, options, message",
    [
        (
            supervised,
            {"prompt": "a"},
            {},
            "wanted .* prompt and completion, messages, text or .*; got prompt$",
        ),
        (supervised, {}, {}, "got none"),
        (supervised, {"text": 5}, {}, "text must be text or messages; got 5"),
        (supervised, {"messages": "hi"}, {}, "messages must be messages, .*; got 'hi'"),
        (supervised, {"messages": [{"role": "user", "content": ["a"]}]}, {}, "TypeError: can only concatenate str"),
        (supervised, {"messages": [{"role": "user"}]}, {}, "messages, message 0: content must be text, .*; got None"),
        (supervised, {"messages": [*say("a"), *say(3)]}, {}, "messages, message 1: content must be text, .*; got 3"),
        (supervised, {"messages": [{"role": None, "content": "a"}]}, {}, "message 0: role must be text; got None"),
        (supervised, {"prompt": say("a"), "completion": say(None)}, {}, "completion, message 0: content must be"),
        (supervised, {"conversations": [{"from": 1, "value": "a"}]}, {}, "message 0: role must be text; got 1"),
        (reward_pair, {"chosen": say([None]), "rejected": say("a")}, {}, "chosen, message 0: content must be .*None"),
        (
            preference_pair,
            {"prompt": say([{"type": "text", "text": 1}]), "chosen": say("a"), "rejected": say("b")},
            {},
            "prompt, message 0: content must be text, or a list of parts; got .*'text': 1",
        ),
        (supervised, {"messages": [{"content": "hi"}]}, {}, "messages must be messages, .*; got .*'content': 'hi'"),
        (supervised, {"prompt": say("hi"), "completion": "yes"}, {}, "prompt must be text, as completion is; got"),
        (supervised, {"prompt": "hi", "completion": say("yes")}, {}, "prompt must be messages, .*; got 'hi'"),
        (supervised, {"input_ids": [1, 2], "labels": [1]}, {}, "labels must have one entry for each of the 2 .* got 1"),
        (supervised, {"input_ids": [1, 2], "completion_mask": [1]}, {}, "completion_mask must have one entry"),
        (supervised, {"input_ids": [1, 67]}, {}, "input_ids must be tokens of the tokenizer, 0 to 66; got 67"),
        (supervised, {"input_ids": [-100, 1]}, {}, "input_ids must be tokens of the tokenizer, 0 to 66; got -100"),
        (supervised, {"input_ids": [1, 2], "labels": [-1, 2]}, {}, "labels must be tokens of the tokenizer, .*got -1"),
        (supervised, {"text": "a"}, {"completion_only_loss": True}, "needs a prompt and a completion; got neither"),
        (supervised, {"text": "a"}, {"assistant_only_loss": True}, "assistant_only_loss needs messages; got text"),
        (preference_pair, {"prompt": "a", "chosen": "b"}, {}, "columns prompt, chosen, rejected; got prompt, chosen"),
        (preference_pair, {"prompt": say("a"), "chosen": "b", "rejected": "c"}, {}, "prompt must be text, as rejected"),
        (preference_pair, {"chosen": "b", "rejected": ""}, {}, "wanted the columns prompt, chosen, rejected; got"),
        (reward_pair, {"chosen": "b"}, {}, "wanted the columns chosen, rejected; got chosen"),
        (reward_pair, {"chosen": "b", "rejected": 1}, {}, "rejected must be text or messages; got 1"),
    ],
)
def test_wrong_rows(function, row, options, message, tokenizer):
    good = {"input_ids": [1, 2], "labels": [1, 2]} if function is supervised else {"chosen": "ab", "rejected": "ac"}
    with pytest.raises(ValueError, match=f"^eval_dataset, row 1: .*{message}"):
        prepare("eval_dataset", [good, row], partial(function, tokenizer, **options))


def test_a_message_that_says_nothing(tokenizer):
    """But calls a tool."""
    tokenizer.chat_template = "{% for m in messages %}{{ m.content or m.tool_calls[0].name }}{% endfor %}"
    turn = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}
    assert supervised(tokenizer, {"messages": [turn]})[0].input_ids == tokenizer("add")["input_ids"]


@pytest.mark.parametrize("kind", [list, Dataset.from_list])
@pytest.mark.parametrize("margin", [None, math.nan, math.inf, True, "", "inf", "1x"], ids=str)
def test_wrong_margins(kind, margin, tokenizer):
    if kind is not list and not isinstance(margin, float | None):
        rows = [{"chosen": "b", "rejected": "c", "margin": margin}]
    else:
        rows = [{"chosen": "b", "rejected": "c", "margin": each} for each in (1.0, margin)]
    last = len(rows) - 1
    with pytest.raises(ValueError, match=f"^train_dataset, row {last}: margin must be a finite number; got "):
        prepare("train_dataset", kind(rows), partial(reward_pair, tokenizer), keep=("margin",))


def test_wrong_templates(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('no system turn') }}"  # given back by the fixture
    with pytest.raises(ValueError, match="row 0: TemplateError: no system turn"):
        prepare("train_dataset", [{"messages": say("hi")}], partial(supervised, tokenizer))
    with pytest.raises(ValueError, match="needs a chat template that puts what the assistant says between"):
        supervised(tokenizer, {"messages": say("hi")}, assistant_only_loss=True)


def test_wrong_datasets(tokenizer):
    with pytest.raises(ValueError, match="row 0: a row must be a dict of columns; got str"):
        prepare("train_dataset", ["abc"], partial(supervised, tokenizer))
    with pytest.raises(ValueError, match="train_dataset: none of its 2 rows has a token to learn from"):
        prepare("train_dataset", [{"text": ""}] * 2, partial(supervised, tokenizer))


def test_a_prompt_that_is_rendered_otherwise_alone(tokenizer, tmp_path):
    """The completion starts where the tokens part."""
    tokenizer.chat_template = "{{ messages|map(attribute='content')|join }}{% if add_generation_prompt %}xy{% endif %}"
    rows = [{"prompt": say("ab"), "completion": answer("xc")}]
    (expected,) = theirs("SFT", rows, tokenizer, tmp_path, {}, completion_only_loss=True)
    (((ids, labels),),) = ours(rows, supervised, tokenizer)
    assert (ids, labels) == (expected["input_ids"], expected["labels"])
    assert sum(label != -100 for label in labels) == 1


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (None, "prompt must be messages, a list of dicts with a role and a content; got None"),
        ("", "prompt '' has no tokens"),
        ([], "prompt must have messages; got none"),
        (say(None), "prompt, message 0: content must be text, or a list of parts; got None"),
        ([{"role": 1, "content": "a"}], "prompt, message 0: role must be text; got 1"),
        ("ab", "prompt must be messages, as row 0 has; got 'ab'"),
    ],
)
def test_wrong_prompts(prompt, message, tokenizer):
    first = say("hi") if isinstance(prompt, list) or prompt == "ab" else "hi"
    with pytest.raises(ValueError, match=f"^eval_dataset, row 1: {message}$"):
        check_prompts("eval_dataset", [{"prompt": first}, {"prompt": prompt}], tokenizer, Limits(67, None), 6)


@pytest.fixture
def adding(tokenizer):
    """A tokenizer that begins and ends what it encodes."""
    own = copy.deepcopy(tokenizer)
    own.bos_token = "B"
    tokens = [("B", own.bos_token_id), ("<eos>", own.eos_token_id)]
    own.backend_tokenizer.post_processor = TemplateProcessing(single="B $A <eos>", special_tokens=tokens)
    return own


@pytest.fixture
def warnings(monkeypatch):
    said = []
    monkeypatch.setattr(data.logger, "warning", said.append)
    return said


def test_special_tokens_that_stand_twice(tokenizer, adding, warnings):
    rows = [{"input_ids": [3, 4]}, {"text": "Bab"}, {"text": "cd"}]  # of text the trainer writes the end
    prepare("train_dataset", rows, partial(supervised, adding), tokenizer=adding)
    prepare("train_dataset", rows, partial(supervised, tokenizer), tokenizer=tokenizer)
    (said,) = warnings
    assert said.startswith("train_dataset: 2 of 3 rows, first row 1, begin or end with a special token")


def test_special_tokens_of_prompts(tokenizer, adding, warnings):
    rows = [{"prompt": prompt} for prompt in ("ab", "Bab", "Bc")]
    check_prompts("train_dataset", rows, tokenizer, Limits(67, None), 6)
    assert not warnings
    check_prompts("train_dataset", rows, adding, Limits(67, None), 6)
    assert warnings == [
        "train_dataset: 2 of 3 prompts, first row 1, begin with 'B' twice: the text holds it, and the "
        "tokenizer adds it.",
        "train_dataset: 3 of 3 prompts, first row 0, end with '<eos>', which the tokenizer adds: "
        "completions follow an end token.",
    ]
    warnings.clear()
    check_prompts("train_dataset", [{"prompt": say("Bab")}], adding, Limits(67, None), 6)
    assert not warnings  # a template writes all by itself


FOREVER = (
    "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}"
)


def test_a_template_that_does_not_end(tokenizer, monkeypatch):
    """Rows and prompts are refused; nothing waits for it, and the alarm of before rings as it would have."""
    monkeypatch.setattr(templates, "SECONDS", 0.1)
    monkeypatch.setattr(tokenizer, "chat_template", FOREVER)
    rang: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda *_: rang.append(1))
    try:
        message = r"row 0: TimeoutError: the chat template has not ended after 0.1 s$"
        with pytest.raises(ValueError, match=f"^train_dataset, {message}"):
            prepare("train_dataset", [{"messages": say("a", "b")}], partial(supervised, tokenizer))
        with pytest.raises(ValueError, match=f"^eval_dataset, {message}"):
            check_prompts("eval_dataset", [{"prompt": say("a")}], tokenizer, Limits(68, None), 6)
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
        signal.raise_signal(signal.SIGALRM)
        assert rang == [1]
    finally:
        signal.signal(signal.SIGALRM, before)
