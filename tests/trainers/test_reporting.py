"""What a run shows and leaves behind: completions/*.parquet, a table of completions, curves.png."""

import importlib.util
import io
import re

import matplotlib.image
import pyarrow
import pyarrow.parquet
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from rlkernels.trainers import GRPOConfig, GRPOTrainer
from rlkernels.trainers.base import reporting
from rlkernels.trainers.rollouts.completions import choose, completions_table, write_completions

PROMPTS = [{"prompt": "ab" + "c" * (i % 5) + "d", "index": i} for i in range(8)]


def vowels(completions, log_extra, **kwargs):
    log_extra("letters", [len(text) for text in completions])
    return [sum(letter in "aeiou" for letter in text) / (1 + len(text)) for text in completions]


def sometimes(completions, **kwargs):
    return [1.0 if index % 2 else None for index in range(len(completions))]


@pytest.fixture(autouse=True)
def quiet():
    """Here, runs do draw."""


@pytest.fixture
def make_trainer(make_model, tokenizer, tmp_path):
    def make(**options):
        options = {
            "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_completion_length": 6,
            "logging_steps": 1,
            "max_steps": 3,
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "activation_checkpointing": False,
            "disable_tqdm": True,
        } | options
        return GRPOTrainer(make_model(), [vowels, sometimes], GRPOConfig(**options), PROMPTS, PROMPTS[:2], tokenizer)

    return make


def test_a_run_leaves_its_completions_and_its_curves(make_trainer, tmp_path, capsys):
    trainer = make_trainer(eval_strategy="steps", eval_steps=3, beta=0.1)
    trainer.train()
    files = sorted(path.relative_to(tmp_path / "run").as_posix() for path in (tmp_path / "run").rglob("*"))
    assert files == [
        "completions",
        *(f"completions/completions_{step:05d}.parquet" for step in (1, 2, 3)),
        "curves.png",
    ]
    last = pyarrow.parquet.read_table(tmp_path / "run" / "completions" / "completions_00003.parquet")
    names = ["step", "prompt", "completion", "rewards/vowels", "rewards/sometimes", "letters", "advantage"]
    assert last.column_names == names
    rows = last.to_pylist()
    assert [row.pop("step") for row in rows] == [3] * 8
    for row, shown in zip(rows, trainer.completions, strict=True):
        reward = shown.pop("rewards/sometimes")
        assert row.pop("rewards/sometimes") == (reward if reward == 1.0 else None)
        assert row == shown
    assert None in last["rewards/sometimes"].to_pylist() and last["advantage"].type == pyarrow.float64()

    printed = capsys.readouterr().out
    for step in (1, 2, 3):
        table = re.split(rf"step {step} *\n", printed)[1].split("\u2514")[0]
        assert table.count("\u251c") == 3, "four rows"
        assert all(name in table for name in ("prompt", "completion", "vowels", "sometimes", "letters", "advantage"))
    assert matplotlib.image.imread(tmp_path / "run" / "curves.png").std() > 0.01


def test_completions_are_written_once(make_trainer, tmp_path):
    make_trainer(num_iterations=2, max_steps=4).train()
    files = sorted(path.name for path in (tmp_path / "run" / "completions").iterdir())
    assert files == ["completions_00001.parquet", "completions_00003.parquet"]


def test_what_is_asked_for_alone(make_trainer, tmp_path, capsys):
    make_trainer(log_completions=False, max_steps=1).train()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["curves.png"]
    make_trainer(num_completions_to_print=0, max_steps=1).train()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["completions", "curves.png"]
    assert "advantage" not in capsys.readouterr().out


def test_the_main_process_alone_writes(make_trainer, tmp_path, capsys, monkeypatch):
    trainer = make_trainer(max_steps=1)
    trainer.is_world_process_zero = lambda: False
    trainer.train()
    assert list((tmp_path / "run").iterdir()) == [] and "advantage" not in capsys.readouterr().out


@pytest.mark.parametrize(("package", "told"), [("rich", "no table of completions"), ("matplotlib", "no curves.png")])
def test_a_missing_package_is_told_in_one_line(make_trainer, tmp_path, capsys, monkeypatch, package, told):
    told_of = []
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(reporting, "find_spec", lambda name: None if name == package else find_spec(name))
    monkeypatch.setattr(reporting.logger, "warning", told_of.append)
    make_trainer(max_steps=1).train()
    assert told_of == [f"{package} is not installed, so there is {told}: pip install {package}"]
    assert (tmp_path / "run" / "completions" / "completions_00001.parquet").is_file()
    assert ("advantage" in capsys.readouterr().out) == (package != "rich")
    assert (tmp_path / "run" / "curves.png").is_file() == (package != "matplotlib")


