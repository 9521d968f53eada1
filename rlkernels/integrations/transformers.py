"""The fused head in the loss of any `transformers.Trainer`.

    from rlkernels.integrations.transformers import apply
    trainer = transformers.Trainer(apply(model), ...)

`model(**batch)` with labels then gives the same loss and gradients, and its logits never exist. `restore` undoes it.
"""

import functools
import inspect
import types
from typing import Any

import torch
from torch import Tensor, nn

from rlkernels import linear_policy_loss, unwrap_lm_head, wrap_lm_head

__all__ = ["apply", "restore"]

IGNORE_INDEX = -100  # of labels, in all of Hugging Face
_STATE = "_fused_loss"
"""Of an applied model: (its forward under ours, skip_logits)."""


def apply(
    model: nn.Module, *, skip_logits: bool | None = None, scale: float | None = None, softcap: float | None = None
) -> Any:
    """Make a Hugging Face causal LM compute the loss of its labels without ever computing logits.

        loss = -1/N sum_t log p(labels[b, t] | input_ids[b, :t]) over labels that are not -100,
        N = num_items_in_batch, where it is given (transformers.Trainer does), else their number;
        + router_aux_loss_coef * aux_loss of a mixture of experts that gives its aux_loss

    which is the model's own loss: with shift_labels, padding, packed sequences, gradient accumulation, mixed precision,
    tied weights, PEFT (LoRA on the head too), and the softcap or scale of its logits. The rest of the output is the
    model's own, but logits is None.

    The model does what it always did where it is called without labels (generation, label_smoothing_factor,
    compute_loss_func), with return_dict=False or another ignore_index, and in evaluation, where compute_metrics needs
    logits. `model(..., skip_logits=False)` gives logits in training too; True gives none in evaluation either.

    Args:
        model: a causal LM, as it is or inside PEFT; before it is compiled, sharded or given to a Trainer.
        skip_logits: for calls that do not say: None: in training only; True: also in evaluation, which needs less
            memory where only the loss is evaluated; False: never.
        scale, softcap: of the logits. Giving either omits the measurement, as in `wrap_lm_head`, and the comparison of
            both losses on two rows of four tokens.

    Returns:
        model. Applying again replaces skip_logits alone. Parameters, state_dict and save_pretrained are untouched; a
        deep copy has the fused head too; a pickle loads without it.

    Differentiable: the loss, once: a second backward pass through it raises RuntimeError. It is float32.

    Not for torch.nn.DataParallel, which raises RuntimeError then. A Trainer that sees several GPUs takes it unless each
    has a process of its own (torchrun, accelerate launch).

    Edge cases: labels that are all -100 give NaN without num_items_in_batch, and 0 with it, as ever.

    Raises:
        TypeError: for what is no causal LM.
        ValueError: with the model's class and the reason: where `wrap_lm_head` refuses it, and where its own loss is
            another than this one.

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
            return under(*args, **kwargs)  # which raises
        return _with_loss(self, under, named | kwargs)

    positions = list(inspect.signature(type(lm).forward).parameters)[1:]
    forward.fused_loss = forward  # type: ignore[attr-defined]
    # On the model, not in the closure, so that a deep copy calls its own.
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
    """Undo `apply`: the model is what it was before. Harmless where it was not applied. Returns model.

    Raises:
        ValueError: if another forward stands over ours, as a Trainer in mixed precision puts one there. Its
            `accelerator.unwrap_model(model, keep_fp32_wrapper=False)` undoes both.
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
    """Our forward, if it stands on the model or under what stands there: not so on a model that was unpickled."""
    function = getattr(lm, "forward", None)
    while function is not None:
        function = getattr(function, "__func__", function)
        # functools.wraps gives what stands over ours its attributes.
        if getattr(function, "fused_loss", None) is function:
            break
        function = getattr(function, "__wrapped__", None)
    return function


def _replicate_for_data_parallel(lm: Any) -> Any:
    """In place of the module's own: replicas would share the forward and the hooks of the first."""
    raise RuntimeError(
        f"{type(lm).__name__} has the fused head in its loss, which torch.nn.DataParallel cannot replicate; start a "
        "process for each GPU (torchrun, accelerate launch), or undo `apply` with `restore`"
    )


def _gives_loss(lm: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the model would give a loss, and in an output whose logits may be missing."""
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
    # A new one, since the loss comes first in what was made without it.
    return type(output)(**{**output, "loss": loss, "head_output": None})


def _negative_log_likelihood(hidden: Tensor, weight: Tensor, token_ids: Tensor, **head: Any) -> tuple[Tensor, Tensor]:
    """The sum over the scored tokens, and their number. The gradient of reinforce is that of the log-probabilities."""
    ones = torch.ones(len(hidden), device=hidden.device)
    loss, _ = linear_policy_loss(
        hidden, weight, token_ids, None, ones, objective="reinforce", aggregation="token_sum", **head
    )
    return loss.float(), (token_ids != head["ignore_index"]).sum()


def _compare(lm: Any) -> None:
    """Raises where the loss is not the model's own, on two rows of four tokens, of which not all are scored."""
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
    """The model itself, out of torch.compile, DDP and PEFT."""
    while isinstance(inner := getattr(model, "_orig_mod", getattr(model, "module", None)), nn.Module):
        model = inner
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _refusal(lm: nn.Module, reason: str) -> ValueError:
    return ValueError(f"{type(lm).__name__} cannot have the fused head in its loss: {reason}")
