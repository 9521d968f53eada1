"""Losses of pairs of completions: plain PyTorch on [B] vectors, where a kernel would have nothing to gain."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rlkernels.ops import _checks

DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
WITHOUT_REFERENCE = ("sft", "simpo", "orpo")
WITH_LENGTHS = ("ipo", "sigmoid_norm", "sft", "simpo", "orpo")
SMOOTHED = ("sigmoid", "exo_pair", "robust", "aot", "aot_unpaired", "simpo")
# In the others log Z of the divergence does not cancel between chosen and rejected. sft has neither.
WITH_DIVERGENCE = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")
# exp of more leaves float32; TRL's limit for alpha_divergence.
MAX_EXPONENT = 80.0


def preference_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor | None,
    ref_chosen: Tensor | None = None,
    ref_rejected: Tensor | None = None,
    *,
    loss: str = "sigmoid",
    beta: float = 0.1,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    label_smoothing: float = 0.0,
    divergence: str = "reverse_kl",
    alpha: float = 0.5,
    discopop_tau: float = 0.05,
    simpo_gamma: float = 0.5,
    labels: Tensor | None = None,
    kl: Tensor | float | None = None,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Losses on log-probabilities of completions that were preferred over others (DPO and its relatives).

        c = policy_chosen - ref_chosen,  r = policy_rejected - ref_rejected,  d = f(c) - f(r),  |c|, |r| the lengths
        s(x) = log sigmoid(x),  S(x) = -(1 - e) s(x) - e s(-x),  e = label_smoothing

    The loss is the mean over pairs of (in brackets the paper's number on arXiv):

        sigmoid       S(beta d)                                                        DPO (2305.18290); e > 0: cDPO
        hinge         max(0, 1 - beta d)                                               SLiC (2305.10425)
        ipo           (f(c)/|c| - f(r)/|r| - 1/(2 beta))^2                             IPO (2310.12036)
        exo_pair      KL((q, 1 - q) || (1 - e, e)),  q = sigmoid(beta d)               EXO (2402.00856)
        nca_pair      -s(beta c) - s(-beta c)/2 - s(-beta r)/2                         NCA (2402.05369)
        robust        (-(1 - e) s(beta d) + e s(-beta d)) / (1 - 2 e)                  robust DPO (2403.00409)
        bco_pair      -s(beta c) - s(-beta r)                                          BCO (2404.04656)
        sppo_hard     (c - 1/(2 beta))^2 + (r + 1/(2 beta))^2                          SPPO (2405.00675)
        aot           S(beta (sort(policy_chosen - policy_rejected)                    AOT (2406.05882),
                         - sort(ref_chosen - ref_rejected)))                           sorted over the batch
        aot_unpaired  S(beta (sort(c) - sort(r)))                                      AOT (2406.05882)
        apo_zero      1 - sigmoid(beta c) + sigmoid(beta r)                            APO (2408.06266)
        apo_down      sigmoid(beta c) + 1 - sigmoid(beta (c - r))                      APO (2408.06266)
        discopop      -s(x) (1 - m) + exp(-x) m,  x = beta d, m = sigmoid(x/tau)       DiscoPOP (2406.08414)
        sigmoid_norm  -s(beta (f(c)/|c| - f(r)/|r|))                                   normalised DPO (2411.15124)
        sft           -(sum of policy_chosen) / (sum of |c|) over the batch            likelihood of chosen tokens
        simpo         S(beta (policy_chosen/|c| - policy_rejected/|r|) - simpo_gamma)  SimPO (2405.14734)
        orpo          sft - beta s(o(policy_chosen/|c|) - o(policy_rejected/|r|)),     ORPO (2403.07691)
                      o(x) = x - log(1 - exp(x))
        kto           1 - sigmoid(beta (c - kl)) of desirable completions,             KTO (2402.01306)
                      1 - sigmoid(beta (kl - c)) of the others

    f is the derivative of the divergence that keeps the policy near the reference (f-DPO, arXiv 2309.16240): reverse_kl
    x; forward_kl 1 - exp(-x); js_divergence log 2 + s(x); alpha_divergence (exp((alpha - 1) x) - 1) / (alpha - 1).
    Others than reverse_kl go with sigmoid, sigmoid_norm, hinge, ipo, exo_pair, robust and discopop; sft has none.

    kto has no pairs: policy_chosen and ref_chosen hold all completions, [B], policy_rejected and ref_rejected are None,
    and `labels` says which are desirable.

    Each is TRL 1.16's of that name (DPOTrainer; CPOTrainer's simpo with cpo_alpha 0; ORPOTrainer; KTOTrainer), but that
    sigmoid there ignores label_smoothing, and that ORPOTrainer's likelihood includes the prompt.
    Mixtures are sums: `preference_loss(...)[0] + weight * preference_loss(..., loss="sft")[0]`.

    Args:
        policy_chosen, policy_rejected: [B], float32, bfloat16, float16 or float64 (computed in float64, the others in
            float32): log-probabilities of the completions, summed over their tokens.
        ref_chosen, ref_rejected: the same, of the reference model. Needed by all but sft, simpo and orpo.
        beta: > 0.
        chosen_lengths, rejected_lengths: [B], integer or float: tokens of each completion; 0 counts as 1. Needed by
            ipo, sigmoid_norm, sft, simpo and orpo.
        label_smoothing: in [0, 1), the share of labels that are wrong, for sigmoid, exo_pair (where it must be > 0),
            robust (< 1/2), aot, aot_unpaired and simpo.
        alpha: of alpha_divergence; 1 is reverse_kl.
        discopop_tau: > 0; tau above.
        simpo_gamma: the margin that simpo wants.
        labels: [B], bool or integer; nonzero is desirable.
        kl: a number, or a 0-d tensor: mean of log policy - log reference over completions of other prompts; less than 0
            counts as 0. With 0 kto is TRL's apo_zero_unpaired.
        desirable_weight, undesirable_weight: >= 0, of the completions of either kind in kto.

    Returns:
        loss: 0-d float32 (float64 for float64 policy_chosen).
        metrics: [6], of that dtype, named by `preference_loss.metrics`: means over pairs of rewards_chosen beta c and
            rewards_rejected beta r, accuracy (reward of chosen > rejected), margin (their difference), logprobs_chosen
            and logprobs_rejected. Without a reference c and r are those of the policy alone, for simpo and orpo these
            divided by the lengths. For kto means over desirable and others, 0 where there are none, and accuracy 0.

    Differentiable: the loss with respect to policy_chosen and policy_rejected, by autograd, any number of times.

    Edge cases: an empty batch has loss and metrics 0. Values and gradients are finite for log-ratios up to 1e4 and
    beyond; exponents of forward_kl and alpha_divergence are cut at 80 (no gradient there). orpo at a probability of 1
    has no gradient.

    Raises: TypeError, ValueError for wrong dtypes, shapes, devices, options and combinations of them, and for anything
    but the policy's log-probabilities that requires a gradient.

    Traffic: [B] vectors in plain PyTorch operations; nothing to fuse. No host synchronisation.
    """
    _checks.choice("loss", loss, LOSSES)
    _checks.choice("divergence", divergence, DIVERGENCES)
    if divergence != "reverse_kl" and loss not in WITH_DIVERGENCE:
        raise ValueError(
            f"divergence must be reverse_kl with loss {loss!r} (others go with {', '.join(WITH_DIVERGENCE)}); "
            f"got {divergence!r}"
        )
    beta = _checks.number("beta", beta, above=0.0)
    label_smoothing = _smoothing(label_smoothing, loss)
    _checks.tensor("policy_chosen", policy_chosen, _checks.FLOATS)
    if policy_chosen.dim() != 1:
        raise ValueError(f"policy_chosen must have the shape [B]; got {list(policy_chosen.shape)}")
    chosen = policy_chosen if policy_chosen.dtype == torch.float64 else policy_chosen.float()
    ref_chosen = _reference("ref_chosen", ref_chosen, chosen, loss)

    if loss == "kto":
        for name, value in (("policy_rejected", policy_rejected), ("ref_rejected", ref_rejected)):
            if value is not None:
                raise ValueError(
                    f"{name} must be None with loss 'kto', whose labels say what is desirable; got a tensor"
                )
        weights = (
            _checks.number("desirable_weight", desirable_weight, at_least=0.0),
            _checks.number("undesirable_weight", undesirable_weight, at_least=0.0),
        )
        return _kto(chosen, ref_chosen, _labels(labels, chosen), _kl(kl, chosen), beta, *weights)
    for name, given in (("labels", labels), ("kl", kl)):
        if given is not None:
            raise ValueError(
                f"{name} must be None with loss {loss!r}, since only 'kto' takes it; got {type(given).__name__}"
            )

    rejected = _like("policy_rejected", policy_rejected, chosen, _checks.FLOATS)
    pairs = Pairs(
        chosen,
        rejected,
        ref_chosen,
        _reference("ref_rejected", ref_rejected, chosen, loss),
        _lengths("chosen_lengths", chosen_lengths, chosen, loss),
        _lengths("rejected_lengths", rejected_lengths, chosen, loss),
        beta,
        label_smoothing,
        divergence,
        _checks.number("alpha", alpha),
        _checks.number("discopop_tau", discopop_tau, above=0.0),
        _checks.number("simpo_gamma", simpo_gamma),
    )
    per_pair = PAIR_LOSSES[loss](pairs)
    with torch.no_grad():
        rewards = pairs.averages() if loss in ("simpo", "orpo") else pairs.log_ratios()
        chosen_rewards, rejected_rewards = (beta * reward for reward in rewards)
        each = (
            chosen_rewards,
            rejected_rewards,
            (chosen_rewards > rejected_rewards).to(chosen.dtype),
            chosen_rewards - rejected_rewards,
            chosen,
            rejected,
        )
        metrics = torch.stack([_mean(value) for value in each])
    return _mean(per_pair), metrics


