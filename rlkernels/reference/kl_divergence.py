import math

import torch
from torch import Tensor


def kl_divergence(
    student: Tensor,
    teacher: Tensor,
    *,
    kind: str,
    beta: float,
    temperature: float,
    teacher_temperature: float,
    softcap: float,
    teacher_softcap: float,
) -> Tensor:
    """Divergence of softmax(z_S) and softmax(z_T), z = cap(logits) / temperature, from all logits.

    student, teacher [..., V] -> [...], in float32, or in float64 for float64 logits. Terms that are negative here and
    positive there would lose a small divergence: with -p + q, whose sum is 0, every term of
    sum p log(p / q) - p + q is >= 0.
    """
    log_s = _log_softmax(student, temperature, softcap)
    log_t = _log_softmax(teacher, teacher_temperature, teacher_softcap)
    # A token that neither has adds nothing: it is replaced before any arithmetic, so that no NaN reaches a gradient.
    neither = torch.isneginf(log_s) & torch.isneginf(log_t)
    log_s, log_t = log_s.masked_fill(neither, 0.0), log_t.masked_fill(neither, 0.0)
    if kind == "forward":
        terms = _excess(log_t, log_s)
    elif kind == "reverse":
        terms = _excess(log_s, log_t)
    else:
        log_m = torch.logaddexp(log_t + math.log(beta), log_s + math.log1p(-beta))
        terms = beta * _excess(log_t, log_m) + (1 - beta) * _excess(log_s, log_m)
    return terms.masked_fill(neither, 0.0).sum(-1)


def _log_softmax(logits: Tensor, temperature: float, softcap: float) -> Tensor:
    z = logits if logits.dtype == torch.float64 else logits.float()
    if softcap > 0:
        z = softcap * torch.tanh(z / softcap)
    return (z / temperature).log_softmax(-1)


def _excess(log_p: Tensor, log_q: Tensor) -> Tensor:
    """p log(p / q) - p + q >= 0, from the logarithms; at most one of them is -inf."""
    p, q = log_p.exp(), log_q.exp()
    absent = torch.isneginf(log_p)
    d = (log_p - log_q).masked_fill(absent, 0.0)
    near = d.abs() < 1
    x = d.masked_fill(~near, 0.0)
    # Where d + expm1(-d) would cancel, its series; where they meet, each is wrong by about eps^(3/4).
    series = x.square() * (1 / 2 - x / 6 + x.square() / 24)
    near_value = p * torch.where(x.abs() < torch.finfo(d.dtype).eps ** 0.25, series, x + torch.expm1(-x))
    # The least positive number stands for a p that rounds to 0, for that times an infinite d is still infinite.
    far_value = p.clamp(min=torch.finfo(d.dtype).tiny) * d.masked_fill(near, 0.0) - (p - q)
    return torch.where(absent, q, torch.where(near, near_value, far_value))
