"""What makes a run survive: `SavingTrainer`, whose checkpoints hold all that a resumed run needs to go on as if it had
never stopped."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from transformers import EarlyStoppingCallback, Trainer, TrainerState
from transformers.trainer_callback import ExportableState

from . import checkpoints
from .interrupts import StopRequest, stopped_by
from .lock import FolderInUse, Lock, settle
from .save_callback import SavesAndStops
from .sharding import keeps_shards
from .states import check_state, other_optimizer, other_weights, unlike


def reads(what: str) -> Callable:
    """For a method that is given the folder of a checkpoint: whatever it raises is a BadCheckpoint."""

    def decorate(method: Callable) -> Callable:
        @functools.wraps(method)
        def reading(self: Any, checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
            try:
                return method(self, checkpoint, *args, **kwargs)
            except checkpoints.BadCheckpoint:
                raise
            except Exception as error:
                if checkpoint is None:
                    raise
                why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                raise checkpoints.BadCheckpoint(checkpoint, f"{what} cannot be loaded: {why}") from error

        return reading

    return decorate


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
        self._locks: dict[Path, Lock] = {}
        super().__init__(*args, **kwargs)
        self.add_callback(SavesAndStops(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `transformers.Trainer.train`. Ctrl-C and SIGTERM end it after a checkpoint, by KeyboardInterrupt and
        `Terminated`; with save_strategy "no", which wants none, at once. A checkpoint that it cannot go on from is a
        ValueError, an output folder that another run writes into a `CheckpointError`."""
        with self.locked():
            return self._train(resume_from_checkpoint, *args, **kwargs)

    def _train(self, resume_from_checkpoint: str | bool | None, *args: Any, **kwargs: Any) -> Any:
        settle(self.args, self._lock(Path(self.args.output_dir)))
        self.saved_step = self.resumed_from = None
        self.metrics.clear()  # of a run of this trainer before
        if resume_from_checkpoint:
            self.resumed_from = os.path.abspath(self._goes_on_from(resume_from_checkpoint))
        if self.args.save_strategy == "no":
            return super().train(self.resumed_from, *args, **kwargs)
        with self.stop.listening(tells=self.args.local_process_index == 0):
            output = super().train(self.resumed_from, *args, **kwargs)
            self.agree()
            if self.stop.agreed:  # too late to stop it, but not what comes after it
                raise stopped_by(self.stop.agreed, f"stopped after step {self.state.global_step}, the last")
            return output

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Inside, no other run may write into the output folder: a `lock.FolderInUse` on every process where one
        does. Every process calls it."""
        with contextlib.ExitStack() as stack:
            error, told = None, None
            if self.args.should_save:
                try:
                    stack.enter_context(self._lock(Path(self.args.output_dir)))
                except FolderInUse as raised:
                    error, told = raised, str(raised)
            found = gather_object([told]) if self.args.world_size > 1 else [told]
            for why in filter(None, found):
                raise FolderInUse(why) from error
            yield

    def _lock(self, folder: Path) -> Lock:
        return self._locks.setdefault(folder.absolute(), Lock(folder))

    def _goes_on_from(self, given: str | bool) -> str:
        """The checkpoint to go on from, whose content one process reads for all."""
        found: list[tuple[str, str | None]] = [("", None)]
        if self.args.process_index == 0:
            folder, why = Path(str(given)), None
            try:
                if given is True:
                    last = checkpoints.last_checkpoint(Path(self.args.output_dir), contents=True)
                    if last is None:
                        why = f"there is no whole checkpoint in {self.args.output_dir}"
                        raise checkpoints.BadCheckpoint("True", why)
                    folder = last
                checkpoints.check(folder, contents=given is not True)
                check_state(folder)
            except checkpoints.BadCheckpoint as error:
                why = error.why
            found = [(str(folder), why)]
        if self.args.world_size > 1:
            broadcast_object_list(found)
        ((checkpoint, why),) = found
        if why is not None:
            raise checkpoints.BadCheckpoint(checkpoint, why)
        return checkpoint

    def agree(self) -> None:
        """Whether any process was asked to stop. All come here together."""
        self.stop.agreed = self.stop.number
        if self.args.world_size > 1:
            number = torch.tensor([self.stop.number], device=self.args.device)
            self.stop.agreed = int(self.accelerator.gather(number).max())

    # A run that goes on

    @reads("its weights")
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        loaded = self.model if model is None else model
        given: set[str] = set()

        def look(module: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
            given.update(state_dict)
            if why := other_weights(module, state_dict):
                raise checkpoints.BadCheckpoint(resume_from_checkpoint, why)

        hook = loaded.register_load_state_dict_pre_hook(look)
        adapters = {} if self.is_fsdp_enabled or not hasattr(loaded, "get_base_model") else loaded.peft_config
        try:
            if not adapters:
                super()._load_from_checkpoint(resume_from_checkpoint, model)
            # The Trainer would take any folder with adapters, such as those of PPO's value, for one more of these.
            active = loaded.active_adapters if adapters else ()
            for name in adapters:
                folder = Path(resume_from_checkpoint) / ("" if name == "default" else name)
                loaded.load_adapter(str(folder), name, is_trainable=name in active)
        finally:
            hook.remove()
        if self.is_fsdp_enabled or any(each.is_prompt_learning for each in adapters.values()):
            return
        # The Trainer and PEFT warn at most. One of tied weights is enough; a model with adapters needs those trained.
        own = loaded.state_dict(keep_vars=True)
        found = {id(own[name]) for name in given & own.keys()}
        missing = [n for n, value in own.items() if id(value) not in found and (not adapters or value.requires_grad)]
        if others := [*missing, *sorted(given - own.keys())]:
            names = ", ".join(others[:5])
            raise checkpoints.BadCheckpoint(resume_from_checkpoint, f"of another model: {names} in one alone")

    @reads("its optimizer and scheduler")
    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return

        def look(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
            if why := other_optimizer(optimizer, state_dict):
                raise checkpoints.BadCheckpoint(checkpoint, why)

        self._check_form(checkpoint, "scheduler.pt", self.lr_scheduler)
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        if not isinstance(optimizer, torch.optim.Optimizer):  # of DeepSpeed
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        if not self.is_fsdp_enabled:
            for name in ("optimizer.pt", "scheduler.pt"):  # without which the Trainer goes on with new ones
                if not (Path(checkpoint) / name).is_file():
                    raise checkpoints.BadCheckpoint(checkpoint, f"it has no {name}")
        hook = optimizer.register_load_state_dict_pre_hook(look)
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        finally:
            hook.remove()

    @reads("its scaler")
    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self._check_form(checkpoint, "scaler.pt", self.accelerator.scaler)
        super()._load_scaler(checkpoint)

    def _check_form(self, checkpoint: str, name: str, loader: Any) -> None:
        file = Path(checkpoint) / name
        if file.is_file() and hasattr(loader, "state_dict"):
            given = torch.load(file, map_location="cpu", weights_only=True)
            if why := unlike(given, loader.state_dict(), name):
                raise checkpoints.BadCheckpoint(checkpoint, why)

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
        best = self.state.best_model_checkpoint
        reads_best = self.args.load_best_model_at_end and best is not None
        if reads_best and (why := checkpoints.fault(Path(best), contents=True)):
            raise checkpoints.CheckpointError(f"load_best_model_at_end: {best} is not a whole checkpoint: {why}")
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

    @reads("its random states")
    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.args.world_size == checkpoints.processes(Path(checkpoint)) == 1:
            (Path(checkpoint) / "rng_state.pth").stat()  # where there is none the Trainer says so and goes on
        super()._load_rng_state(checkpoint)
        if checkpoint is not None:
            place = np.random.get_state(legacy=False)["state"]["pos"]
            if not 0 <= place <= 624:  # it has 624 words, past which numpy would read
                raise ValueError(f"numpy's is at a place that there is not, {place}")
            folder = Path(checkpoint)
            # Of fewer processes, another's: its loss is theirs all the same.
            file = checkpoints.unlogged_file(folder, self.args.process_index % checkpoints.processes(folder))
            # Not by the name of the device: of "cpu:0", which a process of several has, torch does not know.
            unlogged = torch.load(file, map_location="cpu", weights_only=True)
            self._tr_loss, self._total_loss_scalar = unlogged["loss"].to(self.args.device), unlogged["logged_loss"]
            self._globalstep_last_logged = unlogged["last_logged"]
            self.metrics.load(unlogged["metrics"])

    def saved_model(self) -> Any:
        return self.model

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
        lock = self._lock(folder) if self.args.should_save else contextlib.nullcontext()
        with self.stop.finishing(f"the model in {folder}"), lock:
            checkpoints.write_model(folder, self._save_whole, self.args.should_save)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_whole(self, folder: str) -> None:
        if keeps_shards(self.accelerator):  # the Trainer would save nothing
            self._save(folder, state_dict=self.accelerator.get_state_dict(self.model))
        else:
            super().save_model(folder, _internal_call=True)
