"""What demo.py reports besides the curves: result.json, completions.jsonl and a table on the terminal."""

import json
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from arithmetic import Grader


def write(folder: Path, result: dict[str, Any], grader: Grader) -> None:
    (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    with open(folder / "completions.jsonl", "w") as file:
        file.writelines(json.dumps(record) + "\n" for record in grader.records)


def before_and_after(grader: Grader, steps: int, rows: int = 8) -> Table:
    """The first completion of some held-out problems before and after training, with right ones in green."""

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
