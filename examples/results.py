"""Prints the results of the examples as a page. `make examples` makes the runs RUNS/0/sft, RUNS/1/sft, RUNS/0/reward
and so on, each with a result.json.

    python examples/results.py [RUNS] > docs/learning.md
"""

import json
import sys
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

| example | seed | measured on held-out sums | before | after | steps | seconds |
|---|---|---|---|---|---|---|"""


def main(runs: str = "runs") -> None:
    print(HEADER)
    for example in EXAMPLES:
        for file in sorted(Path(runs).glob(f"*/{example}/result.json")):
            result = json.loads(file.read_text())
            for name, before in result["before"].items():
                values = f"{before:.3f} | {result['after'][name]:.3f} | {result['steps']} | {result['seconds']:.0f}"
                print(f"| {example} | {result['seed']} | {name} | {values} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
