"""Prints the results of the examples as a page. `make examples` makes the runs RUNS/0/sft, RUNS/1/sft, RUNS/0/reward
and so on, each with a result.json. AVX2_RUNS, if given, has the same runs without AVX-512, for their seconds.

    python examples/results.py [RUNS [AVX2_RUNS]] > docs/learning.md
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path

EXAMPLES = ("sft", "reward", "dpo", "ppo", "grpo")
HEADER = """# What the examples learn

`python examples/results.py` printed this page from the runs of `make examples SEED=0` and `make examples SEED=1`. Each
run trains SmolLM2-135M-Instruct to answer single-digit sums with the sentence "The answer is 8." and nothing else, and
measures before and after training on sums that it has not seen. Rates are over 100 completions, two of each of 50
held-out sums, sampled at temperature 1. The format rate is the share that is the sentence; right answers is the share
that also has the right number. Demonstrations and pairs show the right number; the reward model of PPO and the rule of
GRPO do not look at it. In held-out pairs the sentence stands against words that no training pair has, and against the
model's own completion. PPO's score is the reward model's. Seconds are those of the whole example with its measurements.
"""
COLUMNS = ("example", "seed", "measured on held-out sums", "before", "after", "steps", "seconds")


def line(cells: Iterable[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def seconds(file: Path) -> str:
    return f"{json.loads(file.read_text())['seconds']:.0f}" if file.is_file() else "not measured"


def main(runs: str = "runs", avx2_runs: str | None = None) -> None:
    columns = COLUMNS if avx2_runs is None else (*COLUMNS, "seconds on AVX2")
    print(HEADER, line(columns), f"|{'---|' * len(columns)}", sep="\n")
    for example in EXAMPLES:
        for file in sorted(Path(runs).glob(f"*/{example}/result.json")):
            result = json.loads(file.read_text())
            times = [seconds(file)]
            if avx2_runs is not None:
                times.append(seconds(avx2_runs / file.relative_to(runs)))
            for name, before in result["before"].items():
                measured = f"{before:.3f}", f"{result['after'][name]:.3f}"
                print(line((example, result["seed"], name, *measured, result["steps"], *times)))


if __name__ == "__main__":
    main(*sys.argv[1:])
