"""What a run shows and leaves behind: completions/*.parquet, a table of samples on the terminal, curves.png."""

import contextlib
import itertools
import math
import re
from collections.abc import Container, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.utils import logging

from ..rewards.calls import text_of
from ..rollouts.engine import is_chat

logger = logging.get_logger(__name__)

# Panels of curves.png, each with the names under which trainers log what it shows.
ONLINE = {
    "reward": ("reward",),
    "KL to the reference": ("kl", "objective/kl"),
    "tokens per completion": ("completions/mean_length",),
    "entropy": ("entropy", "policy/entropy_avg"),
}
OFFLINE = {
    "loss": ("loss",),
    "accuracy": ("accuracy", "rewards/accuracies", "mean_token_accuracy"),
    "margin": ("margin", "rewards/margins"),
}
SHOWN = 200  # characters of a prompt or a completion in the table


@contextlib.contextmanager
def written_aside(file: Path) -> Iterator[Path]:
    """A path beside `file` that is renamed to it in the end, so that an interrupted run leaves no half of a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f".{file.name}.unfinished")
    try:
        yield aside
        aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def warned_of(file: Path) -> Iterator[None]:
    """A file that cannot be written, on a full disk, costs a warning and not the run."""
    try:
        yield
    except OSError as error:
        logger.warning(f"{file} could not be written: {error.strerror or error}")


def unique(name: str, taken: Container[str]) -> str:
    """The name, or the first of name_2, name_3, ... that is free."""
    numbered = (f"{name}_{number}" for number in itertools.count(2))
    return next(each for each in itertools.chain([name], numbered) if each not in taken)


def missing(package: str, what: str) -> bool:
    """Whether a package is not installed; then says, in one line, what there will not be."""
    if find_spec(package) is not None:
        return False
    logger.warning(f"{package} is not installed, so there is {what}: pip install {package}")
    return True


# Completions


class CompletionsCallback(TrainerCallback):
    """At each training log, writes the latest completions of `trainer.completions` (a dict per completion) to
    `completions/` in the output folder, and prints some of them."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        count = trainer.args.num_completions_to_print
        self.prints = count != 0 and not missing("rich", "no table of samples")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        rows = self.trainer.completions
        if "loss" not in logs or not rows or not state.is_world_process_zero:
            return
        # Several optimizer steps may be taken on the same completions.
        earlier = (log["step"] for log in reversed(state.log_history[:-1]) if "loss" in log)
        if self.trainer.completions_step < next(earlier, 0):
            return
        file = Path(args.output_dir) / "completions" / f"completions_{state.global_step:05d}.parquet"
        with warned_of(file):
            write_completions(file, rows, state.global_step)
        if self.prints:
            from rich.console import Console

            chosen = choose(rows, args.num_completions_to_print, args.log_unique_prompts)
            Console().print(samples_table(chosen, f"step {state.global_step}"))


def columns_of(rows: list[dict[str, Any]]) -> list[str]:
    """Names in any row, `advantage` last: a reward function may log extra columns for some rows alone."""
    return sorted(dict.fromkeys(name for row in rows for name in row), key=lambda name: name == "advantage")


def write_completions(file: Path, rows: list[dict[str, Any]], step: int) -> None:
    """A parquet file of one row per completion; a reward that does not apply is null."""
    import pyarrow
    import pyarrow.parquet

    columns = {"step": pyarrow.array([step] * len(rows))}
    for name in columns_of(rows):
        values = [row.get(name) for row in rows]
        try:
            column = pyarrow.array(values, from_pandas=True)
            if pyarrow.types.is_nested(column.type):  # not all that arrow has can be written, such as empty dicts
                pyarrow.parquet.write_table(pyarrow.table({name: column}), pyarrow.BufferOutputStream())
        except (pyarrow.ArrowException, ValueError, OverflowError):  # no common type, or none at all
            column = pyarrow.array([None if value is None else text_of(value) for value in values])
        columns[name] = column
    with written_aside(file) as aside:
        pyarrow.parquet.write_table(pyarrow.table(columns), aside)


