"""verl's policy losses, computed by our functions. `verl` registers them and puts them in its table."""

from typing import Any

import torch
from torch import Tensor

import rlkernels as rk
from rlkernels.integrations._verl_aggregation import agg_loss, aggregated, loss_type


def policy_loss_vanilla(
    old_log_prob,
    log_prob,
    advantages,
    response_mask,
    loss_agg_mode="token-mean",
    config=None,
    rollout_is_weights=None,
):
    _check(config)
    clips = _clips(config)
    bound = config.get("clip_ratio_c", 3.0)
    assert bound > 1.0, f"clip_ratio_c, the lower bound of dual-clip PPO, must be greater than 1.0, got {bound}"
    loss, clipped = _policy_loss(
        (old_log_prob, log_prob, advantages, response_mask),
        loss_agg_mode,
        config,
        rollout_is_weights,
        objective="ppo",
        dual_clip=bound,
        log_ratio_clamp=20.0,
        **clips,
    )
    bounded = (_ratio(old_log_prob, log_prob) > bound) & (advantages < 0)
    return loss, _metrics(clipped, _kl(old_log_prob, log_prob, response_mask, 20.0), _fraction(bounded, response_mask))


def policy_loss_dppo_tv(
    old_log_prob,
    log_prob,
    advantages,
    response_mask,
    loss_agg_mode="token-mean",
    config=None,
    rollout_is_weights=None,
):
    tokens = old_log_prob, log_prob, advantages, response_mask
    return _dppo("dppo_tv", tokens, loss_agg_mode, config, rollout_is_weights)


def policy_loss_dppo_kl(
    old_log_prob,
    log_prob,
    advantages,
    response_mask,
    loss_agg_mode="token-mean",
    config=None,
    rollout_is_weights=None,
):
    tokens = old_log_prob, log_prob, advantages, response_mask
    return _dppo("dppo_kl", tokens, loss_agg_mode, config, rollout_is_weights)


def policy_loss_gspo(
    old_log_prob,
    log_prob,
    advantages,
    response_mask,
    loss_agg_mode="seq-mean-token-mean",
    config=None,
    rollout_is_weights=None,
):
    """The log-ratio of a sequence is bounded only from above, at 10."""
    _check(config, actor=True)
    loss, clipped = _policy_loss(
        (old_log_prob, log_prob, advantages, response_mask),
        loss_agg_mode,
        config,
        rollout_is_weights,
        objective="gspo",
        delta=float(torch.tensor(10.0).exp()),
        **_clips(config),
    )
    return loss, _metrics(clipped, _kl(old_log_prob, log_prob, response_mask), 0.0)


def policy_loss_gspo_0_9_0(
    old_log_prob,
    log_prob,
    advantages,
    response_mask,
    loss_agg_mode="seq-mean-token-mean",
    config=None,
    rollout_is_weights=None,
):
    """verl 0.9.0 ignores loss_agg_mode."""
    return policy_loss_gspo(
        old_log_prob, log_prob, advantages, response_mask, "seq-mean-token-mean", config, rollout_is_weights
    )


def policy_loss_sapo(
    old_log_prob,
    log_prob,
    advantages,
    response_mask,
    loss_agg_mode="seq-mean-token-mean",
    config=None,
    rollout_is_weights=None,
):
    """As in verl, loss_agg_mode is ignored."""
    _check(config, actor=True)
    loss, _ = _policy_loss(
        (old_log_prob, log_prob, advantages, response_mask),
        "seq-mean-token-mean",
        config,
        rollout_is_weights,
        objective="sapo",
        sapo_temperature_pos=float(config.tau_pos),
        sapo_temperature_neg=float(config.tau_neg),
        log_ratio_clamp=20.0,
    )
    return loss, _metrics(0.0, _kl(old_log_prob, log_prob, response_mask, 20.0), 0.0)


def policy_loss_cispo(
    old_log_prob,
    log_prob,
    advantages,
    response_mask,
    loss_agg_mode="token-mean",
    config=None,
    rollout_is_weights=None,
):
    _check(config, actor=True)
    loss, clipped = _policy_loss(
        (old_log_prob, log_prob, advantages, response_mask),
        loss_agg_mode,
        config,
        rollout_is_weights,
        objective="cispo",
        log_ratio_clamp=20.0,
        **_clips(config),
    )
    return loss, _metrics(clipped, _kl(old_log_prob, log_prob, response_mask, 20.0), 0.0)


