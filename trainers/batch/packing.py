"""How sequences fill micro-batches."""

from collections.abc import Iterable


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


def fill_by_length(lengths: list[int], budget: int, rows: Iterable[int] | None = None) -> list[list[int]]:
    """`fill` with the sequences `rows`, all if None, in order of length: attention computes neighbours of equal length
    together."""
    order = sorted(range(len(lengths)) if rows is None else rows, key=lengths.__getitem__)
    return [[order[index] for index in batch] for batch in fill([lengths[row] for row in order], budget)]
