"""A bar on the terminal while a trainer runs."""

from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from program import Run


class ProgressCallback(TrainerCallback):
    """A bar with some of what is logged and the time left. `shown`: what the bar calls a logged value, and its name."""

    def __init__(self, run: Run, shown: dict[str, str]) -> None:
        self.shown = shown
        self.bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("  ".join(f"{name} {{task.fields[{name}]}}" for name in shown)),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=run.console,
        )
        self.task = self.bar.add_task("", total=run.steps, **dict.fromkeys(shown, "-"))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        values = {name: f"{logs[key]:.2f}" for name, key in self.shown.items() if key in logs}
        if values:
            self.bar.update(self.task, completed=state.global_step, **values)
