"""How many threads a program has, by kind of kernel and of GPU.

A table, never timings at run time: the order in which the threads of a program add up a sum depends on their number,
and so do its bits. One column serves sm_80, sm_90 and sm_100, on which the kernels have the same occupancy
(benchmarks/resources.py prints it); no GPU has shown a reason to tell them apart.
"""

import os
from typing import NamedTuple

import torch
from triton.runtime import driver

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


class HeadTile(NamedTuple):
    """How the fused head goes through its product: logits of so many rows and tokens at once, summed up over so much
    of the hidden dimension at a time, by so many warps, with so many loads under way."""

    rows: int
    tokens: int
    width: int
    num_warps: int
    num_stages: int
    descriptors: bool
    """Whether tiles are loaded whole by the hardware (bulk tensor loads), as Hopper and data-centre Blackwell can."""


HEAD_TILES = {
    "sm_90": HeadTile(128, 256, 64, 8, 4, True),
    "sm_100": HeadTile(128, 256, 64, 8, 4, True),
    "cuda": HeadTile(128, 128, 32, 8, 4, False),
    "hip": HeadTile(128, 128, 32, 4, 2, False),
    "interpreter": HeadTile(16, 64, 32, 4, 2, True),
}


def head_tile(fits_descriptors: bool, softcap: bool) -> HeadTile:
    """The tile for this GPU. tanh takes registers that only a smaller tile leaves."""
    name = PLATFORM
    if os.environ.get("TRITON_INTERPRET") == "1":
        name = "interpreter"
    elif name == "cuda":
        name = f"sm_{driver.active.get_current_target().arch}"
    tile = HEAD_TILES.get(name, HEAD_TILES["cuda"])
    if tile.descriptors and not fits_descriptors:
        tile = HEAD_TILES["cuda"] if name != "interpreter" else tile._replace(descriptors=False)
    return tile._replace(tokens=128) if softcap and tile.tokens > 128 else tile
