"""The demo: what it learns from, what it rewards, the model it starts from, and a run of two steps."""

import importlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from cases import thorough
from rlkernels import _backends
from tiny_model import build_model, build_tokenizer

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
arithmetic, smollm2 = importlib.import_module("arithmetic"), importlib.import_module("smollm2")


def test_held_out_problems_are_disjoint_from_training_also_with_the_terms_swapped():
    train, held_out = arithmetic.problems()
    seen = {row["expression"] for row in train}
    for row in held_out:
        left, operator, right = row["expression"].split()
        assert f"{left} {operator} {right}" not in seen
        assert f"{right} {operator} {left}" not in seen
    assert {row["split"] for row in train} == {"train"} and {row["split"] for row in held_out} == {"held_out"}


def test_problems_are_all_single_digit_sums_and_differences():
    train, held_out = arithmetic.problems()
    answers = {row["expression"]: row["answer"] for row in train + held_out}
    expected = {f"{a} + {b}": a + b for a in range(10) for b in range(10)}
    expected |= {f"{a} - {b}": a - b for a in range(10) for b in range(10)}
    assert answers == expected
    assert len(train) + len(held_out) == 200
    for operator in "+-":
        assert sum(operator in row["expression"] for row in held_out) >= 20
    assert arithmetic.problems() == (train, held_out)


def test_accuracy_is_of_one_split_at_one_step():
    grader = arithmetic.Grader(end_token_id=2)
    graded = [("held_out", 0, False), ("train", 2, False), ("held_out", 2, True), ("held_out", 2, False)]
    grader.records = [{"split": split, "step": step, "correct": correct} for split, step, correct in graded]
    assert [grader.accuracy("held_out", step) for step in (0, 2)] == [0.0, 0.5]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8", 8),
        ("The answer is -3.", -3),
        ("5 - 8 = -3", -3),
        ("5-3", 3),
        ("7 or 8", 8),
        ("It is 8, not 9", 9),
        ("12", 12),
        ("", None),
        ("eight", None),
    ],
)
def test_last_integer(text, expected):
    assert arithmetic.last_integer(text) == expected


END = 2


def score(text: str, length: int = 12, ended: bool = False, answer: int = 8) -> float:
    ids = [5] * (length - ended) + [END] * ended
    grader = arithmetic.Grader(END)
    columns = {
        "completions": [[{"role": "assistant", "content": text}]],
        "completion_ids": [ids],
        "answer": [answer],
        "expression": ["6 + 2"],
        "split": ["train"],
        "trainer_state": type("State", (), {"global_step": 0}),
        "prompts": [None],
    }
    return sum(weight * reward(**columns)[0] for weight, reward in zip(grader.weights, grader.rewards, strict=True))


def test_reward_is_not_met_by_rambling():
    answered = score("8", length=2, ended=True)
    assert answered == max(score(text, ended=ended) for text in ("8", "9", "") for ended in (False, True))
    for rambling in ("8 9", "1 2 3 4 5 6 7 8 9 10", "8. Now 3 + 4 is 7", "the answer is 8 or 9 or", ""):
        assert score(rambling) == 0
        # Ending without the answer stays below the answer without an end.
        assert 0 < score(rambling, ended=True) < score("8") < answered
    assert score("1 2 3 4 5 6 7 8") < answered


def test_end_is_known_from_the_last_token_alone():
    grader = arithmetic.Grader(END)
    assert grader.ended([[END, 5], [5, END], [5, 5]]) == [0.0, 1.0, 0.0]


@pytest.mark.thorough
def test_converted_model_is_the_one_in_the_package(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    originals = []

    class Loader:
        """Keeps the model that was read from the GGUF file: reading it takes long."""

        @staticmethod
        def from_pretrained(*arguments, **options):
            assert options["gguf_file"]
            originals.append(AutoModelForCausalLM.from_pretrained(*arguments, **options))
            return originals[-1]

    monkeypatch.setattr(smollm2, "AutoModelForCausalLM", Loader)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = smollm2.model_folder()
    assert folder.is_relative_to(tmp_path) and [*folder.parent.iterdir()] == [folder]

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(ids).logits
        torch.testing.assert_close(logits, originals[0](ids).logits, rtol=0, atol=0)
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"
    assert tokenizer.eos_token_id == END and tokenizer.chat_template

    assert smollm2.model_folder() == folder
    assert len(originals) == 1, "converted a second time"


def test_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(folder):
        (folder / "model.safetensors").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(smollm2, "convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        smollm2.model_folder()
    assert list((tmp_path / "rlkernels").iterdir()) == []


def demo(folder: Path, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(EXAMPLES / "demo.py"), *arguments],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--steps", "0"], "--steps"),
        (["--minutes", "0"], "--minutes"),
        (["--minutes", "nan"], "'nan'"),
        (["--minutes", "2", "--steps", "3"], "--steps: not allowed with argument --minutes"),
        (["--seed", "-1"], "--seed"),
        (["--seed", "x"], "'x'"),
        (["--output_dir", "file"], "file is not a folder"),
        (["--absent"], "--absent"),
    ],
)
def test_bad_option_ends_in_one_line(tmp_path, arguments, named):
    (tmp_path / "file").write_text("")
    process = demo(tmp_path, *arguments)
    out, error = process.communicate()
    assert process.returncode == 2
    assert out == "" and error.count("\n") == 1 and named in error
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_help(tmp_path):
    out, _ = demo(tmp_path, "--help").communicate()
    assert all(option in out for option in ("--seed", "--minutes", "--steps", "--output_dir"))


