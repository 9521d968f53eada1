"""`HFTrainer`: the only file that overrides or calls private methods of `transformers.Trainer`.

A run survives here: its checkpoints hold all that a resumed run needs to go on as if it had never stopped."""

import contextlib
import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, Sampler
from transformers import EarlyStoppingCallback, Trainer, TrainerState
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_callback import ExportableState
from transformers.utils import SAFE_WEIGHTS_NAME

from . import checkpoints
from .hf_private import verify
from .interrupts import StopRequest, stopped_by
from .kept import Kept, State, reading
from .lock import FolderInUse, Lock, settle
from .metrics import Metrics
from .resuming import checkpoint_to_resume
from .rows import NumberedRows
from .save_callback import SavesAndStops
from .sharding import keeps_shards
from .states import other_optimizer, other_weights, unlike

verify(Trainer)


class HFTrainer(Trainer):
    """`transformers.Trainer` with public hooks in place of its private methods.

    Its checkpoints are whole or not there (`checkpoints`); from one a run goes on bit for bit, its logs included; and
    Ctrl-C and SIGTERM ask it to save and stop.

    A subclass overrides `train_sampler`, `eval_sampler` and `model_parts`, sets `train_batch_size` and `columns`, and
    registers with `keep` what else of a run has state. One batch of the dataloader is one optimizer step: transformers'
    loop reads `args.gradient_accumulation_steps` as 1, and everybody else as it was given.

    Args:
        model, args: as for `transformers.Trainer`; args are copied.
        **kwargs: of `transformers.Trainer`.
    """

    args: Any
    #: Columns of the dataset that remove_unused_columns keeps.
    columns: tuple[str, ...] = ()
    #: The checkpoint that this run goes on from.
    resumed_from: str | None = None
    #: The step at which this run saved last.
    saved_step: int | None = None
    #: The last step before this run.
    begun_after: int = 0

    def __init__(self, model: nn.Module, args: Any, **kwargs: Any) -> None:
        self.stop = StopRequest()
        self._locks: dict[Path, Lock] = {}
        #: What a checkpoint keeps besides the model and what transformers keeps, in the order in which it is loaded.
        self.kept: list[Any] = []
        self.accumulation_steps = args.gradient_accumulation_steps
        args = copy.copy(args)
        args.output_dir = os.path.abspath(args.output_dir)  # the current folder is a matter of the user's functions
        if args.data_seed is None:
            # All processes shuffle alike, whose random numbers differ; so does a resumed run, whatever was before it.
            args.data_seed = args.seed
        super().__init__(model=model, args=args, **kwargs)
        call_event = self.callback_handler.call_event

        def call_event_as_given(*args: Any, **kwargs: Any) -> Any:
            with self._accumulating(self.accumulation_steps):
                return call_event(*args, **kwargs)

        self.callback_handler.call_event = call_event_as_given
        #: Rows of one batch of the training dataloader, which is one optimizer step, on this process.
        self.train_batch_size = self.args.train_batch_size * self.accumulation_steps
        self.metrics = Metrics(self.accelerator.device)
        self.keep("unlogged_{process}.pth", State(self._unlogged, self._load_unlogged), "its unlogged metrics")
        self.add_callback(SavesAndStops(self))

    # The hooks

    def train_sampler(self) -> Sampler | None:
        return super()._get_train_sampler(self.train_dataset)

    def eval_sampler(self, eval_dataset: Any) -> Sampler | None:
        return super()._get_eval_sampler(eval_dataset)

    def model_parts(self) -> dict[str, nn.Module]:
        """What is saved and loaded as models, by its folder in a checkpoint."""
        return {"": self.model}

    def keep(self, file: str, owner: Any, what: str) -> None:
        """Makes the state of `owner` a file of each checkpoint, see `kept.Kept`."""
        self.kept.append(Kept(file, owner, what))

    def save_checkpoint(self) -> None:
        """Writes a checkpoint of now. Every process calls it."""
        self._save_checkpoint(self.model, trial=None)

    # Data: a batch of the dataloader is what one optimizer step learns from.

    def _get_dataloader(
        self,
        dataset: Any,
        description: str,
        batch_size: int,
        sampler_fn: Callable | None = None,
        is_training: bool = False,
        dataloader_key: str | None = None,
    ) -> DataLoader:
        size = self.train_batch_size if is_training else batch_size
        return super()._get_dataloader(
            NumberedRows(dataset), description, size, sampler_fn, is_training, dataloader_key
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        return self.train_sampler()

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler | None:
        return self.eval_sampler(eval_dataset)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = [*self.columns, "_row_id"]

    # transformers' loop reads gradient_accumulation_steps as 1, everybody else as it was given

    @contextlib.contextmanager
    def _accumulating(self, steps: int) -> Iterator[None]:
        """Inside, `self.args.gradient_accumulation_steps` is `steps`."""
        before, self.args.gradient_accumulation_steps = self.args.gradient_accumulation_steps, steps
        try:
            yield
        finally:
            self.args.gradient_accumulation_steps = before

    def create_accelerator_and_postprocess(self) -> None:
        with self._accumulating(1):  # DeepSpeed's engine would divide each loss by the number
            super().create_accelerator_and_postprocess()

    def set_initial_training_values(self, *args: Any, **kwargs: Any) -> Any:
        with self._accumulating(1):
            return super().set_initial_training_values(*args, **kwargs)

    def get_total_train_batch_size(self, args: Any) -> int:
        with self._accumulating(self.accumulation_steps):
            return super().get_total_train_batch_size(args)

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        with self._accumulating(1):
            return super()._init_training_state(*args, **kwargs)

    # A run

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `transformers.Trainer.train`. Ctrl-C and SIGTERM end it after a checkpoint, by KeyboardInterrupt and
        `Terminated`; with save_strategy "no", which wants none, at once. A checkpoint that it cannot go on from is a
        ValueError, an output folder that another run writes into a `CheckpointError`."""
        with self.locked():
            return self._train(resume_from_checkpoint, *args, **kwargs)

    def _train(self, resume_from_checkpoint: str | bool | None, *args: Any, **kwargs: Any) -> Any:
        settle(self.args, self._lock(Path(self.args.output_dir)))
        self.saved_step = self.resumed_from = None
        self.metrics.clear()  # those of an earlier run of this trainer
        if resume_from_checkpoint:
            self.resumed_from = os.path.abspath(checkpoint_to_resume(resume_from_checkpoint, self.args))
        if self.args.save_strategy == "no":
            return super().train(self.resumed_from, *args, **kwargs)
        with self.stop.listening(tells=self.args.local_process_index == 0):
            output = super().train(self.resumed_from, *args, **kwargs)
            self.agree()
            if self.stop.agreed:  # too late to stop this run, but not what comes after it
                raise stopped_by(self.stop.agreed, f"stopped after step {self.state.global_step}, the last")
            return output

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Inside, no other run may write into the output folder: if one does, every process gets a
        `lock.FolderInUse`. Every process calls it."""
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

    def agree(self) -> None:
        """Whether any process was asked to stop. All come here together."""
        self.stop.agreed = self.stop.number
        if self.args.world_size > 1:
            number = torch.tensor([self.stop.number], device=self.args.device)
            self.stop.agreed = int(self.accelerator.gather(number).max())

    # A run that goes on

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        # With FSDP a checkpoint holds all parts in one.
        parts = {"": self.model if model is None else model} if self.is_fsdp_enabled else self.model_parts()
        for name, part in parts.items():
            folder = str(Path(resume_from_checkpoint) / name)
            with reading(folder, "its weights"):
                self._load_part(folder, part)

    def _load_part(self, folder: str, part: Any) -> None:
        given: set[str] = set()

        def look(module: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
            given.update(state_dict)
            if why := other_weights(module, state_dict):
                raise checkpoints.BadCheckpoint(folder, why)

        hook = part.register_load_state_dict_pre_hook(look)
        adapters = {} if self.is_fsdp_enabled or not hasattr(part, "get_base_model") else part.peft_config
        try:
            if not adapters:
                super()._load_from_checkpoint(folder, part)
            # The Trainer would take any folder with adapters, such as those of PPO's value, for one more of these.
            active = part.active_adapters if adapters else ()
            for name in adapters:
                adapter = Path(folder) / ("" if name == "default" else name)
                part.load_adapter(str(adapter), name, is_trainable=name in active)
        finally:
            hook.remove()
        if self.is_fsdp_enabled or any(each.is_prompt_learning for each in adapters.values()):
            return
        # The Trainer and PEFT warn at most. One of tied weights is enough; a model with adapters needs those trained.
        own = part.state_dict(keep_vars=True)
        found = {id(own[name]) for name in given & own.keys()}
        missing = [n for n, value in own.items() if id(value) not in found and (not adapters or value.requires_grad)]
        if others := [*missing, *sorted(given - own.keys())]:
            raise checkpoints.BadCheckpoint(folder, f"of another model: {', '.join(others[:5])} in one alone")

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or [*self.model_parts()] == [""]:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        with reading(checkpoint, "its optimizer and scheduler"):
            self._check_form(checkpoint, "scheduler.pt", self.lr_scheduler)
            optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
            if not isinstance(optimizer, torch.optim.Optimizer):  # DeepSpeed's
                super()._load_optimizer_and_scheduler(checkpoint)
                return
            if not self.is_fsdp_enabled:
                for name in ("optimizer.pt", "scheduler.pt"):  # without which the Trainer goes on with new ones
                    if not (Path(checkpoint) / name).is_file():
                        raise checkpoints.BadCheckpoint(checkpoint, f"it has no {name}")

            def look(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
                if why := other_optimizer(optimizer, state_dict):
                    raise checkpoints.BadCheckpoint(checkpoint, why)

            hook = optimizer.register_load_state_dict_pre_hook(look)
            try:
                super()._load_optimizer_and_scheduler(checkpoint)
            finally:
                hook.remove()

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        with reading(checkpoint, "its scaler"):
            self._check_form(checkpoint, "scaler.pt", self.accelerator.scaler)
            super()._load_scaler(checkpoint)

    def _check_form(self, checkpoint: str, name: str, loader: Any) -> None:
        file = Path(checkpoint) / name
        if file.is_file() and hasattr(loader, "state_dict"):
            given = torch.load(file, map_location="cpu", weights_only=True)
            if why := unlike(given, loader.state_dict(), name):
                raise checkpoints.BadCheckpoint(checkpoint, why)

    def _load_callback_state(self) -> None:
        """Loads into the callbacks that there are; the Trainer would replace them, and only if asked to."""
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
            return
        with self._accumulating(1):
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

    def _track_num_input_tokens(self, inputs: Any) -> None:
        pass  # counted where the tokens are made

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # a training log, not an evaluation's or the final summary
            logs.update(self.metrics.flush(self.accelerator), num_tokens=self.state.num_input_tokens_seen)
        if "train_loss" in logs:  # over all steps, also those before this run was resumed
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        super().log(logs, start_time)

    # Checkpoints

    def _unlogged(self) -> dict[str, Any]:
        return {
            "loss": self._tr_loss,
            "logged_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "metrics": self.metrics.state_dict(),
        }

    def _load_unlogged(self, unlogged: Any) -> None:
        # If fewer ranks saved, this may be another rank's: the loss was already reduced.
        self._tr_loss, self._total_loss_scalar = unlogged["loss"].to(self.args.device), unlogged["logged_loss"]
        self._globalstep_last_logged = unlogged["last_logged"]
        self.metrics.load_state_dict(unlogged["metrics"])

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        for each in self.kept:
            each.save(Path(output_dir), self.args.process_index, self.args.should_save)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        with reading(checkpoint, "its random states"):
            if self.args.world_size == checkpoints.processes(Path(checkpoint)) == 1:
                (Path(checkpoint) / "rng_state.pth").stat()  # where there is none the Trainer says so and goes on
            super()._load_rng_state(checkpoint)
            place = np.random.get_state(legacy=False)["state"]["pos"]
            if not 0 <= place <= 624:  # it has 624 words, past which numpy would read
                raise ValueError(f"numpy's is at a place that there is not, {place}")
        for each in self.kept:
            with reading(checkpoint, each.what):
                each.load(Path(checkpoint), self.args.process_index)

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

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        with self._accumulating(self.accumulation_steps):  # which training_args.bin shows
            for name, part in self.model_parts().items():
                if part is self.model:
                    super()._save(str(folder), state_dict)
                elif self.args.should_save:
                    self._save_part(folder / name, part, state_dict)

    def _save_part(self, folder: Path, part: Any, state_dict: dict | None) -> None:
        """As `transformers.Trainer._save` saves the model; state_dict is that of the whole."""
        if state_dict is not None:
            prefix = next(name for name, module in self.model.named_modules() if module is part) + "."
            own = (name for name in state_dict if name.startswith(prefix))
            state_dict = {name.removeprefix(prefix): state_dict[name] for name in own}
        folder.mkdir(parents=True, exist_ok=True)
        if hasattr(part, "save_pretrained"):
            part.save_pretrained(folder, state_dict=state_dict)
        else:
            weights = part.state_dict() if state_dict is None else state_dict
            save_file(weights, folder / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
        self.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / TRAINING_ARGS_NAME)
