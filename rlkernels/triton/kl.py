import torch
import triton
import triton.language as tl
from torch import Tensor

from rlkernels._codes import KL_ESTIMATORS
from rlkernels.triton._launch import implements, multiple_of_16
from rlkernels.triton._math import clamp, expm1, expm1_minus_x
from rlkernels.triton._sequences import sequence_of, valid_sequences

K1 = tl.constexpr(KL_ESTIMATORS.index("k1"))
K2 = tl.constexpr(KL_ESTIMATORS.index("k2"))
K3 = tl.constexpr(KL_ESTIMATORS.index("k3"))
# The fourth is abs.

BLOCK = 1024
# The mask beyond a block is read in steps: few bytes first, since a sequence mostly goes on there.
FIRST_LOOK = 64
LOOK = 4096


@triton.jit
def kl_estimate(d, ESTIMATOR: tl.constexpr):
    """The estimate from d = log policy - log reference."""
    if ESTIMATOR == K1:
        return d
    elif ESTIMATOR == K2:
        return 0.5 * d * d
    elif ESTIMATOR == K3:
        return expm1_minus_x(-d)
    else:
        return tl.abs(d)


@triton.jit
def kl_estimate_derivative(d, ESTIMATOR: tl.constexpr, STRAIGHT_THROUGH: tl.constexpr):
    """d(kl_estimate)/dd. The straight-through forms take that of k2."""
    if STRAIGHT_THROUGH or ESTIMATOR == K2:
        return d
    elif ESTIMATOR == K1:
        return tl.full(d.shape, 1.0, tl.float32)
    elif ESTIMATOR == K3:
        return -expm1(-d)
    else:
        return tl.where(d > 0.0, 1.0, tl.where(d < 0.0, -1.0, d))


@triton.jit
def _load(values, token, inside):
    return tl.load(values + token, mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["count"])