def test_columns_of_some_rows_and_of_mixed_types(tmp_path):
    rows = [
        {"prompt": "a", "completion": "b", "advantage": 0.5, "note": 1},
        {"prompt": "c", "completion": "d", "advantage": -0.5, "note": "two", "late": 3},
    ]
    write_completions(tmp_path / "made" / "x.parquet", rows, step=7)
    assert pyarrow.parquet.read_table(tmp_path / "made" / "x.parquet").to_pylist() == [
        {"step": 7, "prompt": "a", "completion": "b", "note": "1", "late": None, "advantage": 0.5},
        {"step": 7, "prompt": "c", "completion": "d", "note": "two", "late": 3, "advantage": -0.5},
    ]


@pytest.mark.parametrize(
    "values, kept",
    [
        ([{}, {"a": 1}], [{"a": None}, {"a": 1}]),
        ([{}, {}], ["{}", "{}"]),
        ([[{}], []], ["[{}]", "[]"]),
        ([10**30, 1], ["1" + "0" * 30, "1"]),
        (["\ud800", None], ["\\ud800", None]),
        ([{"a": 1}, 2], ["{'a': 1}", "2"]),
    ],
)
def test_what_parquet_cannot_hold_is_written_as_text(tmp_path, values, kept):
    write_completions(tmp_path / "x.parquet", [{"note": value} for value in values], step=1)
    assert pyarrow.parquet.read_table(tmp_path / "x.parquet")["note"].to_pylist() == kept


def test_curves_of_rewards_have_their_whole_names():
    history = [{"step": 1, "rewards/a/b/mean": 1.0, "rewards/a/c/mean": 2.0}]
    assert reporting.rewards_of(history) == {"a/b": ([1], [1.0]), "a/c": ([1], [2.0])}


def named(name, value, **logs):
    def function(completions, log_extra, log_metric, **kwargs):
        for column, logged in logs.items():
            log_extra(column.replace("_of_", "/"), [logged] * len(completions))
            log_metric(column.replace("_of_", "/"), logged)
        return [value] * len(completions)

    function.__name__ = name
    return function


def test_every_name_is_one_thing_everywhere(make_model, tokenizer, tmp_path, capsys):
    """In logs, completions and curves: rewards of one name, and what they log under the names of other things."""
    taken = ["step", "prompt", "completion", "advantage", "rewards_of_same", "loss", "reward", "kl"]
    functions = [named("same", 1.0), named("same", 2.0, **dict.fromkeys(taken, 7.0)), named("overlong", 3.0, note=8.0)]
    functions.append(named("fourth", 4.0, note=9.0))
    args = GRPOConfig(
        output_dir=str(tmp_path / "run"),
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=6,
        overlong_buffer_length=2,
        beta=0.1,
        logging_steps=1,
        max_steps=1,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        activation_checkpointing=False,
        disable_tqdm=True,
        on_reward_error="none",
    )
    trainer = GRPOTrainer(make_model(), functions, args, PROMPTS, PROMPTS[:1], tokenizer)
    trainer.train()
    log = trainer.state.log_history[0]
    means = {"same": 1.0, "same_2": 2.0, "overlong_2": 3.0, "fourth": 4.0}
    assert {name: log[f"rewards/{name}/mean"] for name in means} == means
    assert log["rewards/overlong/mean"] <= 0.0 and log["rewards/same_2/failed"] == 0.0
    assert log["reward"] == 10.0 and log["reward_2"] == log["loss_2"] == log["kl_2"] == log["step_2"] == 7.0
    assert abs(log["loss"]) < 1 and log["kl"] < 1 and log["step"] == 1 and log["note"] == 8.5
    table = pyarrow.parquet.read_table(tmp_path / "run" / "completions" / "completions_00001.parquet").to_pylist()
    assert [row["step"] for row in table] == [1] * 4 and [row["advantage"] for row in table] != [7.0] * 4
    for row in table:
        assert {name: row[f"rewards/{name}"] for name in means} == means
        assert row["prompt"].startswith("ab") and isinstance(row["completion"], str)
        assert (row["note"], row["note_2"], row["loss"]) == (8.0, 9.0, 7.0)
        assert [row[f"{name.replace('_of_', '/')}_2"] for name in taken[:4]] == [7.0] * 4
    metrics = trainer.evaluate()
    assert metrics["eval_reward"] == 10.0 and metrics["eval_reward_2"] == 7.0


def test_conversations_are_kept_as_such(tmp_path):
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2"}]
    row = {"prompt": prompt, "completion": [{"role": "assistant", "content": "4"}], "advantage": 0.0}
    write_completions(tmp_path / "x.parquet", [row], step=1)
    assert pyarrow.parquet.read_table(tmp_path / "x.parquet").to_pylist() == [{"step": 1, **row}]


