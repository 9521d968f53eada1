"""The commands that train: what they do, and that a bad value ends in one line, exit code 2 and no folder."""

import json
import os
import re
import shlex
import signal
import sys
import tempfile
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Trainer,
)

from cases import thorough
from rlkernels import cli, cli_commands, cli_data, cli_options, trainers

REWARDS = """
import asyncio
import pathlib

not_a_function = 3

def length(completions, **columns):
    return [float(len(completion)) for completion in completions]

async def vowels(completions, **columns):
    await asyncio.sleep(0)
    return [float(sum(completion.count(vowel) for vowel in "aeiou")) for completion in completions]

def answer_given(answer, **columns):
    return [float(text == "a") for text in answer]

def raises(prompts, **columns):
    log = pathlib.Path("out/run/runs/log")
    log.parent.mkdir(exist_ok=True)
    log.write_text("as loggers do at the start")
    return [1.0 / (prompt != "cd") for prompt in prompts]

def too_short(completions, **columns):
    return [0.0] * (len(completions) - 1)

def text(prompts, **columns):
    return ["good" if prompt == "cd" else 0.0 for prompt in prompts]
"""

PAIRS = [{"prompt": letter, "chosen": "ab", "rejected": "cde"} for letter in "abcd"]
PROMPTS = [{"prompt": prompt, "answer": prompt[0]} for prompt in ("ab", "cd", "ef", "gh")]

# Each command's rows, and what it needs beside them.
COMMANDS = {
    "sft": ([{"prompt": letter, "completion": "ab"} for letter in "abcd"], {}),
    "reward": (PAIRS, {}),
    "dpo": (PAIRS, {}),
    "ppo": (PROMPTS, {"reward": "graders:length", "response_length": "4"}),
    "grpo": (PROMPTS, {"reward": "graders:length", "max_completion_length": "4", "num_generations": "2"}),
}
SAMPLING = ("ppo", "grpo")


def commands(*quick):
    return pytest.mark.parametrize("command", [name if name in quick else thorough(name) for name in COMMANDS])