def choose(rows: list[dict[str, Any]], count: int | None, unique: bool) -> list[dict[str, Any]]:
    """`count` of the rows, or all for None, from the first to the last at equal distances."""
    if unique:
        rows = list({str(row["prompt"]): row for row in reversed(rows)}.values())[::-1]
    if count is None or count >= len(rows):
        return rows
    return [rows[index * len(rows) // count] for index in range(count)]


def samples_table(rows: list[dict[str, Any]], title: str) -> Any:
    """A rich table: prompt (of a conversation its last message), completion, each reward, what reward functions
    logged, advantage."""
    from rich.table import Table

    table = Table(title=title, show_lines=True)
    names = columns_of(rows)
    for name in names:
        if name in ("prompt", "completion"):
            table.add_column(name, overflow="fold", min_width=12)
        else:
            numeric = all(isinstance(row.get(name), int | float | None) for row in rows)
            table.add_column(name.removeprefix("rewards/"), justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*(cell(name, row.get(name)) for name in names))
    return table


def cell(name: str, value: Any) -> Any:
    from rich.text import Text

    if value is None or (isinstance(value, float) and math.isnan(value)):
        return Text("-")
    if isinstance(value, float):
        return Text(f"{value:.2f}", "" if name != "advantage" or value == 0 else "green" if value > 0 else "red")
    text = str(value[-1]["content"] if is_chat(value) and value else value)
    return Text(shorten(text.strip("\n")))


def shorten(text: str) -> str:
    """The beginning and the end of a text that is too long for a table."""
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} ... {text[-SHOWN // 2 :]}"


# Curves


class CurvesCallback(TrainerCallback):
    """Draws what a run logged to curves.png in the output folder, when the run is done."""

    def __init__(self) -> None:
        self.draws = not missing("matplotlib", "no curves.png")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.draws and state.is_world_process_zero:
            file = Path(args.output_dir) / "curves.png"
            with warned_of(file):
                draw_curves(file, state.log_history)


Curve = tuple[list[int], list[float]]  # steps and values


def curves_of(history: list[dict[str, float]], names: tuple[str, ...]) -> dict[str, Curve]:
    """By what the legend calls them, those of the metrics `names` that were logged, in training and in evaluation."""
    curves: dict[str, Curve] = {}
    for entry in history:
        for key, value in entry.items():
            label = label_of(key, names)
            if label and math.isfinite(value):
                steps, values = curves.setdefault(label, ([], []))
                steps.append(int(entry["step"]))
                values.append(value)
    return curves


def label_of(key: str, names: tuple[str, ...]) -> str | None:
    if key in names:
        return "training"
    # With several evaluation sets a key is eval_{set}_{name}.
    found = [name for name in names if key.startswith("eval_") and key.endswith(f"_{name}")]
    return key.removesuffix(f"_{max(found, key=len)}").replace("eval", "evaluation", 1) if found else None


def rewards_of(history: list[dict[str, float]]) -> dict[str, Curve]:
    """The curves in training of each reward, where there are several."""
    keys = dict.fromkeys(key for entry in history for key in entry if re.fullmatch("rewards/.*/mean", key))
    curves = {key[len("rewards/") : -len("/mean")]: curves_of(history, (key,))["training"] for key in keys}
    return curves if len(curves) > 1 else {}


def draw_curves(file: Path, history: list[dict[str, float]]) -> None:
    """A panel for each of reward, KL, length and entropy, or of loss, accuracy and margin, as far as logged."""
    from matplotlib.figure import Figure

    online = any("reward" in entry for entry in history)
    panels = {title: curves_of(history, names) for title, names in (ONLINE if online else OFFLINE).items()}
    panels = {title: curves for title, curves in panels.items() if curves}
    if not panels:
        return
    columns = len(panels) if len(panels) < 4 else 2
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(5 * columns, 3.5 * rows), layout="constrained")
    for index, (title, curves) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, index + 1)
        for label, (steps, values) in curves.items():
            few = label != "training" or len(steps) == 1
            axes.plot(steps, values, "o-" if few else "-", markersize=4, label=label)
        parts = rewards_of(history) if title == "reward" else {}
        for label, (steps, values) in parts.items():
            axes.plot(steps, values, ":", linewidth=1.2, label=label)
        axes.set(title=title, xlabel="optimizer step")
        axes.grid(alpha=0.3)
        if len(curves) + len(parts) > 1:
            axes.legend()
    with written_aside(file) as aside:
        figure.savefig(aside, format="png", dpi=120)
