"""Our functions with the parameters and results of `openrlhf.models.utils` and of the experience maker. The table in
`openrlhf` names them."""

import torch
from torch import Tensor

import rlkernels

# The bound of the importance weight in later versions than 0.11.0, which has no such weight.
KL_IS_WEIGHT_CLIP = 10.0


def theirs(target: str):
    """OpenRLHF's own function for a target of the table."""
    from rlkernels.integrations.openrlhf import PATCH  # its table imports this module

    return PATCH.original(target)


def needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """token_logprobs in the dtype of the logits. The logits are divided by the temperature in place, since callers
    compute the entropy from them afterwards."""
    if temperature != 1.0:
        logits.div_(temperature)
    log_probs = rlkernels.token_logprobs(logits, labels)
    assert isinstance(log_probs, Tensor)
    return log_probs.to(logits.dtype)


def compute_entropy(logits: Tensor) -> Tensor:
    """The entropy that token_logprobs gives for any token, in the dtype of the logits."""
    tokens = torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device)
    return rlkernels.token_logprobs(logits, tokens, return_entropy=True)[1].to(logits.dtype)


def compute_approx_kl(
    log_probs: Tensor,
    log_probs_base: Tensor,
    log_probs_old: Tensor | None = None,
    kl_estimator: str = "k1",
    unbiased_gradient: bool = False,
) -> Tensor:
    """kl_penalty clamped at 10, always in float32. With `unbiased_gradient` the value is the estimator's, and the
    gradient is that of the unclamped k2 times an importance weight."""
    if kl_estimator not in ("k1", "k2", "k3"):
        return theirs("openrlhf.models.utils:compute_approx_kl")(log_probs, log_probs_base, kl_estimator=kl_estimator)
    ours, base = torch.broadcast_tensors(log_probs.float(), log_probs_base.float())
    if not unbiased_gradient:
        return rlkernels.kl_penalty(ours, base, estimator=kl_estimator, value_clamp=10.0)
    with torch.no_grad():
        value = rlkernels.kl_penalty(ours, base, estimator=kl_estimator, value_clamp=10.0)
    surrogate = rlkernels.kl_penalty(ours, base, estimator="k2")
    if log_probs_old is not None:
        weight = (ours.detach() - log_probs_old.detach().float()).exp().clamp(max=KL_IS_WEIGHT_CLIP)
        surrogate = weight * surrogate
    return value + (surrogate - surrogate.detach())


def compute_approx_kl_0_11_0(log_probs: Tensor, log_probs_base: Tensor, kl_estimator: str = "k1") -> Tensor:
    """compute_approx_kl of 0.11.0, without an unbiased gradient."""
    return compute_approx_kl(log_probs, log_probs_base, kl_estimator=kl_estimator)


def compute_reward(
    r: Tensor,
    kl_coef: float,
    kl: Tensor,
    action_mask: Tensor | None = None,
    reward_clip_range: tuple[float, float] | None = None,
) -> Tensor:
    """shaped_rewards of a KL that is already estimated, passed as the k1 estimate of itself and 0.

    In OpenRLHF every token has its penalty, even after the last action, and a row without an action has its score at
    the end. So each row becomes two packed sequences, with all tokens scored: the first ends with the last action and
    takes the score, the second is the rest.
    """
    if action_mask is None or needs_gradient(r, kl):
        return theirs("openrlhf.models.utils:compute_reward")(r, kl_coef, kl, action_mask, reward_clip_range)
    if reward_clip_range:
        r = r.clamp(min=reward_clip_range[0], max=reward_clip_range[1])
    rows, length = kl.shape
    position = torch.arange(1, length + 1, device=kl.device)
    end = (position * (action_mask.long() > 0)).amax(dim=1)
    end = torch.where(end > 0, end, length)
    start = length * torch.arange(rows + 1, device=kl.device)
    cu_seqlens = torch.stack([start[:-1], start[:-1] + end], dim=1).flatten()
    cu_seqlens = torch.cat([cu_seqlens, start[-1:]]).int()
    scores = r.to(kl.dtype)
    flat = kl.reshape(-1)
    rewards = rlkernels.shaped_rewards(
        torch.stack([scores, torch.zeros_like(scores)], dim=1).flatten(),
        flat,
        torch.zeros_like(flat),
        kl_coef=max(float(kl_coef), 0.0),
        cu_seqlens=cu_seqlens,
    )
    return rewards.view(rows, length).to(kl.dtype)


def masked_mean(tensor: Tensor, mask: Tensor | None, dim: int | None = None) -> Tensor:
    """masked_mean, but NaN if nothing is scored, in the dtype of tensor times mask."""
    if mask is None or tensor.shape != mask.shape or not tensor.is_floating_point():
        # OpenRLHF's sums over such shapes broadcast, and count the mask without broadcasting it.
        return theirs("openrlhf.models.utils:masked_mean")(tensor, mask, dim)
    scored = mask.bool()
    mean = rlkernels.masked_mean(tensor, scored, dim=dim)
    some = scored.any() if dim is None else scored.any(dim)
    return torch.where(some, mean, float("nan")).to(torch.promote_types(tensor.dtype, mask.dtype))


def masked_normalize(tensor: Tensor, mask: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """Normalizes with mean and population variance along `dim`. masked_whiten would take them over all elements."""
    if tensor.shape != mask.shape or not tensor.is_floating_point():
        return theirs("openrlhf.models.utils:masked_normalize")(tensor, mask, dim, eps)
    scored = mask != 0
    mean = _keepdim(rlkernels.masked_mean(tensor, scored, dim=dim), dim)
    centered = torch.where(scored, tensor.to(mean.dtype) - mean, 0.0)
    dims = tuple(range(tensor.dim())) if dim is None else (dim,)
    variance = centered.square().sum(dims, keepdim=True) / scored.sum(dims, keepdim=True).clamp(min=1)
    return (centered * variance.clamp(min=eps).rsqrt()).to(torch.promote_types(tensor.dtype, mask.dtype))


def _keepdim(reduced: Tensor, dim: int | None) -> Tensor:
    return reduced if dim is None else reduced.unsqueeze(dim)


@torch.no_grad()
def get_advantages_and_returns(
    self, values: Tensor, rewards: Tensor, action_mask: Tensor | None, gamma: float, lambd: float
) -> tuple[Tensor, Tensor]:
    """gae with every token scored, since OpenRLHF multiplies by the mask and discounts over masked tokens too."""
    if not (0 <= gamma <= 1 and 0 <= lambd <= 1):
        return theirs("openrlhf.trainer.ppo_utils.experience_maker:RemoteExperienceMaker.get_advantages_and_returns")(
            self, values, rewards, action_mask, gamma, lambd
        )
    if action_mask is not None:
        values, rewards = action_mask * values, action_mask * rewards
    dtype = torch.promote_types(values.dtype, rewards.dtype)
    advantages, returns = rlkernels.gae(rewards.to(dtype), values, gamma=gamma, lam=lambd)
    return advantages.to(dtype), returns.to(dtype)


@torch.no_grad()
def get_cumulative_returns(self, rewards: Tensor, action_mask: Tensor | None, gamma: float) -> Tensor:
    """discounted_returns with every token scored, as in get_advantages_and_returns."""
    if not 0 <= gamma <= 1:
        return theirs("openrlhf.trainer.ppo_utils.experience_maker:RemoteExperienceMaker.get_cumulative_returns")(
            self, rewards, action_mask, gamma
        )
    masked = rewards if action_mask is None else action_mask * rewards
    return rlkernels.discounted_returns(masked, gamma=gamma).to(rewards.dtype)
