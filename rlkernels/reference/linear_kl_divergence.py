import torch
from torch import Tensor

from rlkernels.reference.kl_divergence import kl_divergence
from rlkernels.reference.linear_logprobs import lm_head_logits


def linear_kl_divergence(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    mask: Tensor,
    *,
    kind: str,
    beta: float,
    temperature: float,
    teacher_temperature: float,
    softcap: float,
    teacher_softcap: float,
) -> Tensor:
    """Divergence from all logits, [...]; 0 in rows that the mask leaves out, which may hold anything."""
    out = ~mask
    without = out.unsqueeze(-1)
    with torch.no_grad():
        teacher = lm_head_logits(teacher_hidden, teacher_weight, teacher_bias, None).masked_fill(without, 0.0)
    # A row that is left out may hold a NaN, and meet a bias of -inf: neither may reach a gradient.
    student = lm_head_logits(hidden.masked_fill(without, 0.0), weight, bias, None).masked_fill(without, 0.0)
    divergence = kl_divergence(
        student,
        teacher,
        kind=kind,
        beta=beta,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        softcap=softcap,
        teacher_softcap=teacher_softcap,
    )
    return divergence.masked_fill(out, 0.0)
