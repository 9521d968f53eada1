"""Which checkpoint a run goes on from."""

from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import TrainerState

from .checkpoints import BadCheckpoint, check, last_checkpoint
from .states import unlike


def checkpoint_to_resume(given: str | bool, args: Any) -> str:
    """The folder that was given, or for True the last whole one; one process reads its content for all."""
    found: list[tuple[str, str | None]] = [("", None)]
    if args.process_index == 0:
        folder, why = Path(str(given)), None
        try:
            if given is True:
                last = last_checkpoint(Path(args.output_dir), contents=True)
                if last is None:
                    raise BadCheckpoint("True", f"there is no whole checkpoint in {args.output_dir}")
                folder = last
            check(folder, contents=given is not True)
            check_state(folder)
        except BadCheckpoint as error:
            why = error.why
        found = [(str(folder), why)]
    if args.world_size > 1:
        broadcast_object_list(found)
    ((checkpoint, why),) = found
    if why is not None:
        raise BadCheckpoint(checkpoint, why)
    return checkpoint


def check_state(checkpoint: Path) -> None:
    """Raises BadCheckpoint if trainer_state.json is not the state of a Trainer."""
    try:
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        own = TrainerState(train_batch_size=1, epoch=0.0)
        why = unlike(vars(state), vars(own), "state")
        if why is None and not all(isinstance(each, dict) for each in state.log_history):
            why = "state.log_history must be a list of objects"
        for name, saved in state.stateful_callbacks.items() if why is None else ():
            for each in saved if isinstance(saved, list) else [saved]:
                if not isinstance(each, dict) or not isinstance(each.get("attributes"), dict):
                    why = f"state.stateful_callbacks.{name} has no attributes"
        if why is None and not 0 <= state.global_step == int(state.global_step):
            why = f"state.global_step must be a whole number, at least 0; got {state.global_step}"
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if why is not None:
        raise BadCheckpoint(checkpoint, f"its trainer_state.json cannot be read: {why}")
