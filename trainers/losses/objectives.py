"""The loss of `GRPOTrainer`: from the options of its config to those of `rlkernels.policy_loss`."""

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

import rlkernels

from ..batch import scoring

if TYPE_CHECKING:
    from ..grpo import GRPOBatch, GRPOConfig

# By loss_type of GRPO, the objective and the aggregation of `rlkernels.policy_loss`.
OBJECTIVES = {
    "grpo": ("ppo", "seq_mean_token_mean"),
    "bnpo": ("ppo", "token_sum"),
    "dr_grpo": ("ppo", "token_sum"),
    "dapo": ("ppo", "token_sum"),
    "luspo": ("ppo", "seq_mean_token_sum"),
    "cispo": ("cispo", "token_sum"),
    "sapo": ("sapo", "seq_mean_token_mean"),
    "vespo": ("vespo", "token_sum"),
    "gmpo": ("gmpo", "seq_mean_token_mean"),
    "dppo_tv": ("dppo_tv", "token_sum"),
    "dppo_kl": ("dppo_kl", "token_sum"),
    "reinforce": ("reinforce", "token_sum"),
}


def policy_loss(
    model: nn.Module, batch: "GRPOBatch", args: "GRPOConfig", *, fused: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and metrics of one micro-batch. Its token losses are aggregated as `loss_type` says, and divided by its
    `normalizer`; the metrics are those of `rlkernels.policy_loss`, by name."""
    loss, metrics = _policy_loss(model, batch, args, fused)
    names = rlkernels.policy_loss.metrics  # type: ignore[attr-defined]
    return loss, dict(zip(names, metrics.unbind(), strict=True))


def _policy_loss(model: nn.Module, batch: "GRPOBatch", args: "GRPOConfig", fused: bool) -> tuple[Tensor, Tensor]:
    old, ref = batch.old_logprobs, batch.ref_logprobs
    objective, aggregation = OBJECTIVES[args.loss_type]
    by_sequence = args.importance_sampling_level == "sequence"
    # Where the ratio is 1, ratio x k3 is the estimator k3+, which the policy loss includes.
    has_kl_term = ref is not None and args.use_bias_correction_kl and (old is not None or by_sequence)
    aggregate: dict[str, Any] = {"aggregation": aggregation, "normalizer": batch.normalizer}
    options: dict[str, Any] = {
        "objective": "gspo" if by_sequence else objective,
        **clipping(args),
        **{name: getattr(args, name) for name in vars(args) if name.startswith(("sapo_", "vespo_"))},
        "delta": args.delta,
        **args.sampler_correction(batch.sampler_logprobs),
        "ref_logprobs": ref,
        "kl_coef": 0.0 if has_kl_term or ref is None else args.beta,
        "kl_estimator": "k3+" if args.use_bias_correction_kl else "k3",
        **aggregate,
    }
    advantages, temperature = batch.advantages, args.temperature
    if batch.top_entropy is not None:
        # A token with advantage 0 adds nothing to the policy loss, but still counts in what it is divided by.
        by_token = len(advantages) == len(batch.mask)
        advantages = (advantages if by_token else batch.spread(advantages)) * batch.top_entropy
    if not has_kl_term:
        return scoring.policy_loss(model, batch, old, advantages, fused=fused, temperature=temperature, **options)
    logprobs, entropy = scoring.token_logprobs(model, batch, fused=fused, temperature=temperature, return_entropy=True)
    options |= {"entropy": entropy.detach(), "cu_seqlens": batch.cu_seqlens}
    loss, metrics = rlkernels.policy_loss(logprobs, old, advantages, batch.mask, **options)
    return loss + args.beta * _kl_term(logprobs, batch, by_sequence, aggregate), metrics


def _kl_term(logprobs: Tensor, batch: "GRPOBatch", by_sequence: bool, aggregate: dict[str, Any]) -> Tensor:
    """The aggregate of ratio x k3 over the tokens in the loss. The ratio is that of the token, or of its sequence; the
    gradient through it turns that of k3 into that of k2: ratio x (log p - log p_ref)."""
    log_ratio = logprobs - (logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs)
    if by_sequence:
        log_ratio = batch.spread(batch.sequence_means(log_ratio))
    penalty = log_ratio.exp() * rlkernels.kl_penalty(logprobs, batch.ref_logprobs, estimator="k3")
    # The loss of objective reinforce is -advantage x its first argument: with advantage -1 it aggregates the penalty.
    minus_one = -torch.ones_like(logprobs)
    term, _ = rlkernels.policy_loss(
        penalty, None, minus_one, batch.mask, objective="reinforce", cu_seqlens=batch.cu_seqlens, **aggregate
    )
    return term


def clipping(args: "GRPOConfig") -> dict[str, float]:
    """The options of `rlkernels.policy_loss` that bound the importance ratio, as distances from 1."""
    high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    if args.loss_type == "cispo":  # the ratio itself, and from above alone
        return {"clip_low": 1.0, "clip_high": high - 1}
    return {"clip_low": args.epsilon, "clip_high": high}


def top_entropy(entropies: list[Tensor | None], fraction: float, accelerator: Any) -> list[Tensor | None]:
    """For each row, a bool per token: whether it is among the `fraction` of all processes' tokens with the highest
    entropy (arXiv 2506.01939). Tokens whose entropy is NaN are not, and do not count; None where the row is None."""
    nothing = torch.full((1,), math.nan, device=accelerator.device)
    own = torch.cat([nothing, *(values for values in entropies if values is not None)])
    every = accelerator.gather(accelerator.pad_across_processes(own, pad_index=math.nan)).cpu().numpy()
    every = every[~np.isnan(every)]
    threshold = float(np.quantile(every, 1 - fraction)) if len(every) else math.inf
    return [None if values is None else values >= threshold for values in entropies]
