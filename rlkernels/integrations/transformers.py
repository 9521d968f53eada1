"""The fused head in the loss of any `transformers.Trainer`.

    from rlkernels.integrations.transformers import apply
    trainer = transformers.Trainer(apply(model), ...)

`model(**batch)` with labels then gives the same loss and gradients without storing logits. `restore` undoes it.
"""

import functools
import inspect
import types
from typing import Any

import torch
from torch import Tensor, nn

from rlkernels import linear_policy_loss, unwrap_lm_head, wrap_lm_head

__all__ = ["apply", "restore"]

IGNORE_INDEX = -100  # labels with this value are not in the loss, by Hugging Face's convention
_STATE = "_fused_loss"
"""The attribute of an applied model that holds (the forward under ours, skip_logits)."""


def apply(
    model: nn.Module, *, skip_logits: bool | None = None, scale: float | None = None, softcap: float | None = None
) -> Any:
    """Make a Hugging Face causal LM compute the loss of its labels without storing logits.

        loss = -1/N sum_t log p(labels[b, t] | input_ids[b, :t]) over labels that are not -100,
        N = num_items_in_batch if it is given (transformers.Trainer gives it), else the number of these labels;
        + router_aux_loss_coef * aux_loss for a mixture of experts that gives its aux_loss

    This is the model's own loss, also with shift_labels, padding, packed sequences, gradient accumulation, mixed
    precision, tied weights, PEFT (LoRA on the head too), and the softcap or scale of its logits. The rest of the output
    is the model's own, except that logits is None.

    Some calls still run the model's own forward: calls without labels (generation, label_smoothing_factor,
    compute_loss_func), with return_dict=False or another ignore_index, and in evaluation, where compute_metrics needs
    logits. `model(..., skip_logits=False)` gives logits in training too; True gives none in evaluation either.

    Args:
        model: a causal LM, plain or inside PEFT, before it is compiled, sharded or given to a Trainer.
        skip_logits: the default for calls. None skips logits in training only. True skips them in evaluation too, which
            needs less memory if only the loss is evaluated. False never skips them.
        scale, softcap: scale and softcap of the logits. If either is given, neither is measured, as in `wrap_lm_head`,
            and the two losses are not compared on two rows of four tokens.

    Returns:
        model. Applying it again only changes skip_logits. Parameters, state_dict and save_pretrained are unchanged. A
        deep copy has the fused head too; a pickle loads without it.

    Differentiable: the loss, once. A second backward pass through it raises RuntimeError. The loss is float32.

    Edge cases: labels that are all -100 give NaN without num_items_in_batch and 0 with it, as in the model itself.
    torch.nn.DataParallel raises RuntimeError. A Trainer uses it if one process sees several GPUs, so start a process
    for each GPU (torchrun, accelerate launch).

    Raises:
        TypeError: if model is not a causal LM.
        ValueError: if `wrap_lm_head` refuses the model, or its own loss differs from this one. The message has the
            model's class and the reason.

    Traffic: that of linear_policy_loss: three products of [scored, H] x [H, V], logits_budget_mb of logits at a time.
    """
    lm = _causal_lm(model)
    if _ours(lm) is not None:
        setattr(lm, _STATE, (vars(lm)[_STATE][0], skip_logits))
        return model
    wrap_lm_head(lm, scale=scale, softcap=softcap)

    @functools.wraps(type(lm).forward)
    def forward(self, *args, skip_logits=None, **kwargs):
        under, default = vars(self)[_STATE]
        skip = default if skip_logits is None else skip_logits
        named = dict(zip(positions, args, strict=False))
        if not (self.training if skip is None else skip) or not _gives_loss(self, named | kwargs):
            return under(*args, **kwargs)
        if named.keys() & kwargs.keys() or len(args) > len(positions):
            return under(*args, **kwargs)  # raises the usual TypeError
        return _with_loss(self, under, named | kwargs)

    positions = list(inspect.signature(type(lm).forward).parameters)[1:]
    forward.fused_loss = forward  # type: ignore[attr-defined]
    # Kept on the model, not in the closure, so that a deep copy calls its own forward.
    setattr(lm, _STATE, (lm.forward, skip_logits))
    lm.forward = types.MethodType(forward, lm)
    lm._replicate_for_data_parallel = types.MethodType(_replicate_for_data_parallel, lm)
    if scale is None and softcap is None:
        try:
            _compare(lm)
        except BaseException:
            restore(lm)
            raise
    return model


