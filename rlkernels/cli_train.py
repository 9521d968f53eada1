"""Runs a training command, called by `cli.main`: checks the arguments, builds the trainer, trains and saves.

`train` is the whole of it; the functions above it prepare its arguments, those below clean up.
"""

import importlib
import logging
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import datasets
import torch.distributed
import transformers
from transformers import TrainerCallback

from rlkernels import cli_data, trainers
from rlkernels.cli_commands import COMMANDS, RunArguments
from rlkernels.cli_errors import BadValue, Stopped, local_rank, show
from rlkernels.cli_options import parse_run
from rlkernels.trainers.base import checkpoints, lock
from rlkernels.trainers.rewards.calls import text_of
from rlkernels.trainers.rewards.process_settings import restored


def load_rows(run: RunArguments, split: str, online: bool) -> Any:
    try:
        rows = cli_data.load_split(run.dataset, run.dataset_config, split)
        if online:
            cli_data.check_prompts(rows)
    except (ValueError, OSError) as error:
        raise BadValue(f"--dataset {run.dataset}: {show(error)}") from error
    return rows


def import_reward(name: str) -> Callable:
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise BadValue(f"--reward {name}: want module:function")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        with restored():
            function = getattr(importlib.import_module(module_name), attribute, None)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # also SystemExit, which would end the command without an error
        told = text_of(error, show)
        raise BadValue(f"--reward {name}: cannot import module '{module_name}': {told}") from error
    if function is None:
        raise BadValue(f"--reward {name}: module '{module_name}' has no function '{attribute}'")
    if not callable(function) or isinstance(function, type):
        kind = "class" if isinstance(function, type) else type(function).__name__
        raise BadValue(f"--reward {name}: '{attribute}' is a {kind}, not a function")
    return function


def rewards_of(run: Any) -> list[Any]:
    rewards: list[Any] = [import_reward(name) for name in run.reward or []]
    if getattr(run, "reward_model", None) is not None:
        rewards.append(run.reward_model)
    if not rewards:
        raise BadValue("one of the arguments --reward, --reward_model is required")
    return rewards


def adapter(run: RunArguments, task_type: str) -> Any:
    if not run.use_peft:
        for option in fields(RunArguments):
            if option.name.startswith("lora_") and getattr(run, option.name) != option.default:
                raise BadValue(f"--{option.name}: needs --use_peft")
        return None
    try:
        from peft import LoraConfig  # an optional package
    except ModuleNotFoundError as error:
        raise BadValue("--use_peft: peft is not installed") from error
    targets = run.lora_target_modules
    if targets is not None and len(targets) == 1:
        try:
            re.compile(targets[0])
        except re.error as error:
            raise BadValue(f"--lora_target_modules {targets[0]}: not a name, nor a pattern: {error}") from error
    return LoraConfig(
        task_type=task_type,
        r=run.lora_r,
        lora_alpha=run.lora_alpha,
        lora_dropout=run.lora_dropout,
        # A single name is passed as text, which PEFT reads as a pattern or as a word such as all-linear.
        target_modules=targets[0] if targets is not None and len(targets) == 1 else targets,
    )


# The output folder


def checkpoint_to_resume(config: Any) -> str | bool | None:
    """What `Trainer.train` takes as resume_from_checkpoint: a folder, True for the last one, or None."""
    given, output_dir = config.resume_from_checkpoint, Path(config.output_dir)
    try:
        lock.settle(config)
    except checkpoints.CheckpointError as error:
        raise BadValue(f"--{error}") from error
    if given is None:
        if earlier := checkpoints.numbered(output_dir):
            raise BadValue(
                f"--output_dir {output_dir}: holds {earlier[-1].name} of an earlier run; want another folder, "
                "or --resume_from_checkpoint True to go on from there"
            )
        return None
    if given == "True":  # the last checkpoint, as for transformers.Trainer
        # last_checkpoint raises an error that says why the checkpoints there cannot be used.
        if not checkpoints.whole_checkpoints(output_dir) and checkpoints.last_checkpoint(output_dir) is None:
            raise BadValue(f"--resume_from_checkpoint True: no whole checkpoint in --output_dir {output_dir}")
        return True
    try:
        checkpoints.check(Path(given))
    except ValueError as error:
        raise BadValue(f"--{error}") from error
    return given


def make_folder(folder: Path) -> list[Path]:
    """Makes the folder and checks that it can be written to. Returns those of it and its parents that were new."""
    if local_rank() > 0:  # the machine's first process makes and removes it
        return []
    made = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        remove_empty(made)
        raise BadValue(f"--output_dir {folder}: cannot be written to: {error.strerror}") from error
    return made


def remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        if os.path.isdir(folder) and not any(folder.iterdir()):
            folder.rmdir()


