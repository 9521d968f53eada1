"""verl on our kernels. With both installed there is nothing to import: verl loads this module when it is imported.

    algorithm.adv_estimator=rk_grpo                       # in verl's configuration
    actor_rollout_ref.actor.policy_loss.loss_mode=rk_vanilla

These names are registered in addition to verl's. Each computes what verl's function of the same name computes:

    estimators   rk_gae rk_grpo rk_grpo_vectorized rk_rloo rk_rloo_vectorized rk_reinforce_plus_plus
                 rk_reinforce_plus_plus_baseline rk_gpg
    losses       rk_vanilla rk_gspo rk_cispo rk_sapo rk_geo_mean rk_dppo_tv rk_dppo_kl rk_gpg rk_dro

rk_gae needs critic.enable=True: verl starts a critic without it for the name "gae" only.

For the names "gae" and "grpo" verl's trainer does more than call the estimator. With "gae" it resamples the batch if
use_pf_ppo is set; rk_gae refuses that setting. With "grpo" and an agent loop of several outputs it compares the last
outputs; with rk_grpo each output counts as a sample. To keep both, use patch(). The setting bypass_mode overrides any
loss_mode.

    import rlkernels.integrations.verl as rk;  rk.patch()        # or: with rk.patched(): ...

This replaces verl's functions under verl's own names, wherever they have been imported: the estimators and losses
above; gdpo and remax, whose inputs verl's trainer prepares for these names only; the loss `reinforce` of bypass_mode;
agg_loss, compute_value_loss, kl_penalty; logprobs_from_logits, entropy_from_logits (in chunks too), masked_whiten,
FusedLinearForPPO.forward and linear_cross_entropy, which then runs on any device, with any hidden size. verl's workers
are Ray's processes. This setting makes each of them call patch():

    ray_kwargs.ray_init.runtime_env.worker_process_setup_hook=rlkernels.integrations.verl.patch

Some functions are not replaced, because they only choose tokens or a baseline, which no function of ours does: clip_cov
and kl_cov (random and largest covariances), grpo_passk (two best of a group), opo (a mean weighted by length),
optimal_token_baseline and tir_optimal_token_baseline. Once patched, their aggregation is ours, and so are the losses
that bypass_mode calls.

Ours differ from verl's as follows. A NaN reward does not count, where verl makes its whole group NaN. Masks must be 0
or 1. gamma and lam must lie in [0, 1]. Advantages, old log-probabilities and returns are data; ours refuse one that
requires a gradient.
"""

import importlib
import importlib.metadata
import warnings
from collections.abc import Callable

from packaging.specifiers import SpecifierSet

from rlkernels.integrations import _verl_advantages as advantages
from rlkernels.integrations import _verl_aggregation as aggregation
from rlkernels.integrations import _verl_functional as functional
from rlkernels.integrations import _verl_losses as losses
from rlkernels.integrations._patch import Patch, Replacement

_CORE = "verl.trainer.ppo.core_algos"
_OUTCOME = "(token_level_rewards, response_mask, index, epsilon=1e-06, config=None, **kwargs)"
_GROUP = "(token_level_rewards, response_mask, index, epsilon=1e-06, norm_adv_by_std_in_grpo=True, config=None)"
_LOSS = "(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode='{}', config=None, rollout_is_weights=None)"
_TOKENS, _SEQUENCES = _LOSS.format("token-mean"), _LOSS.format("seq-mean-token-mean")
_COUNTS = "dp_size=1, batch_num_tokens=None, global_batch_size=None, loss_scale_factor=None)"


def _core(name: str, ours: Callable, signature: str, versions: str = "") -> Replacement:
    return Replacement(f"{_CORE}:{name}", ours, signature, versions=versions)


def _functional(name: str, signature: str) -> Replacement:
    return Replacement(f"verl.utils.torch_functional:{name}", getattr(functional, name), signature)


