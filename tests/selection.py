"""Which tests `make test` leaves to `make test-all`: those marked `thorough`, those that are `thorough_on` their
backend, and from each product of three or more parameters the cases that are not needed for every two values to meet.

Most faults show with one value, or where two meet. Those that take three are found by the whole product.
"""

import re
from collections import defaultdict
from collections.abc import Hashable, Sequence
from itertools import combinations

import pytest


def mark_thorough(items: list[pytest.Item]) -> None:
    for item in items:
        if "backend" in params(item) and params(item)["backend"][0] in thorough_backends(item):
            item.add_marker(pytest.mark.thorough)
    products = defaultdict(list)
    for item in items:
        if params(item) and not item.get_closest_marker("thorough"):
            # Each backend has all pairs.
            products[item.parent, item.originalname, params(item).get("backend")].append(item)
    for cases in products.values():
        columns = parameters(cases)
        if len(columns) >= 3:
            kept = cover(list(zip(*columns, strict=True)))
            for index, item in enumerate(cases):
                if index not in kept:
                    item.add_marker(pytest.mark.thorough)


def params(item: pytest.Item) -> dict:
    return item.callspec.params if hasattr(item, "callspec") else {}


def thorough_backends(item: pytest.Item) -> set[str]:
    """What `thorough_on` names: that of the test and its parameters, else that of its file."""
    for node in reversed(item.listchain()):
        if marks := [mark for mark in node.own_markers if mark.name == "thorough_on"]:
            return {name for mark in marks for name in mark.args}
    return set()


def parameters(cases: list[pytest.Item]) -> list[tuple[Hashable, ...]]:
    """For each parameter with more than one value: the value in each case. Names that are given together are one
    parameter. Values are known by their identity: some cannot be hashed, and the cases share them."""
    together = [mark.args[0] for mark in cases[0].iter_markers("parametrize") if mark.args]
    groups = [re.split(r"\s*,\s*", names) if isinstance(names, str) else list(names) for names in together]
    groups += [[name] for name in params(cases[0]) if not any(name in group for group in groups)]
    columns = [tuple(tuple(id(params(item)[name]) for name in group) for item in cases) for group in groups]
    return [column for column in columns if len(set(column)) > 1]


def cover(cases: Sequence[tuple[Hashable, ...]]) -> set[int]:
    """The indices of few cases that hold every pair of values, in two places of a tuple, that all of them hold."""
    pairs = [set(combinations(enumerate(case), 2)) for case in cases]
    missing, kept = set().union(*pairs), set()
    while missing:
        # The first of those that bring most, so that the choice is the same in every process.
        best = max(range(len(cases)), key=lambda index: len(pairs[index] & missing))
        missing -= pairs[best]
        kept.add(best)
    return kept