def close_progress_bars(trainer: Any) -> None:
    """Closes the progress bars, which would otherwise overwrite the next message and print again when collected."""
    for callback in trainer.callback_handler.callbacks:
        for name in ("prediction_bar", "training_bar"):
            bar = getattr(callback, name, None)
            if bar is not None:
                bar.close()


def progress(trainer: Any) -> str:
    """Text that says how far a run has come and which checkpoint goes on from there."""
    saved = checkpoints.whole_checkpoints(Path(trainer.args.output_dir))
    kept = f"--resume_from_checkpoint {saved[-1]} goes on" if saved else "there is no checkpoint yet"
    return f"after step {trainer.state.global_step} of {trainer.state.max_steps}; {kept}"


def train(name: str, arguments: list[str]) -> None:
    """Runs a command of COMMANDS. Nothing is written before all arguments have been checked."""
    if local_rank() > 0:
        silence()
    command = COMMANDS[name]
    run, config = parse_run(name, getattr(trainers, f"{command.method}Config"), arguments)
    checkpoint = checkpoint_to_resume(config)
    rewards = [rewards_of(run)] if command.online else []
    train_dataset = load_rows(run, run.dataset_train_split, command.online)
    eval_dataset = load_rows(run, run.dataset_test_split, command.online) if config.eval_strategy != "no" else None
    options = {role: getattr(run, role) for role in ("ref_model", "value_model") if hasattr(run, role)}
    options["peft_config"] = adapter(run, command.task_type)
    first = FirstStep()
    options["callbacks"] = [first]
    build = getattr(trainers, f"{command.method}Trainer")

    # Absolute, since the user's functions may change the current folder.
    output_dir, trainer = Path(os.path.abspath(config.output_dir)), None
    made = [folder.absolute() for folder in make_folder(Path(config.output_dir))]

    def told(text: object) -> str:
        """The text with paths as the user gave them, not absolute."""
        for given in (checkpoint, config.output_dir):
            if isinstance(given, str):
                text = str(text).replace(os.path.abspath(given), str(Path(given)))
        return str(text)

    try:
        trainer = checked(build, run.model, *rewards, config, train_dataset, eval_dataset, **options)
        with trainer.locked():
            trainer.train(resume_from_checkpoint=checkpoint)
            trainer.save_model()
    except BaseException as error:
        has_begun = trainer is not None and trainer.state.global_step > 0
        in_use = isinstance(error, lock.FolderInUse)  # the files in it are another run's
        if output_dir in made and not (has_begun or in_use or checkpoints.whole_checkpoints(output_dir)):
            shutil.rmtree(output_dir, ignore_errors=True)  # holds only what loggers wrote at the start
        remove_empty(made)
        if trainer is None:
            raise
        if isinstance(error, KeyboardInterrupt | trainers.Terminated):
            close_progress_bars(trainer)
            leave_process_group()
            if isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(f"interrupted {told(progress(trainer))}") from error
            raise Stopped(f"terminated {told(progress(trainer))}", error.code) from error
        known = trainers.CheckpointError | trainers.RewardError | trainers.RolloutError | trainers.NonFiniteLoss
        if isinstance(error, known):
            close_progress_bars(trainer)
            raise BadValue(told(error)) from error
        if isinstance(error, checkpoints.BadCheckpoint):
            raise BadValue(f"--{told(error)}") from error
        if checkpoint is not None and not first.begun:
            raise BadValue(f"--resume_from_checkpoint {checkpoint}: {show(error)}") from error
        if isinstance(error, REFUSALS) and not first.begun:  # for example, the optimizer refused an option
            raise BadValue(show(error)) from error
        raise
    if trainer.is_world_process_zero():
        print(f"saved in {config.output_dir}")
    leave_process_group()


def leave_process_group() -> None:
    """Ends this process's part in the process group. Its threads could otherwise abort Python's shutdown."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def silence() -> None:
    """Turns off messages and progress bars in a process that is not the first of its machine."""
    for library in (transformers, datasets):
        library.logging.set_verbosity_error()
        library.logging.disable_progress_bar()
    logging.getLogger("rlkernels").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


class FirstStep(TrainerCallback):
    """Notes whether a first step was begun. Before it, errors come from the arguments or from the checkpoint."""

    begun = False

    def on_step_begin(self, *args: Any, **options: Any) -> None:
        self.begun = True


# Exceptions that mean, before the first step, that an argument was refused. Later ones are defects of ours.
REFUSALS = (ValueError, TypeError, OSError, ImportError, RuntimeError)


def checked(build: Callable, *args: Any, **options: Any) -> Any:
    """Builds the trainer. An argument that it refuses becomes a BadValue."""
    try:
        return build(*args, **options)
    except REFUSALS as error:
        of_peft = type(error).__module__.startswith("peft.")
        raise BadValue("--lora_target_modules: " * of_peft + show(error)) from error
