"""`rlkernels sft|reward|dpo|ppo|grpo`: one table of what the commands are, and the one way in which they all run."""

import argparse
import difflib
import importlib
import json
import logging
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

from rlkernels import cli_data


class BadValue(Exception):
    """A value given by the user, told in one line; everything else keeps its traceback."""


class Stopped(Exception):
    """SIGTERM, as which Ctrl-C is a KeyboardInterrupt: a line, and an exit code."""


def local_rank() -> int:
    """Of this process on its machine, under torchrun and accelerate."""
    return int(os.environ.get("LOCAL_RANK", 0))


def show(error: BaseException) -> str:
    """An error of the standard library rarely makes sense without its type's name; a plain ValueError does."""
    text = str(error)
    return text if type(error) in (ValueError, FileNotFoundError) and text else f"{type(error).__name__}: {text}"


# The longest mapping in a file of options, as JSON; what else than a mapping a file could be; and the
# tags that YAML gives to single values.
LONGEST_MAPPING = 1_000_000
NODES = {"sequence": "list", "scalar": "single value"}
SCALARS = {"str", "bool", "int", "float", "null", "timestamp", "merge", "value"}

# What each command takes: these arguments, and every field of its config.


@dataclass(kw_only=True)
class RunArguments:
    """What a run needs beside its config."""

    model: str = field(metadata={"help": "Folder of the model, or its name in the local Hugging Face cache."})
    dataset: str = field(
        metadata={
            "help": "A .jsonl, .json, .csv or .parquet file, a folder of such, named after their splits (train.jsonl, "
            "test.jsonl), or a dataset on the Hugging Face hub."
        }
    )
    config: str | None = field(
        default=None, metadata={"help": "YAML file of options; the command line goes before the file."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the hub."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(
        default="test", metadata={"help": "Split to evaluate on, where eval_strategy asks for evaluation."}
    )
    use_peft: bool = field(default=False, metadata={"help": "Train and save a LoRA adapter, not the model itself."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=32, metadata={"help": "What the adapter adds is scaled by lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before the adapter."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Names of the layers that get an adapter, or all-linear; PEFT's choice if unset."},
    )


@dataclass(kw_only=True)
class DPOArguments(RunArguments):
    ref_model: str | None = field(default=None, metadata={"help": "The reference model; the model at start if unset."})


@dataclass(kw_only=True)
class GRPOArguments(RunArguments):
    reward: list[str] = field(metadata={"help": "Reward functions, each as module:function."})


@dataclass(kw_only=True)
class PPOArguments(DPOArguments):
    reward: list[str] | None = field(default=None, metadata={"help": "Reward functions, each as module:function."})
    reward_model: str | None = field(
        default=None, metadata={"help": "A reward model, as `rlkernels reward` trains them; one more reward."}
    )
    value_model: str | None = field(
        default=None, metadata={"help": "A classifier with one label to start the value model from."}
    )


@dataclass(frozen=True)
class Command:
    """A way to train: {method}Trainer of rlkernels.trainers with its {method}Config."""

    method: str
    help: str
    rows: str
    arguments: type[RunArguments] = RunArguments
    samples: bool = False
    task_type: str = "CAUSAL_LM"


COMMANDS = {
    "sft": Command("SFT", "imitate texts", "prompt and completion, messages, or text"),
    "reward": Command(
        "Reward",
        "train a reward model on pairs of texts of which one is preferred",
        "chosen and rejected, with or without prompt and margin",
        task_type="SEQ_CLS",
    ),
    "dpo": Command(
        "DPO", "learn from pairs of completions of which one is preferred", "prompt, chosen and rejected", DPOArguments
    ),
    "ppo": Command(
        "PPO",
        "learn from rewards of sampled completions, with a value model",
        "prompt, and what the reward functions take",
        PPOArguments,
        samples=True,
    ),
    "grpo": Command(
        "GRPO",
        "learn from rewards of groups of sampled completions",
        "prompt, and what the reward functions take",
        GRPOArguments,
        samples=True,
    ),
}


def yaml_loader() -> Any:
    """Which takes 1e-5 for a number, as JSON does, also in a mapping; YAML 1.1 wants a point in it."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    number = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    return Loader


def options_in_file(arguments: list[str], known: set[str]) -> list[str]:
    """The options of the file that `--config` names, as they would stand on the command line."""
    import yaml

    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--config")
    try:
        file = finder.parse_known_args(arguments)[0].config
    except argparse.ArgumentError as error:
        raise BadValue(str(error)) from error
    if file is None:
        return []
    try:
        given = yaml.compose(Path(file).read_bytes(), Loader=yaml_loader())
        if given is None:
            return []
        if not isinstance(given, yaml.MappingNode):
            raise BadValue(f"--config {file}: want `option: value` lines; got a {NODES[given.id]}")
        options = [(name.value, value) for name, value in given.value]
        if len(names := [name for name, _ in options]) > len(set(map(str, names))):
            raise BadValue(f"--config {file}: option '{max(names, key=names.count)}' stands twice")
        return [part for name, value in options for part in option_in_file(name, value, known)]
    except OSError as error:
        raise BadValue(f"--config {file}: {error.strerror}") from error
    except (yaml.YAMLError, RecursionError, ValueError, TypeError, OverflowError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else error
        raise BadValue(f"--config {file}: {reason}") from error


def option_in_file(name: Any, value: Any, known: set[str]) -> list[str]:
    """An option as it would stand on the command line: the text of the file, which YAML would have typed."""
    import yaml

    if not isinstance(name, str) or name not in known - {"config"}:
        raise ValueError(f"unknown option '{name}'")
    if isinstance(value, yaml.ScalarNode):
        return [] if value.tag == "tag:yaml.org,2002:null" else [f"--{name}={text_of(value)}"]
    if isinstance(value, yaml.SequenceNode):
        if value.tag != "tag:yaml.org,2002:seq":
            raise ValueError(f"unknown tag {value.tag}")
        if not all(isinstance(each, yaml.ScalarNode) for each in value.value):
            raise ValueError(f"{name}: want one value, or a list of values")
        return [f"--{name}", *map(text_of, value.value)]
    loader = yaml.SafeLoader("")
    try:
        mapping = loader.construct_document(value)
    finally:
        loader.dispose()
    text = ""
    for part in json.JSONEncoder().iterencode(mapping):  # piece by piece: aliases of aliases have no end
        text += part
        if len(text) > LONGEST_MAPPING:
            raise ValueError(f"{name}: want at most {LONGEST_MAPPING} characters as JSON; got more")
    return [f"--{name}={text}"]


def text_of(scalar: Any) -> str:
    """Where YAML has a spelling of its own for what is no text, that of the command line."""
    kind = scalar.tag.removeprefix("tag:yaml.org,2002:")
    if kind not in SCALARS:
        raise ValueError(f"unknown tag {scalar.tag}")
    own = {"on": "true", "off": "false", ".inf": "inf", "-.inf": "-inf", "+.inf": "inf", ".nan": "nan"}
    return own.get(scalar.value.lower(), scalar.value) if kind in ("bool", "float") else scalar.value


def parse_run(name: str, config_class: type, arguments: list[str]) -> tuple[Any, Any]:
    from transformers import HfArgumentParser

    from rlkernels.trainers.base.field_values import check_fields

    class Parser(HfArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise BadValue(message)

    command = COMMANDS[name]
    parts = (command.arguments, config_class)
    known = {entry.name for part in parts for entry in fields(part) if entry.init}
    description = f"{command.method}Trainer: {command.help}. A row of the dataset has the columns {command.rows}."
    parser = Parser(parts, prog=f"rlkernels {name}", description=description, allow_abbrev=False)
    arguments = options_in_file(arguments, known) + arguments
    try:
        run, config, rest = parser.parse_args_into_dataclasses(
            arguments, return_remaining_strings=True, look_for_args_file=False
        )
        check_fields(run)
    except BadValue:
        raise
    except Exception as error:  # all that it reads was given, and transformers raises what it likes
        told = isinstance(error, ValueError | TypeError | ImportError)
        raise BadValue(str(error) if told else show(error)) from error
    if rest:
        option = rest[0].partition("=")[0]
        near = difflib.get_close_matches(option, [f"--{each}" for each in known], 1)
        raise BadValue(f"unknown option {option}" + (f"; did you mean {near[0]}?" if near else ""))
    return run, config


def load_rows(run: RunArguments, split: str, samples: bool) -> Any:
    try:
        rows = cli_data.load_split(run.dataset, run.dataset_config, split)
        if samples:
            cli_data.check_prompts(rows)
    except (ValueError, OSError) as error:
        raise BadValue(f"--dataset {run.dataset}: {show(error)}") from error
    return rows


def import_reward(name: str) -> Callable:
    from rlkernels.trainers.rewards import calls as reward_calls
    from rlkernels.trainers.rewards import process_settings as settings

    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise BadValue(f"--reward {name}: want module:function")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        with settings.restored():
            function = getattr(importlib.import_module(module_name), attribute, None)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # also sys.exit, after which there would be no run, and no error
        told = reward_calls.text_of(error, show)
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
        from peft import LoraConfig
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
        # By itself a name is a pattern, or one that PEFT reserves, such as all-linear.
        target_modules=targets[0] if targets is not None and len(targets) == 1 else targets,
    )


# The output folder


def checkpoint_to_resume(config: Any) -> str | bool | None:
    from rlkernels.trainers.base import checkpoints, saving

    given, output_dir = config.resume_from_checkpoint, Path(config.output_dir)
    try:
        saving.settle(config)
    except checkpoints.CheckpointError as error:
        raise BadValue(f"--{error}") from error
    if given is None:
        if earlier := checkpoints.numbered(output_dir):
            raise BadValue(
                f"--output_dir {output_dir}: holds {earlier[-1].name} of an earlier run; want another folder, "
                "or --resume_from_checkpoint True to go on from there"
            )
        return None
    if given == "True":  # as for transformers.Trainer, the last one
        # The latter tells why those that there are do not count; the trainer, which of them have changed.
        if not checkpoints.whole_checkpoints(output_dir) and checkpoints.last_checkpoint(output_dir) is None:
            raise BadValue(f"--resume_from_checkpoint True: no whole checkpoint in --output_dir {output_dir}")
        return True
    try:
        checkpoints.check(Path(given))
    except ValueError as error:
        raise BadValue(f"--{error}") from error
    return given


def make_folder(folder: Path) -> list[Path]:
    """Those of the folder and the ones above it that were not there, once it is known that it can be written to."""
    if local_rank() > 0:  # its first process makes it, and takes it away
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
    """Else they would write over what is said next, and once more when they are collected."""
    for callback in trainer.callback_handler.callbacks:
        for name in ("prediction_bar", "training_bar"):
            bar = getattr(callback, name, None)
            if bar is not None:
                bar.close()


def progress(trainer: Any) -> str:
    """How far a run has come, and what is left of it."""
    from rlkernels.trainers.base import checkpoints

    saved = checkpoints.whole_checkpoints(Path(trainer.args.output_dir))
    kept = f"--resume_from_checkpoint {saved[-1]} goes on" if saved else "there is no checkpoint yet"
    return f"after step {trainer.state.global_step} of {trainer.state.max_steps}; {kept}"


def train(name: str, arguments: list[str]) -> None:
    """Runs a command of the table. Nothing is written before all that was given has been looked at."""
    try:
        import rlkernels.trainers as trainers
    except ImportError as error:
        if "pip install rlkernels[trainers]" not in str(error):
            raise  # a mistake, not something that can be installed
        raise BadValue(str(error)) from error

    if local_rank() > 0:
        silence()
    command = COMMANDS[name]
    run, config = parse_run(name, getattr(trainers, f"{command.method}Config"), arguments)
    checkpoint = checkpoint_to_resume(config)
    rewards = [rewards_of(run)] if command.samples else []
    train_dataset = load_rows(run, run.dataset_train_split, command.samples)
    eval_dataset = load_rows(run, run.dataset_test_split, command.samples) if config.eval_strategy != "no" else None
    options = {role: getattr(run, role) for role in ("ref_model", "value_model") if hasattr(run, role)}
    options["peft_config"] = adapter(run, command.task_type)
    first = first_step()
    options["callbacks"] = [first]
    build = getattr(trainers, f"{command.method}Trainer")

    # Absolute, as for the trainer: the user's functions may change the current folder.
    output_dir, trainer = Path(os.path.abspath(config.output_dir)), None
    made = [folder.absolute() for folder in make_folder(Path(config.output_dir))]

    def told(text: object) -> str:
        """With paths as the user gave them."""
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
        in_use = isinstance(error, trainers.base.checkpoints.FolderInUse)  # what is there is another run's
        if output_dir in made and not (has_begun or in_use or trainers.base.checkpoints.whole_checkpoints(output_dir)):
            shutil.rmtree(output_dir, ignore_errors=True)  # what loggers made at the start
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
        if isinstance(error, trainers.base.checkpoints.BadCheckpoint):
            raise BadValue(f"--{told(error)}") from error
        if checkpoint is not None and not first.begun:
            raise BadValue(f"--resume_from_checkpoint {checkpoint}: {show(error)}") from error
        if isinstance(error, REFUSALS) and not first.begun:  # by the optimizer, say, or the scheduler
            raise BadValue(show(error)) from error
        raise
    if trainer.is_world_process_zero():
        print(f"saved in {config.output_dir}")
    leave_process_group()


def leave_process_group() -> None:
    """Where all processes end together. Its threads would go on while Python shuts down, and could abort it."""
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def silence() -> None:
    """What the first process of the machine says, too, this one does not."""
    import datasets
    import transformers

    for library in (transformers, datasets):
        library.logging.set_verbosity_error()
        library.logging.disable_progress_bar()
    logging.getLogger("rlkernels").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


def first_step() -> Any:
    """A callback that knows whether a step was begun, and so whether the checkpoint, if any, was read."""
    from transformers import TrainerCallback

    class FirstStep(TrainerCallback):
        begun = False

        def on_step_begin(self, *args: Any, **options: Any) -> None:
            self.begun = True

    return FirstStep()


# What was given is refused by these, before the first step; what is raised later is a defect of ours.
REFUSALS = (ValueError, TypeError, OSError, ImportError, RuntimeError)


def checked(build: Callable, *args: Any, **options: Any) -> Any:
    """The trainer."""
    try:
        return build(*args, **options)
    except REFUSALS as error:
        of_peft = type(error).__module__.startswith("peft.")
        raise BadValue("--lora_target_modules: " * of_peft + show(error)) from error
