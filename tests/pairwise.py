"""Which cases of a product of parameters `make test` runs: so many that every two values of two parameters meet.

A fault shows with one value, or with two that meet; one that takes three is left to `make test-all`, which runs the
whole product.
"""

from collections.abc import Hashable, Sequence
from itertools import combinations


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
