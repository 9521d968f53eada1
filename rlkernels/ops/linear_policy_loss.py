from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from rlkernels._codes import SAMPLER_CORRECTIONS
from rlkernels.ops import _checks
from rlkernels.ops._first_order import first_order_only, leads_to_inputs
from rlkernels.ops._token_losses import check_per_token
from rlkernels.ops.linear_logprobs import evaluate
from rlkernels.ops.lm_head.head import Head, forward_backward
from rlkernels.ops.lm_head.inputs import (
    LOSS_LOGITS_BUDGET_MB,
    Inputs,
    Options,
    budget_bytes,
    check_head,
    check_tokens,
    start,
)
from rlkernels.ops.lm_head.tiles import Rows, fill_up, scored_index, slices, working_dtype
from rlkernels.ops.policy_loss import policy_loss

SEQUENCE_OBJECTIVES = ("gspo", "gmpo", "vespo")


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    adapter: tuple[Tensor, Tensor] | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    ignore_index: int = -100,
    group: Any = None,
    num_scored: int | None = None,
    logits_budget_mb: float = LOSS_LOGITS_BUDGET_MB,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """policy_loss of the log-probabilities, and the entropy, of the LM head's logits, which never exist as a whole.

        logprobs, entropy = linear_token_logprobs(hidden, weight, token_ids, return_entropy=True, ...)
        loss, metrics = policy_loss(logprobs, old_logprobs, advantages, mask, entropy=entropy, **options)

    but with three products of [scored, H] x [H, V] instead of four, or two where the head is frozen. A token's loss and
    its gradient are known as soon as its row's logits are. The forward pass therefore turns the logits into their
    gradient, and that into the gradients of hidden and weight, before the next rows take their place. The backward pass
    multiplies by the upstream gradient.

    Args:
        hidden: [B, T, H] padded, or [N, H] packed with cu_seqlens; the hidden state that predicts each token.
        token_ids: [B, T] or [N]; rows with ignore_index are not scored, whatever the mask says.
        old_logprobs, advantages, mask: as in policy_loss.
        **options: all other options of policy_loss, except entropy, which is computed here.
        weight, bias, adapter, temperature, softcap, scale, ignore_index, group, num_scored: as in
            linear_token_logprobs. num_scored counts the tokens that the mask scores. (If whole sequences have to be
            split into several groups of rows, the host waits for their lengths even so.)
        logits_budget_mb: how much memory logits may take at a time. Rows are processed in groups that fit, in whole
            blocks, at least one block. The default, 64, is half of linear_token_logprobs', since more groups cost no
            more products. They do cost a float32 sum of the weight's gradient, in bfloat16 from the second group on
            and in float16 always. Objectives and sampler corrections of whole sequences ("gspo", "gmpo", "vespo",
            "sequence_*") need whole sequences in a group. If the longest does not fit, the loss is computed by
            linear_token_logprobs and policy_loss, in four products.

    Returns: loss and metrics, as policy_loss does; the entropy is always among them.

    Differentiable: the loss with respect to hidden, weight, bias and both parts of adapter, once: a second backward
    pass raises RuntimeError. Second derivatives and forward mode raise NotImplementedError, except in the reference.

    Edge cases, Raises: as in linear_token_logprobs and policy_loss.

    Traffic: three products. Each logit is written and read once by the forward and by the gradient's pass over it, and
    read by two more products. Under torch.compile, and in the reference, that of the two functions above.

    References: those of linear_token_logprobs and policy_loss; Hsu et al. 2024, "Liger Kernel" (arXiv 2410.10989), for
    the gradient in the forward pass.
    """
    if "entropy" in options:
        raise TypeError("entropy cannot be given to linear_policy_loss, which computes it")
    _checks.tensor("token_ids", token_ids, _checks.INTEGERS)
    _, cu_seqlens = _checks.sequences("token_ids", token_ids, options.get("cu_seqlens"))
    if cu_seqlens is not None and (cu_seqlens.is_cpu or _checks.CHECK_VALUES) and not torch.compiler.is_compiling():
        _checks.cu_seqlens_values(cu_seqlens, len(token_ids))
    ignore_index = _checks.integer("ignore_index", ignore_index)
    if mask is not None:
        _checks.mask("mask", mask, "token_ids", token_ids)
        token_ids = token_ids.long().masked_fill(~_checks.scored(mask), ignore_index)
    inputs, head_options = check_head(
        hidden, weight, token_ids, bias, adapter, temperature, softcap, scale, ignore_index, group, num_scored
    )
    budget = budget_bytes(logits_budget_mb)
    scored = token_ids.long() != ignore_index
    head_options = replace(head_options, return_entropy=True, budget=budget, differentiated=torch.is_grad_enabled())
    if old_logprobs is not None:
        check_per_token("old_logprobs", old_logprobs, "token_ids", token_ids)
    loss = Loss(old_logprobs, advantages, scored, options)
    tensors = inputs.tensors()[:5]
    differentiated = torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in tensors)
    plan = None
    if differentiated and head_options.backend != "reference" and not torch.compiler.is_compiling():
        plan = Plan.of(inputs, head_options, loss)
    if plan is None:
        logprobs, entropy, _ = evaluate(inputs, head_options)
        return loss(logprobs.view(token_ids.shape), entropy.view(token_ids.shape))
    return _LinearPolicyLoss.apply(*inputs.tensors(), loss, plan)[:2]


