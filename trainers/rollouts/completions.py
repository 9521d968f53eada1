"""Shows completions to the user: a parquet file of all and a printed table of some at each log.

PPOTrainer and GRPOTrainer add `CompletionsCallback` where `log_completions` is set.
"""

import math
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from transformers import TrainerCallback

from ..base.chat import is_chat
from ..base.reporting import missing, warned_of, written_aside
from ..rewards.calls import text_of

SHOWN = 200  # characters of a prompt or a completion in the table


class LatestCompletions:
    """The completions that were sampled last, over all processes: a dict for each, as `Samples.table` gives them."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.step = 0  # the optimizer steps that were taken before they were sampled

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "rows": self.rows}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        if state is None:
            raise FileNotFoundError("completions.json")
        self.step, self.rows = state["step"], state["rows"]


class CompletionsCallback(TrainerCallback):
    """At each training log, writes the latest completions to `completions/` in the output folder, and prints some of
    them."""

    def __init__(self, latest: LatestCompletions, args: Any) -> None:
        self.latest = latest
        self.prints = args.num_completions_to_print != 0 and not missing("rich", "no table of completions")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        rows = self.latest.rows
        if "loss" not in logs or not rows or not state.is_world_process_zero:
            return
        # Several optimizer steps may learn from the same completions, which are shown once.
        earlier = (log["step"] for log in reversed(state.log_history[:-1]) if "loss" in log)
        if self.latest.step < next(earlier, 0):
            return
        file = Path(args.output_dir) / "completions" / f"completions_{state.global_step:05d}.parquet"
        with warned_of(file):
            write_completions(file, rows, state.global_step)
        if self.prints:
            from rich.console import Console  # an optional package

            chosen = choose(rows, args.num_completions_to_print, args.log_unique_prompts)
            Console().print(completions_table(chosen, f"step {state.global_step}"))


def columns_of(rows: list[dict[str, Any]]) -> list[str]:
    """The names that occur in any row, `advantage` last. A reward function may log columns for only some rows."""
    return sorted(dict.fromkeys(name for row in rows for name in row), key=lambda name: name == "advantage")


def write_completions(file: Path, rows: list[dict[str, Any]], step: int) -> None:
    """Writes a parquet file with one row per completion. A reward that does not apply is null."""
    columns = {"step": pyarrow.array([step] * len(rows))}
    for name in columns_of(rows):
        values = [row.get(name) for row in rows]
        try:
            column = pyarrow.array(values, from_pandas=True)
            if pyarrow.types.is_nested(column.type):  # parquet cannot hold every nested type, such as empty dicts
                pyarrow.parquet.write_table(pyarrow.table({name: column}), pyarrow.BufferOutputStream())
        except (pyarrow.ArrowException, ValueError, OverflowError):  # the values have no common arrow type
            column = pyarrow.array([None if value is None else text_of(value) for value in values])
        columns[name] = column
    with written_aside(file) as aside:
        pyarrow.parquet.write_table(pyarrow.table(columns), aside)


def choose(rows: list[dict[str, Any]], count: int | None, unique: bool) -> list[dict[str, Any]]:
    """`count` rows at equal distances, or all rows if `count` is None. With `unique`, one row per prompt."""
    if unique:
        rows = list({str(row["prompt"]): row for row in reversed(rows)}.values())[::-1]
    if count is None or count >= len(rows):
        return rows
    return [rows[index * len(rows) // count] for index in range(count)]


def completions_table(rows: list[dict[str, Any]], title: str) -> Any:
    """A rich table with columns for the prompt (its last message), the completion, each reward, what reward functions
    logged, and the advantage."""
    from rich.table import Table  # an optional package

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
    """One value of the table as rich text."""
    from rich.text import Text  # an optional package

    if value is None or (isinstance(value, float) and math.isnan(value)):
        return Text("-")
    if isinstance(value, float):
        return Text(f"{value:.2f}", "" if name != "advantage" or value == 0 else "green" if value > 0 else "red")
    text = str(value[-1]["content"] if is_chat(value) and value else value)
    return Text(shorten(text.strip("\n")))


def shorten(text: str) -> str:
    """The text, or its beginning and its end if it is too long for the table."""
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} ... {text[-SHOWN // 2 :]}"
