"""What makes a run survive: `SavingTrainer`, whose checkpoints hold all that a resumed run needs to go on as if it had
never stopped."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState

from . import checkpoints
from .interrupts import StopRequest, stopped_by
from .sharding import keeps_shards


class SavingTrainer(Trainer):
    """`transformers.Trainer` with checkpoints that are whole or not there (`checkpoints`), from which a run goes on bit
    for bit, its logs included; and which Ctrl-C and SIGTERM ask to save and stop.

    A subclass with a state of its own saves it in `_save_rng_state` and loads it in `_load_rng_state`, which every
    process calls."""

    args: Any
    metrics: Any
    #: The checkpoint that this run goes on from.
    resumed_from: str | None = None
    #: The step at which this run saved last.
    saved_step: int | None = None
    #: The last step before this run.
    begun_after: int = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.stop = StopRequest()
        super().__init__(*args, **kwargs)
        self.add_callback(SavesAndStops(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `transformers.Trainer.train`. Ctrl-C and SIGTERM end it after a checkpoint, by KeyboardInterrupt and
        `Terminated`; with save_strategy "no", which wants none, at once."""
        output_dir = Path(self.args.output_dir)
        settle(self.args)
        self.saved_step = self.resumed_from = None
        self.metrics.clear()  # of a run of this trainer before
        if resume_from_checkpoint is True:
            last = checkpoints.last_checkpoint(output_dir)
            if last is None:
                raise ValueError(f"resume_from_checkpoint True: there is no whole checkpoint in {output_dir}")
            self.resumed_from = str(last)
        elif resume_from_checkpoint:
            self.resumed_from = str(resume_from_checkpoint)
        if self.resumed_from is not None:
            checkpoints.check(Path(self.resumed_from))
        if self.args.save_strategy == "no":
            return super().train(self.resumed_from, *args, **kwargs)
        with self.stop.listening(tells=self.args.local_process_index == 0):
            output = super().train(self.resumed_from, *args, **kwargs)
            self.agree()
            if self.stop.agreed:  # too late to stop it, but not what comes after it
                raise stopped_by(self.stop.agreed, f"stopped after step {self.state.global_step}, the last")
            return output

    def agree(self) -> None:
        """Whether any process was asked to stop. All come here together."""
        self.stop.agreed = self.stop.number
        if self.args.world_size > 1:
            number = torch.tensor([self.stop.number], device=self.args.device)
            self.stop.agreed = int(self.accelerator.gather(number).max())

    # A run that goes on

    def _load_callback_state(self) -> None:
        """Into the callbacks that there are. The Trainer would put new ones in their place, and only if asked to."""
        for name, saved in self.state.stateful_callbacks.items():
            present = [each for each in self.callback_handler.callbacks if type(each).__name__ == name]
            for callback, state in zip(present, saved if isinstance(saved, list) else [saved], strict=False):
                vars(callback).update(state["attributes"])

    def _is_done(self) -> bool:
        stopped_early = any(
            isinstance(each, EarlyStoppingCallback)
            and each.early_stopping_patience_counter >= each.early_stopping_patience
            for each in self.callback_handler.callbacks
        )
        return self.resumed_from is not None and (stopped_early or self.state.global_step >= self.state.max_steps)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self._is_done():  # the Trainer would take one more step
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        if skip_scheduler and self.resumed_from is not None:
            return {}  # eval_on_start: the run that it goes on from has done it
        return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)

    def _finalize_training(self, *args: Any) -> Any:
        if self.resumed_from is not None and self.state.global_step == self.begun_after:
            self._load_rng_state(self.resumed_from)  # there was no step to do it before
        output = super()._finalize_training(*args)
        return output._replace(training_loss=output.metrics["train_loss"])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "train_loss" in logs:  # over all steps, also those before this run was resumed
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        super().log(logs, start_time)

    def before_step(self) -> Callable[[], None]:
        """Remembers what a step changes before its loss is known; calling the result puts it back."""
        seen, metrics = self.state.num_input_tokens_seen, self.metrics.state()

        def restore() -> None:
            self.state.num_input_tokens_seen = seen
            self.metrics.load(metrics)

        return restore

    # Checkpoints

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        unlogged = {
            "loss": self._tr_loss,
            "logged_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "metrics": self.metrics.state(),
        }
        torch.save(unlogged, checkpoints.unlogged_file(Path(output_dir), self.args.process_index))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is not None:
            folder = Path(checkpoint)
            # Of fewer processes, another's: its loss is theirs all the same.
            file = checkpoints.unlogged_file(folder, self.args.process_index % checkpoints.processes(folder))
            # Not by the name of the device: of "cpu:0", which a process of several has, torch does not know.
            unlogged = torch.load(file, map_location="cpu", weights_only=True)
            self._tr_loss, self._total_loss_scalar = unlogged["loss"].to(self.args.device), unlogged["logged_loss"]
            self._globalstep_last_logged = unlogged["last_logged"]
            self.metrics.load(unlogged["metrics"])

    def checkpoint_folder(self) -> Path:
        return Path(self._get_output_dir(trial=None)) / f"checkpoint-{self.state.global_step}"

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.store_flos()
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        best = folder.with_name(f"checkpoint-{self.state.best_global_step}")
        if self.state.best_global_step and (best == folder or checkpoints.is_whole(best)):
            self.state.best_model_checkpoint = str(best)
        parts: list[Callable[[str], Any]] = [self._save_weights]
        if not self.args.save_only_model or self.stop.agreed:  # what was asked to stop can go on
            parts += [self._save_optimizer_and_scheduler, self._save_scaler, self._save_rng_state]
        parts.append(self._save_state)
        with self.stop.finishing(str(folder)):
            checkpoints.write(folder, parts, self.args)
        self.saved_step = self.state.global_step
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))
        self.rotate(folder)

    def rotate(self, last: Path) -> None:
        if self.args.should_save:
            kept = [last, *([Path(each)] if (each := self.state.best_model_checkpoint) else [])]
            checkpoints.rotate(last.parent, self.args.save_total_limit, kept)

    def _save_weights(self, folder: str) -> None:
        self.save_model(folder, _internal_call=True)

    def _save_state(self, folder: str) -> None:
        if not self.args.should_save:
            return
        stateful = [each for each in self.callback_handler.callbacks if isinstance(each, ExportableState)]
        self.state.stateful_callbacks = TrainerState(stateful_callbacks=[*stateful, self.control]).stateful_callbacks
        self.state.save_to_json(str(Path(folder) / "trainer_state.json"))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `transformers.Trainer.save_model`, whole or not at all: see `checkpoints.write_model`."""
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        if checkpoints.is_hidden(folder):
            self._save_whole(str(folder))
            return
        with self.stop.finishing(f"the model in {folder}"):
            checkpoints.write_model(folder, self._save_whole, self.args.should_save)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_whole(self, folder: str) -> None:
        if keeps_shards(self.accelerator):  # the Trainer would save nothing
            self._save(folder, state_dict=self.accelerator.get_state_dict(self.model))
        else:
            super().save_model(folder, _internal_call=True)


def settle(args: Any) -> None:
    """`checkpoints.settle` of the output folder, by the process that writes there; the others wait."""
    state = PartialState()
    try:
        if args.should_save:
            checkpoints.settle(Path(args.output_dir))
    finally:
        state.wait_for_everyone()


class SavesAndStops(TrainerCallback):
    """Comes after the callbacks that decide what a step ends with. A run that was asked to stop does so when it has
    saved; and what is saved after the last step of an epoch is saved at the end of the epoch, whose log and evaluation
    a resumed run would not come back to."""

    def __init__(self, trainer: SavingTrainer) -> None:
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
        resumed = self.trainer.resumed_from
        # The run before may not have come to it. One of its later ones stays until this run has saved.
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
