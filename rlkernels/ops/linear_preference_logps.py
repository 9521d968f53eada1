from typing import Any

import torch
from torch import Tensor

from rlkernels.ops import _checks
from rlkernels.ops.linear_logprobs import linear_token_logprobs


def linear_preference_logps(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    **options: Any,
) -> Tensor:
    """Log-probabilities of whole sequences under the LM head, for preference_loss. The logits never exist as a whole.

        logps[s] = sum of linear_token_logprobs(hidden, weight, token_ids) over the scored tokens of sequence s

    Args:
        hidden: [B, T, H] padded, or [N, H] packed with cu_seqlens; the hidden state that predicts each token.
        token_ids: [B, T] or [N].
        mask: the shape of token_ids, bool, integer or float; nonzero is scored; None scores every token. Tokens with
            ignore_index are not scored either.
        cu_seqlens: int32 [S + 1], from 0 to N, not decreasing: where each packed sequence starts.
        weight, ignore_index and, by keyword, bias, adapter, temperature, softcap, scale, group, num_scored,
            logits_budget_mb: as in linear_token_logprobs.

    Returns: float32 [B] or [S] (float64 for float64 hidden); 0 for a sequence without scored tokens.

    Differentiable: as linear_token_logprobs.

    Raises: as linear_token_logprobs; on a CPU also for cu_seqlens that do not run from 0 to N without decreasing. On a
    GPU such cu_seqlens make all results NaN, or raise with RLKERNELS_CHECK=1.

    Traffic: that of linear_token_logprobs.

    References: Rafailov et al. 2023, "Direct Preference Optimization" (arXiv 2305.18290).
    """
    for name in ("return_entropy", "outputs"):
        if name in options:
            raise TypeError(
                f"{name} cannot be given to linear_preference_logps, which returns sums of log-probabilities"
            )
    _checks.tensor("token_ids", token_ids, _checks.INTEGERS)
    _, cu_seqlens = _checks.sequences("token_ids", token_ids, cu_seqlens)
    if mask is not None:
        _checks.mask("mask", mask, "token_ids", token_ids)
        token_ids = token_ids.long().masked_fill(~_checks.scored(mask), ignore_index)
    logprobs = linear_token_logprobs(hidden, weight, token_ids, ignore_index=ignore_index, **options)
    assert isinstance(logprobs, Tensor)
    if cu_seqlens is None:
        return logprobs.sum(-1)
    tokens = len(token_ids)
    if (cu_seqlens.is_cpu or _checks.CHECK_VALUES) and not torch.compiler.is_compiling():
        _checks.cu_seqlens_values(cu_seqlens, tokens)
    # Wrong values on a GPU must not make the kernel read out of range.
    offsets = cu_seqlens.long().clamp(0, tokens).cummax(0).values
    sums = torch.segment_reduce(logprobs, "sum", offsets=offsets, axis=0)
    return sums * _checks.nan_unless_valid(cu_seqlens, tokens, sums)
