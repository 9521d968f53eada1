"""The LM head in tiles: its matrix products are the library's, its rows our kernels'.

Only scored rows are worked on: they are gathered, in order, and filled up to blocks of one number of rows, so that
every matrix product has one shape and a row's result does not depend on how many others there are. A tile is a block of
rows by a range of the vocabulary. What a tile has in the sums of its rows (`token_logprobs_part`) is joined over tiles,
and over the processes that share a vocabulary, in one order.
"""

import functools
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from rlkernels import _registry
from rlkernels.reference import logprobs as reference

PADDING = -(2**62)
"""Token id of the rows that fill up a block."""
BLOCK_ROWS = {"cpu": 256, "cuda": 512}
"""Rows of a matrix product. Fewer make it slower, more are for nothing where few rows are scored."""
CHUNK_ROWS = 4096
"""Rows whose gradient a tile holds at most, so that one product adds all of them to the weight's gradient."""


@functools.cache
def _cache_bytes(device: torch.device) -> int:
    """The cache that a tile should stay in: half of a GPU's L2, the L2 of one CPU core."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size // 2
    try:
        return max(os.sysconf("SC_LEVEL2_CACHE_SIZE"), 2**19)
    except (ValueError, OSError, AttributeError):
        return 2**20


def working_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def multiply(a: Tensor, b: Tensor, out: Tensor, scratch: Tensor | None, *, add: bool) -> None:
    """out (+)= a @ b. Where `out` is float32 and the factors are not, the product is rounded to their dtype first on a
    CPU, where PyTorch has no other, and not rounded on a GPU."""
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    elif out.is_cuda:
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=int(add), out=out)
    else:
        assert scratch is not None
        product = torch.mm(a, b, out=scratch)
        out.add_(product) if add else out.copy_(product)


def scored_index(scored: Tensor, num_scored: int | None) -> tuple[Tensor, Tensor | None]:
    """Where bool [N] `scored` is true, in order, [n]: how many these are the device is asked. With `num_scored` it is
    not; they are so many, the last of them N where fewer are scored. Also, on a GPU, whether they are too few."""
    if num_scored is None:
        return scored.nonzero().squeeze(1), None
    index = torch.nonzero_static(scored, size=num_scored, fill_value=scored.numel()).squeeze(1)
    too_few = scored.sum() > num_scored
    if scored.is_cpu and too_few:
        raise ValueError(
            f"num_scored must be at least the number of scored rows, {int(scored.sum())}; got {num_scored}"
        )
    return index, None if scored.is_cpu else too_few


def nan_if(too_few: Tensor | None, values: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Gradients that say so where more rows were scored than were projected."""
    if too_few is None:
        return values
    return tuple(None if value is None else value.masked_fill_(too_few, float("nan")) for value in values)


def fill_up(index: Tensor, block_rows: int, total: int) -> Tensor:
    """[n] to whole blocks, with `total`, which is no row."""
    return torch.nn.functional.pad(index, (0, -len(index) % block_rows), value=total)


@dataclass
class Rows:
    """Scored rows, in whole blocks."""

    index: Tensor
    """[R]: where each is among all rows; how many those are, for rows that fill up."""
    total: int
    hidden: Tensor
    """[R, H], zeros in the rows that fill up."""
    adapter: Tensor | None
    token_ids: Tensor
    """[R], PADDING in the rows that fill up."""
    whole: bool = False
    """Whether these are all rows as they are."""

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
        """[R] of [N], 0 in the rows that fill up."""
        if self.whole:
            return values.contiguous()
        return torch.nn.functional.pad(values, (0, 1)).index_select(0, self.index)

    def scatter(self, values: Tensor) -> Tensor:
        """[R, ...] at their places among all rows, 0 elsewhere."""
        if self.whole:
            return values
        out = values.new_zeros(self.total + 1, *values.shape[1:])
        return out.index_copy_(0, self.index, values)[: self.total]

    def __len__(self) -> int:
        return len(self.index)


def slices(stop: int, step: int) -> list[slice]:
    return [slice(at, min(at + step, stop)) for at in range(0, stop, step)]


