"""Causal attention within each of several sequences that are laid end to end, or that share prefixes.

The layout stands in cu_seq_lens_q and cu_seq_lens_k, as flash attention takes it. It consists of blocks. A block with
as many keys as queries is a sequence or a prefix. A block with more keys is a branch of the prefix before it: its keys
are those of the prefix, then its own.
"""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# Up to this length of a sequence its scores are stored for the backward pass, which is faster on a CPU than to compute
# them again.
STORED_SCORES = 512


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: list[tuple[int, int]],
    scaling: float | None,
    dropout: float,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    """Causal attention within each of the blocks, which have (queries, keys): [1, heads, N, D] to [1, N, heads, D].

    Neighbours of equal length are computed together, if they are branches of one prefix or no branches. With a mask
    over N x N, scores between sequences would be computed only to be dropped: a pass over 16 sequences of 102 tokens
    takes more than twice as long."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    groups = query.shape[1] // key.shape[1]
    outputs, start = [], 0
    for (length, prefix), run in itertools.groupby(with_prefixes(blocks)):
        count = len(list(run))
        stop = start + count * length
        # [sequences, heads, length, D]
        q, k, v = (part[0, :, start:stop].unflatten(1, (count, length)).transpose(0, 1) for part in (query, key, value))
        start = stop
        before = prefix.stop - prefix.start
        if before:
            k, v = (
                torch.cat([part[:, :, prefix].expand(count, -1, -1, -1), own], 2)
                for part, own in ((key, k), (value, v))
            )
        long = before + length > STORED_SCORES and softcap is None
        causal = None
        if not long or before or (sliding_window is not None and sliding_window < length):
            causal = torch.ones(length, before + length, dtype=torch.bool, device=q.device).tril(before)
            if sliding_window is not None:
                causal = causal.triu(before + 1 - sliding_window)
        if long:
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
            out = nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=causal, is_causal=causal is None, dropout_p=dropout, scale=scaling
            )
        else:
            # The query heads that share a key are rows of one product.
            scores = (q * scaling).reshape(count, key.shape[1], groups * length, -1) @ k.transpose(2, 3)
            scores = scores.unflatten(2, (groups, length))
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            weights = scores.masked_fill(~causal, -torch.inf).softmax(-1, dtype=torch.float32).to(q.dtype)
            weights = nn.functional.dropout(weights, dropout, module.training)
            out = (weights.flatten(2, 3) @ v).view(count, query.shape[1], length, -1)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).unsqueeze(0)


def with_prefixes(blocks: Iterable[tuple[int, int]]) -> Iterator[tuple[int, slice]]:
    """For each block the number of its queries, and the places of the prefix that it is a branch of; none of others."""
    start, prefix = 0, slice(0, 0)
    for queries, keys in blocks:
        is_branch = keys > queries
        yield queries, prefix if is_branch else slice(0, 0)
        if not is_branch:
            prefix = slice(start, start + queries)
        start += queries


def by_sequence(other: str) -> str:
    """Registers an attention function with transformers and returns its name. It computes packed sequences one after
    the other, and leaves all else (generation, padded batches) to the implementation `other`."""

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
            return ALL_ATTENTION_FUNCTIONS[other](
                module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
            )
        for name in ("s_aux", "position_bias"):
            if kwargs.get(name) is not None:
                raise NotImplementedError(name)
        if not getattr(module, "is_causal", True) or query.shape[2] != key.shape[2]:
            raise NotImplementedError("attention that is not causal self-attention")
        blocks = list(zip(starts.diff().tolist(), kwargs["cu_seq_lens_k"].diff().tolist(), strict=True))
        window, softcap = kwargs.get("sliding_window"), kwargs.get("softcap")
        return attend(module, query, key, value, blocks, scaling, dropout, window, softcap), None

    name = f"rlkernels_by_sequence_{other}"
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[other])
    return name
