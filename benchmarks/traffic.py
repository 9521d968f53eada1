"""Bytes that each Triton kernel reads and writes, next to the least possible. Triton's interpreter runs them: no GPU.

    python benchmarks/traffic.py > docs/traffic.md

A kernel's traffic is what it asks for: every lane of a load or store that its mask lets through; lanes of one
instruction at the same address count once. What is read again counts again, whichever cache would hold it, except for
inputs that are small enough for all programs to share. The least possible is each input once and each output once;
where a statistic of a row or of the batch must come before the output, its inputs count once more. Tokens and rows are
fewer than in training; both numbers are proportional to them. The command ends with 1 if a kernel of ours moves more
than 1.05 times the least.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
import triton
from torch import Tensor
from triton.runtime import interpreter

import head_traffic
import rlkernels
from rlkernels import _registry
from rlkernels._codes import DIVERGENCES

MOST = 1.05
SHARED = 1024
"""Bytes of a tensor, such as weights or cu_seqlens, up to which a launch reads it once: it stays in the L2 cache."""


@dataclass
class Traffic:
    read: int = 0
    written: int = 0
    kernels: dict[str, None] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return self.read + self.written


@contextmanager
def counting(*, share: bool = False) -> Iterator[Traffic]:
    """What the kernels that are launched inside move. With `share` the programs of a launch share the small tensors
    that it is given, what an earlier launch left among them."""
    traffic = Traffic()
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    originals = {
        (executor, "__call__"): executor.__call__,
        (builder, "create_masked_load"): builder.create_masked_load,
        (builder, "create_masked_store"): builder.create_masked_store,
        (builder, "create_atomic_rmw"): builder.create_atomic_rmw,
        (builder, "create_atomic_cas"): builder.create_atomic_cas,
    }

    # Where the shared tensors of the running launch lie, and the addresses that it has read of each.
    shared: dict[range, set[int]] = {}

    def launch(self, *args, **kwargs):
        traffic.kernels[self.fn.__name__] = None
        shared.clear()
        for value in args if share else ():
            if isinstance(value, Tensor) and size_of(value) <= SHARED:
                shared[range(value.data_ptr(), value.data_ptr() + size_of(value))] = set()
        return originals[executor, "__call__"](self, *args, **kwargs)

    def load(self, pointers, mask, *rest):
        asked, size = asked_for(pointers, mask)
        for memory, seen in shared.items():
            if len(asked) and int(asked[0]) in memory:
                new = set(asked.tolist()) - seen
                seen |= new
                traffic.read += len(new) * size
                break
        else:
            traffic.read += len(asked) * size
        return originals[builder, "create_masked_load"](self, pointers, mask, *rest)

    def store(self, pointers, value, mask, *rest):
        asked, size = asked_for(pointers, mask)
        traffic.written += len(asked) * size
        return originals[builder, "create_masked_store"](self, pointers, value, mask, *rest)

    def atomic(*args):
        raise NotImplementedError("the traffic of atomic operations is not counted")

    try:
        for (owner, name), replacement in zip(originals, (launch, load, store, atomic, atomic), strict=True):
            setattr(owner, name, replacement)
        yield traffic
    finally:
        for (owner, name), original in originals.items():
            setattr(owner, name, original)


def asked_for(pointers, mask) -> tuple[np.ndarray, int]:
    """The addresses of an instruction, and the bytes at each."""
    addresses = np.asarray(pointers.data)[np.asarray(mask.data, dtype=bool)]
    return np.unique(addresses), pointers.get_element_ty().primitive_bitwidth // 8


def size_of(*tensors: Tensor | None) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


@dataclass
class Line:
    """A line of the table."""

    name: str
    shape: str
    traffic: Traffic
    least: int
    ours: bool = True

    @property
    def ratio(self) -> float:
        return self.traffic.total / self.least


Case = Callable[[], Iterator[Line]]


def measured(name: str, function: Callable, *inputs, again: tuple = (), **options) -> Line:
    """Calls a function on its inputs, without a backward pass."""
    tensors = [value for value in (*inputs, *options.values()) if isinstance(value, Tensor)]
    with counting(share=True) as traffic:
        outputs = function(*inputs, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    largest = max(tensors, key=torch.numel)
    return Line(name, str(list(largest.shape)), traffic, size_of(*tensors, *outputs, *again))


def token_logprobs(name: str, function: Callable, dtype: torch.dtype, *, ours: bool = True) -> Iterator[Line]:
    """Forward and backward, with entropy: saved and upstream numbers are a few a row."""
    rows, vocab_size = 4, 49152
    logits = torch.randn(rows, vocab_size).to(dtype).requires_grad_()
    token_ids = torch.randint(vocab_size, (rows,))
    shape = f"[rows, {vocab_size}] {str(dtype).removeprefix('torch.')}"
    with counting() as traffic:
        logprobs, entropy = function(logits * 1, token_ids)
    yield Line(f"{name} forward", shape, traffic, size_of(logits, token_ids, logprobs, entropy), ours)
    with counting() as traffic:
        torch.autograd.grad([logprobs, entropy], logits, [torch.randn(rows), torch.randn(rows)])
    per_row = size_of(token_ids, *[logprobs, entropy] * 3)
    yield Line(f"{name} backward", shape, traffic, size_of(logits, logits) + per_row, ours)


def trl_logprobs(dtype: torch.dtype) -> Iterator[Line]:
    from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy

    return token_logprobs("TRL logprob_entropy", selective_log_softmax_and_entropy, dtype, ours=False)


def our_logprobs(dtype: torch.dtype, **options) -> Iterator[Line]:
    def function(logits, token_ids):
        return rlkernels.token_logprobs(logits, token_ids, return_entropy=True, **options)

    name = ", ".join(["token_logprobs", *(option.removesuffix("_backward") for option in options)])
    return token_logprobs(name, function, dtype)


def token_logprobs_part() -> Iterator[Line]:
    """A tile as a GPU has it: the product of bfloat16 in float32, its gradient in bfloat16 for the next product."""
    rows, vocab_size, start = 4, 16384, 32768
    tile, gradient = torch.randn(rows, vocab_size), torch.empty(rows, vocab_size, dtype=torch.bfloat16)
    token_ids, options = start + torch.randint(vocab_size, (rows,)), (1.0, 0.0, -100)
    shape = f"[rows, {vocab_size}] float32, bfloat16"
    with counting() as traffic:
        parts = _registry.op("token_logprobs_part", "triton")(tile, token_ids, start, *options, True)
    yield Line("token_logprobs_part", shape, traffic, size_of(tile, token_ids, parts))
    per_row = (token_ids, numbers(rows), numbers(rows), numbers(2, rows))
    upstream = numbers(rows), numbers(rows)
    with counting() as traffic:
        _registry.op("token_logprobs_part_backward", "triton")(
            *upstream, tile, per_row[0], start, *per_row[1:], *options, gradient
        )
    yield Line("token_logprobs_part backward", shape, traffic, size_of(tile, gradient, *per_row, *upstream))


def kl_divergence() -> Iterator[Line]:
    """Two tiles, which the second kernel reads once the sums of their rows are known."""
    rows, vocab_size = 4, 16384
    tiles, gradient = numbers(2, rows, vocab_size), torch.empty(rows, vocab_size, dtype=torch.bfloat16)
    stats, upstream = numbers(2, 2, rows), numbers(2, rows)
    shape = f"[rows, {vocab_size}] float32, bfloat16"
    for number, kind in enumerate(DIVERGENCES):
        options = (number, 0.3, 1.0, 1.0, 0.0, 0.0)
        with counting() as traffic:
            parts = _registry.op("kl_divergence_part", "triton")(*tiles, *stats, *options)
        yield Line(f"kl_divergence_part, {kind}", shape, traffic, size_of(tiles, stats, parts))
        with counting() as traffic:
            _registry.op("kl_divergence_part_backward", "triton")(*upstream, *tiles, *stats, *options, gradient)
        least = size_of(tiles, stats, upstream, gradient)
        yield Line(f"kl_divergence_part backward, {kind}", shape, traffic, least)


BATCH, TIME = 8, 4096
SHAPE = (BATCH, TIME)


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape or SHAPE)


def response_mask() -> Tensor:
    """Responses of all lengths up to the longest."""
    return torch.arange(TIME) < torch.linspace(0.2, 1, BATCH).mul(TIME).long().unsqueeze(1)


def cu_seqlens() -> Tensor:
    return torch.tensor([0, 5000, 5001, 9000, BATCH * TIME], dtype=torch.int32)


def kl_penalty() -> Iterator[Line]:
    logprobs, reference = numbers().requires_grad_(), numbers()
    with counting() as traffic:
        values = rlkernels.kl_penalty(logprobs, reference)
    yield Line("kl_penalty forward", str(list(SHAPE)), traffic, size_of(logprobs, reference, values))
    with counting() as traffic:
        torch.autograd.grad(values, logprobs, numbers())
    yield Line("kl_penalty backward", str(list(SHAPE)), traffic, 4 * size_of(values))


def group_advantages() -> Iterator[Line]:
    function = partial(rlkernels.group_advantages, return_signal=True)
    yield measured("group_advantages", function, numbers(1024, 1), group_size=8)
    yield measured("group_advantages, 3 rewards", function, numbers(1024, 3), group_size=8, weights=numbers(3))
    rewards = numbers(1024, 1)
    yield measured("group_advantages, batch scale", function, rewards, group_size=8, scale="batch", again=(rewards,))


def loss(name: str, function: Callable, *inputs, again: tuple = (), **options) -> Line:
    """A loss also writes its gradient, as large as its first input."""
    inputs[0].requires_grad_()
    return measured(name, function, *inputs, again=(*again, inputs[0]), **options)


def policy_loss() -> Iterator[Line]:
    def line(name: str, *inputs, **options) -> Line:
        return loss(f"policy_loss, {name}", rlkernels.policy_loss, *inputs, **options)

    logprobs, old, reference, sampler, mask = numbers(), numbers(), numbers(), numbers(), response_mask()
    inputs = logprobs, old, numbers(BATCH), mask
    yield line("ppo", *inputs)
    yield line("ppo with KL", *inputs, ref_logprobs=reference, kl_coef=0.1)
    yield line("advantage a token", logprobs, old, numbers(), mask)
    for objective in ("cispo", "sapo", "dppo_kl"):
        yield line(objective, *inputs, objective=objective)
    # A mean over the sequence, or its length, comes first.
    for objective in ("gspo", "gmpo", "vespo"):
        yield line(objective, *inputs, objective=objective, again=(logprobs, old, mask))
    yield line("seq_mean_token_mean", *inputs, aggregation="seq_mean_token_mean", again=(mask,))
    correction = dict(sampler_logprobs=sampler, sampler_correction="token_truncate")
    yield line("token_truncate", *inputs, **correction)
    correction = dict(sampler_logprobs=sampler, sampler_correction="sequence_mask")
    # The sampler's log-probabilities are spent once their sums over sequences are known.
    yield line("sequence_mask", *inputs, **correction, again=(old, mask))
    packed = numbers(BATCH * TIME), numbers(BATCH * TIME), numbers(4)
    yield line("packed", *packed, cu_seqlens=cu_seqlens())


def value_loss() -> Iterator[Line]:
    yield loss("value_loss", rlkernels.value_loss, numbers(), numbers(), numbers(), response_mask())


def shaped_rewards() -> Iterator[Line]:
    mask = response_mask()
    # The score stands at the last scored token, which must be found first.
    options = dict(kl_coef=0.1, again=(mask,))
    yield measured("shaped_rewards", rlkernels.shaped_rewards, numbers(BATCH), numbers(), numbers(), mask, **options)


def masked() -> Iterator[Line]:
    x, mask = numbers(), response_mask()
    yield measured("masked_mean", rlkernels.masked_mean, x, mask)
    yield measured("masked_mean, by row", rlkernels.masked_mean, x, mask, dim=1)
    yield measured("masked_whiten", rlkernels.masked_whiten, x, mask, again=(x, mask))


def recurrence() -> Iterator[Line]:
    rewards, values, mask = numbers(), numbers(), response_mask()
    discounts = dict(gamma=0.99, lam=0.95)
    yield measured("gae", rlkernels.gae, rewards, values, **discounts)
    yield measured("gae, masked", rlkernels.gae, rewards, values, mask, **discounts)
    # Read and written once more when their statistics are known.
    again = (rewards, rewards, mask)
    yield measured("gae, whitened", rlkernels.gae, rewards, values, mask, whiten=True, again=again, **discounts)
    packed = dict(cu_seqlens=cu_seqlens(), **discounts)
    yield measured("gae, packed", rlkernels.gae, numbers(BATCH * TIME), numbers(BATCH * TIME), **packed)
    # Blocks of time work side by side: what a block carries into the one before it comes first.
    long = numbers(1, 65536), numbers(1, 65536)
    yield measured("gae, a long row", rlkernels.gae, *long, **discounts, again=long)
    yield measured("discounted_returns", rlkernels.discounted_returns, rewards, mask, gamma=0.99)
    yield measured("td_lambda", rlkernels.td_lambda, rewards, values, mask, **discounts)
    yield measured("vtrace", rlkernels.vtrace, numbers(), numbers(), rewards, values, mask, **discounts)


CASES: list[Case] = [
    *(lambda dtype=dtype: our_logprobs(dtype) for dtype in (torch.float32, torch.bfloat16)),
    lambda: our_logprobs(torch.bfloat16, inplace_backward=True),
    token_logprobs_part,
    kl_divergence,
    *(lambda dtype=dtype: trl_logprobs(dtype) for dtype in (torch.float32, torch.bfloat16)),
    kl_penalty,
    group_advantages,
    policy_loss,
    value_loss,
    shaped_rewards,
    masked,
    recurrence,
]


def lines() -> Iterator[Line]:
    torch.manual_seed(0)
    with rlkernels.use_backend("triton"), np.errstate(all="ignore"):
        for case in CASES:
            yield from case()


def main() -> int:
    paragraphs = __doc__.strip().split("\n\n")
    print("# Bytes that the Triton kernels move\n")
    print(f"Printed by `python benchmarks/traffic.py`, with Triton {triton.__version__}.\n{paragraphs[2]}\n")
    print("| | shape | read, kB | written, kB | least, kB | ratio | kernels |\n|---|---|---|---|---|---|---|")
    excessive = []
    for line in lines():
        traffic = line.traffic
        sizes = (f"{size / 1e3:,.1f}" for size in (traffic.read, traffic.written, line.least))
        kernels = ", ".join(f"`{name}`" for name in traffic.kernels)
        cells = (line.name, line.shape, *sizes, f"{line.ratio:.3f}", kernels)
        print(f"| {' | '.join(cells)} |", flush=True)
        if line.ours and line.ratio > MOST:
            excessive.append(line.name)
    print()
    for text in head_traffic.section():
        print(text, flush=True)
    if excessive:
        print(f"error: more than {MOST} times the least possible: {'; '.join(excessive)}", file=sys.stderr)
    return int(bool(excessive))


if __name__ == "__main__":
    sys.exit(main())
