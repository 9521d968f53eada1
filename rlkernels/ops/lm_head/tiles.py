"""The parts that the LM head is computed in: the size of tiles, scored rows in blocks, the memory of kept logits."""

import functools
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

PADDING = -(2**62)
"""Token id of the rows that pad a block."""
BLOCK_ROWS = {"cpu": 256, "cuda": 512}
"""Rows of a matrix product. Fewer rows make it slower; more are wasted where few rows are scored."""


@functools.cache
def _cache_bytes(device: torch.device) -> int:
    """Bytes of the cache that a tile should fit in: half of a GPU's L2, or the L2 of one CPU core."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size // 2
    try:
        return max(os.sysconf("SC_LEVEL2_CACHE_SIZE"), 2**19)
    except (ValueError, OSError, AttributeError):
        return 2**20


def default_tile(device: torch.device, dtype: torch.dtype) -> tuple[int, int]:
    """(rows, tokens) of a tile of logits of `dtype`: as many tokens as the cache has room for."""
    rows = BLOCK_ROWS["cuda" if device.type == "cuda" else "cpu"]
    tokens = _cache_bytes(device) // (rows * dtype.itemsize)
    return rows, max(tokens // 256, 1) * 256


RANGE_BYTES = 2**28
"""The memory of the gradient of all rows' logits for a range of the vocabulary, in 16 bits."""


def range_of(rows: int) -> int:
    """Tokens of a range: whole tiles of a GPU's kernel."""
    return max(RANGE_BYTES // (2 * max(rows, 1)) // 256, 1) * 256


# A plain module global, so that torch.compile guards on it and recompiles when it changes.
_chosen: tuple[int, int] | None = None


@contextmanager
def tile_size(size: tuple[int, int] | None) -> Iterator[None]:
    """Set the (rows, tokens) of tiles for all calls within the block; None is the default. For benchmarks and tests.
    A backward pass uses the size of its forward pass, inside the block or not."""
    global _chosen
    if size is not None and min(size) < 1:
        raise ValueError(f"size must be rows and tokens of a tile, each at least 1; got {size}")
    previous, _chosen = _chosen, size
    try:
        yield
    finally:
        _chosen = previous


def chosen_tile() -> tuple[int, int] | None:
    return _chosen


def slices(stop: int, step: int) -> list[slice]:
    return [slice(at, min(at + step, stop)) for at in range(0, stop, step)]


def working_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def scored_index(scored: Tensor, num_scored: int | None) -> tuple[Tensor, Tensor | None]:
    """Indices of the scored rows, from bool [N]. Without num_scored this waits for the device to count them; with it
    the result has num_scored entries, padded with N. On a GPU also whether num_scored is too small."""
    if num_scored is None:
        return scored.nonzero().squeeze(1), None
    index = torch.nonzero_static(scored, size=num_scored, fill_value=scored.numel()).squeeze(1)
    too_few = scored.sum() > num_scored
    if scored.is_cpu and too_few:
        raise ValueError(
            f"num_scored must be at least the number of scored rows, {int(scored.sum())}; got {num_scored}"
        )
    return index, None if scored.is_cpu else too_few


def fill_up(index: Tensor, block_rows: int, total: int) -> Tensor:
    """Pad indices to whole blocks with `total`, which is the index of no row."""
    return torch.nn.functional.pad(index, (0, -len(index) % block_rows), value=total)


@dataclass
class Rows:
    """Scored rows, padded to whole blocks."""

    index: Tensor
    """[R]: the index of each row in the batch; `total` for padding."""
    total: int
    """Rows of the batch."""
    hidden: Tensor
    """[R, H], 0 for padding."""
    adapter: Tensor | None
    token_ids: Tensor
    """[R], PADDING for padding."""
    whole: bool = False
    """Whether these are all rows of the batch, without padding."""

    @classmethod
    def gather(
        cls, index: Tensor, hidden: Tensor, adapter: Tensor | None, token_ids: Tensor, whole: bool = False
    ) -> "Rows":
        total = len(token_ids)
        if whole:
            adapter = None if adapter is None else adapter.contiguous()
            return cls(index, total, hidden.contiguous(), adapter, token_ids, True)
        real, at = index < total, index.clamp(max=max(total - 1, 0))

        def rows_of(values: Tensor) -> Tensor:
            return values.index_select(0, at).masked_fill_(~real.unsqueeze(-1), 0.0)

        adapter = None if adapter is None else rows_of(adapter)
        return cls(index, total, rows_of(hidden), adapter, token_ids.index_select(0, at).masked_fill_(~real, PADDING))

    def part(self, at: slice) -> "Rows":
        adapter = None if self.adapter is None else self.adapter[at]
        return Rows(self.index[at], self.total, self.hidden[at], adapter, self.token_ids[at])

    def select(self, values: Tensor) -> Tensor:
        """The values [R] of these rows from all values [N]; 0 for padding."""
        if self.whole:
            return values.contiguous()
        return torch.nn.functional.pad(values, (0, 1)).index_select(0, self.index)

    def scatter(self, values: Tensor) -> Tensor:
        """All values [N, ...] from the values [R, ...] of these rows; 0 elsewhere."""
        if self.whole:
            return values
        out = values.new_zeros(self.total + 1, *values.shape[1:])
        return out.index_copy_(0, self.index, values)[: self.total]

    def __len__(self) -> int:
        return len(self.index)


class Pool:
    """The memory of the last logits that were kept on a CPU, for the next call. PyTorch returns such memory to the
    system, and the first touch of a new page takes as long as the product that is written to it."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None
        self._new_lock()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._new_lock)

    def _new_lock(self) -> None:
        """After a fork, a thread that exists only in the parent may hold the old lock."""
        self._lock = threading.Lock()

    def take(self, size: int) -> Tensor | None:
        """uint8 [size], or None if the pool holds less. No other caller gets the same memory."""
        with self._lock:
            memory, self._memory = self._memory, None
        return None if memory is None or memory.numel() < size else memory[:size]

    def give(self, kept: Tensor) -> None:
        """Leave the memory of `kept` to the next call. The caller must not use it any more."""
        if kept.is_cpu:
            memory: Tensor | None = torch.empty(0, dtype=torch.uint8).set_(kept.untyped_storage())
            with self._lock:
                self._memory, memory = memory, self._memory

    def clear(self) -> None:
        with self._lock:
            self._memory = None


POOL = Pool()
