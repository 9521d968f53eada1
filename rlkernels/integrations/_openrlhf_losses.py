"""Our losses with the parameters and results of `openrlhf.models.loss`. The table in `openrlhf` names them."""

import functools

import torch
from torch import Tensor

import rlkernels
from rlkernels.integrations._openrlhf_utils import masked_mean, needs_gradient, theirs

NAMES = rlkernels.policy_loss.metrics  # type: ignore[attr-defined]
POLICY_LOSS = "openrlhf.models.loss:PolicyLoss.forward"
# (level, mode) of the corrections by their names before 0.11.2. All of them bound the ratio.
CORRECTIONS = {"tis": ("token", "clip"), "icepop": ("token", "mask"), "seq-mask-tis": ("seq", "mask")}


def aggregate_loss(
    loss: Tensor,
    loss_mask: Tensor,
    token_level_loss: bool = True,
    dp_size: int = 1,
    batch_num_tokens: float | Tensor | None = None,
    global_batch_size: float | Tensor | None = None,
) -> Tensor:
    """masked_mean over tokens, or over the means of sequences, divided by the counts of the whole step if given."""
    if loss_mask is None or loss.shape != loss_mask.shape:
        return theirs("openrlhf.models.loss:aggregate_loss")(
            loss, loss_mask, token_level_loss, dp_size, batch_num_tokens, global_batch_size
        )
    total = batch_num_tokens if token_level_loss else global_batch_size
    if token_level_loss:
        if total is None:
            return masked_mean(loss, loss_mask)
        mean = rlkernels.masked_mean(loss, loss_mask) * (loss_mask != 0).sum() / total * dp_size
    else:
        mean = rlkernels.masked_mean(loss, loss_mask, dim=-1).sum()
        mean = mean / loss_mask.any(dim=-1).sum() if total is None else mean / total * dp_size
    return mean.to(_loss_dtype(token_level_loss, total, loss, loss_mask))


