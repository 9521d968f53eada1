"""Inputs of the LM head's functions, and what eager PyTorch makes of them, for their tests."""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from rlkernels.ops.lm_head.tiles import tile_size

IGNORE = -100
NAN = float("nan")


@dataclass
class Problem:
    """hidden [..., H], weight [V, H], bias [V], adapter [..., r] and [V, r]."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    adapter: Tensor | None
    adapter_weight: Tensor | None

    def to(self, *args) -> "Problem":
        return Problem(*(None if v is None else v.detach().to(*args) for v in self.values()))

    def values(self) -> list[Tensor | None]:
        return [getattr(self, field.name) for field in fields(self)]

    def leaves(self, frozen: tuple[str, ...] = ()) -> "Problem":
        """Copies, which require a gradient but for those named."""
        copies = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(
            self, **{n: None if v is None else v.clone().requires_grad_(n not in frozen) for n, v in copies.items()}
        )

    def differentiated(self) -> dict[str, Tensor]:
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in named.items() if value is not None and value.requires_grad}

    def call(self, function, *args, tile=None, **options):
        adapter = None if self.adapter is None else (self.adapter, self.adapter_weight)
        with tile_size(tile):
            return function(self.hidden, self.weight, *args, bias=self.bias, adapter=adapter, **options)


def random_problem(
    shape, vocab_size, device, dtype=torch.float32, *, width=24, bias=False, rank=0, spread=3.0, seed=0
) -> tuple[Problem, Tensor]:
    """A head whose logits have the standard deviation `spread`, and token ids."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=g)

    problem = Problem(
        normal(*shape, width),
        normal(vocab_size, width) * (spread / width**0.5),
        normal(vocab_size) if bias else None,
        normal(*shape, rank) if rank else None,
        normal(vocab_size, rank) * 0.5 if rank else None,
    )
    token_ids = torch.randint(vocab_size, shape, generator=g)
    return problem.to(device, dtype), token_ids.to(device)


def rows_under_a_cap(rows: int, vocab_size: int, softcap: float, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits from a twentieth of a softcap to all of it, and token ids, some of them of the largest: what a low
    temperature makes of the rounding of each shows in rows where one token has all, and where two are nearly equal."""
    generator = torch.Generator().manual_seed(seed)
    spread = softcap * torch.tensor([0.05, 0.1, 0.3, 1.0]).repeat(rows // 4).unsqueeze(-1)
    logits = spread * torch.randn(rows, vocab_size, generator=generator)
    token_ids = torch.randint(vocab_size, (rows,), generator=generator)
    token_ids[::3] = logits[::3].argmax(-1)
    return logits, token_ids


def eager_logits(hidden, weight, token_ids, bias, adapter, scale):
    """As a model computes them: in the dtype of the hidden state, then in float32."""
    ignored = (token_ids == IGNORE).unsqueeze(-1)
    logits = torch.nn.functional.linear(hidden.masked_fill(ignored, 0.0), weight, bias)
    if adapter is not None:
        logits = logits + adapter[0].masked_fill(ignored, 0.0) @ adapter[1].T
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits * scale


def eager(hidden, weight, token_ids, *, bias=None, adapter=None, temperature=1.0, softcap=None, scale=1.0):
    """As a user writes it: all logits, log_softmax, gather and p log p."""
    z = eager_logits(hidden, weight, token_ids, bias, adapter, scale)
    ignored = token_ids == IGNORE
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    log_p = (z / temperature).log_softmax(-1)
    logprobs = log_p.gather(-1, token_ids.masked_fill(ignored, 0).long().unsqueeze(-1)).squeeze(-1)
    p = log_p.exp()
    entropy = -(p * log_p.masked_fill(p == 0, 0.0)).sum(-1)
    return logprobs.masked_fill(ignored, 0.0), entropy.masked_fill(ignored, 0.0)
