"""Single-digit sums and differences from reasoning-gym, and the rewards for their answers. demo.py trains on them."""

import random
import re
from typing import Any

import reasoning_gym

HELD_OUT_SHARE = 0.25
# It replaces the chat template's own system prompt, which is eleven tokens longer, a fifth of all that the model reads.
SYSTEM_PROMPT = "Answer with a number."


def unordered(row: dict[str, Any]) -> tuple[str, ...]:
    """The operator and both terms in sorted order, so that swapping the terms changes nothing."""
    left, operator, right = row["expression"].split()
    return operator, *sorted((left, right))


def problems() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(rows to train on, held-out rows). They are disjoint even if terms are swapped, and the same on every call."""
    # There are 200 problems; 4000 draws include each of them.
    drawn = reasoning_gym.create_dataset(
        "chain_sum", min_terms=2, max_terms=2, min_digits=1, max_digits=1, size=4000, seed=0
    )
    rows = {
        entry["question"]: {
            "prompt": [
                {"role": "system", "content": SYSTEM_PROMPT},
                {"role": "user", "content": entry["question"]},
            ],
            "expression": entry["metadata"]["expression"],
            "answer": int(entry["answer"]),
        }
        for entry in drawn
    }
    keys = sorted({unordered(row) for row in rows.values()})
    held_out = set(random.Random(0).sample(keys, round(HELD_OUT_SHARE * len(keys))))
    for row in rows.values():
        row["split"] = "held_out" if unordered(row) in held_out else "train"
    train, test = ([row for row in rows.values() if row["split"] == split] for split in ("train", "held_out"))
    return train, test


def last_integer(text: str) -> int | None:
    # In "5-3" the minus is an operator, so the last integer is 3.
    found = re.findall(r"(?<!\d)-?\d+", text)
    return int(found[-1]) if found else None


class Grader:
    """The two reward functions, and a record of every completion that they graded."""

    weights = (1.0, 0.2)
    """Weights of `correct` and `ended`. Ending in time does not make up for a wrong answer."""

    def __init__(self, end_token_id: int) -> None:
        self.end_token_id = end_token_id
        self.records: list[dict[str, Any]] = []

    @property
    def rewards(self) -> list:
        return [self.correct, self.ended]

    def correct(self, completions, completion_ids, answer, expression, split, trainer_state, **_) -> list[float]:
        """1 if the last integer of the completion is the answer, else 0."""
        texts = [messages[0]["content"] for messages in completions]
        right = [last_integer(text) == wanted for text, wanted in zip(texts, answer, strict=True)]
        columns = zip(split, expression, answer, texts, right, self.ended(completion_ids), completion_ids, strict=True)
        self.records += [
            {
                "step": trainer_state.global_step,
                "split": part,
                "problem": problem,
                "answer": wanted,
                "completion": text,
                "correct": is_right,
                "ended": bool(has_ended),
                "length": len(ids),
            }
            for part, problem, wanted, text, is_right, has_ended, ids in columns
        ]
        return [float(is_right) for is_right in right]

    def ended(self, completion_ids, **_) -> list[float]:
        """1 if the completion ends with the end token, else 0."""
        return [float(ids[-1] == self.end_token_id) for ids in completion_ids]

    def accuracy(self, split: str, step: int) -> float:
        graded = [record["correct"] for record in self.records if (record["split"], record["step"]) == (split, step)]
        return sum(graded) / len(graded)
