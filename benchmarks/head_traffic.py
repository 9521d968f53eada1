"""Floating-point operations and bytes of the LM head: how many products of the whole batch, and what its tiles move.

Counted on the CPU, by the dispatcher: a product or a row kernel reads each of its inputs once and writes each of its
outputs once. How often a product reads its factors again, from whichever cache, is up to the library. Tiles are as
large as this machine's cache asks for. The last ones are as large as an H100's, where tiles are float32 for bfloat16
factors too.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import rlkernels
from rlkernels.ops.lm_head.tiles import tile_size

PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm)
ROW_KERNELS = ("rlkernels::token_logprobs_part", "rlkernels::token_logprobs_part_backward")


@dataclass
class Line:
    """A row of the table."""

    name: str
    shape: tuple[int, int, int]
    dtype: torch.dtype
    flops: int
    traffic: "Traffic"

    @property
    def products(self) -> float:
        """How many products of the whole batch, [N, H] x [H, V], the operations amount to."""
        rows, hidden_size, vocab_size = self.shape
        return self.flops / (2 * rows * hidden_size * vocab_size)


class Traffic(TorchDispatchMode):
    """Bytes of the products' factors and gradients, which have `hidden_size` columns, and of the tiles of logits, by
    what reads or writes them."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.factors = self.tiles_of_products = self.tiles_of_rows = 0
        self.tile = (0, 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        results = func(*args, **kwargs)
        packet = func._overloadpacket
        if packet in PRODUCTS:
            # With beta=0 and for a bias that is broadcast nothing of the size of the result is read.
            accumulates = packet is torch.ops.aten.addmm and kwargs.get("beta", 1) != 0
            tensors = (*args[int(packet is torch.ops.aten.addmm) :][:2], results, *(args[:1] if accumulates else ()))
            for tensor in tensors:
                if self.hidden_size in tensor.shape:
                    self.factors += tensor.nbytes
                else:
                    self.tiles_of_products += tensor.nbytes
                    self.tile = max(self.tile, tuple(tensor.shape))
        elif func._schema.name in ROW_KERNELS:
            values = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
            largest = max(value.numel() for value in values)
            # In a backward pass the tile and its gradient, which takes its place or not.
            self.tiles_of_rows += sum(value.nbytes for value in values if value.numel() == largest)
        return results


def counted(name: str, shape: tuple[int, int, int], dtype: torch.dtype, function: Callable, *, frozen=False) -> Line:
    """`function` of hidden, weight and token ids, and its gradient by the first two, or by hidden alone."""
    rows, hidden_size, vocab_size = shape
    hidden = torch.randn(rows, hidden_size, dtype=dtype).requires_grad_()
    weight = torch.randn(vocab_size, hidden_size, dtype=dtype).mul_(hidden_size**-0.5).requires_grad_(not frozen)
    token_ids = torch.randint(vocab_size, (rows,))
    traffic, counter = Traffic(hidden_size), FlopCounterMode(display=False)
    with counter, traffic:
        output = function(hidden, weight, token_ids)
        gradients = torch.autograd.grad(output, [hidden] if frozen else [hidden, weight], torch.ones_like(output))
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    return Line(name, shape, dtype, counter.get_total_flops(), traffic)


ENOUGH = 1024
"""MB of all logits of these shapes."""
TILE_OF_H100 = (512, 12800)
"""Half of 50 MiB of L2 cache, in float32."""
SHAPES = [
    ((512, 576, 49152), torch.float32, None),
    ((512, 576, 49152), torch.bfloat16, None),
    ((512, 1024, 151936), torch.bfloat16, None),
    ((512, 1024, 151936), torch.float32, TILE_OF_H100),
]


def lines(shape: tuple[int, int, int], dtype: torch.dtype, tile: tuple[int, int] | None = None) -> Iterator[Line]:
    def logprobs(budget_mb: float) -> Callable:
        return lambda *inputs: rlkernels.linear_token_logprobs(*inputs, logits_budget_mb=budget_mb)

    def policy_loss(hidden, weight, token_ids):
        inputs = (hidden.unsqueeze(0), weight, token_ids.unsqueeze(0), None, torch.ones(1))
        return rlkernels.linear_policy_loss(*inputs, logits_budget_mb=ENOUGH)[0]

    with rlkernels.use_backend("cpu"), tile_size(tile):
        yield counted("linear_policy_loss", shape, dtype, policy_loss)
        yield counted("linear_token_logprobs, logits kept", shape, dtype, logprobs(ENOUGH))
        yield counted("linear_token_logprobs, recomputing", shape, dtype, logprobs(0))
        yield counted("linear_token_logprobs, frozen weight", shape, dtype, logprobs(ENOUGH), frozen=True)


def section() -> Iterator[str]:
    """In Markdown."""
    yield f"## Products and bytes of the LM head\n\n{__doc__.strip().partition(chr(10) * 2)[2]}"
    yield "MB of tiles: by products, by row kernels. Rows are fewer than in training.\n"
    yield "| | [rows, H, V] | products | GFLOP | factors and gradients, MB | tiles, MB | largest tile | flop a byte |"
    yield "|---|---|---|---|---|---|---|---|"
    torch.manual_seed(0)
    for shape, dtype, tile in SHAPES:
        for line in lines(shape, dtype, tile):
            traffic = line.traffic
            every = traffic.factors + traffic.tiles_of_products + traffic.tiles_of_rows
            cells = (
                line.name,
                f"{list(shape)} {str(dtype).removeprefix('torch.')}",
                f"{line.products:.2f}",
                f"{line.flops / 1e9:,.1f}",
                f"{traffic.factors / 1e6:,.0f}",
                f"{traffic.tiles_of_products / 1e6:,.0f} + {traffic.tiles_of_rows / 1e6:,.0f}",
                str(list(traffic.tile)),
                f"{line.flops / every:.0f}",
            )
            yield f"| {' | '.join(cells)} |"
