"""The progress display of the examples while a trainer runs."""

import time
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from program import Run


class ProgressCallback(TrainerCallback):
    """Shows a bar with some logged values and the time left, or prints a line per step without a terminal. It also ends
    a run that was asked to stop. `shown` maps a label to the name of a logged value."""

    def __init__(self, run: Run, shown: dict[str, str]) -> None:
        self.run, self.shown = run, shown
        self.bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("  ".join(f"{name} {{task.fields[{name}]}}" for name in shown)),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=run.console,
            disable=not run.console.is_interactive,
        )
        self.task = self.bar.add_task("", total=None, **dict.fromkeys(shown, "-"))

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.run.stop.keeps, self.run.stop.steps = True, state.max_steps
        self.bar.update(self.task, total=state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.run.stop.step = state.global_step
        control.should_training_stop |= bool(self.run.stop.number)

    on_evaluate = on_step_end

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        values = {name: f"{logs[key]:.2f}" for name, key in self.shown.items() if key in logs}
        if not values:
            return
        self.bar.update(self.task, completed=state.global_step, **values)
        if self.bar.disable:
            told = "  ".join(f"{name} {value}" for name, value in values.items())
            seconds = time.perf_counter() - self.run.start
            self.run.console.print(f"step {state.global_step:3d} of {state.max_steps}  {told}  {seconds:.0f} s")
