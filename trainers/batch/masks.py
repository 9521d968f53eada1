"""Which tokens of packed sequences see which, as a mask, where sequences share prefixes; for GPUs without flash
attention."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

_masks = WeakTensorKeyDictionary()  # by cu_seq_lens_k, those of the last batch alone: they are large


@torch.compiler.disable
def mask_of(
    implementation: str, query: Tensor, cu_seq_lens_q: Tensor, cu_seq_lens_k: Tensor, sliding_window: int | None
) -> Any:
    """The mask of a batch in the form that this implementation of attention takes. It is made once for each window."""
    if cu_seq_lens_k not in _masks:
        _masks.clear()
        _masks[cu_seq_lens_k] = {}
    masks, form = _masks[cu_seq_lens_k], (implementation, query.dtype, sliding_window)
    if form not in masks:
        length = query.shape[2]
        masks[form] = ALL_MASK_ATTENTION_FUNCTIONS[implementation](
            batch_size=1,
            q_length=length,
            kv_length=length,
            mask_function=sees(cu_seq_lens_q, cu_seq_lens_k, length, sliding_window),
            allow_is_causal_skip=False,
            dtype=query.dtype,
            device=query.device,
        )
    return masks[form]


def sees(
    cu_seq_lens_q: Tensor, cu_seq_lens_k: Tensor, length: int, sliding_window: int | None
) -> Callable[[Any, Any, Tensor, Tensor], Tensor]:
    """The function (row, head, query, key) that says whether the token at place `query` sees the one at place `key`:
    if that is in its block or in the prefix of its block, at no later position, and within the window. Nothing here
    waits for the device."""
    queries, keys = cu_seq_lens_q.diff(), cu_seq_lens_k.diff()
    blocks = torch.arange(len(queries), device=queries.device)
    places = torch.arange(length, device=queries.device)
    block = torch.searchsorted(cu_seq_lens_q[1:].long(), places, right=True)
    prefix = torch.where(keys == queries, blocks, 0).cummax(0).values[block]
    position = places + ((keys - queries) - cu_seq_lens_q[:-1])[block]

    def mask(row: Any, head: Any, query: Tensor, key: Tensor) -> Tensor:
        seen = (block[key] == block[query]) | (block[key] == prefix[query])
        seen = seen & (position[key] <= position[query])
        return seen if sliding_window is None else seen & (position[key] > position[query] - sliding_window)

    return mask
