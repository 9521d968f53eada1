"""Runs every Triton kernel, under the interpreter, on tensors with forbidden memory right before or right after them.

A program of its own, because an access out of range ends it: `python triton_bounds.py before|after
[thorough]` prints each case that it begins.
"""

import ctypes
import itertools
import math
import mmap
import sys

import torch
from torch.overrides import TorchFunctionMode
from triton.runtime import interpreter

from rlkernels._codes import (
    AGGREGATIONS,
    BASELINES,
    DIVERGENCES,
    KL_ESTIMATORS,
    OBJECTIVES,
    RECURRENCES,
    SAMPLER_CORRECTIONS,
    SCALES,
)
from rlkernels.triton import (
    _token_losses,
    groups,
    kl,
    kl_divergence,
    logprobs,
    masked,
    policy_loss,
    recurrence,
    value_loss,
)
from triton_interpreter import scalars_count, scan_in_steps

PAGE = mmap.PAGESIZE
PROT_NONE = 0  # of <sys/mman.h>
_libc = ctypes.CDLL(None, use_errno=True)


def guarded(tensor: torch.Tensor, *, after: bool) -> torch.Tensor:
    """A copy that ends where a forbidden page begins, or begins where one ends."""
    size = tensor.numel() * tensor.element_size()
    if not size:
        return tensor
    pages = math.ceil(size / PAGE)
    memory = mmap.mmap(-1, (pages + 2) * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for forbidden in (start, start + (pages + 1) * PAGE):
        if _libc.mprotect(ctypes.c_void_p(forbidden), ctypes.c_size_t(PAGE), PROT_NONE):
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = (pages + 1) * PAGE - size if after else PAGE
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset).view(tensor.shape)
    return copy.copy_(tensor)


class GuardedOutputs(TorchFunctionMode):
    """What the launchers allocate is guarded too."""

    def __init__(self, after: bool) -> None:
        self.after = after

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in (torch.empty, torch.empty_like, torch.Tensor.new_empty, torch.Tensor.new_zeros):
            with torch._C.DisableTorchFunction():
                return guarded(result if func is torch.Tensor.new_zeros else result.fill_(1), after=self.after)
        return result


