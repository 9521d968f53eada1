import torch
import triton
import triton.language as tl
from torch import Tensor

from rlkernels._codes import RECURRENCES
from rlkernels.triton._config import num_warps
from rlkernels.triton._launch import implements
from rlkernels.triton._math import whitening_unit
from rlkernels.triton._sequences import bounds

GAE = tl.constexpr(RECURRENCES.index("gae"))
DISCOUNTED_RETURNS = tl.constexpr(RECURRENCES.index("discounted_returns"))
TD_LAMBDA = tl.constexpr(RECURRENCES.index("td_lambda"))
VTRACE = tl.constexpr(RECURRENCES.index("vtrace"))
WHITEN_EPS = tl.constexpr(1e-8)

# Tokens that a program scans at once: 16 bytes an array for each thread. With more to a thread registers spill.
BLOCK = 1024
# A program goes through a sequence block by block and reads everything once. One that is longer than this would keep a
# GPU waiting for a single program: its blocks are reduced side by side, and read again once each knows what lies behind
# it. Which way a sequence goes depends on its length alone, and so do its bits.
SERIAL = 32768
# Blocks whose composites are looked at together.
GROUP = 64

# Two variants are compiled, ALIGNED or not, whatever the lengths and the options.
_DO_NOT_SPECIALIZE = [
    "rewards",
    "values",
    "logprobs",
    "behavior_logprobs",
    "mask",
    "dones",
    "cu_seqlens",
    "valid",
    "bootstrap",
    "advantages",
    "returns",
    "statistics",
    "composites",
    "tokens",
    "length",
    "sequences",
    "longest",
    "next_value_weight",
    "decay",
    "gamma",
    "rho_clip",
    "c_clip",
    "slots",
    "steps",
]


@triton.jit
def _pass_back(known_later, value_later, known, value):
    """The value that a stretch of tokens passes back: its first, or that of the stretch behind it."""
    return known | known_later, tl.where(known != 0, value, value_later)


@triton.jit
def _apply(a, b, y):
    return tl.where(a == 0.0, b, b + a.to(tl.float32) * y)


@triton.jit
def _compose(a_later, b_later, a, b):
    """y = b + a * (b_later + a_later * y'). Where a is 0 an episode ends, and not even an infinity flows back.

    a is a product of up to all tokens' factors, in float64: they are often all the same, and then the float32 rounding
    of each squaring would go in one direction and double with the next."""
    return tl.where(a == 0.0, 0.0, a * a_later), _apply(a, b, b_later)


@triton.jit
def _first(x, position):
    return tl.sum(tl.where(position == 0, x, 0.0), 0)


@triton.jit
def _at(pointer, start, ALIGNED: tl.constexpr):
    """`pointer + start`, in a form that shows the compiler that it is a multiple of 16 bytes where it is."""
    if ALIGNED:
        return tl.multiple_of(pointer + start, 16)
    else:
        return pointer + start


