"""The model applied to one micro-batch of `packing.lay_out`: what its LM head or its score head says of each token.

`fused` is whether `rlkernels.wrap_lm_head` took the model: then logits are never stored. Results are packed, [N],
whether the batch is packed or padded.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

import rlkernels

from .batch import IGNORE

logger = logging.get_logger(__name__)


def needs_no_logits(model: nn.Module) -> bool:
    """Wraps the model's LM head, if it can."""
    try:
        rlkernels.wrap_lm_head(model)
    except ValueError as error:
        logger.warning(f"Logits are stored: {error}")
        return False
    return True


def packed(values: Tensor, batch: dict[str, Any]) -> Tensor:
    """[N, ...] of the model's [1, N, ...] or [S, T, ...]."""
    flat = values.flatten(0, 1)
    return flat if batch["index"] is None else flat[batch["index"]]


def head_call(model: nn.Module, batch: dict[str, Any], function: Callable[..., Any]) -> Any:
    """function(hidden [N, H], weight, token_ids [N], **head), called inside the forward of a fused model, where DDP,
    FSDP2 and autocast expect the head to run. `head` is what the functions linear_* of rlkernels take by keyword."""

    def call(hidden: Tensor, weight: Tensor, shift_labels: Tensor, **head: Any) -> Any:
        if head["adapter"] is not None:
            down, up = head["adapter"]
            head["adapter"] = packed(down, batch), up
        return function(packed(hidden, batch), weight, batch["token_ids"], **head)

    return model(**batch["model_inputs"], shift_labels=batch["shift_labels"], head_function=call).head_output


def logits(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """[N, V], stored."""
    return packed(model(**batch["model_inputs"]).logits, batch)


def token_logprobs(
    model: nn.Module,
    batch: dict[str, Any],
    *,
    fused: bool,
    temperature: float = 1.0,
    return_entropy: bool = False,
    outputs: tuple[str, ...] = (),
) -> Any:
    """log p of each token, float32 [N], 0 where it is not in the loss; with return_entropy also the entropy of its
    distribution; with `outputs` what linear_token_logprobs gives besides (of a model that is not fused, is_top1)."""
    options: dict[str, Any] = {"temperature": temperature, "return_entropy": return_entropy}
    if fused:

        def score(hidden: Tensor, weight: Tensor, token_ids: Tensor, **head: Any) -> Any:
            return rlkernels.linear_token_logprobs(
                hidden, weight, token_ids, outputs=outputs, num_scored=batch["num_scored"], **head, **options
            )

        return head_call(model, batch, score)
    stored, token_ids = logits(model, batch), batch["token_ids"]
    others = [stored.argmax(-1) == token_ids] if "is_top1" in outputs else []
    found = rlkernels.token_logprobs(
        stored, token_ids, ignore_index=IGNORE, inplace_backward=stored.requires_grad, **options
    )
    return (*(found if return_entropy else [found]), *others) if others else found


def policy_loss(
    model: nn.Module,
    batch: dict[str, Any],
    old_logprobs: Tensor | None,
    advantages: Tensor,
    *,
    fused: bool,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """rlkernels.policy_loss of these log-probabilities, and their entropy. Of a fused model the gradients of the LM
    head are made on the way. `mask` [N] replaces the batch's."""
    mask = batch["mask"] if mask is None else mask
    options |= {"cu_seqlens": batch["cu_seqlens"]}
    if fused:

        def loss(hidden: Tensor, weight: Tensor, token_ids: Tensor, **head: Any) -> tuple[Tensor, Tensor]:
            return rlkernels.linear_policy_loss(
                hidden, weight, token_ids, old_logprobs, advantages, mask, temperature=temperature, **head, **options
            )

        return head_call(model, batch, loss)
    logprobs, entropy = token_logprobs(model, batch, fused=False, temperature=temperature, return_entropy=True)
    return rlkernels.policy_loss(logprobs, old_logprobs, advantages, mask, entropy=entropy, **options)


def sequence_sums(values: Tensor, batch: dict[str, Any]) -> Tensor:
    """[S] of [N]."""
    return torch.segment_reduce(values, "sum", offsets=batch["cu_seqlens"].long(), axis=0)


def sequence_means(values: Tensor, batch: dict[str, Any]) -> Tensor:
    """[S] of [N], over the tokens in the loss; 0 where there is none."""
    mask = batch["mask"].to(values.dtype)
    return sequence_sums(values * mask, batch) / sequence_sums(mask, batch).clamp(min=1)


def spread(values: Tensor, batch: dict[str, Any]) -> Tensor:
    """[N] of [S]: each sequence's value for each of its positions."""
    return values.repeat_interleave(batch["cu_seqlens"].diff(), output_size=len(batch["mask"]))


def token_scores(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """What a sequence classifier with one label says of each token, [N]: its score head before pooling, which takes the
    padding token for the end of a sequence. position p scores the tokens up to and with p."""
    head = score_head(model)
    seen: list[Tensor] = []
    handle = head.register_forward_hook(lambda module, inputs, output: seen.append(output))
    # Classifiers refuse several rows without a padding token, by which they find the last one, which is not used here.
    config = unwrapped(model).config.get_text_config()
    padding = config.pad_token_id
    config.pad_token_id = 0 if padding is None else padding
    try:
        model(**batch["model_inputs"])
    finally:
        handle.remove()
        config.pad_token_id = padding
    if len(seen) != 1:
        raise ValueError(f"{type(model).__name__}: its score head was called {len(seen)} times, not once")
    return packed(seen[0], batch).squeeze(-1)


def unwrapped(model: Any) -> Any:
    """Out of DDP, torch.compile and PEFT."""
    while isinstance(inner := getattr(model, "_orig_mod", getattr(model, "module", None)), nn.Module):
        model = inner
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def score_head(model: Any) -> nn.Module:
    """The score head of a classifier, however that is wrapped."""
    model = unwrapped(model)
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Module):
        raise ValueError(f"{type(model).__name__} has no score head; wanted a decoder with one, num_labels=1")
    return head


def last_scores(scores: Tensor, batch: dict[str, Any]) -> Tensor:
    """The score of each whole sequence, [S]: that of its last token."""
    return scores[batch["cu_seqlens"][1:].long() - 1]