def restore(model: nn.Module) -> Any:
    """Undo `apply`. A model without the fused head is left as it is. Returns model.

    Raises:
        ValueError: if another forward was put over ours, as a Trainer does in mixed precision. Then undo that first
            with `accelerator.unwrap_model(model, keep_fp32_wrapper=False)`.
    """
    lm = _causal_lm(model)
    ours = _ours(lm)
    if ours is None:
        return model
    if getattr(lm.forward, "__func__", None) is not ours:
        raise ValueError(
            f"model: the forward of {type(lm).__name__} was replaced since it got the fused head; undo that first"
        )
    lm.forward, _ = vars(lm).pop(_STATE)
    del lm._replicate_for_data_parallel
    unwrap_lm_head(lm)
    return model


def _ours(lm: Any) -> Any:
    """Our forward, if the model's forward is ours or wraps ours; else None, as on a model that was unpickled."""
    function = getattr(lm, "forward", None)
    while function is not None:
        function = getattr(function, "__func__", function)
        # functools.wraps copies ours' attributes to a function that wraps it, hence the identity check.
        if getattr(function, "fused_loss", None) is function:
            break
        function = getattr(function, "__wrapped__", None)
    return function


def _replicate_for_data_parallel(lm: Any) -> Any:
    """Replaces the module's own method, whose replicas would share the forward and hooks of the first."""
    raise RuntimeError(
        f"{type(lm).__name__} has the fused head in its loss, which torch.nn.DataParallel cannot replicate; start a "
        "process for each GPU (torchrun, accelerate launch), or undo `apply` with `restore`"
    )


def _gives_loss(lm: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the model would give a loss, in an output object whose logits may be None."""
    return_dict = kwargs.get("return_dict")
    return (
        kwargs.get("labels") is not None
        and (lm.config.return_dict if return_dict is None else return_dict)
        and kwargs.get("ignore_index", IGNORE_INDEX) == IGNORE_INDEX
    )


def _with_loss(lm: Any, under: Any, kwargs: dict[str, Any]) -> Any:
    output = under(**kwargs, head_function=_negative_log_likelihood)
    loss, count = output.head_output
    num_items = kwargs.get("num_items_in_batch")
    if num_items is not None:
        count = num_items.to(loss.device) if isinstance(num_items, Tensor) else num_items
    loss = loss / count
    if output.get("aux_loss") is not None:
        loss = loss + lm.router_aux_loss_coef * output.aux_loss.to(loss.device)
    # A new output object, in which the loss comes first.
    return type(output)(**{**output, "loss": loss, "head_output": None})


def _negative_log_likelihood(hidden: Tensor, weight: Tensor, token_ids: Tensor, **head: Any) -> tuple[Tensor, Tensor]:
    """(sum over the scored tokens, their number). The reinforce loss with advantages of 1 is this sum."""
    ones = torch.ones(len(hidden), device=hidden.device)
    loss, _ = linear_policy_loss(
        hidden, weight, token_ids, None, ones, objective="reinforce", aggregation="token_sum", **head
    )
    return loss.float(), (token_ids != head["ignore_index"]).sum()


def _compare(lm: Any) -> None:
    """Raises unless our loss is the model's own on two rows of four tokens, one of them not scored."""
    special = {value for name, value in lm.config.to_dict().items() if "token" in name and isinstance(value, int)}
    embedding = lm.get_input_embeddings().weight
    tokens = [token for token in range(len(embedding)) if token not in special][:8]
    inputs: dict[str, Any] = {"input_ids": torch.tensor(tokens, device=embedding.device).view(2, -1)}
    inputs["labels"] = inputs["input_ids"].clone()
    inputs["labels"][0, -1] = IGNORE_INDEX
    if hasattr(lm.config, "output_router_logits"):
        inputs["output_router_logits"] = True
    training = [module for module in lm.modules() if module.training]
    lm.eval()
    try:
        with torch.no_grad():
            own, ours = (lm(**inputs, skip_logits=skip).loss for skip in (False, True))
    except Exception as error:
        raise _refusal(lm, f"it could not be run on eight tokens, {type(error).__name__}: {error}") from error
    finally:
        for module in training:
            module.training = True
    precision = 8 * max(torch.finfo(lm.get_output_embeddings().weight.dtype).eps, 1e-6)
    if own is None or not torch.isclose(own.float(), ours, rtol=precision, atol=0.0):
        raise _refusal(lm, f"its loss is not the cross-entropy of its logits, {ours:.6g}, but {own}")


def _causal_lm(model: Any) -> Any:
    """The model inside torch.compile, DDP and PEFT."""
    while isinstance(inner := getattr(model, "_orig_mod", getattr(model, "module", None)), nn.Module):
        model = inner
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _refusal(lm: nn.Module, reason: str) -> ValueError:
    return ValueError(f"{type(lm).__name__} cannot have the fused head in its loss: {reason}")
