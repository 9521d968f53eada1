"""The command line: `rlkernels grpo` trains, `rlkernels bench` times, `rlkernels info` says what serves here."""

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import torch

import rlkernels
from rlkernels.ops import _registry

# Each op with the backends that have kernels for it; the others are plain PyTorch.
OPS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("token_logprobs", "kl_penalty", "shaped_rewards", "group_advantages"), _registry.KERNEL_BACKENDS),
    **dict.fromkeys(("gae", "discounted_returns", "td_lambda", "vtrace"), _registry.KERNEL_BACKENDS),
    **dict.fromkeys(("masked_mean", "masked_whiten"), _registry.WITHOUT_CUDA),
    **dict.fromkeys(
        ("linear_token_logprobs", "linear_policy_loss", "linear_preference_logps", "linear_kl_divergence"),
        _registry.WITHOUT_CUDA,
    ),
    **dict.fromkeys(("policy_loss", "value_loss"), _registry.KERNEL_BACKENDS),
    **dict.fromkeys(("preference_loss", "reward_pair_loss"), ()),
}


class BadValue(Exception):
    """A value given by the user, told in one line; everything else keeps its traceback."""


# rlkernels info


def serving_backends(device_type: str) -> dict[str, str]:
    """For each op the backend that serves tensors on a device."""
    tensor = torch.empty(0, device=device_type)
    return {op: _registry.select(tensor, backends) for op, backends in OPS.items()}


def faster_backends(op: str, backend: str, device_type: str) -> dict[str, str]:
    """The backends faster than `backend` that have kernels for `op`, and for each the reason why it does not serve."""
    by_speed = ("cuda", "triton", "cpu", "reference")
    faster = [name for name in by_speed[: by_speed.index(backend)] if name in OPS[op]]
    return {name: _registry.status(name, device_type) or "another was asked for" for name in faster}


def instruction_set() -> str:
    try:
        import rlkernels._C as _C
    except ImportError:
        return "no extension"
    return _C.instruction_set()


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def info() -> None:
    print(f"rlkernels     {rlkernels.__version__}")
    print(f"python        {platform.python_version()}")
    for package in ("torch", "triton", "transformers", "trl"):
        print(f"{package:13} {version_of(package)}")
    print(f"CPU           {platform.machine()}, kernels for {instruction_set()}, {torch.get_num_threads()} threads")
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    print(f"GPU           {', '.join(gpus) or 'none'}")
    for device_type in ("cuda", "cpu") if gpus else ("cpu",):
        print(f"\n{'op':18} serves {device_type:5} why not a faster one")
        for op, backend in serving_backends(device_type).items():
            reasons = "; ".join(f"{name}: {why}" for name, why in faster_backends(op, backend, device_type).items())
            print(f"{op:18} {backend:12} {reasons or '-'}")


# rlkernels grpo


