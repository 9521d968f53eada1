import torch
import triton
import triton.language as tl
from torch import Tensor

from rlkernels._codes import RECURRENCES
from rlkernels.triton._config import num_warps
from rlkernels.triton._launch import aligned, implements
from rlkernels.triton._math import whitening_unit
from rlkernels.triton._sequences import bounds, valid_sequences

GAE = tl.constexpr(RECURRENCES.index("gae"))
DISCOUNTED_RETURNS = tl.constexpr(RECURRENCES.index("discounted_returns"))
TD_LAMBDA = tl.constexpr(RECURRENCES.index("td_lambda"))
VTRACE = tl.constexpr(RECURRENCES.index("vtrace"))
WHITEN_EPS = tl.constexpr(1e-8)

# Tokens that one warp scans at once: four times 16 bytes of an array for each thread.
BLOCK = 512
# A warp goes through a sequence block by block and reads everything once. Where sequences are few, that leaves most of
# a GPU idle: those that are longer are done by a warp a block, and read twice. Both ways give the same bits.
FEW_SEQUENCES = 528  # four warps for each multiprocessor of an H100
LONGEST_OF_FEW, LONGEST_OF_MANY = 2048, 32768
# Blocks whose composites are under way from memory at once.
FOLD = 8
TOKENS = 1024  # of a program that whitens

# Two variants are compiled for each choice of tensors, whatever the lengths and the options: ALIGNED or not, where all
# sequences begin and end at multiples of 16 tokens.
_DO_NOT_SPECIALIZE = [
    *("inputs", "sequences", "outputs", "statistics", "composites", "coefficients"),
    *("tokens", "length", "longest", "count", "steps", "slots"),
]


# ---- one linear recurrence, y[t] = b[t] + a[t] y[t+1]


@triton.jit
def _step(a, b, y, ENDS: tl.constexpr):
    """b + a y. Where a is 0 an episode ends, and not even an infinity flows back; only `ENDS` has such tokens."""
    result = tl.fma(a, y, b)
    return tl.where(a == 0.0, b, result) if ENDS else result


@triton.jit
def _product(high, low, high_later, low_later, ENDS: tl.constexpr):
    """The product of two factors, each the sum of two floats. One of many factors must keep more digits than a float
    has: they are often all the same, and then the rounding of each squaring would go in one direction and double with
    the next. Dekker 1971, "A floating-point technique for extending the available precision"."""
    high_product = high * high_later
    error = tl.fma(high, high_later, -1.0 * high_product)  # a minus alone is 0 - x, an instruction more
    low_product = tl.fma(high, low_later, tl.fma(low, high_later, error))
    if ENDS:
        high_product = tl.where(high == 0.0, 0.0, high_product)
        low_product = tl.where(high == 0.0, 0.0, low_product)
    return high_product, low_product


@triton.jit
def _times(a, high, low, ENDS: tl.constexpr):
    """The product where one factor is a float."""
    product = a * high
    rest = tl.fma(a, low, tl.fma(a, high, -1.0 * product))
    if ENDS:
        product = tl.where(a == 0.0, 0.0, product)
        rest = tl.where(a == 0.0, 0.0, rest)
    return product, rest


@triton.jit
def _compose(high_later, low_later, b_later, high, low, b):
    """The composite of some tokens and of those behind them."""
    high_product, low_product = _product(high, low, high_later, low_later, False)
    return high_product, low_product, _step(high + low, b, b_later, False)


@triton.jit
def _compose_to_ends(high_later, low_later, b_later, high, low, b):
    high_product, low_product = _product(high, low, high_later, low_later, True)
    return high_product, low_product, _step(high + low, b, b_later, True)


@triton.jit
def _pass_back(known_later, value_later, known, value):
    """The value that some tokens pass back: their first, or that of those behind them."""
    return known | known_later, tl.where(known != 0, value, value_later)


# ---- a block of tokens: each thread holds runs of four, and the runs go from the last to the first


