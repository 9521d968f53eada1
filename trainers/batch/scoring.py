"""The model applied to one micro-batch: what its LM head or its score head gives for each token.

`fused` says whether `rlkernels.wrap_lm_head` took the model; logits are then never stored. Results are packed, [N],
also where the model's inputs are padded.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.utils import logging

import rlkernels

from .batch import IGNORE, Batch

logger = logging.get_logger(__name__)


def needs_no_logits(model: nn.Module) -> bool:
    """Wraps the model's LM head, and returns whether it could; if not, the reason is logged."""
    try:
        rlkernels.wrap_lm_head(model)
    except ValueError as error:
        logger.warning(f"Logits are stored: {error}")
        return False
    return True


def head_call(model: nn.Module, batch: Batch, function: Callable[..., Any]) -> Any:
    """Returns function(hidden [N, H], weight, token_ids [N], **head). It is called inside the forward pass of a fused
    model, where DDP, FSDP2 and autocast expect the head to run. `head` holds the keyword arguments that the functions
    linear_* of rlkernels take."""

    def call(hidden: Tensor, weight: Tensor, shift_labels: Tensor, **head: Any) -> Any:
        if head["adapter"] is not None:
            down, up = head["adapter"]
            head["adapter"] = batch.packed(down), up
        return function(batch.packed(hidden), weight, batch.token_ids, **head)

    return model(**batch.model_inputs, shift_labels=batch.shift_labels, head_function=call).head_output


def logits(model: nn.Module, batch: Batch) -> Tensor:
    """The logits [N, V], stored."""
    return batch.packed(model(**batch.model_inputs).logits)


def token_logprobs(
    model: nn.Module,
    batch: Batch,
    *,
    fused: bool,
    temperature: float = 1.0,
    return_entropy: bool = False,
    outputs: tuple[str, ...] = (),
) -> Any:
    """log p of each token, float32 [N], 0 where token_ids is -100. `return_entropy` adds the entropy of its
    distribution, and `outputs` adds further outputs of linear_token_logprobs; a model that is not fused gives is_top1
    alone."""
    options: dict[str, Any] = {"temperature": temperature, "return_entropy": return_entropy}
    if fused:

        def score(hidden: Tensor, weight: Tensor, token_ids: Tensor, **head: Any) -> Any:
            return rlkernels.linear_token_logprobs(
                hidden, weight, token_ids, outputs=outputs, num_scored=batch.num_scored, **head, **options
            )

        return head_call(model, batch, score)
    stored, token_ids = logits(model, batch), batch.token_ids
    others = [stored.argmax(-1) == token_ids] if "is_top1" in outputs else []
    found = rlkernels.token_logprobs(
        stored, token_ids, ignore_index=IGNORE, inplace_backward=stored.requires_grad, **options
    )
    return (*(found if return_entropy else [found]), *others) if others else found


def policy_loss(
    model: nn.Module,
    batch: Batch,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    *,
    fused: bool,
    temperature: float = 1.0,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Loss and metrics of rlkernels.policy_loss, given the model's log-probabilities and their entropy. A fused model
    makes the gradients of the LM head in this forward pass."""
    mask = batch.mask
    options |= {"cu_seqlens": batch.cu_seqlens}
    if fused:

        def loss(hidden: Tensor, weight: Tensor, token_ids: Tensor, **head: Any) -> tuple[Tensor, Tensor]:
            return rlkernels.linear_policy_loss(
                hidden, weight, token_ids, old_logprobs, advantages, mask, temperature=temperature, **head, **options
            )

        return head_call(model, batch, loss)
    logprobs, entropy = token_logprobs(model, batch, fused=False, temperature=temperature, return_entropy=True)
    return rlkernels.policy_loss(logprobs, old_logprobs, advantages, mask, entropy=entropy, **options)


def token_scores(model: nn.Module, batch: Batch) -> Tensor:
    """The score that a sequence classifier with one label gives each token, [N]; position p scores the tokens up to and
    with p. It is the output of the score head before pooling, because pooling takes the padding token for the end of a
    sequence."""
    head = score_head(model)
    seen: list[Tensor] = []
    handle = head.register_forward_hook(lambda module, inputs, output: seen.append(output))
    # Without a padding token classifiers refuse several rows: they look for the last token by it, for their pooling.
    config = unwrapped(model).config.get_text_config()
    padding = config.pad_token_id
    config.pad_token_id = 0 if padding is None else padding
    try:
        model(**batch.model_inputs)
    finally:
        handle.remove()
        config.pad_token_id = padding
    if len(seen) != 1:
        raise ValueError(f"{type(model).__name__}: its score head was called {len(seen)} times, not once")
    return batch.packed(seen[0]).squeeze(-1)


def unwrapped(model: Any) -> Any:
    """The model without the wrappers of DDP, torch.compile and PEFT."""
    while isinstance(inner := getattr(model, "_orig_mod", getattr(model, "module", None)), nn.Module):
        model = inner
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def score_head(model: Any) -> nn.Module:
    """The score head of a classifier, wrapped or not."""
    model = unwrapped(model)
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Module):
        raise ValueError(f"{type(model).__name__} has no score head; wanted a decoder with one, num_labels=1")
    return head
