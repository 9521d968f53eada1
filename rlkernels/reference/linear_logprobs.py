import torch
from torch import Tensor

from rlkernels.reference.logprobs import token_logprobs


def lm_head_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, adapter: tuple[Tensor, Tensor] | None
) -> Tensor:
    """hidden @ weight.T + bias + adapter[0] @ adapter[1].T: [..., H], [V, H] -> [..., V], in the dtype of hidden."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    if adapter is not None:
        logits = logits + torch.nn.functional.linear(*adapter)
    return logits


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    bias: Tensor | None,
    adapter: tuple[Tensor, Tensor] | None,
    *,
    temperature: float,
    softcap: float,
    ignore_index: int,
    outputs: tuple[str, ...],
) -> tuple[Tensor, ...]:
    """Log-probabilities and entropy from all logits, then what `outputs` names, all [...]; 0, and False, in ignored
    rows, which may hold anything."""
    ignored = token_ids == ignore_index
    hidden = hidden.masked_fill(ignored.unsqueeze(-1), 0.0)
    if adapter is not None:
        adapter = (adapter[0].masked_fill(ignored.unsqueeze(-1), 0.0), adapter[1])
    logits = lm_head_logits(hidden, weight, bias, adapter)
    logprobs, entropy = token_logprobs(
        logits, token_ids, temperature=temperature, softcap=softcap, ignore_index=ignore_index
    )
    z = logits.detach() if logits.dtype == torch.float64 else logits.detach().float()
    if softcap > 0:
        z = softcap * torch.tanh(z / softcap)
    z = z / temperature
    functions = {
        "log_sum_sq_probs": lambda: torch.logsumexp(2 * z.log_softmax(-1), -1),
        "mean_logit": lambda: z.mean(-1),
        "is_top1": lambda: z.argmax(-1) == token_ids,
    }
    return logprobs, entropy, *(functions[name]().masked_fill(ignored, 0) for name in outputs)