@dataclass
class Loss:
    """policy_loss with all of its arguments except the log-probabilities and the entropy."""

    old_logprobs: Tensor | None
    advantages: Tensor
    scored: Tensor
    options: dict[str, Any]

    def __call__(self, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor]:
        return policy_loss(logprobs, self.old_logprobs, self.advantages, self.scored, entropy=entropy, **self.options)

    def needs_sequences(self) -> bool:
        """Whether a token's gradient depends on the log-probabilities of the other tokens of its sequence."""
        correction = self.options.get("sampler_correction", "sequence_mask")
        corrected = self.options.get("sampler_logprobs") is not None and correction in SAMPLER_CORRECTIONS[2:]
        on_policy = self.old_logprobs is None
        return self.options.get("objective", "ppo") in SEQUENCE_OBJECTIVES or (corrected and on_policy)

    def lengths(self) -> list[int]:
        """The number of scored tokens of each sequence."""
        cu_seqlens = self.options.get("cu_seqlens")
        if cu_seqlens is None:
            return self.scored.sum(-1).tolist()
        before = torch.nn.functional.pad(self.scored.cumsum(0), (1, 0))
        return before[cu_seqlens.long()].diff().tolist()


@dataclass
class Plan:
    """The order in which rows are projected."""

    head: Head
    index: Tensor
    """Indices of the scored rows, each group padded to whole blocks."""
    groups: list[slice]
    """The parts of `index` whose logits exist at the same time."""
    too_few: Tensor | None

    @classmethod
    def of(cls, inputs: Inputs, options: Options, loss: Loss) -> "Plan | None":
        """None if a sequence that must be whole does not fit into the budget, or if only the device knows whether."""
        head = start(inputs, options)
        check_tokens(inputs, options, head)
        index, too_few = scored_index(inputs.token_ids != options.ignore_index, options.num_scored)
        total, most = len(inputs.token_ids), head.rows_within(options.budget)
        filled = fill_up(index, head.block_rows, total)
        if len(filled) <= most or not loss.needs_sequences():
            return cls(head, filled, slices(len(filled), most), too_few)
        if options.num_scored is not None and not index.is_cpu:
            return None  # the lengths are on the device: reading them would wait for it
        lengths = loss.lengths()
        if max(lengths) > most:
            return None
        ends = [0]  # where each group ends among the scored rows
        at = 0
        for length in lengths:
            if at + length - ends[-1] > most:
                ends.append(at)
            at += length
        ends.append(at)
        parts = [fill_up(index[a:b], head.block_rows, total) for a, b in pairwise(ends)]
        bounds = [0, *accumulate(map(len, parts))]
        groups = [slice(a, b) for a, b in pairwise(bounds)]
        return cls(head, torch.cat(parts), groups, too_few)


