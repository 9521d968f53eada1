"""The losses of `SFTTrainer`: how likely the model finds the tokens in the loss.

Each loss is a mean over the N tokens in the loss of an optimizer step. The functions here return one micro-batch's
share of it, 0-d: the sum over the batch's own tokens, divided by its `normalizer`, which is N. They also return the
batch's metrics, which are means over its own tokens: `entropy` is that of the tokens' distributions, and
`mean_token_accuracy` is how often a token is the likeliest. `return_accuracy` asks for the latter, which costs one more
product with the LM head.
"""

from typing import Any

import torch
from torch import Tensor, nn

import rlkernels

from ..batch import scoring
from ..batch.batch import Batch


def nll(
    model: nn.Module, batch: Batch, *, fused: bool, return_accuracy: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """The negative log-likelihood.

    loss = -1/N sum_t log p(x_t | x_<t)
    """
    return _mean(model, batch, None, fused, return_accuracy, objective="reinforce")


def dft(
    model: nn.Module, batch: Batch, *, fused: bool, return_accuracy: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """Dynamic Fine-Tuning (arXiv 2508.05629): each token's negative log-likelihood is weighted with its probability.

    loss = -1/N sum_t sg(p(x_t | x_<t)) log p(x_t | x_<t),   where no gradient flows through sg(.)
    """
    # The weight of CISPO, p / p_old, is the probability itself where p_old is 1.
    log_one = torch.zeros_like(batch.token_ids, dtype=torch.float32)
    return _mean(model, batch, log_one, fused, return_accuracy, objective="cispo", clip_low=1.0)


# By the name of SFTConfig.loss_type.
LOSSES = {"nll": nll, "dft": dft}


def _mean(
    model: nn.Module, batch: Batch, old_logprobs: Tensor | None, fused: bool, return_accuracy: bool, **objective: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean as a policy loss, whose kernels never store the logits of a fused model. With every advantage 1 its
    objectives are weighted log-likelihoods."""
    ones = torch.ones(len(batch.cu_seqlens) - 1, device=batch.mask.device)
    options: dict[str, Any] = {**objective, "aggregation": "token_sum", "normalizer": batch.normalizer}
    metrics = {}
    if return_accuracy:
        logprobs, entropy, is_top1 = scoring.token_logprobs(
            model, batch, fused=fused, return_entropy=True, outputs=("is_top1",)
        )
        loss, values = rlkernels.policy_loss(
            logprobs, old_logprobs, ones, batch.mask, entropy=entropy, cu_seqlens=batch.cu_seqlens, **options
        )
        metrics["mean_token_accuracy"] = is_top1[batch.mask].float().mean()
    else:
        loss, values = scoring.policy_loss(model, batch, old_logprobs, ones, fused=fused, **options)
    names = rlkernels.policy_loss.metrics  # type: ignore[attr-defined]
    metrics["entropy"] = values[names.index("entropy")]
    return loss, metrics
