"""How sequences fill micro-batches."""

from collections.abc import Iterable
from collections.abc import Sequence as Rows
from typing import Any

from .batch import Sequence


def fill(lengths: Iterable[int], budget: int) -> list[list[int]]:
    """For each micro-batch, the indices of its sequences: in order, as many as fit into `budget` tokens, and at least
    one."""
    batches: list[list[int]] = []
    room = 0
    for index, length in enumerate(lengths):
        if not batches or length > room:
            batches.append([])
            room = budget
        batches[-1].append(index)
        room -= length
    return batches


def fill_by_length(sequences: Rows[Sequence], budget: int, rows: Iterable[int] | None = None) -> list[list[int]]:
    """The sequences `rows`, all if None, in micro-batches of at most `budget` tokens, and at least one sequence.

    Sequences that share a prefix, which counts once, stay together if they fit into one micro-batch, and are split if
    not. Sequences, or what shares a prefix, come in order of length: attention computes neighbours of equal length
    together."""
    groups: dict[Any, list[int]] = {}
    for row in range(len(sequences)) if rows is None else rows:
        groups.setdefault(sequences[row].prefix_ids or row, []).append(row)
    batches: list[list[int]] = []
    room = 0
    for group in sorted(groups.values(), key=lambda group: max(len(sequences[row]) for row in group)):
        prefix = sequences[group[0]].prefix
        whole = prefix + sum(sequences[row].branch_length for row in group)
        if room < whole <= budget:
            room = 0  # it stays together in a micro-batch of its own
        is_run = False  # the prefix, in the last micro-batch
        for row in sorted(group, key=lambda row: len(sequences[row])):
            length = sequences[row].branch_length + (0 if is_run else prefix)
            if not batches or length > room:
                batches.append([])
                room, length = budget, len(sequences[row])
            batches[-1].append(row)
            room -= length
            is_run = True
    return batches