def _forward_kernel(
    logprobs,
    ref_logprobs,
    values,
    count: tl.int64,
    log_ratio_clamp,
    value_clamp,
    ESTIMATOR: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = token < multiple_of_16(count, ALIGNED)
    d = _load(logprobs, token, inside) - _load(ref_logprobs, token, inside)
    value = clamp(kl_estimate(clamp(d, log_ratio_clamp), ESTIMATOR), value_clamp)
    tl.store(values + token, value, mask=inside)


@triton.jit(do_not_specialize=["count"])
def _backward_kernel(
    grad,
    logprobs,
    ref_logprobs,
    grad_logprobs,
    grad_ref,
    count: tl.int64,
    log_ratio_clamp,
    value_clamp,
    ESTIMATOR: tl.constexpr,
    STRAIGHT_THROUGH: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = token < multiple_of_16(count, ALIGNED)
    log_ratio = _load(logprobs, token, inside) - _load(ref_logprobs, token, inside)
    d = clamp(log_ratio, log_ratio_clamp)
    clamped = (tl.abs(log_ratio) > log_ratio_clamp) | (tl.abs(kl_estimate(d, ESTIMATOR)) > value_clamp)
    derivative = tl.where(clamped, 0.0, kl_estimate_derivative(d, ESTIMATOR, STRAIGHT_THROUGH))
    result = _load(grad, token, inside) * derivative
    tl.store(grad_logprobs + token, result, mask=inside)
    if grad_ref is not None:
        tl.store(grad_ref + token, -result, mask=inside)


@triton.jit
def _any_scored(mask, start, end, BLOCK: tl.constexpr):
    token = start + tl.arange(0, BLOCK)
    return tl.max((tl.load(mask + token, mask=token < end, other=0) != 0).to(tl.int32), 0)


@triton.jit(do_not_specialize=["count", "sequence_length", "sequences", "steps"])
def _rewards_kernel(
    scores,
    logprobs,
    ref_logprobs,
    mask,
    cu_seqlens,
    valid,
    rewards,
    count: tl.int64,
    sequence_length: tl.int32,
    sequences: tl.int32,
    steps: tl.int32,
    kl_coef,
    ESTIMATOR: tl.constexpr,
    AFTER_LAST: tl.constexpr,
    ALIGNED: tl.constexpr,
    FIRST_LOOK: tl.constexpr,
    LOOK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Which token is the last that is scored in its sequence a block sees by itself, but for the sequence that goes on
    beyond it, whose mask it reads up to the next scored token. Only a block with a scored token asks, and its answer
    lies before the next such block: the mask is read twice, no more."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    count = multiple_of_16(count, ALIGNED)
    offset = tl.arange(0, BLOCK)
    token = first + offset
    inside = token < count
    if cu_seqlens is not None:
        sequence = sequence_of(token, cu_seqlens, sequences, steps)
        known = inside & (sequence < sequences)
        begin = tl.load(cu_seqlens + sequence, mask=known, other=0).to(tl.int64)
        end = tl.load(cu_seqlens + sequence + 1, mask=known, other=0).to(tl.int64)
    else:
        # 64-bit division once a block, 32-bit division once a token.
        within = (first % sequence_length).to(tl.int32) + offset
        sequence = first // sequence_length + within // sequence_length
        known = inside
        begin = sequence * sequence_length
        end = begin + sequence_length
    limit = tl.minimum(tl.max(tl.where(known, end, 0), 0), count)
    # Relative to the block, as far as that matters.
    begin = tl.maximum(begin - first, -1).to(tl.int32)
    end = tl.minimum(tl.maximum(end - first, 0), BLOCK + 1).to(tl.int32)

    bears = offset + 1 == end
    scored = inside
    if mask is not None:
        scored = scored & (tl.load(mask + token, mask=inside, other=0) != 0)
        asks = tl.max(scored.to(tl.int32), 0)
        if AFTER_LAST:
            # The token after the last one may bear its score.
            before_first = (tl.load(mask + first - 1, mask=first > 0, other=0) != 0).to(tl.int32)
            asks = tl.maximum(asks, before_first)
            before = tl.gather(scored.to(tl.int32), tl.maximum(offset - 1, 0), 0)
            before = tl.where(offset == 0, before_first, before)
            bears = tl.where(scored, bears, (before != 0) & (offset > begin))
        else:
            bears = scored
        later = 0
        start = first + BLOCK
        if (asks > 0) & (start < limit):
            later = _any_scored(mask, start, limit, FIRST_LOOK)
            start += FIRST_LOOK
            while (later == 0) & (start < limit):
                later = _any_scored(mask, start, limit, LOOK)
                start += LOOK
        # Scored tokens of the block from each token on, less those from the end of its sequence on.
        onwards = tl.cumsum(scored.to(tl.int32), 0, reverse=True)
        from_end = tl.gather(onwards, tl.minimum(end, BLOCK - 1), 0)
        from_end = tl.where(end < BLOCK, from_end, -later)
        bears = bears & (onwards - scored.to(tl.int32) == from_end)

    reward = _load(logprobs, token, inside) - _load(ref_logprobs, token, inside)
    reward = tl.where(scored & (kl_coef != 0.0), -kl_coef * kl_estimate(reward, ESTIMATOR), 0.0)
    reward += _load(scores, sequence, bears & known)
    if valid is not None:
        reward *= tl.load(valid)
    tl.store(rewards + token, reward, mask=inside)


@implements("kl_penalty_forward")
def kl_penalty_forward(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    estimator: int,
    straight_through: bool,
    log_ratio_clamp: float,
    value_clamp: float,
) -> Tensor:
    values = torch.empty_like(logprobs, dtype=torch.float32)
    count = logprobs.numel()
    if count:
        _forward_kernel[(triton.cdiv(count, BLOCK),)](
            logprobs,
            ref_logprobs,
            values,
            count,
            log_ratio_clamp,
            value_clamp,
            ESTIMATOR=estimator,
            ALIGNED=count % 16 == 0,
            BLOCK=BLOCK,
        )
    return values


@implements("kl_penalty_backward")
def kl_penalty_backward(
    grad: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    estimator: int,
    straight_through: bool,
    log_ratio_clamp: float,
    value_clamp: float,
    need_ref: bool,
) -> tuple[Tensor, Tensor]:
    grad_logprobs = torch.empty_like(logprobs)
    grad_ref = torch.empty_like(ref_logprobs) if need_ref else ref_logprobs.new_empty(0)
    count = logprobs.numel()
    if count:
        _backward_kernel[(triton.cdiv(count, BLOCK),)](
            grad,
            logprobs,
            ref_logprobs,
            grad_logprobs,
            grad_ref if need_ref else None,
            count,
            log_ratio_clamp,
            value_clamp,
            ESTIMATOR=estimator,
            STRAIGHT_THROUGH=straight_through,
            ALIGNED=count % 16 == 0,
            BLOCK=BLOCK,
        )
    return grad_logprobs, grad_ref


@implements("shaped_rewards")
def shaped_rewards(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    kl_coef: float,
    estimator: int,
    after_last: bool,
) -> Tensor:
    rewards = torch.empty_like(logprobs, dtype=torch.float32)
    count, sequences = logprobs.numel(), scores.shape[0]
    if count:
        _rewards_kernel[(triton.cdiv(count, BLOCK),)](
            scores,
            logprobs,
            ref_logprobs,
            mask,
            cu_seqlens,
            valid_sequences(cu_seqlens, count),
            rewards,
            count,
            logprobs.shape[1] if cu_seqlens is None else 0,
            sequences,
            sequences.bit_length(),
            kl_coef,
            ESTIMATOR=estimator,
            AFTER_LAST=after_last,
            ALIGNED=count % 16 == 0,
            FIRST_LOOK=FIRST_LOOK,
            LOOK=LOOK,
            BLOCK=BLOCK,
        )
    return rewards
