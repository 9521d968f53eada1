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
