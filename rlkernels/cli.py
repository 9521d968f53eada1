"""The command line: `rlkernels sft|reward|dpo|ppo|grpo` trains, `rlkernels bench` times the kernels, `rlkernels
selftest` checks them on this machine, `rlkernels info` says which backend serves each op here."""

import argparse
import importlib
import importlib.metadata
import platform
import sys
import time
from pathlib import Path
from typing import NoReturn

import torch

import rlkernels
from rlkernels import _backends
from rlkernels.cli_commands import COMMANDS
from rlkernels.cli_errors import BadValue, Stopped, local_rank

# The other processes of a machine wait this long before they print an error that the first probably has too.
SECONDS_ALONE = 10

# rlkernels info


def serving_backends(device_type: str) -> dict[str, str]:
    """For each op the backend that serves tensors on a device."""
    tensor = torch.empty(0, device=device_type)
    return {op: _backends.select(tensor, op) for op in _backends.BACKENDS_OF}


def faster_backends(op: str, backend: str, device_type: str) -> dict[str, str]:
    """The backends faster than `backend` that have kernels for `op`, and for each the reason why it does not serve."""
    by_speed = [*sorted(_backends.BACKENDS_OF[op], key=lambda name: name == "cpu"), "reference"]  # GPUs first
    faster = by_speed[: by_speed.index(backend)]
    return {name: _backends.status(name, device_type) or "another was asked for" for name in faster}


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


def print_versions() -> list[str]:
    """Print what `info` and `selftest` say of this machine. Returns the names of its GPUs."""
    print(f"rlkernels     {rlkernels.__version__}")
    print(f"python        {platform.python_version()}")
    for package in ("torch", "triton", "transformers", "trl"):
        print(f"{package:13} {version_of(package)}")
    print(f"CPU           {platform.machine()}, kernels for {instruction_set()}, {torch.get_num_threads()} threads")
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    print(f"GPU           {', '.join(gpus) or 'none'}")
    return gpus


def info() -> None:
    gpus = print_versions()
    for device_type in ("cuda", "cpu") if gpus else ("cpu",):
        rows = [("op", f"serves {device_type}", "why not a faster one")]
        for op, backend in serving_backends(device_type).items():
            reasons = "; ".join(f"{name}: {why}" for name, why in faster_backends(op, backend, device_type).items())
            rows.append((op, backend, reasons or "-"))
        widths = [max(len(row[column]) for row in rows) for column in range(2)]
        print()
        for op, backend, reasons in rows:
            print(f"{op:{widths[0]}}  {backend:{widths[1]}}  {reasons}")


# rlkernels selftest


def selftest(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="rlkernels selftest",
        description="Check every op, backend and dtype against float64 on this machine: forward and gradient. Exit "
        "status 1 if any error is larger than allowed: twice PyTorch's in the same dtype, and a few units in the last "
        "place.",
        allow_abbrev=False,
    )
    parser.add_argument("--device", help="cuda or cpu; by default cuda if there is a GPU")
    parser.add_argument("--quick", action="store_true", help="check fewer shapes")
    parser.error = refuse  # type: ignore[method-assign]
    options = parser.parse_args(arguments)
    gpu = torch.cuda.is_available()
    device_type = options.device or ("cuda" if gpu else "cpu")
    if device_type not in ("cuda", "cpu"):
        raise BadValue(f"--device must be cuda or cpu; got {device_type!r}")
    if device_type == "cuda" and not gpu:
        raise BadValue("--device cuda: PyTorch finds no GPU on this machine")
    from rlkernels.selftest import checks

    width = max(map(len, _backends.BACKENDS_OF))
    print(f"{'op':{width}}  {'backend':9}  {'dtype':8}  worst error / allowed")
    failed = count = 0
    for check in checks(device_type, options.quick):
        count += 1
        failed += not check.passed
        note = "" if check.passed else f"  FAILED: {check.why}"
        print(f"{check.op:{width}}  {check.backend:9}  {check.dtype:8}  {check.worst:.2f}{note}", flush=True)
    print()
    print_versions()
    for backend in _backends.KERNEL_BACKENDS:
        if reason := _backends.status(backend, device_type):
            print(f"{backend:13} not checked on {device_type}: {reason}")
    print(f"\n{failed} of {count} checks failed" if failed else f"\nall {count} checks passed")
    return 1 if failed else 0


# rlkernels bench


def bench_folder() -> None:
    """Make the benchmarks importable: they stand next to the package in its repository, and are not installed."""
    root = Path(rlkernels.__file__).parents[1]
    if not (root / "benchmarks" / "bench.py").is_file():
        raise BadValue("the benchmarks are not installed with the package; run it in a checkout of rlkernels")
    sys.path.insert(0, str(root / "benchmarks"))


def bench(arguments: list[str]) -> int:
    bench_folder()
    try:
        module = importlib.import_module("bench")
    except ModuleNotFoundError as error:
        raise BadValue(f"{error.name} is not installed") from error
    return module.main(arguments)


# rlkernels sft|reward|dpo|ppo|grpo


def train(command: str, arguments: list[str]) -> None:
    # Imported here, since the trainers need packages that `info` and `bench` do without, and take seconds to import.
    try:
        import rlkernels.trainers  # noqa: F401
    except ImportError as error:
        if "pip install rlkernels[trainers]" not in str(error):
            raise  # a mistake, not something that can be installed
        raise BadValue(str(error)) from error
    from rlkernels import cli_train

    cli_train.train(command, arguments)


def tell(message: str) -> None:
    """Print an error once. Several processes on a machine mostly have the same error: the first prints it, and the
    launcher then ends the others. An error of another process alone is printed after a while."""
    if local_rank() > 0:
        time.sleep(SECONDS_ALONE)
    print(message, file=sys.stderr)


def refuse(message: str) -> NoReturn:
    raise BadValue(message)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="rlkernels", description=__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"rlkernels {rlkernels.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, each in COMMANDS.items():
        commands.add_parser(name, add_help=False, help=each.help)
    commands.add_parser("bench", add_help=False, help="time the kernels against what people use today")
    commands.add_parser("selftest", add_help=False, help="check every kernel against float64 on this machine")
    commands.add_parser("info", help="versions, instruction set, GPU, and which backend serves each op")

    for each_parser in (parser, *commands.choices.values()):
        each_parser.error = refuse  # type: ignore[method-assign]
    command = ""
    try:
        options, rest = parser.parse_known_args(arguments)
        command = f" {options.command}"
        if options.command in COMMANDS:
            train(options.command, rest)
        elif options.command == "bench":
            return bench(rest)
        elif options.command == "selftest":
            return selftest(rest)
        elif rest:
            refuse(f"unrecognized arguments: {' '.join(rest)}")
        else:
            info()
    except BadValue as error:
        tell(f"rlkernels{command}: error: {' '.join(str(error).split())}")
        return 2
    except KeyboardInterrupt as interrupt:
        tell(f"rlkernels{command}: {str(interrupt) or 'interrupted'}")
        return 130
    except Stopped as stopped:
        line, code = stopped.args
        tell(f"rlkernels{command}: {line}")
        return code
    return 0
