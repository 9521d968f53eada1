"""The public calls that are timed and profiled, on inputs of the sizes that matter, or on tiny ones on a CPU."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import rlkernels

VOCABULARY = 151936  # of Qwen2.5
GAMMA, LAM = 0.999, 0.95


@dataclass(frozen=True)
class Call:
    run: Callable[[], object]
    moved: int
    """Bytes: each input read once, each output written once; logits once more in a backward pass."""


def logits_of(rows: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    logits = torch.randn(rows, vocabulary, dtype=torch.bfloat16).mul_(3)
    return logits, torch.randint(vocabulary, (rows,))


def token_logprobs(rows: int, vocabulary: int, temperature: float = 1.0, entropy: bool = False) -> Call:
    logits, ids = logits_of(rows, vocabulary)
    return Call(
        lambda: rlkernels.token_logprobs(logits, ids, temperature=temperature, return_entropy=entropy), logits.nbytes
    )


def token_logprobs_backward(rows: int, vocabulary: int, temperature: float = 1.0) -> Call:
    logits, ids = logits_of(rows, vocabulary)
    logits.requires_grad_()
    logprobs = rlkernels.token_logprobs(logits, ids, temperature=temperature)
    upstream = torch.randn(rows)
    return Call(lambda: torch.autograd.grad(logprobs, logits, upstream, retain_graph=True), 2 * logits.nbytes)


def gae(rows: int, tokens: int) -> Call:
    rewards, values = torch.randn(rows, tokens), torch.randn(rows, tokens)
    return Call(lambda: rlkernels.gae(rewards, values, gamma=GAMMA, lam=LAM), 4 * rewards.nbytes)


def loss_inputs(rows: int, tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    old = -torch.rand(rows, tokens)
    mask = torch.arange(tokens) < torch.randint(tokens // 3, tokens, (rows, 1))
    return (old + 0.1 * torch.randn(rows, tokens)).requires_grad_(), old, torch.randn(rows, tokens), mask


def policy_loss(rows: int, tokens: int) -> Call:
    new, old, advantages, mask = loss_inputs(rows, tokens)
    return Call(
        lambda: torch.autograd.grad(rlkernels.policy_loss(new, old, advantages[:, 0], mask)[0], new),
        3 * new.nbytes + mask.nbytes,
    )


def value_loss(rows: int, tokens: int) -> Call:
    new, old, returns, mask = loss_inputs(rows, tokens)
    return Call(
        lambda: torch.autograd.grad(rlkernels.value_loss(new, old, returns, mask)[0], new),
        4 * new.nbytes + mask.nbytes,
    )


def kl_penalty(rows: int, tokens: int) -> Call:
    logprobs, ref = -torch.rand(rows, tokens), -torch.rand(rows, tokens)
    return Call(lambda: rlkernels.kl_penalty(logprobs, ref), 3 * ref.nbytes)


def group_advantages(rows: int) -> Call:
    rewards = torch.randn(rows)
    return Call(lambda: rlkernels.group_advantages(rewards, group_size=8), 2 * rewards.nbytes)