def run_all(after: bool, whole: bool) -> None:
    def guard(values) -> torch.Tensor:
        return guarded(values if isinstance(values, torch.Tensor) else torch.tensor(values), after=after)

    for vocab_size in (1, 31, 64, 4097):
        for softcap in (0.0, 30.0) if whole else (30.0,):
            print(f"token_logprobs {vocab_size=} {softcap=}", flush=True)
            ids = [0, vocab_size - 1, vocab_size, -1, -100, 2**31 + 1, 2**40, -(2**40), 2**62, -(2**63)]
            logits = guard(torch.randn(1, len(ids), vocab_size).bfloat16())
            token_ids = guard([ids])
            saved = logprobs.token_logprobs_forward(logits, token_ids, 0.7, softcap, -100, True)
            grads = guard(torch.randn(1, len(ids))), guard(torch.randn(1, len(ids)))
            for backward in (logprobs.token_logprobs_backward, logprobs.token_logprobs_backward_):
                backward(*grads, logits, token_ids, *saved, 0.7, softcap, -100)

    start, rows = 1000, 9
    for size in (1, 31, 64, 4097):
        for dtype, gradient in ((torch.float32, torch.bfloat16), (torch.bfloat16, None)):
            print(f"token_logprobs_part {size=} {dtype} {gradient}", flush=True)
            tile = guard(torch.randn(rows, size).to(dtype))
            inside = [start, start + size - 1]
            token_ids = guard([*inside, start - 1, start + size, -100, 2**32 + start, -(2**40), 2**62, -(2**63)])
            logprobs.token_logprobs_part(tile, token_ids, start, 0.7, 0.0, -100, True)
            numbers = [guard(torch.randn(rows)) for _ in range(4)]
            output = tile if gradient is None else guard(torch.empty(rows, size, dtype=gradient))
            logprobs.token_logprobs_part_backward(
                *numbers[:2], tile, token_ids, start, *numbers[2:], guard(torch.randn(2, rows)), 0.7, 0.0, -100, output
            )

    for size in (1, 31, 64, 4097):
        for dtype, teacher_dtype in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)):
            print(f"kl_divergence {size=} {dtype} {teacher_dtype}", flush=True)
            tile, teacher_tile = (guard(torch.randn(3, size).to(d)) for d in (dtype, teacher_dtype))
            stats, numbers = [guard(torch.randn(2, 3)) for _ in range(2)], [guard(torch.randn(3)) for _ in range(2)]
            for kind in DIVERGENCES if whole or size < 1000 else ("js",):
                options = (DIVERGENCES.index(kind), 0.3, 0.7, 0.7, 30.0, 0.0)
                kl_divergence.kl_divergence_part(tile, teacher_tile, *stats, *options)
                output = tile if kind == "forward" else guard(torch.empty(3, size, dtype=torch.bfloat16))
                kl_divergence.kl_divergence_part_backward(*numbers, tile, teacher_tile, *stats, *options, output)

    print("kl_penalty", flush=True)
    values = guard(torch.randn(1027))
    for estimator in range(len(KL_ESTIMATORS)):
        kl.kl_penalty_forward(values, values, estimator, False, math.inf, math.inf)
        kl.kl_penalty_backward(values, values, values, estimator, False, math.inf, math.inf, True)

    print("group_advantages", flush=True)
    rewards, weights = guard(torch.randn(70, 3)), guard(torch.randn(3))
    order, offsets = guard(torch.randperm(70)), guard([0, 3, *[70] * 69])
    for before_sum in (False, True):
        for scale in range(len(SCALES)):
            options = (BASELINES.index("leave_one_out"), scale, 1e-4, before_sum, False)
            groups.group_advantages(rewards, weights, None, None, 70, *options)
            groups.group_advantages(rewards, weights, order, offsets, 1, *options)

    print("token_loss_backward", flush=True)
    for tokens in (1, 1027):
        grads = guard(torch.randn(tokens)), guard(torch.randn(tokens))
        _token_losses.token_loss_backward(*grads, guard(torch.tensor(2.0)), guard(torch.tensor(2.0)), 1, 3)

    print("masked", flush=True)
    for length in (1, 1027):
        x, mask = guard(torch.randn(3, length)), guard(torch.rand(3, length) > 0.5)
        masked.masked_mean(x, mask)
        masked.masked_whiten(x, mask, masked.masked_moments(x, mask), False, 1e-8, True, False)

    for rows, tokens in ((1, 1027), (3, 1025), (1030, 1)):
        print(f"shaped_rewards {rows=} {tokens=}", flush=True)
        values, mask = guard(torch.randn(rows, tokens)), guard(torch.rand(rows, tokens) > 0.999)
        kl.shaped_rewards(guard(torch.randn(rows)), values, values, mask, None, 0.1, KL_ESTIMATORS.index("k1"), True)

    tokens = 1027
    for number, starts in enumerate(
        (
            [0, 500, 500, tokens],
            [5, 3, -7, 2**31 - 1],
            [-(2**31)] * 4,
            [2**31 - 1] * 4,
            [tokens, tokens, 0, 0],
            [7],
        )
    ):
        print(f"shaped_rewards cu_seqlens={starts}", flush=True)
        for after_last in (False, True):
            for scored in (0.0, 0.5, 1.0):
                kl.shaped_rewards(
                    guard(torch.randn(len(starts) - 1)),
                    guard(torch.randn(tokens)),
                    guard(torch.randn(tokens)),
                    guard(torch.rand(tokens) < scored),
                    guard(torch.tensor(starts, dtype=torch.int32)),
                    *(0.1, KL_ESTIMATORS.index("k3"), after_last),
                )

        print(f"policy_loss, value_loss cu_seqlens={starts}", flush=True)
        packed = guard(torch.tensor(starts, dtype=torch.int32))
        mask = guard(torch.rand(tokens) > 0.5)
        numbers = [guard(torch.randn(tokens)) for _ in range(5)]
        objectives = [OBJECTIVES.index(name) for name in ("ppo", "gspo", "gmpo", "vespo")]
        one = [(number % 4, objectives[number % 4])]
        for aggregation, objective in itertools.product(range(len(AGGREGATIONS)), objectives) if whole else one:
            old, ref, sampler, entropy, values = numbers
            advantages = guard(torch.randn(len(starts) - 1))
            estimator, correction = KL_ESTIMATORS.index("k3"), SAMPLER_CORRECTIONS.index("sequence_mask")
            options = (0.2, 0.2, math.inf, math.inf, math.inf, 2.0, 3.0, 3.0, 2.0, 0.1, estimator, False, 0.1)
            policy_loss.policy_loss_forward(
                *(values, old, advantages, mask, packed, ref, sampler, entropy, None, 0.0, aggregation, objective),
                *(*options, correction, 3.0, True, True),
            )
            value_loss.value_loss_forward(values, old, ref, mask, packed, None, 0.0, aggregation, 0.2, True)

    interpreter.ScanOps.generic_scan = scan_in_steps
    recurrence.BLOCK, recurrence.LONGEST_OF_FEW, recurrence.FOLD = 64, 70, 2
    for starts in (
        None,
        [0, 50, 50, 117],
        [5, 3, -7, 2**31 - 1],
        [-(2**31)] * 4,
        [2**31 - 1] * 4,
        [117, 117, 0, 0],
    ):
        print(f"recurrence cu_seqlens={starts}", flush=True)
        shape = (117,) if starts else (1, 117)
        for kind in ("gae", "discounted_returns", "vtrace"):
            recurrence.recurrence(
                guard(torch.randn(shape)),
                guard(torch.randn(shape)) if kind != "discounted_returns" else None,
                guard(torch.randn(shape)) if kind == "vtrace" else None,
                guard(torch.randn(shape)) if kind == "vtrace" else None,
                guard(torch.rand(shape) > 0.5),
                guard(torch.rand(shape) > 0.9),
                guard(torch.tensor(starts, dtype=torch.int32)) if starts else None,
                guard(torch.randn(len(starts) - 1 if starts else 1)),
                *(RECURRENCES.index(kind), 0.9, 0.9, 1.0, 1.0, kind == "gae"),
            )


if __name__ == "__main__":
    interpreter._patch_lang_tensor = scalars_count(interpreter._patch_lang_tensor)
    after = sys.argv[1] == "after"
    with GuardedOutputs(after):
        run_all(after, whole=sys.argv[2:] == ["thorough"])
    print("done", flush=True)
