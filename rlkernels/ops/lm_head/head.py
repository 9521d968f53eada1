from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from rlkernels import _registry
from rlkernels.ops.lm_head.gradients import Gradients
from rlkernels.ops.lm_head.tiles import PADDING, POOL, Rows, default_tile, range_of, slices, working_dtype
from rlkernels.reference import logprobs as reference

CHUNK_ROWS = 4096
"""The most rows of a tile in the backward pass, where one product adds them all to the weight's gradient."""


def multiply(a: Tensor, b: Tensor, out: Tensor, scratch: Tensor | None, *, add: bool) -> None:
    """out = a @ b, or with `add` out += a @ b. If `out` is float32 and the factors are not, a GPU does not round the
    product. A CPU rounds it to the factors' dtype first, in `scratch`, because PyTorch has no other product there."""
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    elif out.is_cuda:
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=int(add), out=out)
    else:
        assert scratch is not None
        product = torch.mm(a, b, out=scratch)
        out.add_(product) if add else out.copy_(product)


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
    """What `shares` returns, if the processes of `group` share the vocabulary."""
    _buffers: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        device = self.weight.device
        self.logits_dtype = self.weight.dtype
        if device.type == "cuda" and self.weight.dtype in (torch.bfloat16, torch.float16):
            self.logits_dtype = torch.float32
        # On a CPU, PyTorch rounds every product of 16-bit factors to 16 bits.
        self.rounds = self.weight.dtype.itemsize == 2 and device.type != "cuda"
        self.block_rows, self.tile_columns = self.tile or default_tile(device, self.logits_dtype)
        self.vocab_tiles = slices(self.weight.shape[0], self.tile_columns)

    def fits(self, rows: int, budget: int) -> bool:
        """Whether the logits of that many rows take at most `budget` bytes in every process."""
        return rows * self._row_bytes() <= budget

    def rows_within(self, budget: int) -> int:
        """The most rows, in whole blocks, whose logits take at most `budget` bytes; at least one block."""
        return max(budget // (self.block_rows * self._row_bytes()), 1) * self.block_rows

    def _row_bytes(self) -> int:
        """Bytes of a row's logits, for the largest share: all processes must group rows alike, or wait forever."""
        vocab_size = self.weight.shape[0] if self.share is None else self.share[2]
        return vocab_size * self.logits_dtype.itemsize

    def _row_op(self, name: str) -> Callable:
        return getattr(reference, name) if self.backend == "reference" else _registry.op(name, self.backend)

    def _joining_op(self, name: str) -> Callable:
        """A kernel of Triton's; elsewhere the reference, which launches nothing on a CPU and costs little next to the
        tiles."""
        return _registry.op(name, "triton") if self.backend == "triton" else getattr(reference, name)

    def _buffer(self, use: str, dtype: torch.dtype, *shape: int) -> Tensor:
        """Memory for one use, which every call shares. On a CPU the first touch of fresh memory costs more than the
        product that is written to it."""
        size = torch.Size(shape).numel()
        if use not in self._buffers or self._buffers[use].numel() < size:
            self._buffers[use] = self.weight.new_empty(size, dtype=dtype)
        return self._buffers[use][:size].view(shape)

    def _scratch(self, *shape: int) -> Tensor | None:
        """Memory for the rounded product in `multiply`."""
        return self._buffer("scratch", self.weight.dtype, *shape) if self.rounds else None

    def kept(self, rows: Rows) -> Tensor:
        """Memory for all logits of `rows`, to be given to POOL in the end. `tiles` and `strips` are views of it."""
        size = len(rows) * self.weight.shape[0]
        memory = POOL.take(size * self.logits_dtype.itemsize) if self.weight.is_cpu else None
        if memory is None:
            return self.weight.new_empty(size, dtype=self.logits_dtype)
        return memory.view(self.logits_dtype)

    def tiles(self, kept: Tensor, rows: Rows) -> list[Tensor]:
        """A tile [R, v] for each range of the vocabulary."""
        if self.rounds:
            whole = kept.view(len(rows), self.weight.shape[0])
            return [whole[:, vocab] for vocab in self.vocab_tiles]
        size = len(rows)
        return [kept[size * v.start : size * v.stop].view(size, v.stop - v.start) for v in self.vocab_tiles]

    def strips(self, kept: Tensor | None, rows: Rows) -> list[tuple[slice, Tensor | None]]:
        """The ranges of the vocabulary that the backward pass goes through, and their logits if they were kept. Kept
        logits whose products are rounded are one range, so that hidden's gradient is rounded once."""
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
        """Logits of a block of rows and a range of the vocabulary, in memory that the next call overwrites."""
        tile = self._buffer("tile", self.logits_dtype, block.stop - block.start, vocab.stop - vocab.start)
        self.logits(rows, block, vocab, tile)
        return tile

    def forward(
        self, rows: Rows, kept: Tensor | None, also: Callable[[Tensor, slice, slice], None] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities [R], entropy [R] and row_stats [2, R]. Writes the logits to `kept` and calls `also` with
        each tile, its block of rows and its range of the vocabulary."""
        if kept is None and also is None and self.in_one_kernel(rows):
            parts = self.all_gather(self._sums_in_one_kernel(rows))
            return self._joining_op("token_logprobs_finish")(parts, self.temperature)
        parts = self.parts(rows, kept, also)
        if self.group is not None:
            parts = self.all_gather(self.join(parts))
        return self._joining_op("token_logprobs_finish")(parts, self.temperature)

    def sums(self, rows: Rows, kept: Tensor | None) -> Tensor:
        """The rows' sums over the whole vocabulary, [4, R]; `kept` is as in forward."""
        part = self.join(self.parts(rows, kept))
        return part if self.group is None else self.join(self.all_gather(part))

    def parts(
        self, rows: Rows, kept: Tensor | None, also: Callable[[Tensor, slice, slice], None] | None = None
    ) -> Tensor:
        """The rows' sums over each tile of this process's vocabulary, [tiles, 4, R]; `kept` and `also` are as in
        forward."""
        part_of = self._row_op("token_logprobs_part")
        token_ids = self.local_ids(rows)
        parts = self.weight.new_empty(len(self.vocab_tiles), 4, len(rows), dtype=working_dtype(self.weight))
        if not self.vocab_tiles:  # this process has no share of the vocabulary
            nothing = parts.new_tensor([float("-inf"), 0.0, 0.0, float("nan")])
            parts = nothing.view(1, 4, 1).expand(1, 4, len(rows)).contiguous()
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
        return parts

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
        """Fill `gradients`, from the gradients of log-probabilities and entropy and the results of forward."""
        if kept is None and self.in_one_kernel(rows):
            saved = (grad_logprobs, grad_entropy, logprobs, entropy, row_stats)
            return self._backward_by_ranges(rows, *saved, gradients, add=add)
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

    def in_one_kernel(self, rows: Rows) -> bool:
        """Whether logits that are not kept are computed and used in one kernel."""
        return (
            self.backend == "triton"
            and self.weight.dtype in (torch.bfloat16, torch.float16)
            and self.adapter_weight is None
            and self.weight.stride(1) == 1
            and min(len(rows), *self.weight.shape) > 0
        )

    def _sums_in_one_kernel(self, rows: Rows) -> Tensor:
        factors = (rows.hidden, self.weight, self.bias, self.local_ids(rows))
        op = _registry.op("linear_token_logprobs_sums", "triton")
        return op(*factors, self.temperature, self.softcap, self.entropy)

    def _backward_by_ranges(
        self,
        rows: Rows,
        grad_logprobs: Tensor | None,
        grad_entropy: Tensor | None,
        logprobs: Tensor,
        entropy: Tensor,
        row_stats: Tensor,
        gradients: Gradients,
        *,
        add: bool,
    ) -> None:
        """One kernel gives the gradient of all rows' logits for a range of the vocabulary; then each gradient is one
        product with it."""
        vocab_size, width = self.weight.shape
        factors = (rows.hidden, self.weight, self.bias, self.local_ids(rows))
        options = (self.temperature, self.softcap, PADDING)
        for number, vocab in enumerate(slices(vocab_size, range_of(len(rows)))):
            gradient = _registry.op("linear_token_logprobs_gradient", "triton")(
                *(
                    grad_logprobs,
                    grad_entropy,
                    *factors,
                    logprobs,
                    entropy,
                    row_stats,
                    vocab.start,
                    vocab.stop,
                    *options,
                )
            )
            if gradients.hidden is not None:
                scratch = self._scratch(len(rows), width)
                multiply(gradient, self.weight[vocab], gradients.hidden, scratch, add=number > 0)
            if gradients.weight is not None:
                out = gradients.weight[vocab]
                scratch = None if out.dtype == gradient.dtype else self._scratch(*out.shape)
                multiply(gradient.t(), rows.hidden, out, scratch, add=add)
            if gradients.bias is not None:
                total = gradient.sum(0, dtype=gradients.bias.dtype)
                gradients.bias[vocab] = total + gradients.bias[vocab] if add else total

    def backward_tiles(
        self,
        rows: Rows,
        to_gradient: Callable[[slice, slice, Tensor, Tensor], None],
        kept: Tensor | None,
        gradients: Gradients,
        *,
        add: bool = False,
    ) -> None:
        """Turn each tile of logits, kept or recomputed, into its gradient, in place where the dtype allows, and fill
        `gradients` from it. to_gradient(range of the vocabulary, block of rows, tile, gradient) writes that gradient.
        With `add` the gradients of weights are added to those that are there."""
        of_rows = [(gradients.hidden, self.weight), (gradients.adapter, self.adapter_weight)]
        of_weights = [
            ("weight", gradients.weight, rows.hidden),
            ("adapter_weight", gradients.adapter_weight, rows.adapter),
        ]
        empty = () if len(rows) or add else (gradients.weight, gradients.bias, gradients.adapter_weight)
        for out in empty if self.vocab_tiles else (gradients.hidden, gradients.adapter):
            if out is not None:
                out.zero_()
        # Kept logits become their gradient in place, all rows at once; others are computed again, in chunks of rows.
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

    def new_gradients(self, rows: Rows, wanted: list[bool], *, weight_in_pieces: bool) -> Gradients:
        """Uninitialized memory for the gradients that are wanted. With weight_in_pieces several calls of backward add
        to the gradient of a weight, which is then at least float32; otherwise it has the weight's dtype."""
        dtype = working_dtype(self.weight)
        weight_dtype = dtype if weight_in_pieces else self.weight.dtype
        like = (rows.hidden, self.weight, self.bias, rows.adapter, self.adapter_weight)
        dtypes = (dtype, weight_dtype, dtype, dtype, weight_dtype)
        return Gradients(
            *(
                torch.empty_like(value, dtype=dtype, memory_format=torch.contiguous_format)
                if want and value is not None
                else None
                for want, value, dtype in zip(wanted, like, dtypes, strict=True)
            )
        )

    def _weight_sum(self, name: str, out: Tensor, pieces: int) -> Tensor:
        """Where a weight's gradient is summed: in `out`, or in float32 until it is complete."""
        if pieces == 1 or out.dtype == working_dtype(out):
            return out
        return self._buffer(name, working_dtype(out), *out.shape)

    def join(self, parts: Tensor) -> Tensor:
        """Join sums over disjoint parts of the vocabulary, [P, 4, R], to [4, R]."""
        return self._joining_op("token_logprobs_join")(parts, self.temperature)

    def all_gather(self, value: Tensor) -> Tensor:
        """The values of all processes, [processes, ...], in the order of their ranks. Without a group there is one."""
        return value.unsqueeze(0) if self.group is None else _all_gather(value, self.group)

    def reduce(self, gradients: Gradients) -> Gradients:
        """Sum the gradients of rows, in place, over the processes that share the vocabulary."""
        if self.group is not None:
            for value in (gradients.hidden, gradients.adapter):
                if value is not None:
                    torch.distributed.all_reduce(value, group=self.group)
        return gradients

    def local_ids(self, rows: Rows) -> Tensor:
        """The rows' token ids, relative to the first token of this process's share."""
        if self.share is None:
            return rows.token_ids
        return torch.where(rows.token_ids == PADDING, PADDING, rows.token_ids - self.share[0])


def _all_gather(value: Tensor, group: Any) -> Tensor:
    gathered = [torch.empty_like(value) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(gathered, value.contiguous(), group=group)
    return torch.stack(gathered)


def shares(weight: Tensor, group: Any) -> tuple[int, int, int]:
    """The first token of this process's share, the size of the vocabulary, and the size of the largest share."""
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
    """Run Head.forward and Head.backward on one group of rows after the other, so that only one group's logits exist at
    a time. `upstream` makes the gradients of the group's log-probabilities and entropy from their values."""
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
        POOL.give(kept)
    logprobs, entropy, row_stats = (torch.cat(parts, -1) for parts in zip(*results, strict=True))
    return logprobs, entropy, row_stats


def _shifted(also: Callable[[Tensor, slice, slice], None], by: int) -> Callable[[Tensor, slice, slice], None]:
    return lambda tile, block, vocab: also(tile, slice(block.start + by, block.stop + by), vocab)
