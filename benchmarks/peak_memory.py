"""How much memory a call needs, by torch's allocation profiler."""

import os
from collections.abc import Callable

import torch

from rlkernels.ops.lm_head.tiles import POOL

# The profiler tells of its starts and stops on stderr.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def peak_memory(call: Callable[[], object]) -> int:
    """The most bytes that `call` holds at a time in CPU tensors of its own, those that it returns included.

    Memory that an earlier call left to the next one is let go first, and so is counted. Not seen: memory that does not
    come from torch's allocator, such as the stack and heap of C++, NumPy and Python.
    """
    POOL.clear()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = call()
    del kept
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
