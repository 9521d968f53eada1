"""How many optimizer steps fit into a given time on this machine, and a stop if they take longer after all."""

import time
from typing import Any

from transformers import TrainerCallback

FEWEST_STEPS = 4
"""A run takes at least this many steps, however slow the machine is."""
STEPS_TO_LEARN = 10
LEARNING_LATER = 0.3
"""After about ten steps most groups are all right, and not learned from: the part of a step that follows sampling takes
0.3 of its time at first."""
OVERTIME = 1.1
"""If steps get slower than they were, as when other programs start to compute, a run ends at this multiple of its
time."""


class StepTimer(TrainerCallback):
    """Measures optimizer steps, without evaluations. Ends the training after at least `fewest` steps if the next one
    would probably end after `limit` seconds."""

    def __init__(self, limit: float, fewest: int) -> None:
        self.limit, self.fewest = limit, fewest
        self.begun = 0.0
        self.seconds: list[float] = []
        self.sampling: list[float] = []  # the part of it until completions are sampled, if `sampled` is a reward

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.begun = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds.append(time.perf_counter() - self.begun)
        is_over = sum(self.seconds) + self.seconds[-1] > self.limit
        control.should_training_stop |= is_over and len(self.seconds) >= self.fewest

    def sampled(self, completion_ids: list, **_: Any) -> list[float]:
        """A reward function for the calibration. Half of each group is right, so that all groups are learned from."""
        self.sampling.append(time.perf_counter() - self.begun)
        return [float(row % 2) for row in range(len(completion_ids))]


def steps_within(seconds: float, sampling: float, learning: float) -> int:
    """The number of steps that take `seconds`, if sampling and the rest of a step take these seconds at first."""
    first, later = sampling + learning, sampling + LEARNING_LATER * learning
    steps = min(int(seconds / first), STEPS_TO_LEARN)
    return max(FEWEST_STEPS, steps + int((seconds - steps * first) / later))
