"""Samples the next completions while the trainer learns from the current ones (`staleness=1`).

PPOTrainer and GRPOTrainer start the rollouts of their next step here and take them when that step comes.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, fields, replace
from typing import Any

from transformers.utils import logging

from .engine import Engine, Rollout, RolloutError, SamplingOptions

logger = logging.get_logger(__name__)

VALUES = [field.name for field in fields(Rollout)]  # a checkpoint keeps only these; an engine may add attributes


@dataclass
class Pending:
    """The rollouts that one optimizer step of this process will learn from, finished or still being sampled."""

    row_ids: list
    prompts: list
    rollouts: Future
    is_resumed: bool = False


class SampledAhead:
    """The pending rollouts of each coming optimizer step. Each step's are sampled in their own thread."""

    def __init__(self) -> None:
        self.pending: dict[int, Pending] = {}

    def start(self, engine: Engine, row_ids: list, prompts: list, options: SamplingOptions) -> None:
        """Starts sampling for the step `options.step`, unless that has been started already."""
        if options.step in self.pending:
            return
        rollouts: Future = Future()
        self.pending[options.step] = Pending(row_ids, prompts, rollouts)
        # A daemon thread, so that a run that stops does not wait for rollouts that nobody will use.
        threading.Thread(target=_fill, args=(rollouts, engine, prompts, options), name="ahead", daemon=True).start()

    def take(self, step: int, row_ids: list, prompts: list) -> list[Rollout] | None:
        """The rollouts that were sampled for this step, or None if there are none. Raises if sampling failed."""
        self.pending = {other: pending for other, pending in self.pending.items() if other >= step}
        pending = self.pending.get(step)
        if pending is None:
            return None
        if (pending.row_ids, pending.prompts) != (row_ids, prompts):
            if pending.is_resumed:
                del self.pending[step]
                logger.warning(
                    f"step {step + 1}: completed anew, since the checkpoint holds completions of other rows of "
                    "train_dataset, or of other prompts"
                )
                return None
            raise RolloutError(
                f"staleness 1: step {step + 1} learns from rows {row_ids} of train_dataset, but {pending.row_ids}, or "
                "other prompts, were sampled ahead; a row must be the same each time it is read"
            )
        try:
            # Copies, since the checkpoint of a step that fails must hold the rollouts as they were sampled.
            return [replace(rollout) for rollout in pending.rollouts.result()]
        except RolloutError:
            raise
        except Exception as error:
            raise RolloutError(
                f"rollout failed while it sampled ahead (staleness 1): {type(error).__name__}: {error}"
            ) from error

    def wait(self) -> None:
        """Waits until nothing is being sampled."""
        for pending in self.pending.values():
            pending.rollouts.exception()

    def state_dict(self, step: int) -> list[dict[str, Any]]:
        """For the checkpoint of this step: the rollouts that this step and later ones will use. Failed ones are left
        out, and so sampled again after a resume."""
        return [
            {
                "step": number,
                "row_ids": pending.row_ids,
                "prompts": pending.prompts,
                "rollouts": [{name: getattr(each, name) for name in VALUES} for each in pending.rollouts.result()],
            }
            for number, pending in self.pending.items()
            if number >= step and pending.rollouts.exception() is None
        ]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """Restores what `state` gave."""
        self.pending = {}
        for saved in state:
            rollouts: Future = Future()
            rollouts.set_result([Rollout(**values) for values in saved["rollouts"]])
            self.pending[saved["step"]] = Pending(saved["row_ids"], saved["prompts"], rollouts, is_resumed=True)


def _fill(rollouts: Future, engine: Callable, prompts: list, options: SamplingOptions) -> None:
    try:
        rollouts.set_result(engine(prompts, options))
    except BaseException as error:
        rollouts.set_exception(error)