def policy_loss_forward(
    self,
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    action_mask: Tensor | None = None,
    rollout_log_probs: Tensor | None = None,
    dp_size: int = 1,
    batch_num_tokens: float | Tensor | None = None,
    global_batch_size: float | Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """policy_loss and its metrics."""
    correction = (self.is_correction_level, self.is_correction_mode, self.is_correction_gating)
    tensors = (log_probs, old_log_probs, advantages, action_mask, rollout_log_probs)
    totals = (dp_size, batch_num_tokens, global_batch_size)
    off = self.is_correction_level == "off"
    if not _served(self, *tensors, batch_num_tokens, corrected=not off):
        return theirs(POLICY_LOSS)(self, *tensors, *totals)
    return _policy_loss(self, *tensors, *totals, None if off else (*correction, *self.is_correction_threshold))


def policy_loss_forward_0_11_1(
    self,
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    action_mask: Tensor | None = None,
    rollout_log_probs: Tensor | None = None,
    dp_size: int = 1,
    batch_num_tokens: float | Tensor | None = None,
    global_batch_size: float | Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """policy_loss_forward before 0.11.2, with three corrections and without a fifth result."""
    tensors = (log_probs, old_log_probs, advantages, action_mask, rollout_log_probs)
    totals = (dp_size, batch_num_tokens, global_batch_size)
    correction = None
    if self.enable_vllm_is_correction:
        correction = (*CORRECTIONS[self.vllm_is_correction_type], "ratio", *self.vllm_is_truncated_threshold)
    if not _served(self, *tensors, batch_num_tokens, corrected=correction is not None):
        return theirs(POLICY_LOSS)(self, *tensors, *totals)
    return _policy_loss(self, *tensors, *totals, correction)[:4]


def _served(
    self,
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    rollout_log_probs: Tensor | None,
    batch_num_tokens: float | Tensor | None,
    *,
    corrected: bool,
) -> bool:
    """Whether ours can serve the call. It cannot if OpenRLHF would raise, broadcast, or give gradients of what is data
    to ours."""
    data = [old_log_probs, advantages]
    if corrected:
        if rollout_log_probs is None:
            return False
        data.append(rollout_log_probs)
    if self.policy_loss_type not in ("ppo", "gspo"):
        return False
    if mask is None:
        if self.policy_loss_type == "gspo" or not self.token_level_loss or batch_num_tokens is not None:
            return False
    elif mask.shape != log_probs.shape:
        return False
    return log_probs.dim() == 2 and all(value.shape == log_probs.shape for value in data) and not needs_gradient(*data)


def _policy_loss(
    self,
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    rollout_log_probs: Tensor | None,
    dp_size: int,
    batch_num_tokens: float | Tensor | None,
    global_batch_size: float | Tensor | None,
    correction: tuple | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    vllm_kl = filtered = None
    rollout = old_log_probs if correction is None else rollout_log_probs
    assert rollout is not None
    tensors = [log_probs, old_log_probs, advantages, mask]
    total = batch_num_tokens if self.token_level_loss else global_batch_size
    options = dict(
        clip_low=self.clip_eps_low,
        clip_high=self.clip_eps_high,
        dual_clip=self.dual_clip,
        **_aggregation(self.token_level_loss, total, dp_size, log_probs),
    )
    if self.policy_loss_type == "gspo":
        # Objective ppo on the mean log-ratio, not our gspo: OpenRLHF differentiates a sequence's ratio for each token,
        # and tokens of a sequence may have different advantages.
        ratios = rlkernels.masked_mean(log_probs - rollout, mask, dim=-1).unsqueeze(-1).expand_as(log_probs)
        loss, metrics = rlkernels.policy_loss(ratios, torch.zeros_like(ratios), advantages, mask, **options)
        policy_kl = masked_mean((old_log_probs - log_probs).detach(), mask)
    else:
        if correction is not None:
            tensors.append(rollout)
            vllm_kl = masked_mean(rollout - old_log_probs, mask)
            advantages, sampler, filtered = _correct(advantages, old_log_probs, rollout, mask, *correction)
            options |= dict(
                sampler_logprobs=sampler,
                sampler_correction="token_truncate",
                sampler_cap=torch.finfo(torch.float32).max,
            )
        # old_log_probs stands as the reference only for the metric policy_kl, which is not clamped.
        loss, metrics = rlkernels.policy_loss(
            *(log_probs, old_log_probs, advantages, mask),
            ref_logprobs=old_log_probs,
            kl_estimator="k1",
            log_ratio_clamp=20.0,
            **options,
        )
        policy_kl = -metrics[NAMES.index("ref_kl")]
    tokens = metrics[NAMES.index("num_tokens")]
    clipped = metrics[NAMES.index("clip_fraction_low")] + metrics[NAMES.index("clip_fraction_high")]
    count = tokens if total is None else options["normalizer"]
    return (
        _nan_of_none(loss, count).to(_loss_dtype(self.token_level_loss, total, *tensors)),
        _nan_of_none(clipped, tokens).to(_dtype(torch.float32, mask)),
        _nan_of_none(policy_kl, tokens).to(_dtype(log_probs, old_log_probs, mask)),
        vllm_kl,
        filtered,
    )


def _correct(
    advantages: Tensor,
    old_log_probs: Tensor,
    rollout_log_probs: Tensor,
    mask: Tensor | None,
    level: str,
    mode: str,
    gating: str,
    low: float,
    high: float,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(advantages, sampler's log-probabilities, fraction of tokens or sequences outside the bounds). With the first two
    policy_loss weights tokens as OpenRLHF does."""
    if gating == "ratio":
        statistic = old_log_probs - rollout_log_probs
    else:
        sampled, trained = (value.exp().clamp(1e-6, 1 - 1e-6) for value in (rollout_log_probs, old_log_probs))
        if gating == "tv":
            statistic = (sampled - trained).abs()
        else:
            statistic = sampled * (sampled / trained).log() + (1 - sampled) * ((1 - sampled) / (1 - trained)).log()
    if level == "seq":
        statistic = masked_mean(statistic, mask, dim=-1).unsqueeze(-1)
    if gating == "ratio":
        statistic = statistic.exp()
    if mode == "clip":
        # A token's loss is proportional to its advantage, so the weight can multiply the advantage.
        advantages, sampler = advantages * statistic.clamp(min=low, max=high), None
        outside = (statistic < low) | (statistic > high)
    else:
        outside = ~((statistic >= low) & (statistic <= high))
        sampler = torch.where(outside, float("inf"), rollout_log_probs)  # inf gives the weight exp(-inf) = 0
    outside = outside.float()
    return advantages, sampler, outside.mean() if level == "seq" else masked_mean(outside, mask)


def value_loss_forward(
    self,
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    action_mask: Tensor | None = None,
    dp_size: int = 1,
    batch_num_tokens: float | Tensor | None = None,
    global_batch_size: float | Tensor | None = None,
) -> Tensor:
    """value_loss, in the dtype of OpenRLHF's."""
    data = [returns, *([] if self.clip_eps is None else [old_values])]
    tensors = [values, *data, *([] if action_mask is None else [action_mask])]
    whole = action_mask is None and (not self.token_level_loss or batch_num_tokens is not None)
    if whole or values.dim() != 2 or any(t.shape != values.shape for t in tensors) or needs_gradient(*data):
        return theirs("openrlhf.models.loss:ValueLoss.forward")(
            self, values, old_values, returns, action_mask, dp_size, batch_num_tokens, global_batch_size
        )
    total = batch_num_tokens if self.token_level_loss else global_batch_size
    options = _aggregation(self.token_level_loss, total, dp_size, values)
    loss, metrics = rlkernels.value_loss(
        *(values, None if self.clip_eps is None else old_values, returns, action_mask), clip=self.clip_eps, **options
    )
    count = metrics[-1] if total is None else options["normalizer"]
    return _nan_of_none(loss, count).to(_loss_dtype(self.token_level_loss, total, *tensors))


def _aggregation(token_level: bool, total: float | Tensor | None, dp_size: int, like: Tensor) -> dict:
    if total is not None:
        total = torch.as_tensor(total, device=like.device) / dp_size
    return dict(aggregation="token_mean" if token_level else "seq_mean_token_mean", normalizer=total)


def _nan_of_none(value: Tensor, count: Tensor) -> Tensor:
    """NaN if nothing was counted, as OpenRLHF's 0 / 0; ours is 0."""
    return value * (count / count)


def _loss_dtype(token_level: bool, total: float | Tensor | None, *tensors: Tensor | None) -> torch.dtype:
    """The dtype of OpenRLHF's loss. It counts the tokens of a sequence in float32 and divides by a total whose dtype
    counts too if it is a tensor."""
    counted = () if token_level else (torch.float32,)
    return _dtype(*tensors, *counted, total if isinstance(total, Tensor) else None)


def _dtype(*values: Tensor | torch.dtype | None) -> torch.dtype:
    dtypes = (value.dtype if isinstance(value, Tensor) else value for value in values)
    return functools.reduce(torch.promote_types, (dtype for dtype in dtypes if dtype is not None))


def pair_wise_loss_forward(self, chosen_reward: Tensor, reject_reward: Tensor, margin: Tensor | None = None) -> Tensor:
    """reward_pair_loss, for tensors of any shape."""
    odd = chosen_reward.shape != reject_reward.shape or chosen_reward.numel() == 0
    if margin is not None and margin.shape not in (chosen_reward.shape, (1,), ()):
        odd = True
    if odd or needs_gradient(margin):
        return theirs("openrlhf.models.loss:PairWiseLoss.forward")(self, chosen_reward, reject_reward, margin)
    dtype = _dtype(chosen_reward, reject_reward, margin)
    if margin is not None:
        margin = margin.to(chosen_reward.dtype).expand_as(chosen_reward).reshape(-1)
    loss, _ = rlkernels.reward_pair_loss(chosen_reward.reshape(-1), reject_reward.reshape(-1), margin)
    return loss.to(dtype)


def dpo_loss_forward(
    self,
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """preference_loss "sigmoid" or "ipo", and the rewards of each pair. For ipo the lengths are 1, since OpenRLHF does
    not divide by lengths."""
    policy = (policy_chosen_logps, policy_rejected_logps)
    reference = (reference_chosen_logps, reference_rejected_logps)
    shape = policy_chosen_logps.shape
    odd = any(value.shape != shape for value in (*policy, *reference)) or policy_chosen_logps.numel() == 0
    if odd or self.beta <= 0 or not 0 <= self.label_smoothing < 1 or needs_gradient(*reference):
        return theirs("openrlhf.models.loss:DPOLoss.forward")(self, *policy, *reference)
    flat = [value.reshape(-1) for value in (*policy, *reference)]
    if self.ipo:
        ones = torch.ones_like(flat[0], dtype=torch.long)
        loss, _ = rlkernels.preference_loss(
            *flat, loss="ipo", beta=self.beta, chosen_lengths=ones, rejected_lengths=ones
        )
    else:
        loss, _ = rlkernels.preference_loss(*flat, beta=self.beta, label_smoothing=self.label_smoothing)
    chosen, rejected = (self.beta * (ours - base).detach() for ours, base in zip(policy, reference, strict=True))
    return loss.to(_dtype(*policy, *reference)), chosen, rejected