@pytest.fixture(scope="module")
def model_folders(tmp_path_factory):
    """Two tiny random models whose tokens are letters, a classifier, and their tokenizer."""
    words = ["<eos>", "?", *"abcdefgh"]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>", unk_token="?")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        eos_token_id=0,
        pad_token_id=0,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    model, other = LlamaForCausalLM(config), LlamaForCausalLM(config)
    config.num_labels = 1
    classifier = LlamaForSequenceClassification(config)
    folder = tmp_path_factory.mktemp("models")
    for name, each in (("model", model), ("other", other), ("classifier", classifier)):
        each.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """The current folder: two reward modules and a dataset for each command."""
    (tmp_path / "graders.py").write_text(REWARDS)
    (tmp_path / "broken_graders.py").write_text("import a_module_that_is_not_there\n")
    for command, (rows, _) in COMMANDS.items():
        (tmp_path / f"{command}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in ("graders", "broken_graders"):
        sys.modules.pop(name, None)


@pytest.fixture
def run(model_folders, workplace):
    """Runs a command on a sound set of options, in which the given ones stand instead."""

    def run(command: str, *more: str, **options: str | None) -> int:
        options = {
            "model": str(model_folders / "model"),
            "dataset": f"{command}.jsonl",
            "output_dir": "out/run",
            "per_device_train_batch_size": "4",
            "max_steps": "1",
            "logging_steps": "1",
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": "True",
            **COMMANDS[command][1],
            **options,
        }
        given = [part for name, value in options.items() if value is not None for part in (f"--{name}", value)]
        return cli.main([command, *given, *more])

    return run


def weights(folder: Path) -> torch.Tensor:
    return torch.cat([values.flatten() for _, values in sorted(load_file(folder / "model.safetensors").items())])


@commands("sft", "ppo")
def test_trains_and_goes_on_from_a_checkpoint(run, capsys, command):
    options = {"save_strategy": "steps", "save_steps": "1", "learning_rate": "0.1", "lr_scheduler_type": "constant"}
    out = Path("out/run")
    assert run(command, **options) == 0
    assert (out / "tokenizer.json").is_file()
    first = weights(out)
    assert first.isfinite().all() and torch.equal(first, weights(out / "checkpoint-1"))

    assert capsys.readouterr().out.endswith("saved in out/run\n")
    assert run(command, **options) == 2
    assert "out/run: holds checkpoint-1 of an earlier run" in capsys.readouterr().err
    assert torch.equal(weights(out), first)

    assert run(command, "--resume_from_checkpoint", "True", max_steps="2", **options) == 0
    assert json.loads((out / "checkpoint-2/trainer_state.json").read_text())["global_step"] == 2
    assert torch.equal(weights(out), weights(out / "checkpoint-2")) and not torch.equal(weights(out), first)


@commands("reward", "grpo")
def test_trains_an_adapter(run, model_folders, command):
    assert run(command, "--use_peft", "--lora_r", "2", "--lora_target_modules", "q_proj", "v_proj") == 0
    saved = json.loads(Path("out/run/adapter_config.json").read_text())
    assert (saved["r"], sorted(saved["target_modules"])) == (2, ["q_proj", "v_proj"])
    assert saved["base_model_name_or_path"] == str(model_folders / "model")
    adapter = load_file("out/run/adapter_model.safetensors")
    assert any("score" in name for name in adapter) == (command == "reward")
    assert not Path("out/run/model.safetensors").exists()


def test_all_linear_layers_get_an_adapter(run):
    assert run("sft", "--use_peft", "--lora_target_modules", "all-linear") == 0
    saved = json.loads(Path("out/run/adapter_config.json").read_text())
    assert {"gate_proj", "q_proj"} <= {name.split(".")[-1] for name in saved["target_modules"]}


def test_several_rewards_get_the_columns(run, capsys):
    assert run("grpo", "--reward", "graders:length", "graders:vowels", "graders:answer_given", reward=None) == 0
    out = capsys.readouterr().out
    assert "rewards/length/mean" in out and "rewards/vowels/mean" in out
    # One of the four prompts starts with the letter a, and a step samples two of them.
    means = re.findall(r"'rewards/answer_given/mean': '?([\d.]+)", out)
    assert means and set(map(float, means)) <= {0.0, 0.5}


def test_ppo_takes_all_its_models(run, model_folders, capsys):
    classifier, other = str(model_folders / "classifier"), str(model_folders / "other")
    assert run("ppo", reward=None, reward_model=classifier, value_model=classifier, ref_model=other) == 0
    out = capsys.readouterr().out
    assert "rewards/classifier/mean" in out and "'objective/kl': '0'" not in out
    assert Path("out/run/value/config.json").is_file()


def test_dpo_takes_a_reference_model(run, model_folders, capsys):
    """From which the model differs at once; at the start it does not from itself, whose loss is log 2."""
    assert run("dpo", ref_model=str(model_folders / "other")) == 0
    assert re.search(r"'loss': '0\.\d+'", out := capsys.readouterr().out) and "'loss': '0.6931'" not in out


@commands("sft", "grpo")
def test_evaluates_on_the_test_split(run, workplace, command, capsys):
    (workplace / "data").mkdir()
    for split in ("train", "test"):
        (workplace / f"data/{split}.jsonl").write_text((workplace / f"{command}.jsonl").read_text())
    assert run(command, dataset="data", eval_strategy="steps", eval_steps="1") == 0
    assert ("'eval_reward'" if command in SAMPLING else "'eval_loss'") in capsys.readouterr().out


def test_command_line_goes_before_the_config_file(run, workplace):
    (workplace / "run.yaml").write_text("max_steps: 1\nlearning_rate: 1e-3\nreward: [graders:length]\nseed:\n")
    assert run("grpo", config="run.yaml", reward=None, max_steps=None) == 0
    assert torch.load("out/run/training_args.bin", weights_only=False).max_steps == 1
    assert torch.load("out/run/training_args.bin", weights_only=False).learning_rate == 1e-3
    assert run("grpo", "--config=run.yaml", learning_rate="1e-4", max_steps=None) == 0
    assert torch.load("out/run/training_args.bin", weights_only=False).learning_rate == 1e-4


@pytest.mark.parametrize("name", ["rows.json", "rows.csv", "rows.parquet", "folder", "data"])
def test_dataset_formats(workplace, name):
    import pandas

    rows = pandas.read_json("grpo.jsonl", lines=True)
    if name == "rows.json":
        rows.to_json(name, orient="records")
    elif name == "rows.csv":
        rows.to_csv(name, index=False)
    elif name == "rows.parquet":
        rows.to_parquet(name)
    else:
        Path(name).mkdir()
        rows.to_json(f"{name}/train.jsonl" if name == "data" else f"{name}/any.jsonl", orient="records", lines=True)
    loaded = cli_data.load_split(name, None, "train")
    assert loaded["prompt"] == ["ab", "cd", "ef", "gh"]
    assert loaded["answer"] == ["a", "c", "e", "g"]


def test_rows_keep_columns_and_text_as_they_are(workplace):
    """Columns that the first row has not; characters that end a line for str.splitlines alone."""
    text = "one\u2028two\x85three"
    rows = [{"prompt": "a"}, {"prompt": text, "answer": 1}]
    Path("x.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    loaded = cli_data.load_split("x.jsonl", None, "train")
    assert loaded["prompt"] == ["a", text] and loaded["answer"] == [None, 1]


def test_options_of_a_file_are_as_they_are_written(workplace):
    text = "run_name: 2024-1-31\nproject: 007\nhub_model_id: 1.10\neval_strategy: no\nuse_peft: on\nseed: ~\n"
    text += "reward_timeout: .inf\nreward: [a:b, 1:30]\nchat_template_kwargs: {deep: {a: [1, '1', null, no]}}\n"
    text += "lr_scheduler_kwargs: {min_lr: 1e-7, b: -2.5E3, c: .5e+1, d: '1e-7', e: 1.e2, f: e1, g: 1-2}\n"
    (workplace / "x.yaml").write_text(text)
    arguments = ["--config", "x.yaml", "--model", "m", "--dataset", "d", "--use_cpu", "True"]
    run, config = cli_options.parse_run("grpo", trainers.GRPOConfig, arguments)
    assert (config.run_name, config.project, config.hub_model_id) == ("2024-1-31", "007", "1.10")
    assert (config.eval_strategy, config.seed, config.reward_timeout) == ("no", 42, float("inf"))
    assert (run.use_peft, run.reward) == (True, ["a:b", "1:30"])
    assert config.chat_template_kwargs == {"deep": {"a": [1, "1", None, False]}}
    numbers = {"min_lr": 1e-7, "b": -2500.0, "c": 5.0, "d": "1e-7", "e": 100.0, "f": "e1", "g": "1-2"}
    assert config.lr_scheduler_kwargs == numbers


AS_WRITTEN = {
    "objects of other keys": '{"x": {"a": 1}}\n{"x": {"b": "2", "c": []}}\n{"x": {}}\n',
    "kinds": '{"x": 1}\n{"x": "1"}\n{"x": 1.0}\n{"x": true}\n{"x": null}\n{"x": [1, "a", {"b": null}]}\n',
    "large": '{"x": 18446744073709551616}\n{"x": -9007199254740993}\n{"x": 1e-300}\n{"x": [1, 1e22]}\n',
    "dates": '{"x": "2024-01-31"}\n{"x": "2024-01-31T00:00:00Z"}\n{"x": "12:30"}\n',
    "literals": '{"x": Infinity, "y": -0.0}\n{"x": -Infinity, "y": "NaN"}\n',
    "tools": '{"x": [{"function": {"name": "f", "arguments": {"a": 1}}}, {"function": {"arguments": {"b": "2"}}}]}\n',
    "deep": '{"x": ' + "[" * 98 + "]" * 98 + "}\n",
    "text": '{"x": "caf\u00e9 \\u00e9 \\ud83d\\ude00 \\u0000"}\n{"": "no name"}\n',
}


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
@pytest.mark.parametrize("name", AS_WRITTEN)
def test_json_rows_are_as_they_are_written(workplace, name, suffix):
    lines = AS_WRITTEN[name].splitlines()
    text = AS_WRITTEN[name] if suffix == "jsonl" else f"[{','.join(lines)}]"
    Path(f"x.{suffix}").write_text(text, encoding="utf-8")
    rows, expected = cli_data.load_split(f"x.{suffix}", None, "train"), [json.loads(line) for line in lines]
    columns = dict.fromkeys(column for row in expected for column in row)
    assert repr(list(rows)) == repr([dict.fromkeys(columns) | row for row in expected])
    assert rows.column_names == list(columns)


def test_what_is_done_to_a_row_stays_with_it(workplace):
    Path("x.jsonl").write_text('{"x": [1]}\n')
    rows = cli_data.load_split("x.jsonl", None, "train")
    rows[0]["x"].append(2)
    assert rows[0] == {"x": [1]}


def test_csv_is_text(workplace):
    fields = [
        "007",
        "1.0",
        "1e5",
        "NA",
        "null",
        "true",
        "2024-1-31",
        "",
        " a ",
        'a "b", c',
        "two\r\nlines",
        "x" * 200_000,
    ]
    quoted = ['"' + field.replace('"', '""') + '"' if set(field) & set('",\r\n') else field for field in fields]
    Path("x.csv").write_bytes("".join(f"{field},{i}\r\n" for i, field in enumerate(["x", *quoted])).encode())
    rows = cli_data.load_split("x.csv", None, "train")
    assert list(rows) == [{"x": field, "0": str(i)} for i, field in enumerate(fields, 1)]


def test_files_of_other_names_are_read_alike(workplace):
    """Those that `load_dataset` takes for the split, in its order."""
    (workplace / "data").mkdir()
    for name, text in (("a", '{"x": {"a": 1}}\n'), ("b", '{"x": {"b": "2"}}\n'), ("test", '{"x": 0}\n')):
        (workplace / f"data/{name}-0.jsonl").write_text(text)
    (workplace / "texts").mkdir()
    (workplace / "texts/any.csv").write_text("x\n007\n")
    assert list(cli_data.load_split("texts", None, "train")) == [{"x": "007"}]
    assert list(cli_data.load_split("data", None, "test")) == [{"x": 0}]
    (workplace / "data/test-0.jsonl").unlink()
    assert list(cli_data.load_split("data", None, "train")) == [{"x": {"a": 1}}, {"x": {"b": "2"}}]
    (workplace / "data/b-0.jsonl").write_text("{}\n{")
    with pytest.raises(ValueError, match=r"^b-0\.jsonl: line 2: "):
        cli_data.load_split("data", None, "train")
    for text in ('[{"x": {"b": "2"}}]', '{"x": {"b": "2"}}\n{}\n'):  # a list, and lines
        (workplace / "data/b-0.jsonl").unlink(missing_ok=True)
        (workplace / "data/b-0.json").write_text(text)
        assert list(cli_data.load_split("data", None, "train"))[:2] == [{"x": {"a": 1}}, {"x": {"b": "2"}}]


def test_json_lines_may_be_called_json(workplace):
    Path("x.json").write_text('\ufeff{"x": 1}\n\n{"y": "2"}\n', encoding="utf-8")
    assert list(cli_data.load_split("x.json", None, "train")) == [{"x": 1, "y": None}, {"x": None, "y": "2"}]
    Path("x.json").write_text('{"x": 1}\n{"y": 2')
    with pytest.raises(ValueError, match=r"^line 2: "):
        cli_data.load_split("x.json", None, "train")


@pytest.mark.parametrize("name, text", [("x.jsonl", '\r\n{"x": "a"}\r\n \n{"x": "b"}'), ("x.csv", "\r\nx\r\na\r\n\nb")])
def test_marks_and_empty_lines_are_no_data(workplace, name, text):
    Path(name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert list(cli_data.load_split(name, None, "train")) == [{"x": "a"}, {"x": "b"}]


def test_rewards_get_what_is_in_the_file(run, workplace):
    (workplace / "x.jsonl").write_text(
        '{"prompt": "ab", "x": {"a": 1}}\n{"prompt": "cd", "x": [18446744073709551616]}\n'
    )
    with (workplace / "graders.py").open("a") as module:
        module.write("seen = []\ndef look(x, **columns):\n    seen.extend(x)\n    return [0.0] * len(x)\n")
    assert run("grpo", dataset="x.jsonl", reward="graders:look", reward_workers="0") == 0
    assert sorted(map(repr, sys.modules["graders"].seen)) == ["[18446744073709551616]"] * 2 + ["{'a': 1}"] * 2


# Bad values. Each: what stands instead of the sound options, files to write first, and what the line must contain.

OF_EVERY_COMMAND = {
    "model folder": ({"model": "absent"}, {}, ["absent", "no such folder"]),
    "model folder without a model": ({"model": "empty"}, {"empty/note": ""}, ["empty", "config.json"]),
    "dataset file": ({"dataset": "absent.jsonl"}, {}, ["--dataset absent.jsonl: no such file"]),
    "dataset line": ({"dataset": "x.jsonl"}, {"x.jsonl": '{"a": "ab"}\n{"a": "cd"\n'}, ["--dataset x.jsonl: line 2: "]),
    "dataset column": (
        {"dataset": "x.jsonl"},
        {"x.jsonl": '{"question": "ab", "answer": "a"}\n'},
        ["question, answer"],
    ),
    "option": ({"learning_rat": "1"}, {}, ["unknown option --learning_rat; did you mean --learning_rate?"]),
    "option value": ({"learning_rate": "fast"}, {}, ["learning_rate", "fast"]),
    "option missing": ({"model": None}, {}, ["--model"]),
    "checkpoint": ({"resume_from_checkpoint": "absent"}, {}, ["--resume_from_checkpoint absent: not"]),
    "checkpoint without a model": (
        {"resume_from_checkpoint": "broken"},
        {"broken/trainer_state.json": "{}"},
        ["--resume_from_checkpoint broken: "],
    ),
    "checkpoint to go on from": ({"resume_from_checkpoint": "True"}, {}, ["no whole checkpoint in --output_dir out"]),
    "output_dir": ({"output_dir": "x/run"}, {"x": ""}, ["--output_dir x/run", "Not a directory"]),
    "output_dir that is a file": ({"output_dir": "x"}, {"x": ""}, ["--output_dir x", "File exists"]),
    "adapter": ({"use_peft": "True", "lora_target_modules": "absent_proj"}, {}, ["--lora_target_modules: "]),
}

# Rows of the wrong format: what stands in the place of a sound row, and what the line must contain.
BAD_ROWS = {
    "sft": ({"prompt": "a", "completion": None}, ["row 4", "completion"]),
    "reward": ({"prompt": "a", "chosen": "a", "rejected": None}, ["row 4", "rejected"]),
    "dpo": ({"prompt": "a", "chosen": "a", "rejected": None}, ["row 4", "rejected"]),
    "ppo": ({"prompt": None, "answer": "a"}, ["row 4", "prompt", "text, or messages"]),
    "grpo": ({"prompt": "", "answer": "a"}, ["row 4", "prompt", "text, or messages"]),
}

TWO_CHECKPOINTS = {
    f"x/checkpoint-{step}/{name}": text
    for step in (9, 10)
    for name, text in {
        "trainer_state.json": "{}",
        "manifest.json": '{"written": 1, "files": {"trainer_state.json": 2}}',
    }.items()
}

# Each line ten times the one before, 10^10 in all.
BOMB = "".join(f"  b{i}: &b{i} [{', '.join([f'*b{i - 1}'] * 10)}]\n" for i in range(1, 11))

OF_A_COMMAND = [
    ("sft", {"output_dir": "x"}, TWO_CHECKPOINTS, ["--output_dir x: holds checkpoint-10 of an earlier run"]),
    ("sft", {"output_dir": "x", "resume_from_checkpoint": "True"}, TWO_CHECKPOINTS, ["x/checkpoint-10: "]),
    (
        "sft",
        {"output_dir": "x", "resume_from_checkpoint": "x/checkpoint-3"},
        TWO_CHECKPOINTS | {"x/checkpoint-3/trainer_state.json": "{}"},
        ["x/checkpoint-3: not a whole checkpoint: it has no manifest.json", "the last whole one is x/checkpoint-10"],
    ),
    ("sft", {"output_dir": "x" * 300}, {}, ["cannot be written to: File name too long"]),
    ("sft", {"output_dir": "x/" * 3000}, {}, ["cannot be written to: File name too long"]),
    ("sft", {"resume_from_checkpoint": "x" * 300}, {}, ["--resume_from_checkpoint xxx", "there is no such folder"]),
    ("sft", {"resume_from_checkpoint": "x" * 5000}, {}, ["x: not a whole checkpoint: there is no such folder"]),
    ("sft", {"report_to": "absent"}, {}, ["absent is not supported"]),
    ("sft", {"lora_r": "8"}, {}, ["--lora_r: needs --use_peft"]),
    ("dpo", {"loss_type": "best"}, {}, ["loss_type", "best"]),
    ("dpo", {"ref_model": "absent"}, {}, ["absent", "no such folder"]),
    ("ppo", {"reward": None}, {}, ["--reward", "--reward_model"]),
    ("ppo", {"reward_model": "absent"}, {}, ["absent", "no such folder"]),
    ("ppo", {"value_model": "absent"}, {}, ["absent", "no such folder"]),
    ("ppo", {"reward": "graders:raises"}, {}, ["'raises'", "ZeroDivisionError", "prompt 'cd'"]),
    ("grpo", {"loss_type": "ppo"}, {}, ["loss_type", "ppo"]),
    ("grpo", {"num_generations": "3"}, {}, ["batch of 4", "num_generations (3)"]),
    ("grpo", {"reward": "graders"}, {}, ["graders", "module:function"]),
    ("grpo", {"reward": "absent:length"}, {}, ["absent:length", "No module named 'absent'"]),
    ("grpo", {"reward": "broken_graders:length"}, {}, ["'broken_graders'", "a_module_that_is_not_there"]),
    ("grpo", {"reward": "graders:absent"}, {}, ["'graders'", "'absent'"]),
    ("grpo", {"reward": "graders:not_a_function"}, {}, ["'not_a_function'", "int"]),
    ("grpo", {"reward": "graders:raises"}, {}, ["'raises'", "ZeroDivisionError", "prompt 'cd'"]),
    ("grpo", {"reward": "graders:too_short"}, {}, ["'too_short'", "4", "3"]),
    ("grpo", {"reward": "graders:text"}, {}, ["'text'", "'good'", "prompt 'cd'"]),
    ("grpo", {"dataset": "rows.txt"}, {"rows.txt": "ab"}, ["rows.txt", ".jsonl"]),
    ("grpo", {"dataset": "x.jsonl"}, {"x.jsonl": '{"prompt": "a"}\n\n[1]\n'}, ["x.jsonl: line 3", "object", "a list"]),
    (
        "grpo",
        {"dataset": "x.jsonl"},
        {"x.jsonl": '{"prompt": "a"}\n\n{"prompt": [{"role": "user", "content": "b"}]}\n'},
        ["row 1", "text", "as in the rows before"],
    ),
    ("sft", {"dataset": ""}, {}, ["--dataset : want a .jsonl", "got ''"]),
    ("sft", {"dataset": "x" * 300}, {}, ["--dataset xxx", "File name too long"]),
    *[
        ("sft", {"dataset": f"x{suffix}"}, {f"x{suffix}": text}, [f"--dataset x{suffix}: ", *expected])
        for suffix, text, *expected in (
            (".jsonl", '{"a": 1}\n\n{"a": 1, "a": 2}', "line 3: 'a' stands twice"),
            (".jsonl", '{"a": {"b": 1, "b": 2}}', "line 1: 'b' stands twice"),
            (".jsonl", '{"a": 1e999}', "line 1: the number 1e999 is too large"),
            (".jsonl", '{"a": ' + "1" * 5000 + "}", "line 1: ", "4300 digits"),
            (".jsonl", '{"a": ' + "[" * 900 + "]" * 900 + "}", "line 1: want objects and lists at most 100 deep"),
            (".jsonl", "[" * 100_000, "line 1: want objects and lists at most 100 deep"),
            (".jsonl", '{"a": "\\uD800"}', "line 1: \\ud800 is half a character"),
            (".jsonl", "{}\nnull", "line 2: want an object; got null"),
            (".json", '[{"a": ' + "[" * 900 + "]" * 900 + "}]", "at most 100 deep"),
            (".json", "", "Expecting value: line 1 column 1"),
            (".json", "[{}, 3]", "row 1: want an object; got a number"),
            (".csv", "a,a\n1,2\n", "'a' stands twice"),
            (".csv", 'a,b\n1,"2\n', "line 2: unexpected end of data"),
            (".csv", "a,b\n1\n", "line 2: want 2 fields, as in the header; got 1"),
            (".csv", "", "no rows"),
            (".csv", "a,b\n", "no rows"),
        )
    ],
    ("grpo", {"dataset": "x.jsonl"}, {"x.jsonl": ""}, ["x.jsonl", "no rows"]),
    ("grpo", {"dataset": "x.json"}, {"x.json": '[{"prompt": "ab"},\n{"prompt" "cd"}]'}, ["x.json", "line 2"]),
    ("grpo", {"dataset": "x.json"}, {"x.json": '{"prompt": "ab"}'}, ["x.json", "a list of objects", "an object"]),
    ("grpo", {"dataset": "x.csv"}, {"x.csv": "prompt,answer\nab,a\ncd,c,3,4\n"}, ["x.csv", "line 3"]),
    ("grpo", {"dataset": "x.parquet"}, {"x.parquet": "not such a file"}, ["x.parquet", "magic"]),
    ("grpo", {"dataset": "data"}, {"data/train.jsonl": "{"}, ["--dataset data: train.jsonl: line 1"]),
    ("grpo", {"eval_strategy": "epoch"}, {}, ["grpo.jsonl", "'test'", "a folder with train.jsonl and test.jsonl"]),
    ("grpo", {"config": "absent.yaml"}, {}, ["absent.yaml", "No such file"]),
    ("grpo", {"config": "x.yaml"}, {"x.yaml": "a: [1\nb: 2"}, ["x.yaml", "line 2"]),
    ("grpo", {"config": "x.yaml"}, {"x.yaml": "- a\n- b\n"}, ["x.yaml", "list"]),
    ("grpo", {"config": "x.yaml"}, {"x.yaml": "absent_option: 1\n"}, ["x.yaml", "'absent_option'"]),
    *[
        ("grpo", {"config": "x.yaml"}, {"x.yaml": text}, ["--config x.yaml: ", expected])
        for text, expected in (
            ("[" * 2000, "nested too deep"),
            ("chat_template_kwargs: " + "{a: " * 900, "nested too deep"),
            ("chat_template_kwargs: &a {x: *a}", "Circular"),
            ("lora_target_modules: &a [*a]", "lora_target_modules: want one value, or a list of values"),
            ("chat_template_kwargs: {day: 2024-01-31}", "date is not JSON"),
            ("chat_template_kwargs:\n  b0: &b0 [x]\n" + BOMB, "chat_template_kwargs: want at most 1000000 characters"),
            ("run_name: !!python/object:os.system x", "unknown tag tag:yaml.org,2002:python/object:os.system"),
            ("run_name: !!python/object/apply:os.system [x]", "unknown tag tag:yaml.org,2002:python/object/apply"),
            ("seed: 1\nseed: 2", "option 'seed' stands twice"),
            ("? [a]\n: b", "unknown option"),
            ("seed: \0", "#x0000"),
            ("--- 3", "a single value"),
        )
    ],
    ("grpo", {"config": "x.yaml", "model": None}, {"x.yaml": 'model: "a\\0b"'}, ["model must not hold a NUL"]),
    ("sft", {"output_dir": ""}, {}, ["output_dir must name a folder; got ''"]),
    ("sft", {"model": ""}, {}, ["model must name a folder; got ''"]),
    ("sft", {"optim": "adamw_bnb_8bit"}, {}, ["ImportError", "bitsandbytes"]),
    ("sft", {"optim": "stable_adamw"}, {}, ["ImportError", "torch-optimi"]),
    ("sft", {"optim_args": "x"}, {}, ["optim_args must be name=value, separated by commas; got 'x'"]),
    ("sft", {"lr_scheduler_kwargs": '{"x": 1}'}, {}, ["TypeError", "'x'"]),
    ("sft", {"model_init_kwargs": '{"dtype": "float99"}'}, {}, ["model: ", "cannot be loaded", "float99"]),
    ("sft", {"model_init_kwargs": '{"x": 1}'}, {}, ["model: ", "cannot be loaded", "'x'"]),
    ("sft", {"accelerator_config": "absent.json"}, {}, ["absent.json"]),
    *[
        ("sft", {"use_peft": "True", name: value}, {}, expected)
        for name, value, expected in (
            ("lora_r", "0", ["lora_r must be at least 1; got 0"]),
            ("lora_alpha", "0", ["lora_alpha must be at least 1; got 0"]),
            ("lora_dropout", "nan", ["lora_dropout must be at least 0 and below 1; got nan"]),
            ("lora_target_modules", "[", ["--lora_target_modules [: not a name, nor a pattern: unterminated"]),
            ("lora_target_modules", "", ["--lora_target_modules: "]),
        )
    ],
    *[
        ("sft", {name: value}, {}, [f"{name} must be ", f"got {value}"])
        for name, value in (
            ("gradient_accumulation_steps", "0"),
            ("gradient_accumulation_steps", "-1"),
            ("dataloader_num_workers", "-1"),
            ("dataset_num_proc", "0"),
            ("adam_beta1", "2.0"),
            ("max_grad_norm", "nan"),
            ("weight_decay", "nan"),
            ("max_steps", "0"),
            ("seed", "-1"),
        )
    ],
    ("sft", {"max_length": "9" * 400}, {}, ["max_length must be a number that fits in 64 bits; got one of 1329"]),
    ("sft", {"save_strategy": "steps", "save_steps": "0"}, {}, ["save_steps must be above 0 with save_strategy steps"]),
]


REWARD = "def length(completions, **kwargs):\n    return [float(len(each)) for each in completions]\n"
NO_TEXT = "class Silent(Exception):\n    def __str__(self):\n        raise RuntimeError\n"
MODULES = {
    "exits": ("import sys\nsys.exit()\n" + REWARD, "length", "cannot import module 'graders': SystemExit:"),
    "exits with 0": ("raise SystemExit(0)\n", "length", "cannot import module 'graders': SystemExit: 0"),
    "raises": ("1 / 0\n", "length", "cannot import module 'graders': ZeroDivisionError: division by zero"),
    "raises what is no Exception": ("raise GeneratorExit\n", "length", "cannot import module 'graders': GeneratorExit"),
    "raises without a text": (NO_TEXT + "raise Silent\n", "length", "'graders': (Silent without a text)"),
    "syntax": ("def length(:\n", "length", "cannot import module 'graders': SyntaxError: invalid syntax"),
    "not text": ("\xff\x00", "length", "cannot import module 'graders': SyntaxError"),
    "relative import": ("from . import other\n", "length", "cannot import module 'graders': ImportError: attempted"),
    "attribute that raises": (
        "def __getattr__(name):\n    raise OSError(name)\n",
        "length",
        "'graders': OSError: length",
    ),
    "prints and closes": ("import sys\nprint(3)\nsys.stdout = None\nlength = 1\n", "length", "'length' is a int, not"),
    "class": ("class Grader:\n    pass\n", "Grader", "'Grader' is a class, not a function"),
    "nothing": ("length = None\n", "length", "module 'graders' has no function 'length'"),
    "method": (REWARD, "length.call", "module 'graders' has no function 'length.call'"),
    "same": (
        NO_TEXT + "def length(**kwargs):\n    raise Silent\n",
        "length",
        "'length' raised Silent: (Silent without",
    ),
}


@pytest.mark.parametrize("case", MODULES)
def test_refuses_a_reward_module(refuses, case):
    """In one line, with exit code 2, whatever the module does."""
    text, name, expected = MODULES[case]
    refuses("grpo", {"reward": f"graders:{name}"}, {"graders.py": text}, [expected])


@pytest.mark.parametrize("name", [".graders:length", "..:x", "graders.length:x"])
def test_refuses_names_that_are_no_module(refuses, name):
    refuses("grpo", {"reward": name}, {}, [f"--reward {name}: cannot import module"])


WANDERS = """
import os, sys, tempfile
import torch
os.chdir(tempfile.mkdtemp())
torch.set_grad_enabled(False)
sys.stdout.close()

class Silent(Exception):
    def __str__(self):
        raise RuntimeError

def length(completions, **kwargs):
    os.chdir(tempfile.mkdtemp())
    torch.set_grad_enabled(False)
    sys.stdout.close()
    return [float(len(each)) for each in completions]

def fails(completions, log_extra, log_metric, **kwargs):
    folder = tempfile.mkdtemp()
    os.chdir(folder)
    os.rmdir(folder)
    circle = [1]
    circle.append(circle)
    for value in (None, b"x", "\\ud800", 10**30, circle, {}, Silent()):
        log_extra("\\ud800", [value] * len(completions))
    log_metric("\\ud800", 10**30)
    if len(completions[0]) > 1:
        raise Silent
    return [0.0] * len(completions)
"""


def test_a_run_survives_its_rewards(run, workplace, monkeypatch):
    (workplace / "graders.py").write_text(WANDERS)
    monkeypatch.setattr(sys, "stdout", os.fdopen(os.dup(1), "w"))
    rewards = {
        "reward": None,
        "on_reward_error": "none",
        "output_dir": "out",
        "save_strategy": "steps",
        "save_steps": "1",
    }
    assert run("grpo", "--reward", "graders:length", "graders:fails", "graders:length", **rewards) == 0
    assert Path.cwd() == workplace
    assert {"checkpoint-1", "completions", "model.safetensors"} <= {path.name for path in (workplace / "out").iterdir()}
    state = json.loads((workplace / "out/checkpoint-1/trainer_state.json").read_text())
    (log,) = state["log_history"]
    assert log["rewards/length/mean"] == log["rewards/length_2/mean"] > 0 and log["rewards/length_2/failed"] == 0


@pytest.fixture
def refuses(run, workplace, capsys):
    def refuses(command, options, files, expected):
        for name, text in files.items():
            (workplace / name).parent.mkdir(parents=True, exist_ok=True)
            (workplace / name).write_text(text)
        # In their order all four prompts are in the first batch of ppo, and the bad one of two in that of grpo.
        in_order = {"shuffle_dataset": "False"} if command in SAMPLING else {}
        assert run(command, **in_order, **options) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
        assert len(lines) == 1 and lines[0].startswith(f"rlkernels {command}: error: ")
        for part in expected:
            assert part in lines[0]
        assert not (workplace / "out").exists()

    return refuses


@pytest.mark.parametrize("case", OF_EVERY_COMMAND)
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses(refuses, command, case):
    refuses(command, *OF_EVERY_COMMAND[case])


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_a_row_of_the_wrong_format(refuses, command):
    row, expected = BAD_ROWS[command]
    text = "".join(json.dumps(row) + "\n" for row in [*COMMANDS[command][0], row])
    refuses(command, {"dataset": "x.jsonl"}, {"x.jsonl": text}, expected)


@pytest.mark.parametrize("case", OF_A_COMMAND, ids=lambda case: "-".join([case[0], *case[1]]))
def test_command_refuses(refuses, case):
    refuses(*case)


def test_refuses_a_reward_model_that_was_not_trained(refuses, model_folders):
    options = {"reward": None, "reward_model": str(model_folders / "model")}
    refuses("ppo", options, {}, ["no trained classifier; it lacks score.weight"])


def test_refuses_a_folder_that_cannot_be_written_to(refuses, monkeypatch):
    def refuse(dir):
        raise PermissionError(13, "Permission denied", dir)

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    refuses("sft", {}, {}, ["--output_dir out/run: cannot be written to: Permission denied"])


@pytest.mark.parametrize(("command", "of"), [("dpo", "reward"), thorough("reward", "dpo"), thorough("dpo", "ppo")])
def test_refuses_the_checkpoint_of_another_model(run, capsys, command, of):
    """Whose optimizer has states of other shapes, past whose end AdamW would write."""
    saving = {"save_strategy": "steps", "save_steps": "1", "output_dir": "other"}
    assert run(of, **saving) == 0
    capsys.readouterr()
    assert run(command, max_steps="2", resume_from_checkpoint="other/checkpoint-1") == 2
    error = capsys.readouterr().err
    assert f"rlkernels {command}: error: --resume_from_checkpoint other/checkpoint-1: " in error
    assert not Path("out").exists()


def test_a_second_run_into_a_folder_is_refused(run, capsys):
    """Before it removes what the first is writing, and without taking away the folder, which it has not made."""
    unfinished = Path("out/run/.checkpoint-1.unfinished")
    unfinished.mkdir(parents=True)
    with trainers.base.lock.Lock(Path("out/run")):
        assert run("sft") == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("rlkernels sft: error: --output_dir out/run: another run writes there (process ")
        assert unfinished.is_dir()
    assert run("sft") == 0 and not unfinished.exists()


def test_a_run_that_another_overtakes_leaves_its_folder(run, monkeypatch, capsys):
    """Which the first of them had made."""
    lock = trainers.base.lock.Lock(Path("out/run"))
    build = trainers.SFTTrainer.__init__

    def overtaken(*args, **kwargs):
        build(*args, **kwargs)
        lock.__enter__()

    monkeypatch.setattr(trainers.SFTTrainer, "__init__", overtaken)
    assert run("sft") == 2
    assert "error: output_dir out/run: another run writes there" in capsys.readouterr().err
    assert Path("out/run/.lock").is_file()
    lock.__exit__()


def test_failed_run_leaves_an_older_run_as_it_was(run, workplace):
    folder = workplace / "out" / "run"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_text("of an older run")
    assert run("grpo", reward="graders:too_short") == 2
    assert [file.name for file in folder.iterdir()] == ["model.safetensors"]
    assert (folder / "model.safetensors").read_text() == "of an older run"


@commands("dpo", "ppo")
def test_loss_that_is_not_finite_ends_in_one_line(run, monkeypatch, capsys, command):
    trainer = getattr(trainers, f"{cli_commands.COMMANDS[command].method}Trainer")
    compute = trainer.compute_loss
    monkeypatch.setattr(trainer, "compute_loss", lambda *args, **options: compute(*args, **options) * torch.nan)
    assert run(command) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert line.startswith(f"rlkernels {command}: error: step 1: the loss is nan, on rows ")
    assert line.endswith("out/run/checkpoint-0")
    assert Path("out/run/checkpoint-0/trainer_state.json").is_file()


def test_interrupted_run_leaves_whole_checkpoints(run, monkeypatch, capsys):
    """Ctrl-C while the second checkpoint is being written."""
    saves = []

    def interrupt(self, folder, save=Trainer._save_optimizer_and_scheduler):
        saves.append(folder)
        if len(saves) == 2:
            signal.raise_signal(signal.SIGINT)
        save(self, folder)

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", interrupt)
    options = {"save_strategy": "steps", "save_steps": "1", "max_steps": "3"}
    assert run("sft", **options) == 130
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == (
        "rlkernels sft: interrupted after step 2 of 3; --resume_from_checkpoint out/run/checkpoint-2 goes on"
    )
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert run("sft", resume_from_checkpoint="out/run/checkpoint-2", **options) == 0
    assert weights(Path("out/run")).isfinite().all()


@commands("sft", "grpo")
def test_interrupted_before_the_first_step(run, workplace, monkeypatch, capsys, command):
    monkeypatch.setattr(Trainer, "create_optimizer", lambda *args: signal.raise_signal(signal.SIGINT))
    assert run(command) == 130
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == f"rlkernels {command}: interrupted after step 0 of 1; there is no checkpoint yet"
    assert not (workplace / "out").exists()


def test_a_release_candidate_of_transformers_is_accepted(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "5.18rc1")
    trainers._require_transformers()


def test_a_mistake_in_the_trainers_is_not_told_as_something_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "rlkernels.trainers.ppo", None)
    monkeypatch.delitem(sys.modules, "rlkernels.trainers")
    with pytest.raises(ModuleNotFoundError, match=r"^import of rlkernels\.trainers\.ppo halted"):
        cli.main(["grpo"])


def test_older_transformers_are_refused(monkeypatch, capsys):
    """Those that are older than pyproject.toml has it."""
    pyproject = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    (oldest,) = re.findall(r'"transformers>=([\d.]+)"', pyproject)
    major, minor = map(int, oldest.split("."))
    found = f"{major}.{minor - 1}.9"
    monkeypatch.setattr("importlib.metadata.version", lambda name: found)
    monkeypatch.delitem(sys.modules, "rlkernels.trainers")
    assert cli.main(["grpo"]) == 2
    assert capsys.readouterr().err == (
        f"rlkernels grpo: error: rlkernels.trainers needs transformers {oldest} or later; got {found}; "
        "pip install rlkernels[trainers]\n"
    )


def test_other_errors_keep_their_traceback(run, monkeypatch):
    def fail(self, inputs):
        raise ValueError("a defect of ours")

    monkeypatch.setattr(trainers.GRPOTrainer, "make_experience", fail)
    with pytest.raises(ValueError, match="a defect of ours"):
        run("grpo")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_option(capsys, command):
    with pytest.raises(SystemExit) as left:
        cli.main([command, "--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    entry = cli_commands.COMMANDS[command]
    parts = (entry.arguments, getattr(trainers, f"{entry.method}Config"))
    options = [option.name for part in parts for option in fields(part) if option.init]
    assert not [name for name in options if f"--{name} " not in text]


@pytest.mark.thorough
def test_training_page(model_folders, tmp_path, monkeypatch):
    """docs/training.md from top to bottom: its files are written, its commands and its code run."""
    page = (Path(__file__).parents[1] / "docs" / "training.md").read_text()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("path/to").mkdir(parents=True)
    Path("path/to/model").symlink_to(model_folders / "model")
    ran = set()
    for language, file, text in re.findall(r"^```(\w+) ?(\S*)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE):
        if file:
            Path(file).parent.mkdir(exist_ok=True)
            Path(file).write_text(text)
        elif language == "sh":
            program, *arguments = shlex.split(text.replace("\\\n", ""))
            assert program == "rlkernels" and cli.main(arguments) == 0, text
            ran.add(arguments[0])
        elif language != "console":  # what takes several processes, as in tests/trainers/test_processes.py
            assert language == "python"
            exec(compile(text, "docs/training.md", "exec"), {})
    sys.modules.pop("rewards")
    assert ran == set(COMMANDS)
