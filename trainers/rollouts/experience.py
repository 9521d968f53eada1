"""What optimizer steps learn from, for as long as they do: `ExperienceBuffer`."""

import hashlib
import json
from collections.abc import Callable
from typing import Any

from accelerate.utils import gather_object
from transformers.utils import logging

from ..batch.batch import Sequence

logger = logging.get_logger(__name__)


class ExperienceBuffer:
    """The experience that the current steps learn from: made anew when it has served all of its steps.

    Args:
        kind: the trainer's dataclass of an experience; its `sequences` have an entry per row.
        steps: optimizer steps that one experience serves.
        trainer: whose steps these are.
    """

    def __init__(self, kind: type, steps: int, trainer: Any) -> None:
        self.kind, self.steps, self.trainer = kind, steps, trainer
        self.experience: Any = None
        self._rows: str | None = None  # the digest of the rows that the experience is of
        self._is_loaded = False  # from a checkpoint, and not yet compared with the rows of a step

    def current(self, rows: list[dict[str, Any]], make: Callable[[list[dict[str, Any]]], Any]) -> tuple[Any, int]:
        """The experience of this step's rows, made by `make(rows)` if there is none yet; and how many steps have
        learned from it."""
        trainer, step = self.trainer, self.trainer.state.global_step % self.steps
        others = self._other_than(rows)
        if step == 0 or self.experience is None:
            if step:
                why = f"those of the checkpoint are of another {', '.join(others)}"
                logger.warning(
                    f"step {trainer.state.global_step + 1}: this step's prompts are completed anew, since "
                    f"{why if others else 'the checkpoint holds no completions for it'}"
                )
            with trainer.stop.while_doing("sampling completions and their rewards"):
                self.experience = make(rows)
            self._rows = digest(rows)
        return self.experience, step

    def _other_than(self, rows: list[dict[str, Any]]) -> list[str]:
        """Why the experience of a checkpoint is not one of these rows in this run. It is then dropped, on every
        process."""
        others = list(self.trainer.changed)
        if self._is_loaded and not others:
            is_other = [self._rows != digest(rows) or len(self.experience.sequences) != len(rows)]
            if self.trainer.accelerator.num_processes > 1:
                is_other = gather_object(is_other)
            others = ["rows of train_dataset"] * any(is_other)
        if self._is_loaded and others:
            self.experience = None
        self._is_loaded = False
        return others

    def state_dict(self) -> dict[str, Any] | None:
        """None where the next step makes an experience of its own."""
        if self.experience is None or self.trainer.state.global_step % self.steps == 0:
            return None
        sequences = [vars(sequence) for sequence in self.experience.sequences]
        return {"rows": self._rows, "rollouts": {**vars(self.experience), "sequences": sequences}}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        self._is_loaded = state is not None
        self.experience = None
        if state is not None:
            fields = dict(state["rollouts"])
            if "sequences" in fields:
                sequences = [Sequence(**sequence) for sequence in fields.pop("sequences")]
            else:  # of an earlier version
                sequences = list(map(Sequence, fields.pop("input_ids"), fields.pop("labels")))
            self.experience = self.kind(sequences=sequences, **fields)
        self._rows = None if state is None else state["rows"]


def digest(rows: list[dict[str, Any]]) -> str:
    """A SHA-256 of the part of the rows that JSON can hold."""
    text = json.dumps(rows, default=lambda value: type(value).__name__, skipkeys=True)
    return hashlib.sha256(text.encode()).hexdigest()
