"""verl's log-probabilities, entropies, whitening and fused heads, computed by our functions, for `verl`."""

import functools
import os

import torch
from torch import Tensor

import rlkernels as rk


def logprobs_from_logits(logits, labels, inplace_backward=True):
    """Returns float32 if verl uses flash-attn's kernel, else the dtype of the logits, as verl does. The id -100 is
    skipped, as by flash-attn's kernel; verl's other path refuses it."""
    flash_attn = _uses_flash_attn()
    # Without flash-attn verl does not overwrite its logits, so callers may use them again. A leaf's memory cannot be
    # reused either.
    inplace = inplace_backward and flash_attn and not (logits.is_leaf and logits.requires_grad)
    logprobs = rk.token_logprobs(logits, labels, inplace_backward=inplace)
    return logprobs if flash_attn else logprobs.to(_dtype(logits))


def entropy_from_logits(logits):
    """A -inf logit contributes 0 (verl: NaN)."""
    return _entropy(logits).to(_dtype(logits))


def entropy_from_logits_with_chunking(logits, chunk_size=2048):
    """Returns float32. No chunks are needed, since the softmax is never stored."""
    return _entropy(logits).float()


def masked_whiten(values, mask, shift_mean=True):
    """Unscored elements are shifted and scaled like the others, as in verl; rlkernels.masked_whiten gives 0."""
    number = mask.sum().item()
    if number == 0:
        raise ValueError("at least one element of the mask must be 1; all are 0")
    if number == 1:
        raise ValueError("the mask must have more than one element that is 1: the variance of one is not defined")
    mask = torch.broadcast_to(mask, values.shape)
    mean = rk.masked_mean(values, mask)
    centered = values - mean
    variance = rk.masked_mean(centered.square(), mask) * (number / (number - 1))
    whitened = centered * torch.rsqrt(variance + 1e-8)
    if not shift_mean:
        whitened = whitened + mean
    return whitened.to(values.dtype)


def fused_linear_for_ppo_forward(self, hidden_states, vocab_weights, input_ids, temperature=1.0):
    """Returns log-probabilities in float32 and the entropy in the dtype of hidden_states. `impl_backend` is ignored."""
    logprobs, entropy = rk.linear_token_logprobs(
        hidden_states,
        vocab_weights,
        input_ids,
        temperature=temperature,
        return_entropy=True,
        num_scored=input_ids.numel(),
    )
    return logprobs, entropy.to(hidden_states.dtype)


def linear_cross_entropy(hidden, weight, labels, temperature=1.0, reduction="none", dist_process_group=None):
    """Returns flat results, for any hidden size and device. As in verl, `reduction` applies to the log-probabilities,
    which are not negated."""
    assert isinstance(temperature, float), f"temperature must be a float, got {type(temperature)}"
    assert isinstance(reduction, str), f"reduction must be a str, got {type(reduction)}"
    reductions = {"none": lambda x: x, "sum": torch.sum, "mean": torch.mean}
    if reduction.lower() not in reductions:
        raise ValueError(f"reduction must be one of {sorted(reductions)}, got {reduction!r}")
    if dist_process_group is not None:
        hidden = _share_gradient(hidden, torch.distributed.get_world_size(dist_process_group))
    logprobs, entropy = rk.linear_token_logprobs(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        labels.reshape(-1),
        temperature=temperature,
        return_entropy=True,
        num_scored=labels.numel(),
        group=dist_process_group,
    )
    return reductions[reduction.lower()](logprobs), entropy


def result_type(*tensors: Tensor) -> torch.dtype:
    """The dtype of an expression of these tensors. Floating-point masks count; bool and integer masks do not."""
    return functools.reduce(torch.promote_types, (t.dtype for t in tensors))


def _entropy(logits: Tensor) -> Tensor:
    ids = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return rk.token_logprobs(logits, ids, return_entropy=True)[1]


def _dtype(logits: Tensor) -> torch.dtype:
    # Under autocast, PyTorch's softmax and logsumexp, which verl uses, return float32 on GPUs but not on CPUs.
    return torch.float32 if logits.is_cuda and torch.is_autocast_enabled("cuda") else logits.dtype


def _uses_flash_attn() -> bool:
    from verl.utils import torch_functional  # verl imports this module while it is imported

    return (
        torch_functional.FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE
        and os.environ.get("VERL_DISABLE_FLASH_ATTN_CE", "0") != "1"
    )


def _share_gradient(hidden: Tensor, processes: int) -> Tensor:
    # verl's gradient of hidden comes from a process's share of the vocabulary, and Megatron's sequence parallel region
    # adds the gradients up. Ours is complete on each process, so each passes on an equal share of it.
    hidden = hidden.view_as(hidden)
    if hidden.requires_grad:
        hidden.register_hook(lambda gradient: gradient / processes)
    return hidden