@triton.jit
def _size(start, end, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """How many of the BLOCK tokens from `start` come before `end`."""
    size = tl.minimum(end - start, BLOCK).to(tl.int32)
    if ALIGNED:
        size = tl.multiple_of(size, 16)
    return size


@triton.jit
def _scored_and_done(mask, dones, start, size, position, ALIGNED: tl.constexpr):
    inside = position < size
    scored = inside
    if mask is not None:
        scored = scored & (tl.load(_at(mask, start, ALIGNED) + position, mask=inside, other=0) != 0)
    done = position < 0
    if dones is not None:
        done = tl.load(_at(dones, start, ALIGNED) + position, mask=inside, other=0) != 0
    return scored, done


@triton.jit
def _scored_only(pointer, start, size, position, scored, ALIGNED: tl.constexpr):
    """Unscored tokens may hold anything: they are replaced before any arithmetic."""
    x = tl.load(_at(pointer, start, ALIGNED) + position, mask=position < size, other=0.0)
    return tl.where(scored, x, 0.0)


@triton.jit
def _scan(
    rewards,
    values,
    logprobs,
    behavior_logprobs,
    mask,
    dones,
    start,
    size,
    next_value,
    next_value_weight,
    decay,
    rho_clip,
    c_clip,
    KIND: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """For each token of a block: whether it is scored, whether it ends an episode, its value, rho and b, and a and b of
    all from it to the block's end. Also the value that the block passes back, if `next_value` is passed to it."""
    position = tl.arange(0, BLOCK)
    scored, done = _scored_and_done(mask, dones, start, size, position, ALIGNED)
    reward = _scored_only(rewards, start, size, position, scored, ALIGNED)
    value = tl.zeros((BLOCK,), tl.float32)
    b = reward
    if KIND != DISCOUNTED_RETURNS:
        value = _scored_only(values, start, size, position, scored, ALIGNED)
        known = (scored | done).to(tl.int32)
        known_value = value
        if mask is not None or dones is not None:
            known, known_value = tl.associative_scan((known, known_value), 0, _pass_back, reverse=True)
        after = tl.minimum(position + 1, BLOCK - 1)
        within = (position + 1 < BLOCK) & (tl.gather(known, after, 0) != 0)
        after_value = tl.where(within, tl.gather(known_value, after, 0), next_value)
        after_value = tl.where(done, 0.0, after_value)
        any_known = tl.max(known, 0) != 0
        next_value = tl.where(any_known, _first(known_value, position), next_value)
        if KIND != TD_LAMBDA:
            b = reward - value
        b += next_value_weight * after_value

    a = tl.zeros((BLOCK,), tl.float32) + decay
    rho = tl.full((BLOCK,), 1.0, tl.float32)
    if KIND == VTRACE:
        logprob = _scored_only(logprobs, start, size, position, scored, ALIGNED)
        ratio = tl.exp(logprob - _scored_only(behavior_logprobs, start, size, position, scored, ALIGNED))
        rho = tl.where(ratio > rho_clip, rho_clip, ratio)
        a = decay * tl.where(ratio > c_clip, c_clip, ratio)
        b = rho * b
    a = tl.where(done, 0.0, tl.where(scored, a, 1.0))
    b = tl.where(scored, b, 0.0)
    all_a, all_b = tl.associative_scan((a.to(tl.float64), b), 0, _compose, reverse=True)
    return scored, done, value, rho, b, all_a.to(tl.float32), all_b, next_value


@triton.jit
def _finish(
    advantages,
    returns,
    statistics,
    factor,
    start,
    size,
    slot,
    slots,
    gamma,
    y,
    scored,
    done,
    value,
    rho,
    b,
    all_a,
    all_b,
    KIND: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes a block's results and returns the y that it passes back. `y` is passed to it."""
    position = tl.arange(0, BLOCK)
    inside = position < size
    each = _apply(all_a, all_b, y)
    if advantages is not None:
        advantage = each
        if KIND == VTRACE:
            after = tl.gather(each, tl.minimum(position + 1, BLOCK - 1), 0)
            after = tl.where(done, 0.0, tl.where(position + 1 < BLOCK, after, y))
            advantage = b + rho * gamma * after
        advantage = tl.where(scored, advantage, 0.0)
        tl.store(_at(advantages, start, ALIGNED) + position, advantage * factor, mask=inside)
        result = value + each
        if statistics is not None:
            # In double, in which the square of no float overflows.
            count = tl.sum(tl.where(scored, 1.0, 0.0), 0)
            mean = tl.sum(advantage.to(tl.float64), 0) / tl.maximum(count, 1.0)
            deviation = tl.where(scored, advantage - mean, 0.0)
            tl.store(statistics + slot, count)
            tl.store(statistics + slots + slot, mean)
            tl.store(statistics + 2 * slots + slot, tl.sum(deviation * deviation, 0))
    else:
        result = each
    tl.store(_at(returns, start, ALIGNED) + position, tl.where(scored, result, 0.0) * factor, mask=inside)
    return _first(each, position)


@triton.jit
def _first_slot(begin, sequence, BLOCK: tl.constexpr):
    """The first slot of a sequence's blocks. The slots of no two sequences overlap, whatever their lengths."""
    return begin // BLOCK + sequence


@triton.jit
def _bootstrap(bootstrap, sequence):
    if bootstrap is not None:
        return tl.load(bootstrap + sequence)
    else:
        return 0.0


@triton.jit(do_not_specialize=_DO_NOT_SPECIALIZE)
def _sequence_kernel(
    rewards,
    values,
    logprobs,
    behavior_logprobs,
    mask,
    dones,
    cu_seqlens,
    valid,
    bootstrap,
    advantages,
    returns,
    statistics,
    tokens: tl.int64,
    length: tl.int64,
    longest: tl.int64,
    slots: tl.int64,
    next_value_weight: tl.float32,
    decay: tl.float32,
    gamma: tl.float32,
    rho_clip: tl.float32,
    c_clip: tl.float32,
    KIND: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A sequence, block by block from its end."""
    sequence = tl.program_id(0).to(tl.int64)
    begin, end = bounds(sequence, cu_seqlens, tokens, length)
    factor = 1.0
    if valid is not None:
        factor = tl.load(valid)
        if factor != factor:
            # Nobody knows where sequences are: every token is reached, and made NaN, by an equal share each.
            share = tl.cdiv(tokens, tl.num_programs(0).to(tl.int64))
            begin = tl.minimum(sequence * share, tokens)
            end = tl.minimum(begin + share, tokens)
        elif end - begin > longest:
            return
    next_value = _bootstrap(bootstrap, sequence) + 0.0
    y = 0.0
    if advantages is None:
        y = next_value
    first_slot = _first_slot(begin, sequence, BLOCK)
    blocks = tl.cdiv(end - begin, BLOCK)
    for done_blocks in range(0, blocks):
        block = blocks - 1 - done_blocks
        start = begin + block * BLOCK
        size = _size(start, end, ALIGNED, BLOCK)
        scored, done, value, rho, b, all_a, all_b, next_value = _scan(
            rewards,
            values,
            logprobs,
            behavior_logprobs,
            mask,
            dones,
            start,
            size,
            next_value,
            next_value_weight,
            decay,
            rho_clip,
            c_clip,
            KIND,
            ALIGNED,
            BLOCK,
        )
        y = _finish(
            advantages,
            returns,
            statistics,
            factor,
            start,
            size,
            first_slot + block,
            slots,
            gamma,
            y,
            scored,
            done,
            value,
            rho,
            b,
            all_a,
            all_b,
            KIND,
            ALIGNED,
            BLOCK,
        )


@triton.jit
def _place(cu_seqlens, tokens, length, sequences, steps, BLOCK: tl.constexpr):
    """The sequence and the block that a program of a grid over slots, or where all lengths are one over blocks, is for.
    There may be none: then the block lies behind the sequence's end."""
    program = tl.program_id(0).to(tl.int64)
    if cu_seqlens is None:
        blocks = tl.cdiv(length, BLOCK)
        sequence = program // blocks
        block = program % blocks
    else:
        # The last sequence whose slots do not begin after this one.
        low = tl.zeros((), tl.int64)
        high = low + sequences
        for _ in range(steps):
            searching = low < high
            # Within the sequences, so that it can be read also once the search is over.
            middle = tl.minimum((low + high) // 2, sequences - 1)
            begin, _ = bounds(middle, cu_seqlens, tokens, length)
            here = _first_slot(begin, middle, BLOCK) <= program
            low = tl.where(searching & here, middle + 1, low)
            high = tl.where(searching & (here == 0), middle, high)
        sequence = tl.maximum(low - 1, 0)
        begin, _ = bounds(sequence, cu_seqlens, tokens, length)
        block = program - _first_slot(begin, sequence, BLOCK)
    return sequence, block


@triton.jit
def _serves(valid, block, size, longest, BLOCK: tl.constexpr):
    """Whether a sequence is one of the long ones, has such a block, and is known to be one."""
    serves = (size > longest) & (block >= 0) & (block * BLOCK < size)
    if valid is not None:
        serves = serves & (tl.load(valid) == 1.0)
    return serves


@triton.jit(do_not_specialize=_DO_NOT_SPECIALIZE)
def _reduce_kernel(
    rewards,
    values,
    logprobs,
    behavior_logprobs,
    mask,
    dones,
    cu_seqlens,
    valid,
    bootstrap,
    composites,
    tokens: tl.int64,
    length: tl.int64,
    sequences: tl.int64,
    steps: tl.int32,
    longest: tl.int64,
    slots: tl.int64,
    next_value_weight: tl.float32,
    decay: tl.float32,
    rho_clip: tl.float32,
    c_clip: tl.float32,
    KIND: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """For a block of a long sequence: the value passed to it, and a and b of all its tokens."""
    sequence, block = _place(cu_seqlens, tokens, length, sequences, steps, BLOCK)
    begin, end = bounds(sequence, cu_seqlens, tokens, length)
    if not _serves(valid, block, end - begin, longest, BLOCK):
        return
    start = begin + block * BLOCK
    position = tl.arange(0, BLOCK)
    next_value = _bootstrap(bootstrap, sequence) + 0.0
    if KIND != DISCOUNTED_RETURNS:
        # The first token behind the block that is scored or ends an episode; most often the very next.
        searching = start + BLOCK < end
        behind = start + BLOCK
        while searching:
            size = _size(behind, end, ALIGNED, BLOCK)
            scored, done = _scored_and_done(mask, dones, behind, size, position, ALIGNED)
            first = tl.min(tl.where(scored | done, position, BLOCK), 0)
            at_first = scored & (position == first)
            value = tl.load(values + behind + position, mask=at_first, other=0.0)
            next_value = tl.where(first < BLOCK, tl.sum(tl.where(at_first, value, 0.0), 0), next_value)
            behind += BLOCK
            searching = (first == BLOCK) & (behind < end)
    size = _size(start, end, ALIGNED, BLOCK)
    _, _, _, _, _, all_a, all_b, _ = _scan(
        rewards,
        values,
        logprobs,
        behavior_logprobs,
        mask,
        dones,
        start,
        size,
        next_value,
        next_value_weight,
        decay,
        rho_clip,
        c_clip,
        KIND,
        ALIGNED,
        BLOCK,
    )
    slot = _first_slot(begin, sequence, BLOCK) + block
    tl.store(composites + slot, _first(all_a, position))
    tl.store(composites + slots + slot, _first(all_b, position))
    tl.store(composites + 2 * slots + slot, next_value)


@triton.jit
def _through_following(composites, slots, blocks, y, GROUP: tl.constexpr):
    """What `blocks` blocks make of the y behind them, from the last to the first."""
    member = tl.arange(0, GROUP)
    last_group = (blocks - 1) // GROUP
    for done_groups in range(0, tl.cdiv(blocks, GROUP)):
        block = (last_group - done_groups) * GROUP + member
        a = tl.load(composites + block, mask=block < blocks, other=1.0)
        b = tl.load(composites + slots + block, mask=block < blocks, other=0.0)
        a, b = tl.associative_scan((a.to(tl.float64), b), 0, _compose, reverse=True)
        y = _apply(_first(a, member), _first(b, member), y)
    return y


@triton.jit(do_not_specialize=_DO_NOT_SPECIALIZE)
def _apply_kernel(
    rewards,
    values,
    logprobs,
    behavior_logprobs,
    mask,
    dones,
    cu_seqlens,
    valid,
    bootstrap,
    composites,
    advantages,
    returns,
    statistics,
    tokens: tl.int64,
    length: tl.int64,
    sequences: tl.int64,
    steps: tl.int32,
    longest: tl.int64,
    slots: tl.int64,
    next_value_weight: tl.float32,
    decay: tl.float32,
    gamma: tl.float32,
    rho_clip: tl.float32,
    c_clip: tl.float32,
    KIND: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """A block of a long sequence, behind which those that follow it are added up, from the end."""
    sequence, block = _place(cu_seqlens, tokens, length, sequences, steps, BLOCK)
    begin, end = bounds(sequence, cu_seqlens, tokens, length)
    if not _serves(valid, block, end - begin, longest, BLOCK):
        return
    slot = _first_slot(begin, sequence, BLOCK) + block
    blocks = tl.cdiv(end - begin, BLOCK)
    start = begin + block * BLOCK
    size = _size(start, end, ALIGNED, BLOCK)
    next_value = tl.load(composites + 2 * slots + slot)
    scored, done, value, rho, b, all_a, all_b, _ = _scan(
        rewards,
        values,
        logprobs,
        behavior_logprobs,
        mask,
        dones,
        start,
        size,
        next_value,
        next_value_weight,
        decay,
        rho_clip,
        c_clip,
        KIND,
        ALIGNED,
        BLOCK,
    )

    y = 0.0
    if advantages is None:
        y = _bootstrap(bootstrap, sequence) + 0.0
    y = _through_following(composites + slot + 1, slots, (blocks - 1 - block).to(tl.int32), y, GROUP)
    _finish(
        advantages,
        returns,
        statistics,
        1.0,
        start,
        size,
        slot,
        slots,
        gamma,
        y,
        scored,
        done,
        value,
        rho,
        b,
        all_a,
        all_b,
        KIND,
        ALIGNED,
        BLOCK,
    )


@triton.jit(do_not_specialize=["statistics", "moments", "slots"])
def _moments_kernel(statistics, moments, slots: tl.int64, BLOCK: tl.constexpr):
    """Mean and 1 / sqrt(variance + eps) of all advantages, from count, mean and squared deviations of each block; 0
    where fewer than two are scored. Both in the unit of whitening_unit, which is the third."""
    counts = tl.zeros((BLOCK,), tl.float64)
    sums = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, slots, BLOCK):
        slot = first + tl.arange(0, BLOCK)
        count = tl.load(statistics + slot, mask=slot < slots, other=0.0)
        counts += count
        sums += count * tl.load(statistics + slots + slot, mask=slot < slots, other=0.0)
    total = tl.sum(counts, 0)
    mean = tl.sum(sums, 0) / tl.maximum(total, 1.0)
    squares = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, slots, BLOCK):
        slot = first + tl.arange(0, BLOCK)
        count = tl.load(statistics + slot, mask=slot < slots, other=0.0)
        distance = tl.load(statistics + slots + slot, mask=slot < slots, other=0.0) - mean
        within = tl.load(statistics + 2 * slots + slot, mask=slot < slots, other=0.0)
        squares += within + tl.where(count > 0.0, count * distance * distance, 0.0)
    variance = tl.sum(squares, 0) / tl.maximum(total - 1.0, 1.0)
    unit = whitening_unit(variance)
    scale = 1.0 / (tl.sqrt(variance + WHITEN_EPS) * unit)
    tl.store(moments, (mean * unit).to(tl.float32))
    tl.store(moments + 1, tl.where(total > 1.0, scale, 0.0).to(tl.float32))
    tl.store(moments + 2, unit)


@triton.jit(do_not_specialize=["advantages", "mask", "valid", "moments", "tokens"])
def _whiten_kernel(advantages, mask, valid, moments, tokens: tl.int64, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    size = _size(start, tokens, ALIGNED, BLOCK)
    position = tl.arange(0, BLOCK)
    scored, _ = _scored_and_done(mask, None, start, size, position, ALIGNED)
    advantage = _scored_only(advantages, start, size, position, scored, ALIGNED)
    scale = tl.load(moments + 1)
    whitened = tl.where(scored, (advantage * tl.load(moments + 2) - tl.load(moments)) * scale, 0.0)
    whitened = tl.where(scale == 0.0, 0.0, whitened)
    if valid is not None:
        whitened *= tl.load(valid)
    tl.store(_at(advantages, start, ALIGNED) + position, whitened, mask=position < size)


@implements("recurrence")
def recurrence(
    rewards: Tensor,
    values: Tensor | None,
    logprobs: Tensor | None,
    behavior_logprobs: Tensor | None,
    mask: Tensor | None,
    dones: Tensor | None,
    cu_seqlens: Tensor | None,
    bootstrap_values: Tensor | None,
    valid: Tensor | None,
    kind: int,
    gamma: float,
    lam: float,
    rho_clip: float,
    c_clip: float,
    whiten: bool,
) -> tuple[Tensor, Tensor]:
    tokens = rewards.numel()
    if cu_seqlens is None:
        sequences, length = rewards.shape
    else:
        sequences, length = cu_seqlens.shape[0] - 1, 0
    returns = torch.empty_like(rewards)
    has_advantages = kind in (GAE.value, VTRACE.value)
    advantages = torch.empty_like(rewards) if has_advantages else rewards.new_empty(0)
    if not tokens:
        return advantages, returns
    outputs = (advantages if has_advantages else None, returns)

    slots = tokens // BLOCK + sequences
    # Not every slot has a block.
    statistics = rewards.new_zeros(3, slots, dtype=torch.float64) if whiten else None
    inputs = (rewards, values, logprobs, behavior_logprobs, mask, dones)
    per_token = [tensor for tensor in inputs if tensor is not None]
    aligned = length % 16 == 0 and cu_seqlens is None and all(t.data_ptr() % 16 == 0 for t in per_token)
    weight = gamma * (1.0 - lam) if kind == TD_LAMBDA.value else gamma
    decay = gamma if kind == DISCOUNTED_RETURNS.value else gamma * lam
    variant = dict(KIND=kind, ALIGNED=aligned, BLOCK=BLOCK, num_warps=num_warps("scan"))
    if cu_seqlens is not None or length <= SERIAL:
        _sequence_kernel[(sequences,)](
            *inputs,
            cu_seqlens,
            valid,
            bootstrap_values,
            *outputs,
            statistics,
            tokens,
            length,
            SERIAL,
            slots,
            weight,
            decay,
            gamma,
            rho_clip,
            c_clip,
            **variant,
        )
    if (tokens if cu_seqlens is not None else length) > SERIAL:
        composites = rewards.new_empty(3, slots)
        programs = slots if cu_seqlens is not None else sequences * triton.cdiv(length, BLOCK)
        where = (tokens, length, sequences, sequences.bit_length(), SERIAL, slots)
        _reduce_kernel[(programs,)](
            *inputs,
            cu_seqlens,
            valid,
            bootstrap_values,
            composites,
            *where,
            weight,
            decay,
            rho_clip,
            c_clip,
            **variant,
        )
        _apply_kernel[(programs,)](
            *inputs,
            cu_seqlens,
            valid,
            bootstrap_values,
            composites,
            *outputs,
            statistics,
            *where,
            weight,
            decay,
            gamma,
            rho_clip,
            c_clip,
            **variant,
            GROUP=GROUP,
        )
    if statistics is not None:
        moments = rewards.new_empty(3)
        _moments_kernel[(1,)](statistics, moments, slots, BLOCK=BLOCK, num_warps=num_warps("scan"))
        _whiten_kernel[(triton.cdiv(tokens, BLOCK),)](
            advantages, mask, valid, moments, tokens, ALIGNED=aligned, BLOCK=BLOCK, num_warps=num_warps("scan")
        )
    return advantages, returns
