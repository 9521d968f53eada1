"""The command line of every example, and an output folder that gets the results of a complete run or stays unchanged.

Nothing here takes long to import. The examples import torch and the trainers inside `train`, so that --help and errors
in options come at once.
"""

import argparse
import contextlib
import math
import os
import secrets
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def at_least(smallest: int, text: str) -> int:
    if not text.isdecimal() or int(text) < smallest:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least {smallest}; got {text!r}")
    return int(text)


def above_zero(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (number := float(text)) < math.inf:
            return number
    raise argparse.ArgumentTypeError(f"must be a number above 0; got {text!r}")


def parse(
    description: str, steps: int | None, minutes: float | None, folder: str, arguments: list[str] | None
) -> argparse.Namespace:
    parser = Parser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    parser.add_argument(
        "--seed", type=lambda text: at_least(0, text), default=0, help="seed of sampling and data order"
    )
    amount = parser.add_mutually_exclusive_group()
    if minutes is not None:
        amount.add_argument(
            "--minutes",
            type=above_zero,
            default=minutes,
            help="time to train for; a calibration at the start chooses the number of steps and prints it",
        )
    amount.add_argument(
        "--steps",
        type=lambda text: at_least(1, text),
        default=argparse.SUPPRESS if steps is None else steps,
        help="optimizer steps",
    )
    parser.add_argument("--output_dir", type=Path, default=Path(folder), help="folder for the results")
    options = parser.parse_args(arguments)
    if options.output_dir.exists() and not options.output_dir.is_dir():
        parser.error(f"--output_dir: {options.output_dir} is not a folder")
    return argparse.Namespace(**{"steps": None, "minutes": None, **vars(options)})


# Seconds within which a second signal counts as the first: under make, a process can get the same signal twice.
ONE_SIGNAL = 1.0
# Python's default handlers. A program that has replaced one keeps its own.
DEFAULTS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


class Stop:
    """Handles Ctrl-C and SIGTERM. The first signal after training has begun lets the run finish its optimizer step and
    keep its results. Any other signal ends the run at once, and nothing is kept."""

    def __init__(self) -> None:
        self.number = 0  # the signal that came; 0 means none
        self.came = 0.0  # its time by time.monotonic
        self.step = 0  # the last optimizer step
        self.steps = 0  # the number of steps that the run was to take
        self.keeps = False  # whether there is something to keep
        self.is_over = False  # True at the end, which takes no time and is not interrupted

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        earlier = {number: signal.getsignal(number) for number in DEFAULTS}
        mine = [number for number, handler in earlier.items() if handler == DEFAULTS[number]]
        for number in mine:
            signal.signal(number, self._receive)
        try:
            yield
        finally:
            for number in mine:
                signal.signal(number, earlier[number])

    def _receive(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if self.is_over or (self.number and now - self.came < ONE_SIGNAL):
            return
        is_first, self.number, self.came = not self.number, number, now
        if not (is_first and self.keeps):
            raise KeyboardInterrupt
        name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        line = f"{name}: the run ends after this step and keeps what it has learned; once more ends it at once"
        # The signal may have come during a write to sys.stderr, which is not reentrant.
        os.write(2, f"\n{line}\n".encode())

    @property
    def word(self) -> str:
        return "terminated" if self.number == signal.SIGTERM else "interrupted"


@dataclass(frozen=True)
class Run:
    folder: Path  # results are written here and moved to output_dir at the end
    output_dir: Path
    seed: int
    steps: int | None  # None: as many as fit into `minutes`
    minutes: float | None
    console: Console
    stop: Stop
    start: float = field(default_factory=time.perf_counter)


def replace(source: Path, target: Path) -> None:
    if target.is_dir():
        shutil.rmtree(target)
    source.replace(target)


def main(
    description: str,
    train: Callable[[Run], list[Any]],
    *,
    steps: int | None = None,
    minutes: float | None = None,
    folder: str,
    arguments: list[str] | None = None,
) -> int:
    """Runs an example and returns its exit status. `train` returns what to print when all results are in place.
    `description` is shown by --help. `steps` and `minutes` are defaults; an example that has `minutes` takes either
    option."""
    options = parse(description, steps, minutes, folder, arguments)
    output_dir: Path = options.output_dir
    console, stop = Console(), Stop()
    try:
        with stop.listening():
            # Written to a folder aside and moved when complete, so that an aborted run changes no earlier results.
            aside = output_dir / f".unfinished-{secrets.token_hex(4)}"
            try:
                aside.mkdir(parents=True)
                shown = train(Run(aside, output_dir, options.seed, options.steps, options.minutes, console, stop))
                stop.is_over = True
                for made in aside.iterdir():
                    replace(made, output_dir / made.name)
            finally:
                try:
                    stop.is_over = True
                finally:  # even if a signal comes before is_over is set
                    shutil.rmtree(aside, ignore_errors=True)
                    with contextlib.suppress(OSError):  # the folder is not empty, or was never made
                        output_dir.rmdir()
    except KeyboardInterrupt:
        print(f"{stop.word}; {output_dir} is as it was before", file=sys.stderr)
        return 128 + (stop.number or signal.SIGINT)
    for part in shown:
        console.print(part)
    if stop.number:
        told = f"{stop.word} after step {stop.step} of {stop.steps}; what it has learned is in {output_dir}"
        print(told, file=sys.stderr)
        return 128 + stop.number
    return 0