PATCH = Patch(
    "verl",
    ">=0.9.0,<0.10",
    (
        _core(
            "compute_gae_advantage_return",
            advantages.compute_gae_advantage_return,
            "(token_level_rewards, values, response_mask, gamma, lam)",
        ),
        _core("compute_grpo_outcome_advantage", advantages.compute_grpo_outcome_advantage, _GROUP),
        _core(
            "compute_grpo_vectorized_outcome_advantage", advantages.compute_grpo_vectorized_outcome_advantage, _GROUP
        ),
        _core(
            "compute_gdpo_outcome_advantage",
            advantages.compute_gdpo_outcome_advantage,
            f"{_GROUP[:-1]}, non_tensor_batch=None, batch=None, **kwargs)",
        ),
        _core(
            "compute_reinforce_plus_plus_baseline_outcome_advantage",
            advantages.compute_reinforce_plus_plus_baseline_outcome_advantage,
            _OUTCOME,
        ),
        _core("compute_rloo_outcome_advantage", advantages.compute_rloo_outcome_advantage, _OUTCOME),
        _core(
            "compute_rloo_vectorized_outcome_advantage", advantages.compute_rloo_vectorized_outcome_advantage, _OUTCOME
        ),
        _core(
            "compute_reinforce_plus_plus_outcome_advantage",
            advantages.compute_reinforce_plus_plus_outcome_advantage,
            "(token_level_rewards, response_mask, config=None, **kwargs)",
        ),
        _core(
            "compute_remax_outcome_advantage",
            advantages.compute_remax_outcome_advantage,
            "(token_level_rewards, reward_baselines, response_mask, config=None, **kwargs)",
        ),
        _core(
            "compute_gpg_outcome_advantage",
            advantages.compute_gpg_outcome_advantage,
            "(token_level_rewards, response_mask, index, epsilon=1e-06, f_norm=1.0, alpha=1.0, config=None, **kwargs)",
        ),
        _core("compute_policy_loss_vanilla", losses.policy_loss_vanilla, _TOKENS),
        _core("compute_policy_loss_dppo_tv", losses.policy_loss_dppo_tv, _TOKENS),
        _core("compute_policy_loss_dppo_kl", losses.policy_loss_dppo_kl, _TOKENS),
        _core("compute_policy_loss_gspo", losses.policy_loss_gspo, _SEQUENCES, versions=">=0.9.1"),
        _core("compute_policy_loss_gspo", losses.policy_loss_gspo_0_9_0, _SEQUENCES, versions="<0.9.1"),
        _core("compute_policy_loss_sapo", losses.policy_loss_sapo, _SEQUENCES),
        _core("compute_policy_loss_gpg", losses.policy_loss_gpg, _TOKENS),
        _core("compute_policy_loss_cispo", losses.policy_loss_cispo, _TOKENS),
        _core("compute_policy_loss_geo_mean", losses.policy_loss_geo_mean, _TOKENS),
        _core("compute_policy_loss_dro", losses.policy_loss_dro, _TOKENS),
        _core(
            "compute_policy_loss_reinforce",
            losses.policy_loss_reinforce,
            _LOSS.format("seq-mean-token-sum").replace("old_log_prob", "rollout_log_prob"),
        ),
        _core("agg_loss", aggregation.agg_loss, f"(loss_mat, loss_mask, loss_agg_mode, {_COUNTS}"),
        _core(
            "compute_value_loss",
            aggregation.compute_value_loss,
            f"(vpreds, returns, values, response_mask, cliprange_value, loss_agg_mode='token-mean', {_COUNTS}",
        ),
        _core("kl_penalty", aggregation.kl_penalty, "(logprob, ref_logprob, kl_penalty)"),
        _functional("logprobs_from_logits", "(logits, labels, inplace_backward=True)"),
        _functional("entropy_from_logits", "(logits)"),
        _functional("entropy_from_logits_with_chunking", "(logits, chunk_size=2048)"),
        _functional("masked_whiten", "(values, mask, shift_mean=True)"),
        Replacement(
            "verl.utils.experimental.torch_functional:FusedLinearForPPO.forward",
            functional.fused_linear_for_ppo_forward,
            "(self, hidden_states, vocab_weights, input_ids, temperature=1.0)",
        ),
        Replacement(
            "verl.utils.kernel.linear_cross_entropy:linear_cross_entropy",
            functional.linear_cross_entropy,
            "(ctx, hidden, weight, labels, temperature=1.0, reduction='none', dist_process_group=None)",
            signature_of="LinearCrossEntropy.forward",
        ),
    ),
)
patch, unpatch, patched = PATCH.patch, PATCH.unpatch, PATCH.patched

ESTIMATORS: dict[str, Callable] = {
    "rk_gae": advantages.rk_gae,
    "rk_grpo": advantages.rk_grpo,
    "rk_grpo_vectorized": advantages.compute_grpo_vectorized_outcome_advantage,
    "rk_rloo": advantages.compute_rloo_outcome_advantage,
    "rk_rloo_vectorized": advantages.compute_rloo_vectorized_outcome_advantage,
    "rk_reinforce_plus_plus": advantages.compute_reinforce_plus_plus_outcome_advantage,
    "rk_reinforce_plus_plus_baseline": advantages.compute_reinforce_plus_plus_baseline_outcome_advantage,
    "rk_gpg": advantages.compute_gpg_outcome_advantage,
}
LOSSES: dict[str, Callable] = {
    "rk_vanilla": losses.policy_loss_vanilla,
    "rk_dppo_tv": losses.policy_loss_dppo_tv,
    "rk_dppo_kl": losses.policy_loss_dppo_kl,
    "rk_gspo": losses.policy_loss_gspo,
    "rk_sapo": losses.policy_loss_sapo,
    "rk_gpg": losses.policy_loss_gpg,
    "rk_cispo": losses.policy_loss_cispo,
    "rk_geo_mean": losses.policy_loss_geo_mean,
    "rk_dro": losses.policy_loss_dro,
}


def _register() -> None:
    """Puts ours into verl's registries. On failure it warns, since verl silently drops a plugin's exceptions."""
    try:
        version = importlib.metadata.version("verl")
    except importlib.metadata.PackageNotFoundError:
        return
    if version not in SpecifierSet(PATCH.versions, prereleases=True):
        warnings.warn(
            f"verl {version} is installed, and rlkernels knows verl{PATCH.versions}: "
            "no estimator and no loss named rk_* was registered",
            stacklevel=2,
        )
        return
    try:
        core = importlib.import_module(_CORE)
        estimators, policy_losses = core.ADV_ESTIMATOR_REGISTRY, core.POLICY_LOSS_REGISTRY
    except (ImportError, AttributeError) as error:
        warnings.warn(f"no estimator and no loss named rk_* was registered with verl: {error}", stacklevel=2)
        return
    gspo = losses.policy_loss_gspo_0_9_0 if version in SpecifierSet("<0.9.1") else losses.policy_loss_gspo
    estimators.update(ESTIMATORS)
    policy_losses.update(LOSSES | {"rk_gspo": gspo})


_register()
