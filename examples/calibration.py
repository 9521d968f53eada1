"""Training for a given time: how many optimizer steps that is on this machine, and a stop if they take longer."""

import time
from typing import Any

from transformers import TrainerCallback

FEWEST_STEPS = 4
"""A run takes at least this many steps, however slow the machine is."""
OVERTIME = 1.1
"""A run that takes longer than its time, as when other programs start to compute, ends at this multiple of it."""


class StepTimer(TrainerCallback):
    """Measures the seconds of each optimizer step, without evaluations. Ends the training after at least `fewest` steps
    if the next one would probably end after `limit` seconds."""

    def __init__(self, limit: float, fewest: int) -> None:
        self.limit, self.fewest = limit, fewest
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.begun = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds.append(time.perf_counter() - self.begun)
        is_over = sum(self.seconds) + self.seconds[-1] > self.limit
        control.should_training_stop |= is_over and len(self.seconds) >= self.fewest


def steps_within(seconds: float, first: float) -> int:
    """The number of steps that take `seconds` if the first takes `first`."""
    return max(FEWEST_STEPS, int(seconds / first))
