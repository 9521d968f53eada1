"""What the examples measured, as a page: of runs in RUNS/0/sft, RUNS/1/sft, RUNS/0/reward ..., as `make examples` makes
them, each with a result.json.

    python examples/results.py [RUNS] > docs/learning.md
"""

import json
import sys
from pathlib import Path

EXAMPLES = ("sft", "reward", "dpo", "ppo", "grpo")
HEADER = """# What the examples learn

Printed by `python examples/results.py`, of the runs of `make examples SEED=0` and `make examples SEED=1`. Each trains
SmolLM2-135M-Instruct to answer single-digit sums with the sentence "The answer is 8." and nothing else, and measures
before and after on sums that it has not seen. Rates are shares of 100 completions, two of each of 50 held-out sums,
sampled at temperature 1: of those that are the sentence, and of those with the right number too, which demonstrations
and pairs show, but neither the reward model of PPO nor the rule of GRPO looks at. Held-out pairs set the sentence
against words that no pair trained on has, and against the model's own. PPO's score is the reward model's. Seconds are
those of the whole example, measuring included.

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
