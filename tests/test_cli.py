"""The command line: what it runs, and that a bad value ends in one line, exit code 2 and an untouched run folder."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import rlkernels
from rlkernels import cli
from rlkernels.ops import _registry

REWARDS = """
import asyncio

not_a_function = 3

def length(completions, **columns):
    return [float(len(completion)) for completion in completions]

async def vowels(completions, **columns):
    await asyncio.sleep(0)
    return [float(sum(completion.count(vowel) for vowel in "aeiou")) for completion in completions]

def answer_given(answer, **columns):
    return [float(text == "a") for text in answer]

def raises(prompts, **columns):
    return [1.0 / (prompt != "cd") for prompt in prompts]

def too_short(completions, **columns):
    return [0.0] * (len(completions) - 1)

def text(prompts, **columns):
    return ["good" if prompt == "cd" else 0.0 for prompt in prompts]
"""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A tiny random model whose tokens are letters, and its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    words = ["<eos>", "?", *"abcdefgh"]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>", unk_token="?"
    ).save_pretrained(folder)
    torch.manual_seed(0)
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
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """The current folder: two reward modules and a dataset."""
    (tmp_path / "graders.py").write_text(REWARDS)
    (tmp_path / "broken_graders.py").write_text("import a_module_that_is_not_there\n")
    rows = [{"prompt": prompt, "answer": prompt[0]} for prompt in ("ab", "cd", "ef", "gh")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in ("graders", "broken_graders"):
        sys.modules.pop(name, None)


@pytest.fixture
def grpo(model_folder, workplace):
    """Runs `rlkernels grpo` on a sound set of options, in which the given ones stand instead."""

    def run(*more: str, **options: str | None) -> int:
        options = {
            "model": str(model_folder),
            "dataset": "rows.jsonl",
            "reward": "graders:length",
            "output_dir": "out/run",
            "per_device_train_batch_size": "4",
            "num_generations": "2",
            "max_completion_length": "4",
            "max_steps": "2",
            "logging_steps": "1",
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": "True",
            **options,
        }
        given = [part for name, value in options.items() if value is not None for part in (f"--{name}", value)]
        return cli.main(["grpo", *given, *more])

    return run


def test_grpo_trains(grpo, model_folder):
    assert grpo("--learning_rate", "0.1") == 0
    trained = AutoModelForCausalLM.from_pretrained("out/run")
    start = AutoModelForCausalLM.from_pretrained(model_folder)
    pairs = list(zip(trained.parameters(), start.parameters(), strict=True))
    assert all(after.isfinite().all() for after, _ in pairs)
    assert any((after != before).any() for after, before in pairs)
    assert (Path("out/run") / "tokenizer.json").is_file()


def test_grpo_takes_several_rewards_and_gives_them_the_columns(grpo, capsys):
    assert grpo("--reward", "graders:length", "graders:vowels", "graders:answer_given", reward=None) == 0
    out = capsys.readouterr().out
    assert "rewards/length/mean" in out and "rewards/vowels/mean" in out
    # One of the four prompts starts with the letter a, and a step samples two of them.
    means = re.findall(r"'rewards/answer_given/mean': '?([\d.]+)", out)
    assert means and set(map(float, means)) <= {0.0, 0.5}


def test_command_line_goes_before_the_config_file(grpo, workplace):
    (workplace / "run.yaml").write_text("max_steps: 1\nlearning_rate: 1e-3\nreward: [graders:length]\nseed:\n")
    assert grpo("--config", "run.yaml", reward=None, max_steps=None) == 0
    assert torch.load("out/run/training_args.bin", weights_only=False).max_steps == 1
    assert torch.load("out/run/training_args.bin", weights_only=False).learning_rate == 1e-3
    assert grpo("--config=run.yaml", "--learning_rate", "1e-4", max_steps=None) == 0
    assert torch.load("out/run/training_args.bin", weights_only=False).learning_rate == 1e-4


@pytest.mark.parametrize("name", ["rows.json", "rows.csv", "rows.parquet", "folder"])
def test_dataset_formats(workplace, name):
    import pandas

    rows = pandas.read_json("rows.jsonl", lines=True)
    if name == "rows.json":
        rows.to_json(name, orient="records")
    elif name == "rows.csv":
        rows.to_csv(name, index=False)
    elif name == "rows.parquet":
        rows.to_parquet(name)
    else:
        Path(name).mkdir()
        rows.to_json("folder/train.jsonl", orient="records", lines=True)
    run = cli.RunArguments(model="", dataset=name, reward=[])
    loaded = cli.load_split(run, "train")
    assert loaded["prompt"] == ["ab", "cd", "ef", "gh"]
    assert loaded["answer"] == ["a", "c", "e", "g"]


# Each: what stands instead of the sound options, files to write first, and what the line must contain.
BAD = {
    "model folder": ({"model": "absent"}, {}, ["absent", "no such folder"]),
    "model folder without a model": ({"model": "empty"}, {"empty/note": ""}, ["empty", "config.json"]),
    "dataset file": ({"dataset": "absent.jsonl"}, {}, ["absent.jsonl", "no such file"]),
    "dataset kind": ({"dataset": "rows.txt"}, {"rows.txt": "ab"}, ["rows.txt", ".jsonl"]),
    "dataset column": (
        {"dataset": "x.jsonl"},
        {"x.jsonl": '{"question": "ab", "answer": "a"}\n'},
        ["x.jsonl", "'prompt'", "question, answer"],
    ),
    "dataset line": (
        {"dataset": "x.jsonl"},
        {"x.jsonl": '{"prompt": "ab"}\n{"prompt": "cd"\n'},
        ["x.jsonl", "line 2"],
    ),
    "dataset json": ({"dataset": "x.json"}, {"x.json": '[{"prompt": "ab"},\n{"prompt" "cd"}]'}, ["x.json", "line 2"]),
    "dataset csv": ({"dataset": "x.csv"}, {"x.csv": "prompt,answer\nab,a\ncd,c,3,4\n"}, ["x.csv", "line 3"]),
    "dataset parquet": ({"dataset": "x.parquet"}, {"x.parquet": "not such a file"}, ["x.parquet", "magic"]),
    "dataset row": (
        {"dataset": "x.jsonl"},
        {"x.jsonl": '{"prompt": "ab"}\n{"answer": "c"}\n'},
        ["x.jsonl", "row 1", "prompt"],
    ),
    "dataset empty": ({"dataset": "x.jsonl"}, {"x.jsonl": ""}, ["x.jsonl"]),
    "dataset split": ({"eval_strategy": "epoch"}, {}, ["rows.jsonl", "'test'"]),
    "reward form": ({"reward": "graders"}, {}, ["graders", "module:function"]),
    "reward module": ({"reward": "absent:length"}, {}, ["absent:length", "No module named 'absent'"]),
    "reward module that fails": (
        {"reward": "broken_graders:length"},
        {},
        ["'broken_graders'", "a_module_that_is_not_there"],
    ),
    "reward attribute": ({"reward": "graders:absent"}, {}, ["'graders'", "'absent'"]),
    "reward not callable": ({"reward": "graders:not_a_function"}, {}, ["'not_a_function'", "int"]),
    "reward raises": ({"reward": "graders:raises"}, {}, ["'raises'", "ZeroDivisionError", "prompt 'cd'"]),
    "reward length": ({"reward": "graders:too_short"}, {}, ["'too_short'", "4", "3"]),
    "reward value": ({"reward": "graders:text"}, {}, ["'text'", "'good'", "prompt 'cd'"]),
    "batch": ({"num_generations": "3"}, {}, ["batch of 4", "num_generations (3)"]),
    "option": ({"absent_option": "1"}, {}, ["absent_option"]),
    "option value": ({"learning_rate": "fast"}, {}, ["learning_rate", "fast"]),
    "option choice": ({"loss_type": "ppo"}, {}, ["loss_type", "ppo"]),
    "option missing": ({"model": None}, {}, ["--model"]),
    "checkpoint": ({"resume_from_checkpoint": "absent"}, {}, ["resume_from_checkpoint", "absent"]),
    "config file": ({"config": "absent.yaml"}, {}, ["absent.yaml", "No such file"]),
    "config yaml": ({"config": "x.yaml"}, {"x.yaml": "a: [1\nb: 2"}, ["x.yaml", "line 2"]),
    "config kind": ({"config": "x.yaml"}, {"x.yaml": "- a\n- b\n"}, ["x.yaml", "list"]),
    "config option": ({"config": "x.yaml"}, {"x.yaml": "absent_option: 1\n"}, ["x.yaml", "'absent_option'"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_value_ends_in_one_line(grpo, workplace, capsys, case):
    options, files, expected = BAD[case]
    for name, text in files.items():
        (workplace / name).parent.mkdir(exist_ok=True)
        (workplace / name).write_text(text)
    # With both sound rewards' prompts in the first batch, the bad row is met at once.
    assert grpo("--shuffle_dataset", "False", **options) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1 and lines[0].startswith("rlkernels grpo: error: ")
    for part in expected:
        assert part in lines[0]
    assert not (workplace / "out").exists()


def test_failed_run_leaves_an_older_run_as_it_was(grpo, workplace):
    run = workplace / "out" / "run"
    run.mkdir(parents=True)
    (run / "model.safetensors").write_text("of an older run")
    assert grpo(reward="graders:raises") == 2
    assert [file.name for file in run.iterdir()] == ["model.safetensors"]
    assert (run / "model.safetensors").read_text() == "of an older run"


def test_other_errors_keep_their_traceback(grpo, monkeypatch):
    from rlkernels.trainers import GRPOTrainer

    def fail(self, inputs):
        raise ValueError("a defect of ours")

    monkeypatch.setattr(GRPOTrainer, "roll_out", fail)
    with pytest.raises(ValueError, match="a defect of ours"):
        grpo()


def shell(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "rlkernels", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_bad_value_in_a_shell(workplace, model_folder):
    done = shell("grpo", "--model", str(model_folder), "--dataset", "absent.csv", "--reward", "graders:length")
    assert done.returncode == 2
    assert done.stderr == "rlkernels grpo: error: --dataset absent.csv: no such file\n"
    assert done.stdout == ""


@pytest.mark.parametrize("arguments", [[], ["absent"], ["info", "--absent"], ["--absent", "info"]])
def test_bad_command(capsys, arguments):
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("rlkernels") and error.count("\n") == 1


def test_version(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"rlkernels {rlkernels.__version__}\n"


def test_help_names_every_config_field(capsys):
    from dataclasses import fields

    from rlkernels.trainers import GRPOConfig

    with pytest.raises(SystemExit) as left:
        cli.main(["grpo", "--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert not [field.name for field in fields(GRPOConfig) if field.init and f"--{field.name}" not in text]


def rows_of_info(text: str) -> dict[str, list[str]]:
    return {line.split()[0]: line.split(maxsplit=2)[1:] for line in text.splitlines() if line}


def test_info(capsys):
    assert cli.main(["info"]) == 0
    rows = rows_of_info(capsys.readouterr().out)
    assert rows["torch"] == [torch.__version__]
    assert set(cli.OPS) == set(rlkernels.__all__) - {"use_backend", "wrap_lm_head", "unwrap_lm_head"}
    for op, backends in cli.OPS.items():
        assert rows[op][0] == _registry.select(torch.empty(0), backends)
        if not torch.cuda.is_available():
            assert ("cuda: no NVIDIA GPU is available" in rows[op][1]) == ("cuda" in backends)


def test_info_names_what_serves_each_op_on_a_gpu(monkeypatch):
    """Where an op has no CUDA kernels, Triton, and nothing faster is missing."""
    for name, devices in (("cuda", ("meta",)), ("triton", ("meta",)), ("cpu", ())):
        monkeypatch.setitem(_registry._devices, name, devices)
    serving = cli.serving_backends("meta")
    assert (serving["policy_loss"], serving["masked_whiten"]) == ("cuda", "triton")
    assert cli.faster_backends("masked_whiten", "triton", "meta") == {}


def test_info_says_why_the_faster_backend_does_not_serve(capsys, monkeypatch):
    monkeypatch.setitem(_registry._devices, "cpu", ())
    monkeypatch.setitem(_registry._reasons, "cpu", "the C++ extension is not built")
    cli.main(["info"])
    backend, reasons = rows_of_info(capsys.readouterr().out)["token_logprobs"]
    assert backend == _registry.select(torch.empty(0)) != "cpu"
    assert "cpu: the C++ extension is not built" in reasons


def test_info_under_a_forced_backend(capsys):
    with rlkernels.use_backend("reference"):
        cli.main(["info"])
    backend, reasons = rows_of_info(capsys.readouterr().out)["policy_loss"]
    assert backend == "reference"
    if _registry.status("cpu", "cpu") is None:
        assert "cpu: another was asked for" in reasons