@dataclass
class Gradients:
    """Of what is differentiated, None of the rest. Sums are kept in float32 at least until they are complete."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    adapter: Tensor | None
    adapter_weight: Tensor | None

    @classmethod
    def of(cls, rows: Rows, head: "Head", wanted: list[bool], *, weight_in_pieces: bool) -> "Gradients":
        """Room for them, in the order of `wanted`. A weight's is of its own dtype where each range of the vocabulary is
        complete in one call of Head.backward."""
        dtype = working_dtype(head.weight)
        weight_dtype = dtype if weight_in_pieces else head.weight.dtype
        like = (rows.hidden, head.weight, head.bias, rows.adapter, head.adapter_weight)
        dtypes = (dtype, weight_dtype, dtype, dtype, weight_dtype)
        return cls(
            *(
                torch.empty_like(value, dtype=dtype, memory_format=torch.contiguous_format)
                if want and value is not None
                else None
                for want, value, dtype in zip(wanted, like, dtypes, strict=True)
            )
        )

    def part(self, at: slice) -> "Gradients":
        """Of rows `at`."""
        hidden = None if self.hidden is None else self.hidden[at]
        adapter = None if self.adapter is None else self.adapter[at]
        return replace(self, hidden=hidden, adapter=adapter)

    def scaled(self, factor: Tensor) -> "Gradients":
        """Those of rows, [R, ...] times [R]."""
        factor = factor.unsqueeze(-1)
        hidden = None if self.hidden is None else self.hidden * factor
        adapter = None if self.adapter is None else self.adapter * factor
        return replace(self, hidden=hidden, adapter=adapter)

    def results(self, rows: Rows, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
        of_rows = {"hidden": self.hidden, "adapter": self.adapter}
        of_rows = {n: None if value is None else rows.scatter(value.to(dtype)) for n, value in of_rows.items()}
        of_weights = (self.weight, self.bias, self.adapter_weight)
        weight, bias, adapter_weight = (None if value is None else value.to(dtype) for value in of_weights)
        return of_rows["hidden"], weight, bias, of_rows["adapter"], adapter_weight


@dataclass
class Head:
    """logits = hidden @ weight.T + adapter @ adapter_weight.T + bias, as y = cap(logits), z = y / temperature."""

    weight: Tensor
    bias: Tensor | None
    adapter_weight: Tensor | None
    temperature: float
    softcap: float
    backend: str
    entropy: bool
    tile: tuple[int, int] | None = None
    group: Any = None
    share: tuple[int, int, int] | None = None
    """What `shares` says, where the vocabulary is shared by `group`."""
    _buffers: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        device = self.weight.device
        self.logits_dtype = self.weight.dtype
        if device.type == "cuda" and self.weight.dtype in (torch.bfloat16, torch.float16):
            self.logits_dtype = torch.float32
        # On a CPU PyTorch has no product of 16-bit factors but one rounded to 16 bits.
        self.rounds = self.weight.dtype.itemsize == 2 and device.type != "cuda"
        self.block_rows = BLOCK_ROWS["cuda" if device.type == "cuda" else "cpu"] if self.tile is None else self.tile[0]
        if self.tile is None:
            columns = _cache_bytes(device) // (self.block_rows * self.logits_dtype.itemsize)
            self.tile_columns = max(columns // 256, 1) * 256
        else:
            self.tile_columns = self.tile[1]
        self.vocab_tiles = slices(self.weight.shape[0], self.tile_columns)

    def fits(self, rows: int, budget: int) -> bool:
        """Whether all logits of so many rows take no more than `budget` bytes, in every process."""
        return rows * self._row_bytes() <= budget

    def rows_within(self, budget: int) -> int:
        """The most rows whose logits fit, in whole blocks, one at least."""
        return max(budget // (self.block_rows * self._row_bytes()), 1) * self.block_rows

    def _row_bytes(self) -> int:
        """What decides how rows are grouped must be the same in all processes, which wait for each other."""
        vocab_size = self.weight.shape[0] if self.share is None else self.share[2]
        return vocab_size * self.logits_dtype.itemsize

    def _row_op(self, name: str) -> Callable:
        return getattr(reference, name) if self.backend == "reference" else _registry.op(name, self.backend)

    def _buffer(self, use: str, dtype: torch.dtype, *shape: int) -> Tensor:
        """Memory for one use, the same in each call: on a CPU the first touch of fresh memory costs more than the
        product that is written to it."""
        size = torch.Size(shape).numel()
        if use not in self._buffers or self._buffers[use].numel() < size:
            self._buffers[use] = self.weight.new_empty(size, dtype=dtype)
        return self._buffers[use][:size].view(shape)

    def _scratch(self, *shape: int) -> Tensor | None:
        """For `multiply`."""
        return self._buffer("scratch", self.weight.dtype, *shape) if self.rounds else None

    def kept(self, rows: Rows) -> Tensor:
        """Memory for all logits of `rows`, seen through `tiles` and `strips`; to be given to `recycle`."""
        size = len(rows) * self.weight.shape[0]
        if self.weight.is_cpu:
            used = size * self.logits_dtype.itemsize
            with suppress(IndexError):  # none, or by now another thread's
                memory = _recycled.pop()
                if memory.numel() >= used:
                    return memory[:used].view(self.logits_dtype)
        return self.weight.new_empty(size, dtype=self.logits_dtype)

    def tiles(self, kept: Tensor, rows: Rows) -> list[Tensor]:
        """A tile [R, v] for each range of the vocabulary."""
        if self.rounds:
            whole = kept.view(len(rows), self.weight.shape[0])
            return [whole[:, vocab] for vocab in self.vocab_tiles]
        size = len(rows)
        return [kept[size * v.start : size * v.stop].view(size, v.stop - v.start) for v in self.vocab_tiles]

    def strips(self, kept: Tensor | None, rows: Rows) -> list[tuple[slice, Tensor | None]]:
        """What the backward pass works on at once: a range of the vocabulary, and its logits if they were kept. Where
        a product is rounded it is of the whole vocabulary, so that it is a whole sum, if that is there."""
        if kept is None:
            return [(vocab, None) for vocab in self.vocab_tiles]
        if self.rounds:
            whole = slice(0, self.weight.shape[0])
            return [(whole, kept.view(len(rows), whole.stop))]
        return list(zip(self.vocab_tiles, self.tiles(kept, rows), strict=True))

    def logits(self, rows: Rows, block: slice, vocab: slice, out: Tensor) -> None:
        hidden, weight = rows.hidden[block], self.weight[vocab]
        if self.bias is not None and out.dtype == hidden.dtype:
            torch.addmm(self.bias[vocab], hidden, weight.t(), out=out)
        else:
            multiply(hidden, weight.t(), out, None, add=False)
            if self.bias is not None:
                out += self.bias[vocab]
        if rows.adapter is not None and self.adapter_weight is not None:
            multiply(rows.adapter[block], self.adapter_weight[vocab].t(), out, None, add=True)

    def logits_tile(self, rows: Rows, block: slice, vocab: slice) -> Tensor:
        """Logits of a block of rows and a range of the vocabulary, in memory that the next such tile takes."""
        tile = self._buffer("tile", self.logits_dtype, block.stop - block.start, vocab.stop - vocab.start)
        self.logits(rows, block, vocab, tile)
        return tile

    def forward(
        self, rows: Rows, kept: Tensor | None, also: Callable[[Tensor, slice, slice], None] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities [R], entropy [R] and row_stats [2, R]. Leaves the logits in `kept`, and shows each tile to
        `also`."""
        return finish(self.sums(rows, kept, also), self.temperature)

    def sums(
        self, rows: Rows, kept: Tensor | None, also: Callable[[Tensor, slice, slice], None] | None = None
    ) -> Tensor:
        """The part [4, R] of all tiles; the rest as forward."""
        part_of = self._row_op("token_logprobs_part")
        token_ids = self.local_ids(rows)
        parts = self.weight.new_empty(len(self.vocab_tiles), 4, len(rows), dtype=working_dtype(self.weight))
        if not self.vocab_tiles:  # a process without a share
            nothing = parts.new_tensor([float("-inf"), 0.0, 0.0, float("nan")])
            parts = nothing.view(1, 4, 1).expand(1, 4, len(rows))
        tiles = None if kept is None else self.tiles(kept, rows)
        for number, vocab in enumerate(self.vocab_tiles):
            for block in slices(len(rows), self.block_rows):
                if tiles is None:
                    tile = self.logits_tile(rows, block, vocab)
                else:
                    tile = tiles[number][block]
                    self.logits(rows, block, vocab, tile)
                options = (self.temperature, self.softcap, PADDING, self.entropy)
                parts[number, :, block] = part_of(tile, token_ids[block], vocab.start, *options)
                if also is not None:
                    also(tile, block, vocab)
        return self.join(parts)

    def backward(
        self,
        rows: Rows,
        grad_logprobs: Tensor | None,
        grad_entropy: Tensor | None,
        logprobs: Tensor,
        entropy: Tensor,
        row_stats: Tensor,
        kept: Tensor | None,
        gradients: Gradients,
        *,
        add: bool = False,
    ) -> None:
        """From the gradients of log-probabilities and entropy, and what Head.forward gave."""
        token_ids = self.local_ids(rows)

        def to_gradient(vocab: slice, block: slice, tile: Tensor, gradient: Tensor) -> None:
            self._row_op("token_logprobs_part_backward")(
                None if grad_logprobs is None else grad_logprobs[block],
                None if grad_entropy is None else grad_entropy[block],
                tile,
                token_ids[block],
                vocab.start,
                logprobs[block],
                entropy[block] if grad_entropy is not None else entropy,
                row_stats[:, block].contiguous(),
                self.temperature,
                self.softcap,
                PADDING,
                gradient,
            )

        self.backward_tiles(rows, to_gradient, kept, gradients, add=add)

    def backward_tiles(
        self,
        rows: Rows,
        to_gradient: Callable[[slice, slice, Tensor, Tensor], None],
        kept: Tensor | None,
        gradients: Gradients,
        *,
        add: bool = False,
    ) -> None:
        """Turns each tile of logits, kept or computed again, into its gradient, in place where the dtype allows, and
        that into those of its factors: to_gradient(range of the vocabulary, block of rows, tile, gradient) writes it.
        With `add` the weights' go on top of what is there."""
        of_rows = [(gradients.hidden, self.weight), (gradients.adapter, self.adapter_weight)]
        of_weights = [
            ("weight", gradients.weight, rows.hidden),
            ("adapter_weight", gradients.adapter_weight, rows.adapter),
        ]
        empty = () if len(rows) or add else (gradients.weight, gradients.bias, gradients.adapter_weight)
        for out in empty if self.vocab_tiles else (gradients.hidden, gradients.adapter):
            if out is not None:
                out.zero_()
        # Kept logits become their gradient where they are, in one piece; others in a tile of so many rows.
        in_place = kept is not None and self.logits_dtype == self.weight.dtype
        most = max(CHUNK_ROWS // self.block_rows, 1) * self.block_rows
        chunks = slices(len(rows), len(rows) if in_place and len(rows) else most)
        for number, (vocab, strip) in enumerate(self.strips(kept, rows)):
            width = vocab.stop - vocab.start
            for piece, chunk in enumerate(chunks):
                size = chunk.stop - chunk.start
                tile = self._buffer("tile", self.logits_dtype, size, width) if strip is None else strip[chunk]
                gradient = tile
                if self.logits_dtype != self.weight.dtype:
                    gradient = self._buffer("gradient", self.weight.dtype, size, width)
                for at in slices(size, self.block_rows):
                    block = slice(chunk.start + at.start, chunk.start + at.stop)
                    if strip is None:
                        self.logits(rows, block, vocab, tile[at])
                    to_gradient(vocab, block, tile[at], gradient[at])
                    for out, weight in of_rows:
                        if out is not None and weight is not None:
                            scratch = self._scratch(self.block_rows, weight.shape[1])
                            multiply(gradient[at], weight[vocab], out[block], scratch, add=number > 0)
                for name, out, factor in of_weights:
                    if out is not None and factor is not None:
                        for columns in slices(width, self.tile_columns):
                            tokens = slice(vocab.start + columns.start, vocab.start + columns.stop)
                            total = self._weight_sum(name, out[tokens], len(chunks))
                            scratch = None if total.dtype == factor.dtype else self._scratch(*total.shape)
                            product = (gradient[:, columns].t(), factor[chunk])
                            multiply(*product, total, scratch, add=add or piece > 0)
                            if total.dtype != out.dtype and piece == len(chunks) - 1:
                                out[tokens] = total
                if gradients.bias is not None:
                    total = gradient.sum(0, dtype=gradients.bias.dtype)
                    gradients.bias[vocab] = total + gradients.bias[vocab] if piece or add else total

    def _weight_sum(self, name: str, out: Tensor, pieces: int) -> Tensor:
        """Where a weight's gradient is added up: `out`, or float32 until it is complete."""
        if pieces == 1 or out.dtype == working_dtype(out):
            return out
        return self._buffer(name, working_dtype(out), *out.shape)

    def join(self, parts: Tensor) -> Tensor:
        """[4, R] of the parts [tiles, 4, R] of this process and all others."""
        part = join(parts, self.temperature)
        return part if self.group is None else join(self.all_gather(part), self.temperature)

    def all_gather(self, value: Tensor) -> Tensor:
        """[processes, ...], in the order of their ranks; of one process without a group."""
        return value.unsqueeze(0) if self.group is None else _all_gather(value, self.group)

    def reduce(self, gradients: Gradients) -> Gradients:
        """With the gradients of rows summed over the processes that share the vocabulary."""
        if self.group is not None:
            for value in (gradients.hidden, gradients.adapter):
                if value is not None:
                    torch.distributed.all_reduce(value, group=self.group)
        return gradients

    def local_ids(self, rows: Rows) -> Tensor:
        """The rows' token ids, counted from this process's first."""
        if self.share is None:
            return rows.token_ids
        return torch.where(rows.token_ids == PADDING, PADDING, rows.token_ids - self.share[0])


def _all_gather(value: Tensor, group: Any) -> Tensor:
    gathered = [torch.empty_like(value) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(gathered, value.contiguous(), group=group)
    return torch.stack(gathered)


def shares(weight: Tensor, group: Any) -> tuple[int, int, int]:
    """The first token of this process's share, how many tokens there are, and how many in the largest share."""
    sizes = _all_gather(torch.tensor(weight.shape[0], device=weight.device), group).tolist()
    return sum(sizes[: torch.distributed.get_rank(group)]), sum(sizes), max(sizes)


def forward_backward(
    head: Head,
    rows: Rows,
    groups: list[slice],
    upstream: Callable[[slice, Tensor, Tensor], tuple[Tensor, Tensor | None]],
    gradients: Gradients,
    also: Callable[[Tensor, slice, slice], None] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Head.forward, and while the logits of a group of rows are there Head.backward, for the upstream gradients that
    `upstream` makes of the group's log-probabilities and entropy."""
    results = []
    for number, at in enumerate(groups or [slice(0, 0)]):
        part = rows.part(at)
        kept = head.kept(part)
        shifted = None if also is None else _shifted(also, at.start)
        logprobs, entropy, row_stats = head.forward(part, kept, shifted)
        grad_logprobs, grad_entropy = upstream(at, logprobs, entropy)
        saved = (grad_logprobs, grad_entropy, logprobs, entropy, row_stats)
        head.backward(part, *saved, kept, gradients.part(at), add=number > 0)
        results.append((logprobs, entropy, row_stats))
        recycle(kept)
    logprobs, entropy, row_stats = (torch.cat(parts, -1) for parts in zip(*results, strict=True))
    return logprobs, entropy, row_stats


_recycled: list[Tensor] = []
"""The memory of the last logits that were kept on a CPU, where PyTorch gives memory back to the system: that the system
gives it anew, page by page at the first touch, takes as long as the product that is written to it."""


def recycle(kept: Tensor) -> None:
    """Leave memory of `Head.kept`, of which nothing is needed any more, to the next call."""
    if kept.is_cpu:
        whole = torch.empty(0, dtype=torch.uint8).set_(kept.untyped_storage())
        _recycled[:] = [whole]


def _shifted(also: Callable[[Tensor, slice, slice], None], by: int) -> Callable[[Tensor, slice, slice], None]:
    return lambda tile, block, vocab: also(tile, slice(block.start + by, block.stop + by), vocab)


def join(parts: Tensor, temperature: float) -> Tensor:
    """The part [4, R] of disjoint parts [P, 4, R] of the same rows."""
    top, total, moment, target = parts.unbind(1)
    largest = top.amax(0)
    # A difference of 0 stands for -inf - -inf, which would be NaN; the sums it weighs are 0.
    below = ((top - largest) / temperature).masked_fill(torch.isneginf(top), 0.0)
    weight = below.exp()
    # A part of which nothing is left may lie so far below (a vocabulary masked by the lowest float) that it overflows.
    moment = ((moment + total * below) * weight).masked_fill(weight == 0, 0.0)
    found = ~target.isnan()
    sum_of_one = target.masked_fill(~found, 0.0).sum(0)
    return torch.stack(
        [
            largest,
            (total * weight).sum(0),
            moment.sum(0),
            sum_of_one.masked_fill(~found.any(0), float("nan")),
        ]
    )


def finish(part: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability and entropy [R] of whole rows, and row_stats [2, R]; `finish_row` in
    csrc/include/rlkernels/logprobs.h has the reasons."""
    top, total, moment, target = part
    origin = torch.where(torch.isneginf(top), target, top)
    lead = (target - origin) / temperature
    x = total.log() - lead
    logprobs = -(x.clamp(min=0) + torch.log1p((-x.abs()).exp()))
    undefined = torch.isposinf(top) | torch.isposinf(target) | x.isnan()
    log_sum = torch.where(lead >= 0, -logprobs, (total + lead.exp()).log())
    p_target = logprobs.exp()
    least = lead.clamp(min=0) + log_sum
    entropy = (-p_target * logprobs).masked_fill(p_target == 0, 0.0)
    entropy = entropy + ((-least).exp() * (total * least - moment)).masked_fill(total == 0, 0.0)
    nan = float("nan")
    row_stats = torch.stack([torch.maximum(origin, target), log_sum])
    return (
        logprobs.masked_fill(undefined, nan),
        entropy.masked_fill(undefined, nan),
        row_stats.masked_fill(undefined, nan),
    )
