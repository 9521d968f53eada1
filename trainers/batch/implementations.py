"""The attention functions that transformers calls in place of a model's own, for packed sequences that share prefixes.

A batch's layout stands in cu_seq_lens_q and cu_seq_lens_k, as flash attention takes it: a branch has more keys than
queries, and these are aligned at their ends. Where there are branches, key_index has the places of each block's keys.
Models pass all of these on to their attention.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention import attend
from .masks import mask_of


def attention_function(module: nn.Module, implementation: str) -> Callable[..., tuple[Tensor, Any]]:
    """The function of this implementation. Eager attention is not among transformers' functions: each model's own
    stands next to its attention module."""
    if implementation != "eager":
        return ALL_ATTENTION_FUNCTIONS[implementation]
    for kind in type(module).__mro__:
        if (own := getattr(sys.modules[kind.__module__], "eager_attention_forward", None)) is not None:
            return own
    raise NotImplementedError(f"eager attention of {type(module).__name__}")


def by_sequence(other: str) -> str:
    """Registers an attention function with transformers and returns its name. It computes packed sequences one after
    the other, and branches of one prefix together. It leaves all else (generation, padded batches) to the
    implementation `other`."""

    @torch.compiler.disable  # each layout would be compiled anew
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        starts = kwargs.get("cu_seq_lens_q")
        if starts is None:
            return attention_function(module, other)(
                module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
            )
        if kwargs.get("position_bias") is not None:
            raise NotImplementedError("position_bias")
        if not getattr(module, "is_causal", True) or query.shape[2] != key.shape[2]:
            raise NotImplementedError("attention that is not causal self-attention")
        blocks = list(zip(starts.diff().tolist(), kwargs["cu_seq_lens_k"].diff().tolist(), strict=True))
        if kwargs.get("key_index") is None and any(queries != keys for queries, keys in blocks):
            raise NotImplementedError("a model that does not pass key_index on, as flash attention needs it")
        options = [kwargs.get(name) for name in ("sliding_window", "softcap", "s_aux")]
        return attend(module, query, key, value, blocks, scaling, dropout, *options), None

    return _register(f"rlkernels_by_sequence_{other}", attention, other)


@dataclass(frozen=True)
class GatheredKeys:
    """An attention function that gathers the keys and values of each block for `own`, which is flash attention's."""

    own: Callable[..., Any]

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *args: Any,
        key_index: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if key_index is not None:
            key, value = key.index_select(2, key_index), value.index_select(2, key_index)
        return self.own(module, query, key, value, *args, **kwargs)


def gather_keys(flash: str) -> None:
    """Lets the flash attention of this name serve branches too. It keeps its name, by which transformers knows that
    attention is flash attention, and which."""
    own = ALL_ATTENTION_FUNCTIONS[flash]
    if not isinstance(own, GatheredKeys):
        AttentionInterface.register(flash, GatheredKeys(own))


def by_mask(other: str, masked: str) -> str:
    """Registers an attention function with transformers and returns its name. Where there are branches, it gives the
    implementation `masked` a mask for them. It leaves all else to `other`, and what `masked` lacks if it is
    FlexAttention: dropout."""

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        dropout: float = 0.0,
        key_index: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        serving = other
        if key_index is not None:
            serving = masked if not dropout else other
            starts = kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"]
            attention_mask = mask_of(serving, query, *starts, kwargs.get("sliding_window"))
        function = attention_function(module, serving)
        return function(module, query, key, value, attention_mask, dropout=dropout, **kwargs)

    return _register(f"rlkernels_by_mask_{masked}_{other}", attention, other)


def _register(name: str, attention: Callable[..., Any], other: str) -> str:
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[other])
    return name
