"""Every public op with small arguments in its usual layouts, for what holds of all of them."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

import rlkernels

B, T, H, V = 2, 3, 4, 5
IDS = torch.tensor([[0, 1, 2], [3, 4, -100]])
MASK = torch.tensor([[True, True, False], [True, True, True]])
CU_SEQLENS = torch.tensor([0, 2, 6], dtype=torch.int32)


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Case:
    op: Callable
    differentiable: dict[str, torch.Tensor] = field(default_factory=dict)
    data: dict[str, torch.Tensor] = field(default_factory=dict)
    """Numbers that are not differentiated."""
    others: dict[str, Any] = field(default_factory=dict)
    """Ids, masks and options."""

    def __call__(self, **changed: Any) -> tuple[torch.Tensor, ...]:
        arguments = {**self.differentiable, **self.data, **self.others, **changed}
        if "adapter_0" in arguments:
            arguments["adapter"] = (arguments.pop("adapter_0"), arguments.pop("adapter_1"))
        results = self.op(**arguments)
        return results if isinstance(results, tuple) else (results,)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {n: v for n, v in {**self.differentiable, **self.data, **self.others}.items() if torch.is_tensor(v)}

    def to(self, where: torch.device | torch.dtype) -> "Case":
        """With all tensors on a device, or all numbers in a dtype."""

        def moved(values: dict[str, Any]) -> dict[str, Any]:
            return {
                name: value.to(where)
                if torch.is_tensor(value) and (isinstance(where, torch.device) or value.is_floating_point())
                else value
                for name, value in values.items()
            }

        return replace(
            self, differentiable=moved(self.differentiable), data=moved(self.data), others=moved(self.others)
        )


def inplace_token_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, **options: Any) -> Any:
    return rlkernels.token_logprobs(1 * logits, token_ids, inplace_backward=True, **options)


def _logprobs(*shape: int, seed: int = 0) -> torch.Tensor:
    return -numbers(*shape, seed=seed).abs()


def _head(*leading: int) -> dict[str, torch.Tensor]:
    return {
        "hidden": numbers(*leading, H),
        "weight": numbers(V, H),
        "bias": numbers(V),
        "adapter_0": numbers(*leading, 2, seed=1),
        "adapter_1": numbers(V, 2),
    }


def _by_token(*leading: int) -> dict[str, torch.Tensor]:
    return {"rewards": numbers(*leading), "values": numbers(*leading, seed=1), "bootstrap_values": numbers(B)}


def _pairs(*names: str) -> dict[str, torch.Tensor]:
    return {name: _logprobs(B, seed=seed) - 0.1 for seed, name in enumerate(names)}


PADDED, PACKED = dict(mask=MASK), dict(mask=MASK.flatten(), cu_seqlens=CU_SEQLENS)
LENGTHS = dict(chosen_lengths=torch.tensor([2.0, 3.0]), rejected_lengths=torch.tensor([1.0, 4.0]))
KTO = dict(loss="kto", labels=torch.tensor([1, 0]), kl=torch.tensor(0.1))

CASES = {
    "token_logprobs": Case(
        rlkernels.token_logprobs, dict(logits=numbers(B, T, V)), {}, dict(token_ids=IDS, return_entropy=True)
    ),
    "token_logprobs, in place": Case(inplace_token_logprobs, dict(logits=numbers(B, T, V)), {}, dict(token_ids=IDS)),
    "kl_penalty": Case(
        rlkernels.kl_penalty, dict(logprobs=_logprobs(B, T), ref_logprobs=_logprobs(B, T, seed=1)), {}, {}
    ),
    "masked_mean": Case(rlkernels.masked_mean, dict(x=numbers(B, T)), {}, dict(mask=MASK)),
    "masked_mean, of rows": Case(rlkernels.masked_mean, dict(x=numbers(B, T)), {}, dict(mask=MASK, dim=1)),
    "linear_preference_logps": Case(rlkernels.linear_preference_logps, _head(B, T), {}, dict(token_ids=IDS, **PADDED)),
    "linear_preference_logps, packed": Case(
        rlkernels.linear_preference_logps, _head(B * T), {}, dict(token_ids=IDS.flatten(), **PACKED)
    ),
    "linear_token_logprobs": Case(
        rlkernels.linear_token_logprobs, _head(B, T), {}, dict(token_ids=IDS, return_entropy=True)
    ),
    "linear_token_logprobs, packed": Case(
        rlkernels.linear_token_logprobs, _head(B * T), {}, dict(token_ids=IDS.flatten(), logits_budget_mb=0)
    ),
    "preference_loss": Case(
        rlkernels.preference_loss,
        _pairs("policy_chosen", "policy_rejected"),
        _pairs("ref_chosen", "ref_rejected"),
        dict(loss="ipo", **LENGTHS),
    ),
    "preference_loss, kto": Case(
        rlkernels.preference_loss,
        _pairs("policy_chosen"),
        dict(ref_chosen=_logprobs(B, seed=7)),
        dict(policy_rejected=None, **KTO),
    ),
    "reward_pair_loss": Case(
        rlkernels.reward_pair_loss, _pairs("chosen", "rejected"), dict(margin=numbers(B, seed=3)), {}
    ),
    "group_advantages": Case(
        rlkernels.group_advantages, {}, dict(rewards=numbers(4, 2), weights=numbers(2)), dict(group_size=2)
    ),
    "group_advantages, weights of a list": Case(
        rlkernels.group_advantages, {}, dict(rewards=numbers(4, 2)), dict(weights=[0.5, 2.0], group_size=2)
    ),
    "group_advantages, by id": Case(
        rlkernels.group_advantages, {}, dict(rewards=numbers(4)), dict(group_ids=torch.tensor([3, 1, 3, 1]))
    ),
    "masked_whiten": Case(rlkernels.masked_whiten, {}, dict(x=numbers(B, T)), dict(mask=MASK)),
}
for _layout, _leading, _sequences in (("", (B, T), PADDED), (", packed", (B * T,), PACKED)):
    _gae = _by_token(*_leading)
    _returns = {name: value for name, value in _gae.items() if name != "values"}
    _behavior = dict(logprobs=_logprobs(*_leading), behavior_logprobs=_logprobs(*_leading, seed=1))
    _of_policy = dict(old_logprobs=_logprobs(*_leading, seed=1), advantages=numbers(B))
    _to_others = dict(ref_logprobs=_logprobs(*_leading, seed=2), sampler_logprobs=_logprobs(*_leading, seed=3))
    _options = dict(entropy_coef=0.1, kl_coef=0.1, **_sequences)
    _ids = IDS.view(_leading)
    _teacher = dict(teacher_hidden=numbers(*_leading, 7), teacher_weight=numbers(V, 7), teacher_bias=numbers(V, seed=1))
    CASES |= {
        f"policy_loss{_layout}": Case(
            rlkernels.policy_loss,
            dict(logprobs=_logprobs(*_leading), entropy=_logprobs(*_leading, seed=4).abs()),
            _of_policy | _to_others,
            _options,
        ),
        f"value_loss{_layout}": Case(
            rlkernels.value_loss,
            dict(values=numbers(*_leading)),
            dict(old_values=numbers(*_leading, seed=1), returns=numbers(*_leading, seed=2)),
            _sequences,
        ),
        f"linear_policy_loss{_layout}": Case(
            rlkernels.linear_policy_loss, _head(*_leading), _of_policy | _to_others, dict(token_ids=_ids, **_options)
        ),
        f"linear_kl_divergence{_layout}": Case(
            rlkernels.linear_kl_divergence,
            {name: value for name, value in _head(*_leading).items() if not name.startswith("adapter")},
            _teacher,
            dict(mask=_sequences["mask"]),
        ),
        f"gae{_layout}": Case(rlkernels.gae, {}, _gae, dict(gamma=0.9, **_sequences)),
        f"td_lambda{_layout}": Case(rlkernels.td_lambda, {}, _gae, dict(gamma=0.9, **_sequences)),
        f"discounted_returns{_layout}": Case(rlkernels.discounted_returns, {}, _returns, dict(gamma=0.9, **_sequences)),
        f"vtrace{_layout}": Case(rlkernels.vtrace, {}, _behavior | _gae, dict(gamma=0.9, **_sequences)),
        f"shaped_rewards{_layout}": Case(
            rlkernels.shaped_rewards,
            {},
            dict(scores=numbers(B), logprobs=_logprobs(*_leading), ref_logprobs=_logprobs(*_leading, seed=1)),
            dict(kl_coef=0.1, **_sequences),
        ),
    }
