"""The examples: the lesson that they teach, their command lines, and a step of each on the tiny model."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from cases import thorough

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))
lesson, program = importlib.import_module("lesson"), importlib.import_module("program")


def terms(row: dict) -> tuple[str, ...]:
    left, operator, right = row["expression"].split()
    return operator, *sorted((left, right))


def test_held_out_sums_and_words_are_not_those_trained_on():
    assert {terms(row) for row in lesson.TRAIN}.isdisjoint(map(terms, lesson.HELD_OUT))
    assert set(lesson.OTHER_WORDS).isdisjoint(lesson.HELD_OUT_WORDS)


def test_sentence():
    for row in lesson.TRAIN:
        assert lesson.is_sentence(lesson.sentence(row))
        for words in (*lesson.OTHER_WORDS, *lesson.HELD_OUT_WORDS):
            assert not lesson.is_sentence(words.format(**row))
    for text in (
        "The answer is .",
        "The answer is 8",
        " The answer is 8.",
        "The answer is 8.\n",
        "The answer is eight.",
    ):
        assert not lesson.is_sentence(text)


@pytest.fixture
def tiny(make_model, tokenizer, tmp_path, monkeypatch):
    """The tiny model in the place of SmolLM2."""
    folder = tmp_path / "start"
    make_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    monkeypatch.setattr(lesson, "model_folder", lambda: folder)
    monkeypatch.setattr(lesson, "HELD_OUT", lesson.HELD_OUT[:4])
    monkeypatch.setattr(lesson, "TRAIN", lesson.TRAIN[:32])


def test_pairs(tiny):
    model, tokenizer = lesson.load()
    made = [lesson.pairs(lesson.TRAIN, lesson.OTHER_WORDS, model, tokenizer) for _ in range(2)]
    assert made[0].to_list() == made[1].to_list()
    assert len(made[0]) == 2 * len(lesson.TRAIN)
    for pair in made[0]:
        assert lesson.is_sentence(pair["chosen"]) and not lesson.is_sentence(pair["rejected"])
        assert pair["prompt"].endswith("a:")


def test_rates_are_of_completions_that_are_the_sentence_and_stop(tiny, monkeypatch):
    said = {
        ("The answer is 3.", True): 1,
        ("The answer is 3.", False): 0,
        ("3", True): 0,
        ("The answer is 99.", True): 1,
    }
    rows = lesson.HELD_OUT
    monkeypatch.setattr(lesson, "sentence", lambda row: "The answer is 3.")
    monkeypatch.setattr(lesson, "SAMPLES", 1)
    monkeypatch.setattr(lesson, "completions", lambda *arguments: list(said)[: len(rows)])
    accelerator = type("Accelerator", (), {"autocast": lambda self: __import__("contextlib").nullcontext()})()
    args = type("Args", (), {"seed": 0})()
    trainer = type("Trainer", (), {"accelerator": accelerator, "args": args, "processing_class": None})()
    assert lesson.rates(trainer, None) == {"format rate": 0.5, "right answers": 0.25}


@pytest.mark.parametrize("name", ["dpo", "ppo", *map(thorough, ("sft", "reward", "grpo"))])
def test_example_runs(tiny, name, tmp_path, capsys):
    example = importlib.import_module(name)
    folder = tmp_path / "runs" / name
    arguments = ["--steps", "1", "--seed", "3", "--output_dir", str(folder)]
    if name == "ppo":
        importlib.import_module("reward").main([*arguments[:-1], str(folder.parent / "reward")])
    assert example.main(arguments) == 0
    result = json.loads((folder / "result.json").read_text())
    assert (result["seed"], result["steps"]) == (3, 1)
    assert result["before"].keys() == result["after"].keys()
    start, learned = (
        load_file(path / "model.safetensors")["model.embed_tokens.weight"]
        for path in (tmp_path / "start", folder / "model")
    )
    assert (start != learned).any()
    assert not list(folder.glob(".unfinished-*"))
    printed = capsys.readouterr().out
    assert all(measure in printed for measure in result["before"])


def run(name: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize("name", ["grpo", *map(thorough, ("sft", "reward", "dpo", "ppo"))])
def test_wrong_option_ends_in_one_line(name, tmp_path):
    (tmp_path / "file").touch()
    done = run(name, "--output_dir", "file", folder=tmp_path)
    assert done.returncode == 2
    assert done.stdout == "" and done.stderr == f"{name}.py: error: --output_dir: file is not a folder\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


SIGNALS = [(signal.SIGINT, "interrupted", 130), (signal.SIGTERM, "terminated", 143)]


@pytest.mark.parametrize(("number", "word", "code"), SIGNALS)
@pytest.mark.parametrize("times", [1, 2], ids=["before the first step", "twice"])
def test_run_that_ends_at_once_leaves_the_last_results(tmp_path, capfd, monkeypatch, number, word, code, times):
    def interrupted(run: program.Run) -> list:
        (run.folder / "result.json").touch()
        run.stop.keeps = times > 1
        for _ in range(times):
            signal.raise_signal(number)
        pytest.fail("went on")

    monkeypatch.setattr(program, "ONE_SIGNAL", 0.0)
    (tmp_path / "result.json").write_text("of the last run")
    before = {each: signal.getsignal(each) for each in program.DEFAULTS}
    arguments = ["--output_dir", str(tmp_path)]
    assert program.main("An example.", interrupted, steps=1, folder="unused", arguments=arguments) == code
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]
    assert (tmp_path / "result.json").read_text() == "of the last run"
    assert capfd.readouterr().err.splitlines()[-1] == f"{word}; {tmp_path} is as it was before"
    assert {each: signal.getsignal(each) for each in before} == before


def test_one_signal_may_come_twice(tmp_path):
    """From make, and to the whole group of processes."""

    def interrupted(run: program.Run) -> list:
        run.stop.keeps = True
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)
        (run.folder / "result.json").touch()
        return []

    assert program.main("An example.", interrupted, steps=1, folder=str(tmp_path), arguments=[]) == 143
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]


def test_results_are_put_in_place_together(tmp_path, monkeypatch):
    def make(run: program.Run) -> list:
        for name in "abc":
            (run.folder / name).touch()
        return []

    def replace(source: Path, target: Path) -> None:
        signal.raise_signal(signal.SIGTERM)
        source.replace(target)

    monkeypatch.setattr(program, "replace", replace)
    assert program.main("An example.", make, steps=1, folder=str(tmp_path), arguments=[]) == 0
    assert {entry.name for entry in tmp_path.iterdir()} == set("abc")


def test_demo_that_is_stopped_keeps_what_it_has_learned(make_model, tokenizer, tmp_path, forked):
    """Where there is no terminal it tells of each step as it is done."""
    for part in (make_model(), tokenizer):
        part.save_pretrained(tmp_path / "rlkernels" / "SmolLM2-135M-Instruct")
    process = subprocess.Popen(
        [*forked.FORKED, str(EXAMPLES / "demo.py"), "--steps", "1000", "--output_dir", "out"],
        cwd=tmp_path,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    told = (line for line in process.stdout if " of 1000 " in line)
    for step in (1, 2):
        assert re.fullmatch(rf"step   {step} of 1000  reward \d\.\d\d  length \d+\.\d\d  \d+ s\n", next(told))
    process.send_signal(signal.SIGTERM)
    out, error = process.stdout.read(), process.stderr.read()
    assert process.wait() == 143
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    steps = result["steps"]
    assert 2 <= steps < 1000 and f"{steps} of 1000 " in out and "everything is in out" in out
    assert "\nSIGTERM: the run ends after this step and keeps what it has learned; once more ends it at once\n" in error
    assert error.splitlines()[-1] == f"terminated after step {steps} of 1000; what it has learned is in out"
    made = {"result.json", "curves.png", "completions.jsonl", "model"}
    assert {entry.name for entry in (tmp_path / "out").iterdir()} == made
    records = [json.loads(line) for line in (tmp_path / "out" / "completions.jsonl").read_text().splitlines()]
    measured = [record["correct"] for record in records if (record["split"], record["step"]) == ("held_out", steps)]
    assert result["accuracy_after"] == sum(measured) / len(measured)
