import torch
from torch import Tensor


def token_logprobs(
    logits: Tensor, token_ids: Tensor, *, temperature: float, softcap: float, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """log p(token) and entropy of softmax(z), z = cap(logits) / temperature.

    logits [..., V], token_ids int64 [...] -> both [...], in float32, or in float64 for float64 logits.
    Ignored rows give 0 and a zero gradient; ids out of range, and rows where log-softmax is undefined (a NaN, a +inf,
    nothing but -inf), give NaN.
    """
    vocab_size = logits.shape[-1]
    z = logits if logits.dtype == torch.float64 else logits.float()
    ignored = token_ids == ignore_index
    valid = (token_ids >= 0) & (token_ids < vocab_size)
    index = token_ids.where(valid, 0).unsqueeze(-1)
    # An ignored row may hold anything: it is replaced before any arithmetic, so that no NaN reaches a gradient.
    z = z.masked_fill(ignored.unsqueeze(-1), 0.0)
    if softcap > 0:
        z = softcap * torch.tanh(z / softcap)
    z = z / temperature
    # Log-softmax is the same for z and z - max, and the latter keeps its precision where all logits are large.
    z = z - z.detach().amax(-1, keepdim=True)

    # The target is kept out of the sum: for a confident token log p = z_t - logsumexp(z) would round to 0.
    z_target = z.gather(-1, index)
    others = z.scatter(-1, index, float("-inf"))
    alone = torch.isneginf(others.amax(-1, keepdim=True)) & torch.isfinite(z_target)
    lse_others = torch.logsumexp(others.masked_fill(alone, 0.0), -1, keepdim=True).masked_fill(alone, float("-inf"))
    logprob = -torch.logaddexp(torch.zeros_like(z_target), lse_others - z_target)

    log_p = (z - torch.logaddexp(lse_others, z_target)).scatter(-1, index, logprob)
    p = log_p.exp()
    entropy = -(p * log_p.masked_fill(p == 0, 0.0)).sum(-1)

    wrong = ~valid & ~ignored
    logprob = logprob.squeeze(-1).masked_fill(ignored, 0.0)
    entropy = entropy.masked_fill(ignored, 0.0)
    nan = torch.full((), float("nan"), dtype=z.dtype, device=z.device)
    return torch.where(wrong, nan, logprob), torch.where(wrong, nan, entropy)


def token_logprobs_part(
    logits: Tensor,
    token_ids: Tensor,
    vocab_start: int,
    temperature: float,
    softcap: float,
    ignore_index: int,
    return_entropy: bool,
) -> Tensor:
    """What a tile of logits [R, v], those of the tokens from `vocab_start` on, has in log p and entropy: [4, R], of

        max     the largest capped logit y of the tile but the target's, -inf if there is none
        sum     of exp((y - max) / temperature) over the same logits
        moment  of exp((y - max) / temperature) (y - max) / temperature; 0 unless return_entropy
        target  the capped logit of the target, NaN where it is in another tile

    Rows with ignore_index are -inf, 0, 0, NaN, whatever they hold. Where another logit is NaN or +inf, max, sum
    and moment are NaN.
    """
    y = _capped(logits, softcap)
    inside, index = _target(token_ids, vocab_start, logits.shape[-1], ignore_index)
    target = y.gather(-1, index).squeeze(-1).masked_fill(~inside, float("nan"))
    others = torch.where(inside.unsqueeze(-1), y.scatter(-1, index, float("-inf")), y)
    top = others.amax(-1)
    top = top.masked_fill(torch.isposinf(top), float("nan"))
    below = (others - top.masked_fill(torch.isneginf(top), 0.0).unsqueeze(-1)) / temperature
    weight = below.exp()
    moment = (weight * below.masked_fill(weight == 0, 0.0)).sum(-1) if return_entropy else torch.zeros_like(top)
    parts = torch.stack([top, weight.sum(-1), moment, target])
    nothing = torch.tensor([float("-inf"), 0.0, 0.0, float("nan")], dtype=y.dtype, device=y.device)
    return torch.where(token_ids == ignore_index, nothing.unsqueeze(-1), parts)


def token_logprobs_join(parts: Tensor, temperature: float) -> Tensor:
    """Join a row's sums over P disjoint parts of the vocabulary: [P, 4, R] -> [4, R]."""
    top, total, moment, target = parts.unbind(1)
    largest = top.amax(0)
    # 0 instead of -inf - -inf, which is NaN; the sums that it weighs are 0.
    below = ((top - largest) / temperature).masked_fill(torch.isneginf(top), 0.0)
    weight = below.exp()
    # A part with weight 0 may lie so far below (a vocabulary masked by the lowest float) that its moment overflows.
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


def token_logprobs_finish(parts: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities [R], entropy [R] and row_stats [2, R] from a row's sums over P disjoint parts, which together
    are the vocabulary: [P, 4, R]. `finish_row` in csrc/include/rlkernels/logprobs.h explains the steps."""
    top, total, moment, target = token_logprobs_join(parts, temperature)
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


def token_logprobs_part_backward(
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    token_ids: Tensor,
    vocab_start: int,
    logprobs: Tensor,
    entropy: Tensor,
    row_stats: Tensor,
    temperature: float,
    softcap: float,
    ignore_index: int,
    gradient: Tensor,
) -> None:
    """Writes the gradient of a tile's logits to `gradient`, which may be the logits themselves. row_stats [2, R] are
    the row's largest capped logit and the logarithm of its sum of exp((y - largest) / temperature)."""
    x = logits if logits.dtype == torch.float64 else logits.float()
    inside, index = _target(token_ids, vocab_start, logits.shape[-1], ignore_index)
    log_p = (_capped(logits, softcap) - row_stats[0].unsqueeze(-1)) / temperature - row_stats[1].unsqueeze(-1)
    p, p_target = log_p.exp(), logprobs.exp()
    weight = torch.zeros_like(logprobs) if grad_logprobs is None else grad_logprobs
    at_target = -weight * torch.expm1(logprobs)
    weight = weight.unsqueeze(-1)
    if grad_entropy is not None:
        weight = weight + grad_entropy.unsqueeze(-1) * (log_p + entropy.unsqueeze(-1))
        at_target = at_target - (grad_entropy * p_target * (logprobs + entropy)).masked_fill(p_target == 0, 0.0)
    dz = (-p * weight).masked_fill(p == 0, 0.0)
    dz = torch.where(inside.unsqueeze(-1), dz.scatter(-1, index, at_target.unsqueeze(-1)), dz)
    if softcap > 0:
        dz = dz * (1 - torch.tanh(x / softcap).square())
    gradient.copy_((dz / temperature).masked_fill((token_ids == ignore_index).unsqueeze(-1), 0.0))


def _capped(logits: Tensor, softcap: float) -> Tensor:
    x = logits if logits.dtype == torch.float64 else logits.float()
    return softcap * torch.tanh(x / softcap) if softcap > 0 else x


def _target(token_ids: Tensor, vocab_start: int, vocab_size: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Whether a row's target is in the tile, [R], and where, [R, 1]."""
    local = token_ids - vocab_start
    inside = (local >= 0) & (local < vocab_size) & (token_ids != ignore_index)
    return inside, local.where(inside, 0).unsqueeze(-1)