METRICS = ("rewards_chosen", "rewards_rejected", "accuracy", "margin", "logprobs_chosen", "logprobs_rejected")
preference_loss.metrics = METRICS  # type: ignore[attr-defined]


def reward_pair_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Bradley-Terry loss of a reward model on pairs of scores.

        loss = mean over pairs of -log sigmoid(chosen - rejected - margin)

    Args:
        chosen, rejected: [B], float32, bfloat16, float16 or float64 (computed in float64, the others in float32).
        margin: [B], how much better the chosen one is known to be, or None: 0.

    Returns:
        loss: 0-d float32 (float64 for float64 chosen).
        metrics: [2], of that dtype, named by `reward_pair_loss.metrics`: accuracy (chosen > rejected) and margin
            (chosen - rejected), means over pairs.

    Differentiable: the loss with respect to chosen and rejected, by autograd, any number of times.

    Edge cases: an empty batch has loss and metrics 0.

    Raises: TypeError, ValueError for wrong dtypes, shapes and devices, and for a margin that requires a gradient.

    Traffic: [B] vectors in plain PyTorch operations; nothing to fuse. No host synchronisation.

    References: Bradley and Terry 1952; Ouyang et al. 2022 (arXiv 2203.02155); Touvron et al. 2023 (the margin, arXiv
    2307.09288). As TRL 1.16's RewardTrainer.
    """
    _checks.tensor("chosen", chosen, _checks.FLOATS)
    if chosen.dim() != 1:
        raise ValueError(f"chosen must have the shape [B]; got {list(chosen.shape)}")
    chosen = chosen if chosen.dtype == torch.float64 else chosen.float()
    _checks.tensor("rejected", rejected, _checks.FLOATS)
    _checks.shape("rejected", rejected, tuple(chosen.shape), because="that of chosen")
    _checks.same_device("rejected", rejected, "chosen", chosen)
    difference = chosen - rejected.to(chosen.dtype)
    metrics = torch.stack([_mean((difference > 0).to(chosen.dtype)), _mean(difference)]).detach()
    if margin is not None:
        _checks.tensor("margin", margin, _checks.FLOATS)
        _checks.shape("margin", margin, tuple(chosen.shape), because="that of chosen")
        _checks.same_device("margin", margin, "chosen", chosen)
        _checks.no_gradient("margin", margin, "gradients do not flow to margin")
        difference = difference - margin.to(chosen.dtype)
    return _mean(-F.logsigmoid(difference)), metrics


reward_pair_loss.metrics = ("accuracy", "margin")  # type: ignore[attr-defined]


class Pairs(NamedTuple):
    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor | None
    ref_rejected: Tensor | None
    chosen_lengths: Tensor | None
    rejected_lengths: Tensor | None
    beta: float
    smoothing: float
    divergence: str
    alpha: float
    discopop_tau: float
    simpo_gamma: float

    def log_ratios(self) -> tuple[Tensor, Tensor]:
        """The log-ratios of chosen and rejected to the reference, or their log-probabilities without one."""
        if self.ref_chosen is None or self.ref_rejected is None:
            return self.chosen, self.rejected
        return self.chosen - self.ref_chosen, self.rejected - self.ref_rejected

    def scores(self) -> tuple[Tensor, Tensor]:
        """f of the log-ratios."""
        chosen, rejected = self.log_ratios()
        return self._derivative(chosen), self._derivative(rejected)

    def logits(self) -> Tensor:
        chosen, rejected = self.scores()
        return self.beta * (chosen - rejected)

    def averages(self) -> tuple[Tensor, Tensor]:
        """Log-probabilities per token."""
        return self.per_token(self.chosen, self.rejected)

    def per_token(self, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
        assert self.chosen_lengths is not None and self.rejected_lengths is not None
        return chosen / self.chosen_lengths.clamp(min=1), rejected / self.rejected_lengths.clamp(min=1)

    def _derivative(self, log_ratio: Tensor) -> Tensor:
        if self.divergence == "forward_kl":
            return -torch.expm1((-log_ratio).clamp(max=MAX_EXPONENT))
        if self.divergence == "js_divergence":
            return math.log(2) + F.logsigmoid(log_ratio)
        if self.divergence == "alpha_divergence" and abs(self.alpha - 1) >= 1e-6:
            return torch.expm1(((self.alpha - 1) * log_ratio).clamp(max=MAX_EXPONENT)) / (self.alpha - 1)
        return log_ratio


def _logistic(logits: Tensor, smoothing: float) -> Tensor:
    loss = -F.logsigmoid(logits)
    return loss if smoothing == 0.0 else (1 - smoothing) * loss - smoothing * F.logsigmoid(-logits)


def _sigmoid(p: Pairs) -> Tensor:
    return _logistic(p.logits(), p.smoothing)


def _hinge(p: Pairs) -> Tensor:
    return torch.relu(1 - p.logits())


def _ipo(p: Pairs) -> Tensor:
    chosen, rejected = p.per_token(*p.scores())
    return (chosen - rejected - 1 / (2 * p.beta)).square()


def _exo_pair(p: Pairs) -> Tensor:
    logits = p.logits()
    right = torch.sigmoid(logits) * (F.logsigmoid(logits) - math.log1p(-p.smoothing))
    return right + torch.sigmoid(-logits) * (F.logsigmoid(-logits) - math.log(p.smoothing))


def _nca_pair(p: Pairs) -> Tensor:
    chosen, rejected = (p.beta * log_ratio for log_ratio in p.log_ratios())
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def _robust(p: Pairs) -> Tensor:
    logits, e = p.logits(), p.smoothing
    return (e * F.logsigmoid(-logits) - (1 - e) * F.logsigmoid(logits)) / (1 - 2 * e)


def _bco_pair(p: Pairs) -> Tensor:
    chosen, rejected = (p.beta * log_ratio for log_ratio in p.log_ratios())
    return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)


def _sppo_hard(p: Pairs) -> Tensor:
    chosen, rejected = p.log_ratios()
    return (chosen - 0.5 / p.beta).square() + (rejected + 0.5 / p.beta).square()


def _aot(p: Pairs) -> Tensor:
    assert p.ref_chosen is not None and p.ref_rejected is not None
    policy, reference = (p.chosen - p.rejected).sort().values, (p.ref_chosen - p.ref_rejected).sort().values
    return _logistic(p.beta * (policy - reference), p.smoothing)


def _aot_unpaired(p: Pairs) -> Tensor:
    chosen, rejected = (log_ratio.sort().values for log_ratio in p.log_ratios())
    return _logistic(p.beta * (chosen - rejected), p.smoothing)


def _apo_zero(p: Pairs) -> Tensor:
    chosen, rejected = p.log_ratios()
    return torch.sigmoid(-p.beta * chosen) + torch.sigmoid(p.beta * rejected)


def _apo_down(p: Pairs) -> Tensor:
    chosen, rejected = p.log_ratios()
    return torch.sigmoid(p.beta * chosen) + torch.sigmoid(-p.beta * (chosen - rejected))


def _discopop(p: Pairs) -> Tensor:
    logits = p.logits()
    modulation = logits / p.discopop_tau
    # exp(-x) * sigmoid(x / tau) in one exponential, since the first alone overflows.
    return torch.sigmoid(-modulation) * -F.logsigmoid(logits) + torch.exp(F.logsigmoid(modulation) - logits)


def _sigmoid_norm(p: Pairs) -> Tensor:
    chosen, rejected = p.per_token(*p.scores())
    return -F.logsigmoid(p.beta * (chosen - rejected))


def _sft(p: Pairs) -> Tensor:
    assert p.chosen_lengths is not None
    # The mean over pairs of this is the mean over tokens.
    return -p.chosen * (len(p.chosen) / p.chosen_lengths.sum().clamp(min=1))


def _simpo(p: Pairs) -> Tensor:
    chosen, rejected = p.averages()
    return _logistic(p.beta * (chosen - rejected) - p.simpo_gamma, p.smoothing)


def _orpo(p: Pairs) -> Tensor:
    chosen, rejected = (_log_odds(average) for average in p.averages())
    return _sft(p) - p.beta * F.logsigmoid(chosen - rejected)


def _log_odds(logprob: Tensor) -> Tensor:
    """log p - log(1 - p)"""
    logprob = logprob.clamp(max=-torch.finfo(logprob.dtype).tiny)
    near_one = logprob > -math.log(2)
    # Where the second branch is not taken it must not overflow: its gradient is 0 times that.
    log_complement = torch.where(
        near_one,
        torch.log(-torch.expm1(logprob)),
        torch.log1p(-torch.exp(logprob.masked_fill(near_one, -1.0))),
    )
    return logprob - log_complement


PAIR_LOSSES: dict[str, Callable[[Pairs], Tensor]] = {
    "sigmoid": _sigmoid,
    "hinge": _hinge,
    "ipo": _ipo,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "robust": _robust,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "aot": _aot,
    "aot_unpaired": _aot_unpaired,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "discopop": _discopop,
    "sigmoid_norm": _sigmoid_norm,
    "sft": _sft,
    "simpo": _simpo,
    "orpo": _orpo,
}
LOSSES = (*PAIR_LOSSES, "kto")


def _kto(
    policy: Tensor,
    reference: Tensor | None,
    labels: Tensor,
    kl: Tensor | float,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> tuple[Tensor, Tensor]:
    assert reference is not None
    log_ratio = policy - reference
    advantage = beta * (log_ratio - kl)
    loss = torch.where(
        labels, desirable_weight * torch.sigmoid(-advantage), undesirable_weight * torch.sigmoid(advantage)
    )

    def mean_of(value: Tensor, kind: Tensor) -> Tensor:
        return value.detach().masked_fill(~kind, 0.0).sum() / kind.sum().clamp(min=1)

    rewards = beta * log_ratio
    chosen, rejected = mean_of(rewards, labels), mean_of(rewards, ~labels)
    logprobs = mean_of(policy, labels), mean_of(policy, ~labels)
    return _mean(loss), torch.stack([chosen, rejected, torch.zeros_like(chosen), chosen - rejected, *logprobs])


def _mean(value: Tensor) -> Tensor:
    return value.sum() / max(len(value), 1)


def _smoothing(value: float, loss: str) -> float:
    value = _checks.number("label_smoothing", value, at_least=0.0)
    if value != 0.0 and loss not in SMOOTHED:
        raise ValueError(f"label_smoothing must be 0 with loss {loss!r} (it is for {', '.join(SMOOTHED)}); got {value}")
    below = 0.5 if loss == "robust" else 1.0
    if value >= below:
        raise ValueError(f"label_smoothing must be < {below:g} with loss {loss!r}; got {value}")
    if value == 0.0 and loss == "exo_pair":
        raise ValueError("label_smoothing must be > 0 with loss 'exo_pair' (its paper takes 1e-3); got 0")
    return value


def _like(name: str, value: object, policy: Tensor, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    _checks.tensor(name, value, dtypes)
    assert isinstance(value, Tensor)
    _checks.shape(name, value, tuple(policy.shape), because="that of policy_chosen")
    _checks.same_device(name, value, "policy_chosen", policy)
    return value.to(policy.dtype)


def _reference(name: str, value: Tensor | None, policy: Tensor, loss: str) -> Tensor | None:
    if loss in WITHOUT_REFERENCE and value is None:
        return None
    if value is None:
        raise ValueError(
            f"{name} must be given with loss {loss!r} (losses without a reference: {', '.join(WITHOUT_REFERENCE)})"
        )
    reference = _like(name, value, policy, _checks.FLOATS)
    _checks.no_gradient(name, reference, "gradients flow to the policy alone")
    return reference


def _lengths(name: str, value: Tensor | None, policy: Tensor, loss: str) -> Tensor | None:
    if value is None:
        if loss in WITH_LENGTHS:
            raise ValueError(
                f"{name} must be given with loss {loss!r}, which divides by the number of tokens; got None"
            )
        return None
    lengths = _like(name, value, policy, (*_checks.INTEGERS, *_checks.FLOATS))
    _checks.no_gradient(name, lengths, "gradients flow to the policy alone")
    return lengths


def _labels(value: Tensor | None, policy: Tensor) -> Tensor:
    if value is None:
        raise ValueError("labels must be given with loss 'kto': which completions are desirable; got None")
    _checks.mask("labels", value, "policy_chosen", policy)
    return _checks.scored(value).contiguous()


def _kl(value: Tensor | float | None, policy: Tensor) -> Tensor | float:
    if value is None:
        raise ValueError("kl must be given with loss 'kto', a number or a 0-d tensor; got None")
    if not isinstance(value, Tensor):
        return max(_checks.number("kl", value), 0.0)
    _checks.tensor("kl", value, _checks.FLOATS)
    _checks.shape("kl", value, (), because="a number or a 0-d tensor")
    _checks.same_device("kl", value, "policy_chosen", policy)
    _checks.no_gradient("kl", value, "gradients flow to the policy alone")
    return value.to(policy.dtype).clamp(min=0)