@pytest.fixture(params=["tiny model", thorough("SmolLM2")])
def start(request, monkeypatch, tmp_path):
    """The demo with few prompts and samples. Returns the folder of the model that it starts from."""
    import learn
    from rlkernels.trainers import GRPOConfig

    problems = arithmetic.problems

    small = {"per_device_train_batch_size": 8, "num_generations": 4, "num_generations_eval": 2}
    monkeypatch.setattr(learn, "GRPOConfig", lambda **options: GRPOConfig(**{**options, **small}))
    monkeypatch.setattr(learn, "problems", lambda: tuple(rows[:6] for rows in problems()))
    # So that which accuracy stands where can be told, however little two steps change.
    monkeypatch.setattr(arithmetic.Grader, "accuracy", lambda self, split, step: (split == "held_out") + step / 10)
    if request.param == "SmolLM2":
        return smollm2.model_folder()
    for part in (build_model(), build_tokenizer()):
        part.save_pretrained(tmp_path / "start")
    monkeypatch.setattr(learn, "model_folder", lambda: tmp_path / "start")
    return tmp_path / "start"


def run_demo(*arguments: str) -> int:
    return importlib.import_module("demo").main(list(arguments))


def test_demo_writes_its_results(start, tmp_path, capsys):
    import matplotlib.image
    from transformers import AutoModelForCausalLM, AutoTokenizer

    output = tmp_path / "demo"
    (output / "model").mkdir(parents=True)
    (output / "model" / "of_an_older_run").touch()
    (output / "kept").touch()
    assert run_demo("--steps", "2", "--seed", "3", "--output_dir", str(output)) == 0
    made = {"result.json", "curves.png", "completions.jsonl", "model"}
    assert {entry.name for entry in output.iterdir()} == made | {"kept"}
    assert not (output / "model" / "of_an_older_run").exists()

    result = json.loads((output / "result.json").read_text())
    assert result.keys() == {
        *("seed", "steps", "wall_s", "accuracy_before", "accuracy_after", "tokens_per_s", "peak_rss_mb", "backends")
    }
    assert (result["seed"], result["steps"]) == (3, 2)
    assert all(math.isfinite(result[name]) and result[name] > 0 for name in ("wall_s", "tokens_per_s", "peak_rss_mb"))
    assert (result["accuracy_before"], result["accuracy_after"]) == (1.0, 1.2)
    assert result["backends"].keys() == _backends.BACKENDS_OF.keys()

    records = [json.loads(line) for line in (output / "completions.jsonl").read_text().splitlines()]
    graded = [(record["split"], record["step"]) for record in records]
    assert {key: graded.count(key) for key in graded} == {
        ("held_out", 0): 12,
        ("train", 0): 8,
        ("held_out", 1): 12,
        ("train", 1): 8,
        ("held_out", 2): 12,
    }
    for record in records:
        assert record["correct"] == (arithmetic.last_integer(record["completion"]) == record["answer"])
        assert 1 <= record["length"] <= 12
    assert matplotlib.image.imread(output / "curves.png").std() > 0.01

    model, loading = AutoModelForCausalLM.from_pretrained(output / "model", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    before = AutoModelForCausalLM.from_pretrained(start)
    assert any((a != b).any() for a, b in zip(model.parameters(), before.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(output / "model").chat_template
    assert "held-out accuracy" in capsys.readouterr().out


class Clock:
    """In the place of the module `time`."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("seconds", "limit", "fewest", "taken"),
    [
        ([6.0, 5.0, 5.0, 5.0], 100.0, 1, 4),
        ([6.0, 5.0, 5.0, 5.0], 16.0, 1, 3),  # a fourth would end at 21 s
        ([6.0, 5.0, 5.0, 5.0], 15.9, 1, 2),
        ([6.0, 5.0, 5.0, 5.0], 1.0, 1, 1),
        ([6.0, 5.0, 5.0, 5.0], 1.0, 3, 3),
    ],
)
def test_step_timer_ends_before_its_limit(monkeypatch, seconds, limit, fewest, taken):
    calibration, clock = importlib.import_module("calibration"), Clock()
    monkeypatch.setattr(calibration, "time", clock)
    timer = calibration.StepTimer(limit, fewest)
    control = type("Control", (), {"should_training_stop": False})()
    for step in seconds:
        clock.now += 1000.0  # an evaluation, which is not counted
        timer.on_step_begin(None, None, control)
        clock.now += step
        timer.on_step_end(None, None, control)
        if control.should_training_stop:
            break
    assert timer.seconds == seconds[:taken]


@pytest.mark.parametrize(
    ("seconds", "sampling", "learning", "steps"),
    [
        (300.0, 2.0, 8.0, 10 + 200 // 4.4),
        (95.0, 2.0, 8.0, 9 + 1),
        (300.0, 20.0, 50.0, 4),
        (300.0, 100.0, 900.0, 4),
        (-60.0, 100.0, 900.0, 4),
        (300.0, 0.1, 0.1, 10 + 298 // 0.13),
    ],
)
def test_steps_within_a_time(seconds, sampling, learning, steps):
    assert importlib.import_module("calibration").steps_within(seconds, sampling, learning) == steps


def test_run_by_minutes_is_repeated_by_its_steps(start, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importlib.import_module("learn"), "OVERTIME", math.inf)
    assert run_demo("--minutes", "0.02", "--output_dir", str(tmp_path / "by_minutes")) == 0
    (steps,) = re.findall(r"--steps (\d+) repeats this run", capsys.readouterr().out)
    assert run_demo("--steps", steps, "--output_dir", str(tmp_path / "by_steps")) == 0
    for name in ("model/model.safetensors", "completions.jsonl"):
        by_minutes, by_steps = ((tmp_path / run / name).read_bytes() for run in ("by_minutes", "by_steps"))
        assert by_minutes == by_steps
    assert (start / "model.safetensors").read_bytes() != (tmp_path / "by_steps/model/model.safetensors").read_bytes()
    result = json.loads((tmp_path / "by_minutes" / "result.json").read_text())
    records = map(json.loads, (tmp_path / "by_minutes" / "completions.jsonl").read_text().splitlines())
    assert sum((record["split"], record["step"]) == ("held_out", int(steps)) for record in records) == 12
    assert result["steps"] == int(steps) >= importlib.import_module("calibration").FEWEST_STEPS


def test_run_whose_time_is_over_ends(start, tmp_path, capsys, monkeypatch):
    """The machine has become slower since the calibration."""
    monkeypatch.setattr(importlib.import_module("learn"), "steps_within", lambda *_: 1000)
    assert run_demo("--minutes", "0.01", "--output_dir", str(tmp_path / "run")) == 0
    steps = json.loads((tmp_path / "run" / "result.json").read_text())["steps"]
    assert importlib.import_module("calibration").FEWEST_STEPS <= steps < 1000
    assert f"the time is over after step {steps} of 1000" in capsys.readouterr().out


def test_interrupted_calibration_leaves_nothing(start, tmp_path, capfd, monkeypatch):
    def interrupted(*_, **__):
        signal.raise_signal(signal.SIGINT)
        pytest.fail("went on")

    monkeypatch.setattr(importlib.import_module("calibration").StepTimer, "on_step_end", interrupted)
    assert run_demo("--output_dir", str(tmp_path / "run")) == 128 + signal.SIGINT
    assert not (tmp_path / "run").exists()
    assert capfd.readouterr().err == f"interrupted; {tmp_path / 'run'} is as it was before\n"


@pytest.mark.parametrize(("number", "word", "code"), [("SIGINT", "interrupted", 130), ("SIGTERM", "terminated", 143)])
def test_demo_that_ends_at_once_leaves_the_last_results(tmp_path, number, word, code):
    """While it still imports what it needs; once it trains, see trainers/test_examples.py."""
    output = tmp_path / "runs" / "demo"
    output.mkdir(parents=True)
    (output / "result.json").write_text("of the last run")
    process = demo(tmp_path)
    deadline = time.monotonic() + 300
    while not list(output.glob(".unfinished-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(getattr(signal, number))
    _, error = process.communicate(timeout=300)
    assert process.returncode == code
    assert error == f"{word}; runs/demo is as it was before\n"
    assert [entry.name for entry in output.iterdir()] == ["result.json"]
    assert (output / "result.json").read_text() == "of the last run"