@triton.jit
def _positions(BLOCK: tl.constexpr):
    """Where in a block its tokens are: the runs in the order in which they are scanned, the tokens of a run in theirs,
    so that a thread reads 16 bytes at a time."""
    index = tl.arange(0, BLOCK)
    return BLOCK - 4 - index // 4 * 4 + index % 4


@triton.jit
def _by_token(x):
    """The first, second, third and fourth tokens of all runs. This moves nothing, nor does its inverse."""
    first_and_third, second_and_fourth = tl.split(tl.reshape(x, (x.shape[0] // 4, 2, 2)))
    first, third = tl.split(first_and_third)
    second, fourth = tl.split(second_and_fourth)
    return first, second, third, fourth


@triton.jit
def _by_run(first, second, third, fourth):
    return tl.reshape(tl.join(tl.join(first, third), tl.join(second, fourth)), (4 * first.shape[0],))


@triton.jit
def _behind(x, last):
    """For each run what `x` is for the run behind it, and `last` for the block's last one."""
    run = tl.arange(0, x.shape[0])
    return tl.where(run == 0, last, tl.gather(x, tl.maximum(run - 1, 0), 0))


@triton.jit
def _of_first_run(x):
    run = tl.arange(0, x.shape[0])
    return tl.sum(tl.where(run == x.shape[0] - 1, x, 0.0), 0)


@triton.jit
def _at(pointer, start):
    """`pointer + start`, in a form that shows the compiler that it is a multiple of 16 bytes."""
    return tl.multiple_of(pointer + start, 16)


@triton.jit
def _inside(position, start, begin, end, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """Whether tokens of the block from `start`, a multiple of 16, are of the sequence. Where that begins and ends at
    multiples of 16 too, the compiler sees that four tokens are or are not together."""
    size = tl.minimum(end - start, BLOCK).to(tl.int32)
    if ALIGNED:
        return position < tl.multiple_of(size, 16)
    else:
        return (position < size) & (position >= tl.maximum(begin - start, 0).to(tl.int32))


@triton.jit
def _scored_and_done(mask, dones, start, position, inside):
    scored = inside
    if mask is not None:
        scored = tl.load(_at(mask, start) + position, mask=inside, other=0) != 0
    done = position < 0
    if dones is not None:
        done = tl.load(_at(dones, start) + position, mask=inside, other=0) != 0
    return scored, done


@triton.jit
def _scored_only(pointer, start, position, inside, scored, MASKED: tl.constexpr):
    """Unscored tokens may hold anything: they are replaced before any arithmetic."""
    x = tl.load(_at(pointer, start) + position, mask=inside, other=0.0).to(tl.float32)
    return tl.where(scored, x, 0.0) if MASKED else x


@triton.jit
def _values_right_behind(values, value, start, end, bootstrap, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """The next token's value where all are scored and no episode ends within a sequence."""
    left = tl.minimum(end - start, BLOCK + 4).to(tl.int32)
    position = _positions(BLOCK)
    _, second, third, fourth = _by_token(value)
    behind, _, _, _ = _by_token(position + 4)
    next_run = tl.load(values + start + behind, mask=behind < left, other=0.0).to(tl.float32)
    next_run = tl.where(behind < left, next_run, bootstrap)
    after = _by_run(second, third, fourth, next_run)
    # Where a sequence may end within a run.
    return after if ALIGNED else tl.where(position + 1 < left, after, bootstrap)


@triton.jit
def _next_values(value, scored, done, next_value):
    """The value of the next token that is scored or ends an episode, where `next_value` is that behind the block; and
    the one that the block passes back."""
    known = (scored | done).to(tl.int32)
    known0, known1, known2, known3 = _by_token(known)
    value0, value1, value2, value3 = _by_token(value)
    run = tl.arange(0, known0.shape[0])
    first = tl.where(known3 != 0, value3, tl.where(run == 0, next_value, 0.0))
    first = tl.where(known2 != 0, value2, first)
    first = tl.where(known1 != 0, value1, first)
    first = tl.where(known0 != 0, value0, first)
    _, first = tl.associative_scan((known0 | known1 | known2 | known3, first), 0, _pass_back)
    after3 = _behind(first, next_value)
    after2 = tl.where(known3 != 0, value3, after3)
    after1 = tl.where(known2 != 0, value2, after2)
    after0 = tl.where(known1 != 0, value1, after1)
    return _by_run(after0, after1, after2, after3), _of_first_run(first)


@triton.jit
def _composites(a, b, ENDS: tl.constexpr):
    """For each run a, as the sum of two floats, and b of all tokens from it to the block's end."""
    a0, a1, a2, a3 = _by_token(a)
    b0, b1, b2, b3 = _by_token(b)
    high, low = _times(a2, a3, 0.0, ENDS)
    high, low = _times(a1, high, low, ENDS)
    high, low = _times(a0, high, low, ENDS)
    run_b = _step(a0, b0, _step(a1, b1, _step(a2, b2, b3, ENDS), ENDS), ENDS)
    if ENDS:
        high, low, run_b = tl.associative_scan((high, low, run_b), 0, _compose_to_ends)
    else:
        high, low, run_b = tl.associative_scan((high, low, run_b), 0, _compose)
    return high + low, run_b


@triton.jit
def _scan(
    inputs, start, begin, end, next_value, bootstrap, coefficients,
    KIND: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """For each token of a block: whether it is scored, whether it ends an episode, its value, rho, a and b; for each
    run a and b of all tokens from it to the block's end; the value that the block passes back, if `next_value` is
    passed to it."""
    rewards, values, logprobs, behavior_logprobs, mask, dones = inputs
    next_value_weight, decay, _, rho_clip, c_clip = coefficients
    ENDS: tl.constexpr = dones is not None
    MASKED: tl.constexpr = mask is not None
    position = _positions(BLOCK)
    inside = _inside(position, start, begin, end, ALIGNED, BLOCK)
    scored, done = _scored_and_done(mask, dones, start, position, inside)
    b = _scored_only(rewards, start, position, inside, scored, MASKED)
    value = tl.zeros((BLOCK,), tl.float32)
    if KIND != DISCOUNTED_RETURNS:
        value = _scored_only(values, start, position, inside, scored, MASKED)
        if mask is None and dones is None:
            after = _values_right_behind(values, value, start, end, bootstrap, ALIGNED, BLOCK)
        else:
            after, next_value = _next_values(value, scored, done, next_value)
            if ENDS:
                after = tl.where(done, 0.0, after)
        if KIND != TD_LAMBDA:
            b -= value
        b += next_value_weight * after

    a = tl.zeros((BLOCK,), tl.float32) + decay
    rho = tl.full((BLOCK,), 1.0, tl.float32)
    if KIND == VTRACE:
        logprob = _scored_only(logprobs, start, position, inside, scored, MASKED)
        ratio = tl.exp(logprob - _scored_only(behavior_logprobs, start, position, inside, scored, MASKED))
        rho = tl.where(ratio > rho_clip, rho_clip, ratio)
        a = decay * tl.where(ratio > c_clip, c_clip, ratio)
        b = rho * b
    a = tl.where(scored, a, 1.0)
    if ENDS:
        a = tl.where(done, 0.0, a)
    b = tl.where(scored, b, 0.0)
    all_a, all_b = _composites(a, b, ENDS)
    return scored, done, value, rho, a, b, all_a, all_b, next_value


@triton.jit
def _store(pointer, start, position, result, factor, inside, PACKED: tl.constexpr):
    """`factor` is NaN where cu_seqlens are wrong."""
    tl.store(_at(pointer, start) + position, result * factor if PACKED else result, mask=inside)


@triton.jit
def _finish(
    block, outputs, statistics, factor, start, begin, end, slot, slots, gamma, y,
    KIND: tl.constexpr, ALIGNED: tl.constexpr, MASKED: tl.constexpr, ENDS: tl.constexpr, PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes a block's results and returns the y that it passes back. `y` is passed to it."""
    scored, done, value, rho, a, b, all_a, all_b, _ = block
    advantages, returns = outputs
    position = _positions(BLOCK)
    inside = _inside(position, start, begin, end, ALIGNED, BLOCK)
    a0, a1, a2, a3 = _by_token(a)
    b0, b1, b2, b3 = _by_token(b)
    of_runs = _step(all_a, all_b, y, ENDS)
    y4 = _behind(of_runs, y)
    y3 = _step(a3, b3, y4, ENDS)
    y2 = _step(a2, b2, y3, ENDS)
    y1 = _step(a1, b1, y2, ENDS)
    each = _by_run(_step(a0, b0, y1, ENDS), y1, y2, y3)
    if advantages is not None:
        advantage = each
        if KIND == VTRACE:
            after = tl.where(done, 0.0, _by_run(y1, y2, y3, y4))
            advantage = b + rho * gamma * after
        if MASKED:
            advantage = tl.where(scored, advantage, 0.0)
        _store(advantages, start, position, advantage, factor, inside, PACKED)
        result = value + each
        if statistics is not None:
            # In double, in which the square of no float overflows.
            count = tl.sum(tl.where(scored, 1.0, 0.0), 0)
            advantage = tl.where(scored, advantage, 0.0)
            mean = tl.sum(advantage.to(tl.float64), 0) / tl.maximum(count, 1.0)
            deviation = tl.where(scored, advantage - mean, 0.0)
            tl.store(statistics + slot, count)
            tl.store(statistics + slots + slot, mean)
            tl.store(statistics + 2 * slots + slot, tl.sum(deviation * deviation, 0))
    else:
        result = each
    if MASKED:
        result = tl.where(scored, result, 0.0)
    _store(returns, start, position, result, factor, inside, PACKED)
    return _of_first_run(of_runs)


# ---- sequences


@triton.jit
def _first_slot(begin, sequence, BLOCK: tl.constexpr):
    """The first slot of a sequence's blocks. The slots of no two sequences overlap, whatever their lengths."""
    return begin // BLOCK + sequence


@triton.jit
def _no_statistics(statistics, begin, end, sequence, BLOCK: tl.constexpr):
    """For the slots of a sequence that have no block."""
    used = _first_slot(begin, sequence, BLOCK) + tl.cdiv(end - begin // 16 * 16, BLOCK)
    for slot in range(used, _first_slot(end, sequence + 1, BLOCK)):
        tl.store(statistics + slot, 0.0)


@triton.jit
def _behind_the_last(bootstrap_values, sequence, KIND: tl.constexpr):
    """The value and y behind a sequence's last token."""
    value = 0.0
    if bootstrap_values is not None:
        value = tl.load(bootstrap_values + sequence).to(tl.float32)
    y = 0.0
    if KIND == DISCOUNTED_RETURNS or KIND == TD_LAMBDA:
        y = value
    return value, y


@triton.jit(do_not_specialize=_DO_NOT_SPECIALIZE)
def _sequence_kernel(
    inputs, sequences, outputs, statistics, coefficients, tokens: tl.int64, length: tl.int64, longest: tl.int64,
    slots: tl.int64, KIND: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A sequence, block by block from its end."""
    cu_seqlens, valid, bootstrap_values = sequences
    ENDS: tl.constexpr = inputs[5] is not None
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
    bootstrap, y = _behind_the_last(bootstrap_values, sequence, KIND)
    next_value = bootstrap + 0.0
    first_slot = _first_slot(begin, sequence, BLOCK)
    first = begin // 16 * 16
    blocks = tl.cdiv(end - first, BLOCK)
    for done_blocks in range(0, blocks):
        number = blocks - 1 - done_blocks
        start = first + number * BLOCK
        block = _scan(inputs, start, begin, end, next_value, bootstrap, coefficients, KIND, ALIGNED, BLOCK)
        next_value = block[8]
        y = _finish(
            block, outputs, statistics, factor, start, begin, end, first_slot + number, slots, coefficients[2], y,
            KIND, ALIGNED, inputs[4] is not None, ENDS, valid is not None, BLOCK,
        )  # fmt: skip
    if statistics is not None and factor == 1.0:
        _no_statistics(statistics, begin, end, sequence, BLOCK)


@triton.jit
def _place(cu_seqlens, tokens, length, count, steps, BLOCK: tl.constexpr):
    """The sequence and the block that a program of a grid over slots, or where all lengths are one over blocks, is for.
    There may be none: then the block lies behind the sequence's end."""
    program = tl.program_id(0).to(tl.int64)
    if cu_seqlens is None:
        blocks = tl.cdiv(length + 15, BLOCK)
        sequence = program // blocks
        block = program % blocks
    else:
        # The last sequence whose slots do not begin after this one.
        low = tl.zeros((), tl.int64)
        high = low + count
        for _ in range(steps):
            searching = low < high
            # Within the sequences, so that it can be read also once the search is over.
            middle = tl.minimum((low + high) // 2, count - 1)
            begin, _ = bounds(middle, cu_seqlens, tokens, length)
            here = _first_slot(begin, middle, BLOCK) <= program
            low = tl.where(searching & here, middle + 1, low)
            high = tl.where(searching & (here == 0), middle, high)
        sequence = tl.maximum(low - 1, 0)
        begin, _ = bounds(sequence, cu_seqlens, tokens, length)
        block = program - _first_slot(begin, sequence, BLOCK)
    return sequence, block


@triton.jit
def _serves(valid, start, begin, end, longest):
    """Whether a sequence is one of the long ones, has a block from `start`, and is known to be one."""
    serves = (end - begin > longest) & (start > begin - 16) & (start < end)
    if valid is not None:
        serves = serves & (tl.load(valid) == 1.0)
    return serves


@triton.jit
def _first_value_behind(inputs, start, end, bootstrap, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """The value of the first token from `start` that is scored or ends an episode; most often the very first is."""
    _, values, _, _, mask, dones = inputs
    position = tl.arange(0, BLOCK)
    next_value = bootstrap + 0.0
    if KIND != DISCOUNTED_RETURNS and (mask is not None or dones is not None):
        searching = start < end
        while searching:
            scored, done = _scored_and_done(mask, dones, start, position, position < end - start)
            first = tl.min(tl.where(scored | done, position, BLOCK), 0)
            at_first = scored & (position == first)
            value = tl.load(values + start + position, mask=at_first, other=0.0).to(tl.float32)
            next_value = tl.where(first < BLOCK, tl.sum(tl.where(at_first, value, 0.0), 0), next_value)
            start += BLOCK
            searching = (first == BLOCK) & (start < end)
    return next_value


@triton.jit(do_not_specialize=_DO_NOT_SPECIALIZE)
def _reduce_kernel(
    inputs, sequences, composites, coefficients, tokens: tl.int64, length: tl.int64, count: tl.int64, steps: tl.int32,
    longest: tl.int64, slots: tl.int64, KIND: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """For a block of a long sequence: a and b of all its tokens, and the value passed to it."""
    cu_seqlens, valid, bootstrap_values = sequences
    sequence, block = _place(cu_seqlens, tokens, length, count, steps, BLOCK)
    begin, end = bounds(sequence, cu_seqlens, tokens, length)
    start = begin // 16 * 16 + block * BLOCK
    if not _serves(valid, start, begin, end, longest):
        return
    bootstrap, _ = _behind_the_last(bootstrap_values, sequence, KIND)
    next_value = _first_value_behind(inputs, start + BLOCK, end, bootstrap, KIND, BLOCK)
    block_of_tokens = _scan(
        inputs, start, begin, end, next_value, bootstrap, coefficients, KIND, ALIGNED, BLOCK
    )  # fmt: skip
    slot = _first_slot(begin, sequence, BLOCK) + block
    tl.store(composites + slot, _of_first_run(block_of_tokens[6]))
    tl.store(composites + slots + slot, _of_first_run(block_of_tokens[7]))
    tl.store(composites + 2 * slots + slot, next_value)


@triton.jit
def _through_following(composites, slots, blocks, y, ENDS: tl.constexpr, FOLD: tl.constexpr):
    """What `blocks` blocks make of the y behind them, from the last to the first, as _sequence_kernel does."""
    for last in range(0, blocks, FOLD):
        for step in tl.static_range(FOLD):
            block = blocks - 1 - last - step
            a = tl.load(composites + block, mask=block >= 0, other=1.0)
            b = tl.load(composites + slots + block, mask=block >= 0, other=0.0)
            y = tl.where(block >= 0, _step(a, b, y, ENDS), y)
    return y


@triton.jit(do_not_specialize=_DO_NOT_SPECIALIZE)
def _apply_kernel(
    inputs, sequences, composites, outputs, statistics, coefficients, tokens: tl.int64, length: tl.int64,
    count: tl.int64, steps: tl.int32, longest: tl.int64, slots: tl.int64,
    KIND: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """A block of a long sequence, once the composites of the blocks behind it are known."""
    cu_seqlens, valid, bootstrap_values = sequences
    ENDS: tl.constexpr = inputs[5] is not None
    sequence, number = _place(cu_seqlens, tokens, length, count, steps, BLOCK)
    begin, end = bounds(sequence, cu_seqlens, tokens, length)
    first = begin // 16 * 16
    start = first + number * BLOCK
    if not _serves(valid, start, begin, end, longest):
        return
    slot = _first_slot(begin, sequence, BLOCK) + number
    bootstrap, y = _behind_the_last(bootstrap_values, sequence, KIND)
    next_value = tl.load(composites + 2 * slots + slot)
    block = _scan(inputs, start, begin, end, next_value, bootstrap, coefficients, KIND, ALIGNED, BLOCK)
    following = (tl.cdiv(end - first, BLOCK) - 1 - number).to(tl.int32)
    y = _through_following(composites + slot + 1, slots, following, y, ENDS, FOLD)
    _finish(
        block, outputs, statistics, 1.0, start, begin, end, slot, slots, coefficients[2], y,
        KIND, ALIGNED, inputs[4] is not None, ENDS, False, BLOCK,
    )  # fmt: skip
    if statistics is not None and number == 0:
        _no_statistics(statistics, begin, end, sequence, BLOCK)


# ---- whitening


@triton.jit(do_not_specialize=["statistics", "moments", "slots"])
def _moments_kernel(statistics, moments, slots: tl.int64, BLOCK: tl.constexpr):
    """Mean and 1 / sqrt(variance + eps) of all advantages, from count, mean and squared deviations of each block; 0
    where fewer than two are scored. Both in the unit of whitening_unit, which is the third."""
    counts = tl.zeros((BLOCK,), tl.float64)
    sums = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, slots, BLOCK):
        slot = first + tl.arange(0, BLOCK)
        count = tl.load(statistics + slot, mask=slot < slots, other=0.0)
        mean = tl.load(statistics + slots + slot, mask=(slot < slots) & (count > 0.0), other=0.0)
        counts += count
        sums += count * mean
    total = tl.sum(counts, 0)
    mean = tl.sum(sums, 0) / tl.maximum(total, 1.0)
    squares = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, slots, BLOCK):
        slot = first + tl.arange(0, BLOCK)
        count = tl.load(statistics + slot, mask=slot < slots, other=0.0)
        there = (slot < slots) & (count > 0.0)
        distance = tl.load(statistics + slots + slot, mask=there, other=0.0) - mean
        within = tl.load(statistics + 2 * slots + slot, mask=there, other=0.0)
        squares += within + tl.where(there, count * distance * distance, 0.0)
    variance = tl.sum(squares, 0) / tl.maximum(total - 1.0, 1.0)
    unit = whitening_unit(variance)
    scale = 1.0 / (tl.sqrt(variance + WHITEN_EPS) * unit)
    tl.store(moments, (mean * unit).to(tl.float32))
    tl.store(moments + 1, tl.where(total > 1.0, scale, 0.0).to(tl.float32))
    tl.store(moments + 2, unit)


@triton.jit(do_not_specialize=["advantages", "mask", "valid", "moments", "tokens"])
def _whiten_kernel(advantages, mask, valid, moments, tokens: tl.int64, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    position = tl.arange(0, BLOCK)
    inside = _inside(position, start, start, tokens, ALIGNED, BLOCK)
    scored, _ = _scored_and_done(mask, None, start, position, inside)
    advantage = _scored_only(advantages, start, position, inside, scored, mask is not None)
    scale = tl.load(moments + 1)
    whitened = tl.where(scored, (advantage * tl.load(moments + 2) - tl.load(moments)) * scale, 0.0)
    whitened = tl.where(scale == 0.0, 0.0, whitened)
    if valid is not None:
        whitened *= tl.load(valid)
    tl.store(_at(advantages, start) + position, whitened, mask=inside)


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
    kind: int,
    gamma: float,
    lam: float,
    rho_clip: float,
    c_clip: float,
    whiten: bool,
) -> tuple[Tensor, Tensor]:
    tokens = rewards.numel()
    if cu_seqlens is None:
        count, length = rewards.shape
    else:
        count, length = cu_seqlens.shape[0] - 1, 0
    returns = torch.empty_like(rewards, dtype=torch.float32)
    has_advantages = kind in (GAE.value, VTRACE.value)
    advantages = torch.empty_like(returns) if has_advantages else returns.new_empty(0)
    if not tokens:
        return advantages, returns

    slots = tokens // BLOCK + count
    inputs = tuple(map(aligned, (rewards, values, logprobs, behavior_logprobs, mask, dones)))
    sequences = (cu_seqlens, valid_sequences(cu_seqlens, tokens), bootstrap_values)
    outputs = (advantages if has_advantages else None, returns)
    statistics = returns.new_empty(3, slots, dtype=torch.float64) if whiten else None
    coefficients = (
        gamma * (1.0 - lam) if kind == TD_LAMBDA.value else gamma,
        gamma if kind == DISCOUNTED_RETURNS.value else gamma * lam,
        *(gamma, rho_clip, c_clip),
    )
    even = cu_seqlens is None and length % 16 == 0
    variant = dict(KIND=kind, ALIGNED=even, BLOCK=BLOCK, num_warps=num_warps("scan"))
    longest = LONGEST_OF_FEW if count < FEW_SEQUENCES else LONGEST_OF_MANY
    if cu_seqlens is not None or length <= longest:
        _sequence_kernel[(count,)](
            inputs, sequences, outputs, statistics, coefficients, tokens, length, longest, slots, **variant
        )
    if (tokens if cu_seqlens is not None else length) > longest:
        composites = returns.new_empty(3, slots)
        grid = (slots if cu_seqlens is not None else count * triton.cdiv(length + 15, BLOCK),)
        sizes = (tokens, length, count, count.bit_length(), longest, slots)
        _reduce_kernel[grid](inputs, sequences, composites, coefficients, *sizes, **variant)
        _apply_kernel[grid](
            inputs, sequences, composites, outputs, statistics, coefficients, *sizes, **variant, FOLD=FOLD
        )
    if statistics is not None:
        moments = returns.new_empty(3)
        _moments_kernel[(1,)](statistics, moments, slots, BLOCK=TOKENS, num_warps=num_warps("tokens"))
        _whiten_kernel[(triton.cdiv(tokens, TOKENS),)](
            *(advantages, inputs[4], sequences[1], moments, tokens),
            ALIGNED=tokens % 16 == 0,
            BLOCK=TOKENS,
            num_warps=num_warps("tokens"),
        )
    return advantages, returns
