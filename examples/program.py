"""The command line of an example, and an output folder that a broken-off run leaves as it was.

Nothing here takes long to import: what does is imported by the examples where they need it, so that --help and a wrong
option need not wait.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
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


def parse(description: str, steps: int, folder: str, arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    parser.add_argument("--seed", type=lambda text: at_least(0, text), default=0, help="of sampling and data order")
    parser.add_argument("--steps", type=lambda text: at_least(1, text), default=steps, help="optimizer steps")
    parser.add_argument("--output_dir", type=Path, default=Path(folder), help="where the results go")
    options = parser.parse_args(arguments)
    if options.output_dir.exists() and not options.output_dir.is_dir():
        parser.error(f"--output_dir: {options.output_dir} is not a folder")
    return options


@dataclass(frozen=True)
class Run:
    folder: Path  # where results are written; what is there at the end is moved to output_dir
    output_dir: Path
    seed: int
    steps: int
    console: Console
    start: float = field(default_factory=time.perf_counter)


def replace(source: Path, target: Path) -> None:
    if target.is_dir():
        shutil.rmtree(target)
    source.replace(target)


def main(
    description: str,
    train: Callable[[Run], list[Any]],
    *,
    steps: int,
    folder: str,
    arguments: list[str] | None = None,
) -> int:
    """The exit status of an example. `train` returns what is printed when all results are in place. `description`: the
    example's docstring, of which --help shows the first paragraph."""
    options = parse(description, steps, folder, arguments)
    output_dir: Path = options.output_dir
    console = Console()
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        # Made aside and moved when complete, so that an interrupted run leaves the last one as it was.
        aside = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=output_dir))
        try:
            shown = train(Run(aside, output_dir, options.seed, options.steps, console))
            for made in aside.iterdir():
                replace(made, output_dir / made.name)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
            if not any(output_dir.iterdir()):
                output_dir.rmdir()
    except KeyboardInterrupt:
        print(f"interrupted; {output_dir} is as it was before", file=sys.stderr)
        return 130
    for part in shown:
        console.print(part)
    return 0