class _LinearPolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, adapter, adapter_weight, token_ids, loss, plan):
        head, wanted = plan.head, list(ctx.needs_input_grad[:5])
        # Rows that are not projected yet may hold any finite value. The last element takes the results of padding.
        logprobs = torch.zeros(len(token_ids) + 1, dtype=working_dtype(hidden), device=hidden.device)
        if loss.old_logprobs is not None:
            logprobs[:-1] = torch.where(loss.scored, loss.old_logprobs, 0.0).flatten()
        entropy = torch.zeros_like(logprobs)
        outcome = scale = None

        def upstream(at, logprobs_at, entropy_at):
            nonlocal outcome, scale
            index = rows.index[at]
            logprobs.index_copy_(0, index, logprobs_at)
            entropy.index_copy_(0, index, entropy_at)
            with torch.enable_grad():
                of_tokens = [
                    value[:-1].view(loss.scored.shape).detach().requires_grad_() for value in (logprobs, entropy)
                ]
                outcome = loss(*of_tokens)
                gradients = torch.autograd.grad(outcome[0], of_tokens, allow_unused=True)
            outcome = [value.detach() for value in outcome]
            if weight.dtype == torch.float16:
                scale = _scale(gradients) if scale is None else scale
                gradients = [None if g is None else g * scale for g in gradients]
            return [None if g is None else nn.functional.pad(g.flatten(), (0, 1))[index] for g in gradients]

        with torch.autocast(hidden.device.type, enabled=False):
            rows = Rows.gather(plan.index, hidden, adapter, token_ids)
            # Scaled gradients are rounded to float16 only when they have been scaled back.
            float16 = weight.dtype == torch.float16
            gradients = head.new_gradients(rows, wanted, weight_in_pieces=len(plan.groups) > 1 or float16)
            forward_backward(head, rows, plan.groups, upstream, gradients)
            ctx.gradients = head.reduce(gradients).results(rows, torch.float32 if float16 else weight.dtype)
        ctx.scale = scale
        total, metrics = outcome
        if plan.too_few is not None:
            total = torch.where(plan.too_few, float("nan"), total)
        ctx.too_few = plan.too_few
        ctx.mark_non_differentiable(metrics)
        path = leads_to_inputs(hidden)
        ctx.save_for_backward(path)
        return total, metrics, path

    @staticmethod
    @first_order_only("linear_policy_loss")
    def backward(ctx, saved, grad_loss, *others):
        if ctx.gradients is None:
            raise RuntimeError(
                "linear_policy_loss cannot be differentiated a second time: the first backward pass took its gradients"
            )
        gradients, ctx.gradients = ctx.gradients, None
        if ctx.too_few is not None:
            grad_loss = torch.where(ctx.too_few, float("nan"), grad_loss)
        if ctx.scale is not None:
            factor = grad_loss / ctx.scale
            return *(None if v is None else v.mul_(factor).half() for v in gradients), None, None, None
        # Saves a pass over the weight's gradient, where a look at the value costs nothing.
        if not (grad_loss.is_cpu and grad_loss.item() == 1):
            for value in gradients:
                if value is not None:
                    value.mul_(grad_loss)
        return *gradients, None, None, None


def _scale(gradients: Sequence[Tensor | None]) -> Tensor:
    """The power of two that brings the largest gradient to 1 or just below. Unscaled, a token's share of a mean times a
    small probability is 0 in float16, and a GradScaler's factor comes only with the backward pass."""
    largest = torch.stack([nn.functional.pad(g.flatten(), (0, 1)).abs().amax() for g in gradients if g is not None])
    exponent = torch.frexp(largest.amax()).exponent
    return torch.ldexp(torch.ones_like(largest[0]), -exponent)
