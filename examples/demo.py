"""Trains a real language model on verifiable rewards: SmolLM2-135M-Instruct learns single-digit sums by GRPO.

    python examples/demo.py [--seed 0] [--minutes 5 | --steps N] [--output_dir runs/demo]

A calibration at the start chooses the number of steps and prints it; with --steps the same run is repeated, bit for
bit. Writes result.json, curves.png, completions.jsonl and model/ to the output folder.
"""

import sys
from typing import Any

import program


def train(run: program.Run) -> list[Any]:
    import report
    from learn import learn

    done = learn(run)
    report.write(run.folder, done.result, done.grader)
    return [
        report.before_and_after(done.grader, done.result["steps"]),
        f"held-out accuracy {done.result['accuracy_before']:.2f} -> {done.result['accuracy_after']:.2f} "
        f"in {done.result['wall_s']:.0f} s; everything is in {run.output_dir}",
    ]


def main(arguments: list[str] | None = None) -> int:
    return program.main(
        "Train SmolLM2-135M-Instruct on single-digit sums by GRPO.",
        train,
        minutes=5,
        folder="runs/demo",
        arguments=arguments,
    )


if __name__ == "__main__":
    sys.exit(main())