def policy_loss_gpg(
    old_log_prob,
    log_prob,
    advantages,
    response_mask,
    loss_agg_mode="token-mean",
    config=None,
    rollout_is_weights=None,
):
    assert config is not None
    tokens = None, log_prob, advantages, response_mask
    return _policy_loss(tokens, loss_agg_mode, config, rollout_is_weights, objective="reinforce")[0], {}


def policy_loss_reinforce(
    rollout_log_prob,
    log_prob,
    advantages,
    response_mask,
    loss_agg_mode="seq-mean-token-sum",
    config=None,
    rollout_is_weights=None,
):
    assert config is not None, "REINFORCE needs the actor's config"
    tokens = None, log_prob, advantages, response_mask
    loss, _ = _policy_loss(tokens, loss_agg_mode, config, rollout_is_weights, objective="reinforce")
    return loss, {"actor/ppo_kl": _kl(rollout_log_prob, log_prob, response_mask).item()}


def policy_loss_dro(
    old_log_prob,
    log_prob,
    advantages,
    response_mask,
    loss_agg_mode="token-mean",
    config=None,
    rollout_is_weights=None,
):
    assert config is not None
    assert config.policy_loss is not None
    beta = config.policy_loss.dro_beta
    if beta is None or beta <= 0:
        raise ValueError(f"policy_loss.dro_beta must be positive, got {beta}")
    if rollout_is_weights is None:
        tokens = None, log_prob, advantages, response_mask
        options = dict(objective="reinforce", ref_logprobs=old_log_prob, kl_coef=float(beta), kl_estimator="k2")
        loss, _ = _policy_loss(tokens, loss_agg_mode, config, None, **options)
        loss = loss.to(torch.promote_types(loss.dtype, old_log_prob.dtype))
    else:
        # The weights apply to the penalty too, which policy_loss does not offer.
        penalty = rk.kl_penalty(log_prob, old_log_prob, estimator="k2")
        losses = (beta * penalty - log_prob * advantages.to(penalty.dtype)) * rollout_is_weights
        dtype = loss_type(loss_agg_mode, log_prob, old_log_prob, advantages, response_mask, rollout_is_weights)
        loss = agg_loss(losses, response_mask, loss_agg_mode, **config.global_batch_info).to(dtype)
    return loss, {"actor/ppo_kl": _kl(old_log_prob, log_prob, response_mask).item()}


def policy_loss_geo_mean(
    old_log_prob,
    log_prob,
    advantages,
    response_mask,
    loss_agg_mode="token-mean",
    config=None,
    rollout_is_weights=None,
):
    """The mean over all sequences, even those without a scored token. As in verl, loss_agg_mode is ignored."""
    _check(config)
    clips = _clips(config)
    weighted = torch.broadcast_to(advantages, log_prob.shape)
    if rollout_is_weights is not None:
        weights = rk.masked_mean(torch.log(rollout_is_weights + 1e-10), response_mask, dim=1).exp()
        weighted = weighted * weights.unsqueeze(1)
    loss, _ = rk.policy_loss(
        log_prob,
        old_log_prob,
        weighted,
        response_mask,
        objective="gmpo",
        aggregation="seq_mean_token_mean",
        normalizer=float(len(log_prob)),
        **clips,
    )
    log_ratio = (log_prob - old_log_prob).detach()
    outside = (log_ratio < -clips["clip_low"]) | (log_ratio > clips["clip_high"])
    dtype = loss_type("seq", log_prob, old_log_prob, advantages, response_mask)
    return loss.to(dtype), _metrics(
        _fraction(outside & (advantages > 0), response_mask),
        _kl(old_log_prob, log_prob, response_mask),
        _fraction(outside & (advantages < 0), response_mask),
    )