@dataclass
class RunArguments:
    """What a run needs beside its config."""

    model: str = field(metadata={"help": "Folder of the model, or its name in the local Hugging Face cache."})
    dataset: str = field(
        metadata={
            "help": "A .json, .jsonl, .csv or .parquet file, a folder of such, or a dataset on the Hugging Face hub, "
            "with a column 'prompt'. Further columns are given to the rewards."
        }
    )
    reward: list[str] = field(metadata={"help": "Reward functions, each as module:function."})
    config: str | None = field(
        default=None, metadata={"help": "YAML file of options; the command line goes before the file."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the hub."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(
        default="test", metadata={"help": "Split to evaluate on, where eval_strategy asks for evaluation."}
    )


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
        values = yaml.safe_load(Path(file).read_text()) or {}
    except OSError as error:
        raise BadValue(f"--config {file}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadValue(f"--config {file}: not YAML: {error}") from error
    if not isinstance(values, dict):
        raise BadValue(f"--config {file}: want `option: value` lines; got a {type(values).__name__}")
    options = []
    for name, value in values.items():
        if name not in known - {"config"}:
            raise BadValue(f"--config {file}: unknown option '{name}'")
        if isinstance(value, list):
            options += [f"--{name}", *map(str, value)]
        elif value is not None:
            options.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return options


def parse_run(program: str, config_class: type, arguments: list[str]) -> tuple[RunArguments, Any]:
    from transformers import HfArgumentParser

    class Parser(HfArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise BadValue(message)

    known = {entry.name for part in (RunArguments, config_class) for entry in fields(part) if entry.init}
    parser = Parser((RunArguments, config_class), prog=program, allow_abbrev=False)
    arguments = options_in_file(arguments, known) + arguments
    try:
        run, config = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    except (ValueError, TypeError, ImportError) as error:
        raise BadValue(str(error)) from error
    return run, config


def import_reward(name: str) -> Callable:
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise BadValue(f"--reward {name}: want module:function")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise BadValue(f"--reward {name}: cannot import module '{module_name}': {show(error)}") from error
    function = getattr(module, attribute, None)
    if function is None:
        raise BadValue(f"--reward {name}: module '{module_name}' has no function '{attribute}'")
    if not callable(function):
        raise BadValue(f"--reward {name}: '{attribute}' is a {type(function).__name__}, not a function")
    return function


def read_rows(file: Path) -> Any:
    """The rows of a local file. Read here rather than by `load_dataset`, which does not name a malformed line."""
    from datasets import Dataset

    if file.suffix == ".parquet":
        import pyarrow.parquet

        return Dataset(pyarrow.parquet.read_table(file))
    if file.suffix == ".csv":
        import pandas

        return Dataset.from_pandas(pandas.read_csv(file), preserve_index=False)
    if file.suffix == ".json":
        rows = json.loads(file.read_text())
    elif file.suffix == ".jsonl":
        rows = []
        for number, line in enumerate(file.read_text().splitlines(), 1):
            try:
                if line.strip():
                    rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number}: {error.msg} at column {error.colno}") from error
    else:
        raise ValueError("want a .json, .jsonl, .csv or .parquet file")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("want a list of objects")
    return Dataset.from_list(rows)


def is_prompt(prompt: Any) -> bool:
    if isinstance(prompt, list):
        return bool(prompt) and all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in prompt)
    return isinstance(prompt, str) and prompt != ""


def load_split(run: RunArguments, split: str) -> Any:
    from datasets import load_dataset

    path = Path(run.dataset)
    try:
        if path.is_file():
            if split != "train":
                raise ValueError(f"a single file has the split 'train' only; got '{split}'")
            rows = read_rows(path)
        elif path.suffix in (".json", ".jsonl", ".csv", ".parquet"):
            raise FileNotFoundError("no such file")
        else:
            rows = load_dataset(run.dataset, run.dataset_config, split=split)
    except (ValueError, OSError) as error:
        raise BadValue(f"--dataset {run.dataset}: {show(error)}") from error
    if "prompt" not in rows.column_names:
        raise BadValue(f"--dataset {run.dataset}: no column 'prompt'; its columns are {', '.join(rows.column_names)}")
    for row, prompt in enumerate(rows["prompt"]):
        if not is_prompt(prompt):
            raise BadValue(
                f"--dataset {run.dataset}: row {row}: want text, or messages with role and content, as prompt; "
                f"got {prompt!r}"
            )
    return rows


def remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def grpo(arguments: list[str]) -> None:
    try:
        from rlkernels.trainers import GRPOConfig, GRPOTrainer, RewardError
    except ModuleNotFoundError as error:
        raise BadValue(f"{error.name} is not installed; install rlkernels[trainers]") from error
    from safetensors import SafetensorError

    run, config = parse_run("rlkernels grpo", GRPOConfig, arguments)
    rewards = [import_reward(name) for name in run.reward]
    train_dataset = load_split(run, run.dataset_train_split)
    eval_dataset = load_split(run, run.dataset_test_split) if config.eval_strategy != "no" else None
    checkpoint = config.resume_from_checkpoint
    if checkpoint is not None and not (Path(checkpoint) / "trainer_state.json").is_file():
        raise BadValue(f"--resume_from_checkpoint {checkpoint}: not the folder of a checkpoint")

    output_dir = Path(config.output_dir)
    made = [folder for folder in (output_dir, *output_dir.parents) if not folder.exists()]
    try:
        try:
            trainer = GRPOTrainer(run.model, rewards, config, train_dataset, eval_dataset)
        except (ValueError, TypeError, OSError, ImportError, RuntimeError, SafetensorError) as error:
            raise BadValue(show(error)) from error
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        except RewardError as error:
            if not config.disable_tqdm:
                print(file=sys.stderr)  # the unfinished progress bar has no line of its own
            raise BadValue(str(error)) from error
    finally:
        remove_empty(made)
    trainer.save_model(config.output_dir)


# rlkernels bench


def bench_folder() -> None:
    """Make the benchmarks, which stand beside the package in its repository, importable as pyproject.toml's option
    pythonpath does for pytest."""
    root = Path(rlkernels.__file__).parents[1]
    if not (root / "benchmarks" / "bench.py").is_file():
        raise BadValue("the benchmarks are not installed with the package; run it in a checkout of rlkernels")
    sys.path[:0] = [str(root / "benchmarks"), str(root / "tests")]


def bench(arguments: list[str]) -> int:
    bench_folder()
    try:
        module = importlib.import_module("bench")
    except ModuleNotFoundError as error:
        raise BadValue(f"{error.name} is not installed") from error
    return module.main(arguments)


def show(error: BaseException) -> str:
    """An error of the standard library rarely makes sense without its type's name; a plain ValueError does."""
    text = str(error)
    return text if type(error) in (ValueError, FileNotFoundError) and text else f"{type(error).__name__}: {text}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="rlkernels", description=__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"rlkernels {rlkernels.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    commands.add_parser("grpo", add_help=False, help="train a causal language model on rewards of its completions")
    commands.add_parser("bench", add_help=False, help="time the kernels beside what people use today")
    commands.add_parser("info", help="versions, instruction set, GPU, and which backend serves each op")

    def refuse(message: str) -> NoReturn:
        raise BadValue(message)

    for each in (parser, *commands.choices.values()):
        each.error = refuse  # type: ignore[method-assign]
    command = ""
    try:
        options, rest = parser.parse_known_args(arguments)
        command = f" {options.command}"
        if options.command == "grpo":
            grpo(rest)
        elif options.command == "bench":
            return bench(rest)
        elif rest:
            refuse(f"unrecognized arguments: {' '.join(rest)}")
        else:
            info()
    except BadValue as error:
        print(f"rlkernels{command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0
