"""OpenRLHF 0.11 on our kernels.

    import rlkernels.integrations.openrlhf as rk;  rk.patch()        # or: with rk.patched(): ...

This replaces the functions of `openrlhf.models.utils`, `forward` of the losses in `openrlhf.models.loss`, and the
experience maker's loops over tokens, where they are defined and wherever OpenRLHF imported them. Its trainers, group
baselines, whitening of advantages, GPTLMLoss and LogExpLoss stay as they are; SFTLoss uses our aggregate_loss.

PPO's actors, critics and trainer run in Ray's worker processes. Start Ray before `openrlhf.cli.train_ppo_ray` with

    ray.init(runtime_env={"worker_process_setup_hook": "rlkernels.integrations.openrlhf.patch"})

Values, gradients, metrics and dtypes are OpenRLHF's, with these differences:

- Masked values that are not finite have no effect. OpenRLHF multiplies them by 0, which makes everything NaN.
- Masks must be 0 or 1.
- A label of -100 has the log-probability 0, as in OpenRLHF with flash-attn.
- k3's gradient beyond its clamp is 0 in every version. In OpenRLHF before 0.11.2 it is NaN if the ratio overflows.
- A logit of -inf adds 0 to the entropy, which OpenRLHF makes NaN.

These calls still go to OpenRLHF's own functions, which serve them or raise: an unknown estimator or type of policy
loss; shapes that broadcast, or losses of other than two dimensions; a missing mask where one is needed; gradients of
what is data to ours (old log-probabilities, advantages, returns, references, a KL that becomes a reward); gamma or
lambda outside [0, 1]; label smoothing outside [0, 1); means over no pairs, and masked_mean without a mask.
"""

from rlkernels.integrations import _openrlhf_losses as losses
from rlkernels.integrations import _openrlhf_utils as utils
from rlkernels.integrations._patch import Patch, Replacement

MAKER = "openrlhf.trainer.ppo_utils.experience_maker:RemoteExperienceMaker"
TOTALS = "dp_size=1, batch_num_tokens=None, global_batch_size=None"
POLICY_LOSS = f"(self, log_probs, old_log_probs, advantages, action_mask=None, rollout_log_probs=None, {TOTALS})"
APPROX_KL = "(log_probs, log_probs_base, log_probs_old=None, kl_estimator='k1', unbiased_gradient=False)"

PATCH = Patch(
    "openrlhf",
    ">=0.11.0,<0.12",
    (
        Replacement(
            "openrlhf.models.utils:log_probs_from_logits",
            utils.log_probs_from_logits,
            "(logits, labels, temperature=1.0)",
        ),
        Replacement("openrlhf.models.utils:compute_entropy", utils.compute_entropy, "(logits)"),
        Replacement("openrlhf.models.utils:compute_approx_kl", utils.compute_approx_kl, APPROX_KL, versions=">=0.11.1"),
        Replacement(
            "openrlhf.models.utils:compute_approx_kl",
            utils.compute_approx_kl_0_11_0,
            "(log_probs, log_probs_base, kl_estimator='k1')",
            versions="<0.11.1",
        ),
        Replacement(
            "openrlhf.models.utils:compute_reward",
            utils.compute_reward,
            "(r, kl_coef, kl, action_mask=None, reward_clip_range=None)",
        ),
        Replacement("openrlhf.models.utils:masked_mean", utils.masked_mean, "(tensor, mask, dim=None)"),
        Replacement(
            "openrlhf.models.utils:masked_normalize", utils.masked_normalize, "(tensor, mask, dim=1, eps=1e-08)"
        ),
        Replacement(
            "openrlhf.models.loss:aggregate_loss",
            losses.aggregate_loss,
            f"(loss, loss_mask, token_level_loss=True, {TOTALS})",
        ),
        Replacement(
            "openrlhf.models.loss:PolicyLoss.forward", losses.policy_loss_forward, POLICY_LOSS, versions=">=0.11.2"
        ),
        Replacement(
            "openrlhf.models.loss:PolicyLoss.forward",
            losses.policy_loss_forward_0_11_1,
            POLICY_LOSS,
            versions="<0.11.2",
        ),
        Replacement(
            "openrlhf.models.loss:ValueLoss.forward",
            losses.value_loss_forward,
            f"(self, values, old_values, returns, action_mask=None, {TOTALS})",
        ),
        Replacement(
            "openrlhf.models.loss:PairWiseLoss.forward",
            losses.pair_wise_loss_forward,
            "(self, chosen_reward, reject_reward, margin=None)",
        ),
        Replacement(
            "openrlhf.models.loss:DPOLoss.forward",
            losses.dpo_loss_forward,
            "(self, policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)",
        ),
        Replacement(
            f"{MAKER}.get_advantages_and_returns",
            utils.get_advantages_and_returns,
            "(self, values, rewards, action_mask, gamma, lambd)",
        ),
        Replacement(
            f"{MAKER}.get_cumulative_returns", utils.get_cumulative_returns, "(self, rewards, action_mask, gamma)"
        ),
    ),
)
patch, unpatch, patched = PATCH.patch, PATCH.unpatch, PATCH.patched