def _policy_loss(
    tokens: tuple[Tensor | None, Tensor, Tensor, Tensor], mode: str, config: Any, weights: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """(loss, fraction of clipped tokens)."""
    old, logprobs, advantages, mask = tokens
    advantages = torch.broadcast_to(advantages, logprobs.shape)
    weighted = advantages if weights is None else advantages * weights

    def call(**aggregation):
        return rk.policy_loss(logprobs, old, weighted, mask, **options, **aggregation)

    loss, metrics = aggregated(call, mode, mask, **config.global_batch_info)
    if weights is not None and options["objective"] not in ("reinforce", "sapo"):
        # In our metrics, but not in verl's, a token of weight 0 does not count. So they are computed without weights.
        metrics = rk.policy_loss(logprobs.detach(), old, advantages, mask, **options)[1]
    dtype = loss_type(mode, logprobs, advantages, mask, *(t for t in (old, weights) if t is not None))
    return loss.to(dtype), metrics[1] + metrics[2]


def _dppo(objective: str, tokens: tuple[Tensor, ...], mode: str, config: Any, weights: Tensor | None):
    _check(config)
    old, logprobs, advantages, mask = tokens
    bound = config.get("clip_ratio_c", 20.0)
    options: dict[str, Any] = dict(objective=objective, delta=bound, log_ratio_clamp=20.0, **_clips(config))
    # verl's mask of trusted tokens is float32, so its loss is at least float32.
    wide = advantages.to(torch.promote_types(advantages.dtype, torch.float32))
    loss, clipped = _policy_loss((old, logprobs, wide, mask), mode, config, weights, **options)

    # verl also counts tokens of advantage 0, with the bound for negative advantages.
    scored, wide = mask.bool(), wide.expand_as(logprobs)
    far = scored & (_ratio(old, logprobs) > bound)
    chosen = far | (scored & (wide == 0))
    trusted = _trusted(objective, _wide(logprobs)[chosen], _wide(old)[chosen], wide[chosen] > 0, config)
    count = scored.sum().clamp(min=1)
    untrusted = clipped + (~trusted & (wide[chosen] == 0)).sum() / count
    truncated = (trusted & far[chosen]).sum() / count
    return loss, _metrics(untrusted, _kl(old, logprobs, mask, 20.0), truncated)


def _trusted(objective: str, logprobs: Tensor, old: Tensor, up: Tensor, config: Any) -> Tensor:
    clips = _clips(config)
    p, q = logprobs.exp(), old.exp()
    moved = torch.where(up, p - q, q - p)
    bound = torch.where(up, clips["clip_high"], clips["clip_low"])
    if objective == "dppo_tv":
        return moved <= bound
    others = ((1e-8 - torch.expm1(old)) / (1e-8 - torch.expm1(logprobs))).log()
    return (moved <= 0) | (q * (old - logprobs) + (1 - q) * others <= bound)


def _check(config: Any, actor: bool = False) -> None:
    # Imported here, since verl imports this module while it is imported.
    from verl.trainer.config import AlgoConfig
    from verl.workers.config import ActorConfig

    assert config is not None
    assert isinstance(config, ActorConfig) if actor else not isinstance(config, AlgoConfig)


def _clips(config: Any) -> dict[str, float]:
    low, high = config.clip_ratio_low, config.clip_ratio_high
    return dict(
        clip_low=config.clip_ratio if low is None else low,
        clip_high=config.clip_ratio if high is None else high,
    )


def _ratio(old: Tensor, logprobs: Tensor) -> Tensor:
    return (logprobs - old).detach().clamp(-20.0, 20.0).exp()


def _kl(old: Tensor, logprobs: Tensor, mask: Tensor, clamp: float | None = None) -> Tensor:
    # Only logged, and computed in one pass, so that a kernel would cost more than it saves.
    difference = _wide(old) - _wide(logprobs)
    return _mean(difference if clamp is None else difference.clamp(-clamp, clamp), mask)


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    scored = mask.bool()
    return torch.where(scored, values, 0.0).sum() / scored.sum().clamp(min=1)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def _fraction(where: Tensor, mask: Tensor) -> Tensor:
    scored = mask.bool()
    return (where & scored).sum() / scored.sum().clamp(min=1)


def _metrics(clipped: Tensor | float, kl: Tensor, clipped_lower: Tensor | float) -> dict[str, float]:
    """The metrics under verl's names, as Python numbers. One transfer from the device brings all three."""
    values = torch.stack([torch.as_tensor(x, dtype=kl.dtype, device=kl.device) for x in (clipped, kl, clipped_lower)])
    return dict(zip(("actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower"), values.tolist(), strict=True))
