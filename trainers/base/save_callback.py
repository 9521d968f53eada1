"""When a run saves, and when it stops because it was asked to."""

import tempfile
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, TrainerCallback

from . import checkpoints
from .interrupts import stopped_by


class SavesAndStops(TrainerCallback):
    """Comes after the callbacks that decide what a step ends with. A run that was asked to stop does so when it has
    saved; and what is saved after the last step of an epoch is saved at the end of the epoch, whose log and evaluation
    a resumed run would not come back to."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.in_step = self.is_held = False

    def _decide(self, state: Any, control: Any) -> None:
        control.should_save |= bool(self.trainer.stop.agreed)
        if not self.in_step or not control.should_save:
            return
        if state.epoch == int(state.epoch) or control.should_training_stop or control.should_epoch_stop:
            control.should_save, self.is_held = False, True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.in_step = self.is_held = False
        self.trainer.begun_after = state.global_step
        if args.save_strategy != "no":
            check_generation_config(self.trainer.model_parts()[""])
        resumed = self.trainer.resumed_from
        # The run before may have ended before it removed its oldest; a later one of its stays until this run has saved.
        if resumed is not None and checkpoints.whole_checkpoints(Path(args.output_dir))[-1:] == [Path(resumed)]:
            self.trainer.rotate(Path(resumed))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.world_size == 1:
            self.trainer.agree()
        self.in_step = True
        self._decide(state, control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.stop.listens:
            self.trainer.agree()
            self._decide(state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save |= self.is_held
        self.in_step = self.is_held = False

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.trainer.stop.listens:
            return
        self.trainer.agree()
        if self.trainer.stop.agreed:
            folder = self.trainer.checkpoint_folder()
            raise stopped_by(
                self.trainer.stop.agreed,
                f"stopped after step {state.global_step} of {state.max_steps}; resume_from_checkpoint={folder} goes on",
            )


def check_generation_config(model: Any) -> None:
    """Raises a ValueError if the generation config could not be saved with a checkpoint: transformers refuses to save
    one that is invalid, and its Trainer sets the special tokens of the tokenizer in it."""
    config = getattr(model, "generation_config", None)
    if not isinstance(config, GenerationConfig) or hasattr(model, "peft_config"):  # adapters are saved alone
        return
    try:
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
    except OSError:  # the config is not at fault
        return
    except ValueError as error:
        raise ValueError(f"generation_config of the model cannot be saved: {' '.join(str(error).split())}") from error
