"""How many threads a program has, by kind of kernel and of GPU.

A table, never timings at run time: the order in which the threads of a program add up a sum depends on their number,
and so do its bits. One column serves sm_80, sm_90 and sm_100, on which the kernels have the same occupancy
(benchmarks/resources.py prints it); no GPU has shown a reason to tell them apart.
"""

import torch

PLATFORM = "hip" if torch.version.hip else "cuda"
WARP = {"cuda": 32, "hip": 64}
THREADS = {
    "rows": {"cuda": 128, "hip": 128},  # of logits
    "scan": {"cuda": 32, "hip": 64},  # one warp
    "tokens": {"cuda": 128, "hip": 256},
    "losses": {"cuda": 256, "hip": 256},  # four tokens a thread
    "group": {"cuda": 32, "hip": 64},
}


def threads(kernel: str) -> int:
    return THREADS[kernel][PLATFORM]


def num_warps(kernel: str) -> int:
    return threads(kernel) // WARP[PLATFORM]
