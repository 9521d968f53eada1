"""The loss of `GRPOTrainer`: the options of its config as those of `rlkernels.policy_loss`."""

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

import rlkernels

from ..batch import scoring

if TYPE_CHECKING:
    from ..grpo import GRPOBatch, GRPOConfig
    from ..rollouts.config import OnlineConfig

# The objective and the aggregation of `rlkernels.policy_loss` that each loss_type of GRPO stands for.
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


def policy_loss(model: nn.Module, batch: "GRPOBatch", args: "GRPOConfig", *, fused: bool) -> tuple[Tensor, Tensor]:
    """Loss and metrics of one micro-batch, whose sum is divided by its `normalizer`."""
    old, ref = batch.old_logprobs, batch.ref_logprobs
    objective, aggregation = OBJECTIVES[args.loss_type]
    by_sequence = args.importance_sampling_level == "sequence"
    # ratio x k3 has the gradient ratio x k2's, so that where the ratio is 1 it is the straight-through k3.
    apart = ref is not None and args.use_bias_correction_kl and (old is not None or by_sequence)
    aggregate: dict[str, Any] = {"aggregation": aggregation, "normalizer": batch.normalizer}
    options: dict[str, Any] = {
        "objective": "gspo" if by_sequence else objective,
        **clipping(args),
        **{name: getattr(args, name) for name in vars(args) if name.startswith(("sapo_", "vespo_"))},
        "delta": args.delta,
        **correction(batch.sampler_logprobs, args),
        "ref_logprobs": ref,
        "kl_coef": 0.0 if apart or ref is None else args.beta,
        "kl_estimator": "k3+" if args.use_bias_correction_kl else "k3",
        **aggregate,
    }
    advantages, temperature = batch.advantages, args.temperature
    if batch.top_entropy is not None:
        # A token without an advantage has no share in the policy loss, but counts in what this is divided by.
        by_token = len(advantages) == len(batch.mask)
        advantages = (advantages if by_token else batch.spread(advantages)) * batch.top_entropy
    if not apart:
        return scoring.policy_loss(model, batch, old, advantages, fused=fused, temperature=temperature, **options)
    logprobs, entropy = scoring.token_logprobs(model, batch, fused=fused, temperature=temperature, return_entropy=True)
    options |= {"entropy": entropy.detach(), "cu_seqlens": batch.cu_seqlens}
    loss, metrics = rlkernels.policy_loss(logprobs, old, advantages, batch.mask, **options)
    log_ratio = logprobs - (logprobs.detach() if old is None else old)
    if by_sequence:
        log_ratio = batch.spread(batch.sequence_means(log_ratio))
    penalty = log_ratio.exp() * rlkernels.kl_penalty(logprobs, ref, estimator="k3")
    # With advantage -1, reinforce is the plain mean of what stands in the place of the log-probabilities.
    minus_one = -torch.ones_like(logprobs)
    kl, _ = rlkernels.policy_loss(
        penalty, None, minus_one, batch.mask, objective="reinforce", cu_seqlens=batch.cu_seqlens, **aggregate
    )
    return loss + args.beta * kl, metrics


def correction(sampler_logprobs: Tensor | None, args: "OnlineConfig") -> dict[str, Any]:
    """For how the weights that the engine sampled by differ from those of now."""
    return {
        "sampler_logprobs": sampler_logprobs,
        "sampler_correction": args.importance_sampling_mode,
        "sampler_cap": args.importance_sampling_cap,
    }


def clipping(args: "GRPOConfig") -> dict[str, float]:
    high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    if args.loss_type == "cispo":  # the ratio itself, and from above alone
        return {"clip_low": 1.0, "clip_high": high - 1}
    return {"clip_low": args.epsilon, "clip_high": high}


def top_entropy(entropies: list[Tensor | None], fraction: float, accelerator: Any) -> list[Tensor | None]:
    """Which tokens of each row are in the fraction of highest entropy of all processes' (arXiv 2506.01939). Of rows
    that are None, and of tokens whose entropy is NaN, none is."""
    nothing = torch.full((1,), math.nan, device=accelerator.device)
    own = torch.cat([nothing, *(values for values in entropies if values is not None)])
    every = accelerator.gather(accelerator.pad_across_processes(own, pad_index=math.nan)).cpu().numpy()
    every = every[~np.isnan(every)]
    threshold = float(np.quantile(every, 1 - fraction)) if len(every) else math.inf
    return [None if values is None else values >= threshold for values in entropies]
