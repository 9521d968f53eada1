"""Causal attention within each of several sequences that are laid end to end, or that share prefixes; for CPUs.

The layout consists of blocks. A block with as many keys as queries is a sequence or a prefix. A block with more keys is
a branch of the prefix before it: its keys are those of the prefix, then its own.
"""

import functools
import itertools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

# Up to this length of a sequence its scores are stored for the backward pass, which is faster on a CPU than to compute
# them again. So are those of a branch up to this number of keys, or of queries: the scores of a few queries take less
# memory than the branch's copies of its prefix's keys and values.
STORED_SCORES = 512
STORED_KEYS, STORED_QUERIES = 256, 48
# Branches of one prefix are padded to the longest if their lengths, in units of this, round up to the same.
PADDED_UNIT = 32


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Iterable[tuple[int, int]],
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention within each of the blocks, which have (queries, keys): [1, heads, N, D] to [1, N, heads, D].
    Each head's softmax has a further score that belongs to no value: that of `sinks` [heads].

    Neighbours are computed together: sequences of equal length, and branches of one prefix. With a mask over N x N,
    scores between sequences would be computed only to be dropped: a pass over 16 sequences of 102 tokens takes more
    than twice as long."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    heads, groups = key.shape[1], query.shape[1] // key.shape[1]
    outputs, start = [], 0
    for prefix, lengths in runs(blocks):
        count, length = len(lengths), max(lengths)
        stop = start + sum(lengths)
        is_padded = min(lengths) < length
        q, k, v = (part[0, :, start:stop] for part in (query, key, value))
        start = stop
        if is_padded:
            padded, real = padding(lengths)
            q, k, v = (part.index_select(1, padded) for part in (q, k, v))
        # [sequences, heads, length, D]
        q, k, v = (part.unflatten(1, (count, length)).transpose(0, 1) for part in (q, k, v))
        before = prefix.stop - prefix.start
        if before:
            k, v = (
                torch.cat([part[:, :, prefix].expand(count, -1, -1, -1), own], 2)
                for part, own in ((key, k), (value, v))
            )
        is_long = before + length > (STORED_KEYS if before else STORED_SCORES) and length > STORED_QUERIES
        is_stored = not is_long or softcap is not None or sinks is not None
        causal = None
        if is_stored or before or (sliding_window is not None and sliding_window < length):
            causal = torch.ones(length, before + length, dtype=torch.bool, device=q.device).tril(before)
            if sliding_window is not None:
                causal = causal.triu(before + 1 - sliding_window)
        if not is_stored and not before:
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
            out = nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=causal, is_causal=causal is None, dropout_p=dropout, scale=scaling
            )
        else:
            # The query heads that share a key are rows of one product.
            rows = q.reshape(count, heads, groups * length, -1)
            if not is_stored:
                out = nn.functional.scaled_dot_product_attention(
                    rows, k, v, attn_mask=causal.repeat(groups, 1), dropout_p=dropout, scale=scaling
                )
            else:
                scores = (rows * scaling @ k.transpose(2, 3)).unflatten(2, (groups, length))
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                scores = scores.masked_fill(~causal, -torch.inf)
                if sinks is not None:
                    sink = sinks.to(scores.dtype).view(1, heads, groups, 1, 1).expand(count, -1, -1, length, 1)
                    scores = torch.cat([scores, sink], -1)
                weights = scores.softmax(-1, dtype=torch.float32)[..., : before + length].to(q.dtype)
                weights = nn.functional.dropout(weights, dropout, module.training)
                out = weights.flatten(2, 3) @ v
            out = out.view(count, query.shape[1], length, -1)
        out = out.transpose(1, 2).flatten(0, 1)
        outputs.append(out.index_select(0, real) if is_padded else out)
    return torch.cat(outputs).unsqueeze(0)


def runs(blocks: Iterable[tuple[int, int]]) -> Iterator[tuple[slice, tuple[int, ...]]]:
    """Neighbours that are computed together: the places of the prefix that they are branches of, none of others, and
    their lengths."""

    def alike(block: tuple[int, slice]) -> tuple[int, slice]:
        length, prefix = block
        return (-(-length // PADDED_UNIT) * PADDED_UNIT if prefix.stop else length), prefix

    for (_, prefix), run in itertools.groupby(with_prefixes(blocks), alike):
        yield prefix, tuple(length for length, _ in run)


def with_prefixes(blocks: Iterable[tuple[int, int]]) -> Iterator[tuple[int, slice]]:
    """For each block the number of its queries, and the places of the prefix that it is a branch of; none of others."""
    start, prefix = 0, slice(0, 0)
    for queries, keys in blocks:
        is_branch = keys > queries
        yield queries, prefix if is_branch else slice(0, 0)
        if not is_branch:
            prefix = slice(start, start + queries)
        start += queries


@functools.lru_cache(maxsize=64)  # each layer asks again
def padding(lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The place of each token of sequences that are laid end to end once each is padded to the longest, by repeating
    its last token; and the places of the real ones among these."""
    longest = torch.arange(max(lengths))
    own = torch.tensor(lengths).unsqueeze(1)
    padded = longest.minimum(own - 1) + own.cumsum(0) - own
    return padded.flatten(), (longest < own).flatten().nonzero().squeeze(1)
