"""What a run leaves behind: result.json, completions.jsonl, reward.png, and a table on the terminal."""

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from rich.table import Table
from rich.text import Text

from arithmetic import Grader


def curves(grader: Grader) -> tuple[list[float], dict[int, float]]:
    """Mean training reward of each step, and held-out accuracy by step."""
    correct, ended = Grader.weights
    rewards: dict[int, list[float]] = {}
    for record in grader.records:
        if record["split"] == "train":
            rewards.setdefault(record["step"], []).append(correct * record["correct"] + ended * record["ended"])
    evaluated = sorted({record["step"] for record in grader.records if record["split"] == "held_out"})
    means = [sum(values) / len(values) for _, values in sorted(rewards.items())]
    return means, {step: grader.accuracy("held_out", step) for step in evaluated}


def plot(grader: Grader, result: dict[str, Any], file: Path) -> None:
    rewards, accuracies = curves(grader)
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(range(1, len(rewards) + 1), rewards, color="tab:blue", label="training reward")
    axes.plot(*zip(*accuracies.items(), strict=True), "o-", color="tab:orange", label="held-out accuracy, sampled")
    axes.set(
        title=f"SmolLM2-135M-Instruct on single-digit sums, {result['wall_s'] / 60:.1f} minutes",
        xlabel="optimizer step",
        xlim=(0, len(rewards)),
        ylim=(0, sum(Grader.weights)),
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(file, dpi=120)
    plt.close(figure)


def write(folder: Path, result: dict[str, Any], grader: Grader) -> None:
    (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    with open(folder / "completions.jsonl", "w") as file:
        file.writelines(json.dumps(record) + "\n" for record in grader.records)
    plot(grader, result, folder / "reward.png")


def before_and_after(grader: Grader, steps: int, rows: int = 8) -> Table:
    """The first sample of some held-out problems, before and after training, right ones in green."""

    def first_samples(step: int) -> dict[str, Text]:
        samples: dict[str, Text] = {}
        for record in grader.records:
            if (record["split"], record["step"]) == ("held_out", step):
                text = record["completion"].replace("\n", " ") + ("" if record["ended"] else " ...")
                samples.setdefault(record["problem"], Text(text, "green" if record["correct"] else "red"))
        return samples

    before, after = first_samples(0), first_samples(steps)
    answers = {record["problem"]: str(record["answer"]) for record in grader.records}
    table = Table("problem", "answer", "before", "after", title="held-out problems, one sample each")
    problems = sorted(before)
    for problem in problems[:: max(len(problems) // rows, 1)][:rows]:
        table.add_row(problem, answers[problem], before[problem], after[problem])
    return table
