"""Trains a real language model on verifiable rewards: SmolLM2-135M-Instruct learns single-digit sums by GRPO.

    python examples/demo.py [--seed 0] [--steps 52] [--output_dir runs/demo]

Writes result.json, reward.png, completions.jsonl and model/ to the output folder.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def at_least(smallest: int, text: str) -> int:
    if not text.isdecimal() or int(text) < smallest:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least {smallest}; got {text!r}")
    return int(text)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        description="Train SmolLM2-135M-Instruct on single-digit sums by GRPO.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--seed", type=lambda text: at_least(0, text), default=0, help="of sampling and data order")
    parser.add_argument("--steps", type=lambda text: at_least(1, text), default=52, help="optimizer steps")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"), help="where the results go")
    arguments = parser.parse_args(arguments)
    if arguments.output_dir.exists() and not arguments.output_dir.is_dir():
        parser.error(f"--output_dir: {arguments.output_dir} is not a folder")
    return arguments


def replace(source: Path, target: Path) -> None:
    if target.is_dir():
        shutil.rmtree(target)
    source.replace(target)


def run(seed: int, steps: int, output_dir: Path) -> None:
    # Imported late: they take seconds, which --help and a wrong option need not wait for.
    from rich.console import Console

    import report
    from learn import learn

    console = Console()
    output_dir.mkdir(parents=True, exist_ok=True)
    # Made aside and moved when complete, so that an interrupted run leaves the last one as it was.
    aside = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=output_dir))
    try:
        done = learn(aside, seed, steps, console)
        report.write(aside, done.result, done.grader)
        for made in aside.iterdir():
            replace(made, output_dir / made.name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if not any(output_dir.iterdir()):
            output_dir.rmdir()
    console.print(report.before_and_after(done.grader, done.result["steps"]))
    console.print(
        f"held-out accuracy {done.result['accuracy_before']:.2f} -> {done.result['accuracy_after']:.2f} "
        f"in {done.result['wall_s']:.0f} s; everything is in {output_dir}"
    )


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        run(options.seed, options.steps, options.output_dir)
    except KeyboardInterrupt:
        print(f"interrupted; {options.output_dir} is as it was before", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
