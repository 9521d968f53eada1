"""verl's aggregation of token losses, its value loss and its KL penalty, computed by our functions, for `verl`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import rlkernels as rk
from rlkernels.integrations._verl_functional import result_type

_AGGREGATIONS = {
    "token-mean": "token_mean",
    "token-sum": "token_sum",
    "seq-mean-token-sum": "seq_mean_token_sum",
    "seq-mean-token-sum-norm": "seq_mean_token_sum",
    "seq-mean-token-mean": "seq_mean_token_mean",
}
_ESTIMATORS = {"kl": "k1", "k1": "k1", "abs": "abs", "mse": "k2", "k2": "k2", "low_var_kl": "k3", "k3": "k3"}


def agg_loss(
    loss_mat,
    loss_mask,
    loss_agg_mode,
    dp_size=1,
    batch_num_tokens=None,
    global_batch_size=None,
    loss_scale_factor=None,
):
    rows, mask = loss_mat.reshape(-1, loss_mat.shape[-1]), loss_mask.reshape(-1, loss_mask.shape[-1])

    def sums(**options):
        # With advantages of -1 the reinforce loss aggregates whatever is passed as log-probabilities.
        return rk.policy_loss(rows, None, rows.new_full((len(rows),), -1.0), mask, objective="reinforce", **options)

    loss, _ = aggregated(sums, loss_agg_mode, mask, dp_size, batch_num_tokens, global_batch_size, loss_scale_factor)
    return loss.to(loss_type(loss_agg_mode, loss_mat, loss_mask))


def compute_value_loss(
    vpreds,
    returns,
    values,
    response_mask,
    cliprange_value,
    loss_agg_mode="token-mean",
    dp_size=1,
    batch_num_tokens=None,
    global_batch_size=None,
    loss_scale_factor=None,
):
    def call(**options):
        return rk.value_loss(vpreds, values, returns, response_mask, clip=float(cliprange_value), **options)

    loss, metrics = aggregated(
        call, loss_agg_mode, response_mask, dp_size, batch_num_tokens, global_batch_size, loss_scale_factor
    )
    return loss.to(loss_type(loss_agg_mode, vpreds, returns, values, response_mask)), metrics[0]


def kl_penalty(logprob, ref_logprob, kl_penalty):
    """With "k3+", tokens whose k3 is clamped keep the gradient of k2, as in verl; in rlkernels.kl_penalty it is 0."""
    straight_through = kl_penalty.endswith("+")
    name = kl_penalty.removesuffix("+")
    if name not in _ESTIMATORS:
        raise NotImplementedError(f"kl_penalty must be one of {sorted(_ESTIMATORS)}, with or without a +")
    estimator = _ESTIMATORS[name]
    dtype = result_type(logprob, ref_logprob)
    logprob, ref_logprob = torch.broadcast_tensors(logprob, ref_logprob)
    clamps = dict(log_ratio_clamp=20.0, value_clamp=10.0) if estimator == "k3" else {}
    if not straight_through or estimator == "k2":
        return rk.kl_penalty(logprob, ref_logprob, estimator=estimator, **clamps).to(dtype)
    if not clamps:
        return rk.kl_penalty(logprob, ref_logprob, estimator=f"{estimator}+").to(dtype)
    value = rk.kl_penalty(logprob.detach(), ref_logprob.detach(), estimator=estimator, **clamps)
    moving = rk.kl_penalty(logprob, ref_logprob, estimator="k2")
    return (moving - moving.detach() + value).to(dtype)


def loss_type(mode: str, *tensors: Tensor) -> torch.dtype:
    """The dtype of verl's loss. Its masks of sequences are float32."""
    dtype = result_type(*tensors)
    return torch.promote_types(dtype, torch.float32) if mode.startswith("seq") else dtype


def aggregated(
    call: Callable[..., tuple[Tensor, Tensor]],
    mode: str,
    mask: Tensor,
    dp_size: int = 1,
    batch_num_tokens: Any = None,
    global_batch_size: Any = None,
    loss_scale_factor: Any = None,
) -> tuple[Tensor, Tensor]:
    """(loss, metrics) of `call(aggregation=, normalizer=)`, with the loss aggregated as by verl's agg_loss."""
    if mode not in _AGGREGATIONS:
        raise ValueError(f"Invalid loss_agg_mode: {mode}")
    if mode == "token-sum":
        count = 1
    else:
        name = "batch_num_tokens" if mode == "token-mean" else "global_batch_size"
        count = batch_num_tokens if mode == "token-mean" else global_batch_size
        if count is None and dp_size > 1:
            raise ValueError(f"(global) {name} is required when dp_size > 1")
    loss, metrics = call(aggregation=_AGGREGATIONS[mode], normalizer=None if count is None else 1.0)
    if count is None:
        # verl divides by its count of scored tokens, so it gives NaN if there is none.
        loss = loss + torch.where(metrics[-1] > 0, 0.0, float("nan"))
    else:
        loss = loss / count
    loss = loss * dp_size
    if mode == "seq-mean-token-sum-norm":
        loss = loss / (mask.shape[-1] if loss_scale_factor is None else loss_scale_factor)
    return loss, metrics
