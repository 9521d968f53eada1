"""Counts what a patched project really called: each function of ours that took another's place, and each kernel."""

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from rlkernels import _registry
from rlkernels.integrations._patch import Patch


def counted(calls: Counter, key: str, function: Callable) -> Callable:
    @functools.wraps(function)
    def count(*args, **kwargs):
        calls[key] += 1
        return function(*args, **kwargs)

    return count


@contextmanager
def patched_and_counted(patch: Patch) -> Iterator[Counter]:
    """`patch.patched()`, with the number of calls of each target, and of each kernel as "rlkernels::<name>"."""
    calls: Counter = Counter()
    rows, op, call = patch.rows, _registry.op, _registry.call

    def counted_op(name, backend):
        return counted(calls, f"rlkernels::{name}", op(name, backend))

    def counted_call(name, backend, *inputs):
        calls[f"rlkernels::{name}"] += 1
        return call(name, backend, *inputs)

    patch.rows = tuple(replace(row, ours=counted(calls, row.target, row.ours)) for row in rows)
    _registry.op, _registry.call = counted_op, counted_call
    try:
        with patch.patched():
            yield calls
    finally:
        patch.rows, _registry.op, _registry.call = rows, op, call
