"""Completions that are sampled while the trainer learns from the ones before (`staleness=1`)."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, fields, replace
from typing import Any

from transformers.utils import logging

from .engine import Engine, Rollout, RolloutError, SamplingOptions

logger = logging.get_logger(__name__)

VALUES = [field.name for field in fields(Rollout)]  # an engine may note further ones


@dataclass
class Batch:
    """Of this process."""

    row_ids: list
    prompts: list
    rollouts: Future
    is_resumed: bool = False


class SampledAhead:
    """Batches of completions by the optimizer step that they are for, each sampled in a thread of its own."""

    def __init__(self) -> None:
        self.batches: dict[int, Batch] = {}

    def start(self, engine: Engine, row_ids: list, prompts: list, options: SamplingOptions) -> None:
        """Samples what is for the step `options.step`, unless that is there already."""
        if options.step in self.batches:
            return
        rollouts: Future = Future()
        self.batches[options.step] = Batch(row_ids, prompts, rollouts)
        # A daemon: a run that stops does not wait for what nobody will use.
        threading.Thread(target=_fill, args=(rollouts, engine, prompts, options), name="ahead", daemon=True).start()

    def take(self, step: int, row_ids: list, prompts: list) -> list[Rollout] | None:
        """What was sampled for this step, or None if nothing was. What failed is raised here."""
        self.batches = {other: batch for other, batch in self.batches.items() if other >= step}
        batch = self.batches.get(step)
        if batch is None:
            return None
        if (batch.row_ids, batch.prompts) != (row_ids, prompts):
            if batch.is_resumed:
                del self.batches[step]
                logger.warning(
                    f"step {step + 1}: completed anew, since the checkpoint holds completions of other rows of "
                    "train_dataset, or of other prompts"
                )
                return None
            raise RolloutError(
                f"staleness 1: step {step + 1} learns from rows {row_ids} of train_dataset, but {batch.row_ids}, or "
                "other prompts, were sampled ahead; a row must be the same each time it is read"
            )
        try:
            # The checkpoint of a step that fails must hold them as they were sampled.
            return [replace(rollout) for rollout in batch.rollouts.result()]
        except RolloutError:
            raise
        except Exception as error:
            raise RolloutError(
                f"rollout failed while it sampled ahead (staleness 1): {type(error).__name__}: {error}"
            ) from error

    def wait(self) -> None:
        """Until nothing is being sampled."""
        for batch in self.batches.values():
            batch.rollouts.exception()

    def state(self, step: int) -> list[dict[str, Any]]:
        """For a checkpoint of this step: what it and later ones have not used yet. What failed is sampled anew."""
        return [
            {
                "step": number,
                "row_ids": batch.row_ids,
                "prompts": batch.prompts,
                "rollouts": [{name: getattr(each, name) for name in VALUES} for each in batch.rollouts.result()],
            }
            for number, batch in self.batches.items()
            if number >= step and batch.rollouts.exception() is None
        ]

    def load(self, state: list[dict[str, Any]]) -> None:
        self.batches = {}
        for saved in state:
            rollouts: Future = Future()
            rollouts.set_result([Rollout(**values) for values in saved["rollouts"]])
            self.batches[saved["step"]] = Batch(saved["row_ids"], saved["prompts"], rollouts, is_resumed=True)


def _fill(rollouts: Future, engine: Callable, prompts: list, options: SamplingOptions) -> None:
    try:
        rollouts.set_result(engine(prompts, options))
    except BaseException as error:
        rollouts.set_exception(error)