def test_an_interrupted_write_leaves_the_last_file(tmp_path):
    file = tmp_path / "x.parquet"
    file.write_text("of the last run")
    with pytest.raises(KeyboardInterrupt), reporting.written_aside(file) as aside:
        aside.write_text("half")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["x.parquet"] and file.read_text() == "of the last run"


def test_which_samples_are_shown():
    rows = [{"prompt": "ab"[index // 4], "index": index} for index in range(8)]

    def chosen(count, unique=False):
        return [row["index"] for row in choose(rows, count, unique)]

    assert chosen(None) == chosen(8) == chosen(20) == list(range(8))
    assert chosen(4) == [0, 2, 4, 6] and chosen(3) == [0, 2, 5] and chosen(1) == [0]
    assert chosen(None, unique=True) == [0, 4] and chosen(1, unique=True) == [0]


def printed(rows: list[dict]) -> str:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(completions_table(rows, "step 1"))
    return console.export_text(styles=True)


def test_table():
    """A conversation is its last message; text in brackets is text, not markup; no number is a dash."""
    row = {
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How many?"}],
        "completion": [{"role": "assistant", "content": "[b]15[/b]\n"}],
        "rewards/correct": float("nan"),
        "rewards/short": 0.251,
        "advantage": -1.5,
    }
    text = printed([row, {**row, "advantage": 1.5, "completion": "x" * 150 + "z" * 150}])
    assert "How many?" in text and "Be brief." not in text and "[b]15[/b]" in text
    assert " - " in text and "0.25 " in text and "nan" not in text and "rewards/" not in text
    assert re.search(r"\x1b\[31m *-1\.50", text) and re.search(r"\x1b\[32m *1\.50", text)
    assert (text.count("x"), text.count("z")) == (100, 100) and " ... " in text


HISTORY = [
    {"loss": 0.1, "reward": 0.2, "kl": 0.0, "rewards/a/mean": 0.3, "rewards/b/mean": 0.1, "step": 2},
    {"eval_reward": 0.25, "eval_easy_reward": 0.5, "eval_rewards/a/mean": 0.4, "step": 2},
    {"loss": 0.1, "reward": 0.4, "kl": float("nan"), "rewards/a/mean": 0.5, "rewards/b/mean": 0.3, "step": 4},
    {"train_loss": 0.1, "train_runtime": 1.0, "step": 4},
]


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """The lines of each panel by their label, by the panel's title."""

    def draw(history):
        figures = []
        monkeypatch.setattr(Figure, "savefig", lambda self, file, **options: (figures.append(self), file.touch()))
        reporting.draw_curves(tmp_path / "curves.png", history)
        return {
            axes.get_title(): {
                line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()
            }
            for axes in (figures[0].get_axes() if figures else [])
        }

    return draw


def test_curves_of_a_run_that_samples(drawn):
    assert drawn(HISTORY) == {
        "reward": {
            "training": ([2, 4], [0.2, 0.4]),
            "evaluation": ([2], [0.25]),
            "evaluation_easy": ([2], [0.5]),
            "a": ([2, 4], [0.3, 0.5]),
            "b": ([2, 4], [0.1, 0.3]),
        },
        "KL to the reference": {"training": ([2], [0.0])},
    }


def test_a_single_reward_is_drawn_once(drawn):
    assert drawn([{"reward": 0.2, "rewards/a/mean": 0.2, "step": 1}]) == {"reward": {"training": ([1], [0.2])}}


def test_curves_of_a_run_on_data(drawn):
    one = {"loss": 0.7, "rewards/accuracies": 0.5, "rewards/margins": 0.0, "rewards/chosen": 0.0, "step": 1}
    assert drawn([one, {"eval_loss": 0.6, "eval_rewards/accuracies": 0.75, "step": 1}]) == {
        "loss": {"training": ([1], [0.7]), "evaluation": ([1], [0.6])},
        "accuracy": {"training": ([1], [0.5]), "evaluation": ([1], [0.75])},
        "margin": {"training": ([1], [0.0])},
    }
    assert drawn([{"loss": 0.7, "mean_token_accuracy": 0.5, "eval_mean_token_accuracy": 0.25, "step": 1}]) == {
        "loss": {"training": ([1], [0.7])},
        "accuracy": {"training": ([1], [0.5]), "evaluation": ([1], [0.25])},
    }


def test_nothing_logged_draws_nothing(drawn, tmp_path):
    assert drawn([{"train_runtime": 1.0, "step": 4}]) == {} and list(tmp_path.iterdir()) == []
