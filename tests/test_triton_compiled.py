"""Every Triton kernel, compiled for NVIDIA and AMD GPUs without one: no spills, 16-byte loads, no needless variants."""

import ast
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from triton_interpreter import INTERPRETED

if INTERPRETED:
    pytest.skip("kernels do not compile in a process with TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")

from cases import thorough
from gpu_assembly import (
    BARRIER,
    LOAD,
    MEMORY_SPILL,
    SPILL,
    STORE,
    TARGETS,
    WIDE_LOAD,
    WIDE_STORE,
    compile_for,
    count,
    disassemble,
    grids_for,
    innermost_loop_with_loads,
    innermost_loops_with_loads,
    instructions,
    variants_for,
)
from launches import Seen
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
from rlkernels.ops.lm_head.tiles import PADDING, range_of
from rlkernels.triton import _token_losses, groups, kl, lm_head, logprobs, masked, policy_loss, recurrence, value_loss
from rlkernels.triton import kl_divergence as kl_divergences

INF = math.inf


@pytest.fixture(scope="session")
def compiled_kernels(tmp_path_factory):
    """Where kernels are that several cases launch: they are compiled once. New at each run."""
    return str(tmp_path_factory.mktemp("kernels"))


@pytest.fixture
def compile_launches(monkeypatch, compiled_kernels):
    """compile_launches(target, launch): what running `launch` compiles, by the kernels' names."""
    monkeypatch.setenv("TRITON_CACHE_DIR", compiled_kernels)
    return compile_for


def empty(*shape: int, dtype: torch.dtype = torch.float32, strides: tuple[int, ...] | None = None) -> torch.Tensor:
    if strides is None:
        return torch.empty(shape, dtype=dtype, device="meta")
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta")


def token_logprobs(
    dtype: torch.dtype,
    vocab_size: int = 49152,
    *,
    rows: tuple[int, int] = (2, 3),
    strides: tuple[int, int] | None = None,
    temperature: float = 1.0,
    softcap: float = 0.0,
    entropy: bool = False,
    inplace: bool = False,
) -> None:
    logits = empty(*rows, vocab_size, dtype=dtype, strides=(*strides, 1) if strides else None)
    token_ids = empty(*rows, dtype=torch.int64)
    options = (temperature, softcap, -100)
    saved = logprobs.token_logprobs_forward(logits, token_ids, *options, entropy)
    grads = (empty(*rows), empty(*rows) if entropy else None)
    backward = logprobs.token_logprobs_backward_ if inplace else logprobs.token_logprobs_backward
    backward(*grads, logits, token_ids, *saved, *options)


def token_logprobs_part(
    dtype: torch.dtype,
    vocab_size: int = 8192,
    *,
    gradient: torch.dtype | None = None,
    rows: int = 6,
    stride: int | None = None,
    vocab_start: int = 8192,
    temperature: float = 1.0,
    softcap: float = 0.0,
    entropy: bool = False,
) -> None:
    """In place, or with a gradient of a dtype of its own."""
    logits = empty(rows, vocab_size, dtype=dtype, strides=(stride, 1) if stride else None)
    token_ids, options = empty(rows, dtype=torch.int64), (temperature, softcap, -100)
    logprobs.token_logprobs_part(logits, token_ids, vocab_start, *options, entropy)
    grads = (empty(rows), empty(rows) if entropy else None)
    saved = (empty(rows), empty(rows), empty(2, rows))
    output = empty(rows, vocab_size, dtype=gradient) if gradient else logits
    logprobs.token_logprobs_part_backward(*grads, logits, token_ids, vocab_start, *saved, *options, output)


def head(
    rows: int = 8192,
    tokens: int = 151_936,
    width: int = 4096,
    *,
    dtype: torch.dtype = torch.bfloat16,
    softcap: float = 0.0,
    bias: bool = False,
    entropy: bool = False,
) -> None:
    """The kernels of the fused head: the sums of all logits, and the gradient of a range of them."""
    factors = (empty(rows, width, dtype=dtype), empty(tokens, width, dtype=dtype), empty(tokens) if bias else None)
    token_ids, options = empty(rows, dtype=torch.int64), (0.7, softcap)
    lm_head.linear_token_logprobs_sums(*factors, token_ids, *options, entropy)
    saved = (empty(rows), empty(rows), empty(2, rows))
    upstream = (empty(rows), empty(rows) if entropy else None)
    tokens = min(tokens, range_of(rows))
    lm_head.linear_token_logprobs_gradient(*upstream, *factors, token_ids, *saved, 0, tokens, *options, PADDING)


def kl_divergence(
    dtype: torch.dtype,
    vocab_size: int = 8192,
    *,
    kind: str = "forward",
    teacher: torch.dtype | None = None,
    gradient: torch.dtype | None = None,
    rows: int = 6,
    stride: int | None = None,
    temperature: float = 1.0,
    softcap: float = 0.0,
    teacher_softcap: float = 0.0,
) -> None:
    """In place, or with a gradient of a dtype of its own."""
    student = empty(rows, vocab_size, dtype=dtype, strides=(stride, 1) if stride else None)
    tiles = (student, empty(rows, vocab_size, dtype=teacher or dtype))
    options = (DIVERGENCES.index(kind), 0.3, temperature, temperature, softcap, teacher_softcap)
    stats = (empty(2, rows), empty(2, rows))
    kl_divergences.kl_divergence_part(*tiles, *stats, *options)
    output = empty(rows, vocab_size, dtype=gradient) if gradient else student
    kl_divergences.kl_divergence_part_backward(empty(rows), empty(rows), *tiles, *stats, *options, output)


def kl_penalty(estimator: str, straight_through: bool = False) -> None:
    values = empty(4, 4096)
    options = (KL_ESTIMATORS.index(estimator), straight_through, INF, INF)
    kl.kl_penalty_forward(values, values, *options)
    kl.kl_penalty_backward(values, values, values, *options, True)


def shaped_rewards(
    *,
    length: int = 4096,
    rows: int = 16,
    packed: bool = False,
    with_mask: bool = True,
    estimator: str = "k1",
    after_last: bool = False,
) -> None:
    shape = (rows * length,) if packed else (rows, length)
    kl.shaped_rewards(
        empty(rows),
        empty(*shape),
        empty(*shape),
        empty(*shape, dtype=torch.bool) if with_mask else None,
        empty(rows + 1, dtype=torch.int32) if packed else None,
        0.1,
        KL_ESTIMATORS.index(estimator),
        after_last,
    )


def group_advantages(
    *,
    ragged: bool = False,
    weighted: bool = False,
    baseline: str = "mean",
    scale: str = "group",
    before_sum: bool = False,
) -> None:
    order, offsets = (empty(64, dtype=torch.int64), empty(65, dtype=torch.int64)) if ragged else (None, None)
    weights = empty(3) if weighted else None
    options = (BASELINES.index(baseline), SCALES.index(scale), 1e-4, before_sum, False)
    groups.numbers_on_device([1.0, 0.5, 2.0], empty(64, 3))
    groups.group_segments(empty(64, dtype=torch.int64))
    groups.group_advantages(empty(64, 3), weights, order, offsets, 8, *options)


def policy(
    *,
    packed: bool = False,
    old: bool = True,
    masked: bool = True,
    ref: bool = False,
    per_token: bool = False,
    objective: str = "ppo",
    aggregation: str = "token_mean",
    normalizer: float | None = None,
    estimator: str = "k3",
    sampler: str | None = None,
    entropy: bool = False,
    shape: tuple[int, int] = (16, 4096),
) -> None:
    sequences = shape[0]
    if packed:
        shape = (math.prod(shape),)
    _, _, *grads, scale = policy_loss.policy_loss_forward(
        empty(*shape),
        empty(*shape) if old else None,
        empty(*shape) if per_token else empty(sequences),
        empty(*shape, dtype=torch.bool) if masked else None,
        empty(sequences + 1, dtype=torch.int32) if packed else None,
        empty(*shape) if ref else None,
        empty(*shape) if sampler is not None else None,
        empty(*shape) if entropy else None,
        empty() if normalizer == 0 else None,
        normalizer or 0.0,
        AGGREGATIONS.index(aggregation),
        OBJECTIVES.index(objective),
        *(0.2, 0.2, INF, INF, INF, 2.0, 3.0, 3.0, 2.0, 0.1),
        KL_ESTIMATORS.index(estimator),
        False,
        0.1 if entropy else 0.0,
        SAMPLER_CORRECTIONS.index(sampler) if sampler else 0,
        3.0,
        True,
        entropy,
    )
    _token_losses.token_loss_backward(*grads, scale, empty(), 0, 0)


def value(*, packed: bool = False, old: bool = True, masked: bool = True, aggregation: str = "token_mean") -> None:
    shape = (65536,) if packed else (16, 4096)
    value_loss.value_loss_forward(
        empty(*shape),
        empty(*shape) if old else None,
        empty(*shape),
        empty(*shape, dtype=torch.bool) if masked else None,
        empty(17, dtype=torch.int32) if packed else None,
        None,
        0.0,
        AGGREGATIONS.index(aggregation),
        0.2,
        True,
    )


def masked_ops(
    length: int = 4096,
    *,
    rows: int = 16,
    with_mask: bool = True,
    shift_mean: bool = True,
    unbiased: bool = True,
    eps_floor: bool = False,
) -> None:
    x, mask = empty(rows, length), empty(rows, length, dtype=torch.bool) if with_mask else None
    _, scale = masked.masked_mean(x, mask)
    masked.masked_mean_backward(empty(rows), scale, mask, length, 0)
    masked.masked_whiten(x, mask, masked.masked_moments(x, mask), shift_mean, 1e-8, unbiased, eps_floor)


def recur(
    kind: str,
    shape: tuple[int, ...] = (1024, 4096),
    *,
    masked: bool = True,
    dones: bool = False,
    packed: int = 0,
    bootstrap: bool = True,
    whiten: bool = False,
    gamma: float = 0.99,
) -> None:
    recurrence.recurrence(
        empty(*shape),
        empty(*shape) if kind != "discounted_returns" else None,
        empty(*shape) if kind == "vtrace" else None,
        empty(*shape) if kind == "vtrace" else None,
        empty(*shape, dtype=torch.bool) if masked else None,
        empty(*shape, dtype=torch.bool) if dones else None,
        empty(packed + 1, dtype=torch.int32) if packed else None,
        empty(packed or shape[0]) if bootstrap else None,
        *(RECURRENCES.index(kind), gamma, 0.95, 1.0, 1.0, whiten),
    )


# name: launches, and the 16-byte loads that each thread of a kernel makes, "loop" where they are a loop's only loads.
LOGPROBS_LOADS = {"logprobs._forward_kernel": "loop", "logprobs._backward_kernel": "loop"}
DIVERGENCE_LOADS = {"kl_divergence._part_kernel": "loop", "kl_divergence._part_backward_kernel": "loop"}
KL_LOADS = {"kl._forward_kernel": 2, "kl._backward_kernel": 3}
MASKED_LOADS = {"masked._sums_kernel": 1, "masked._block_moments_kernel": 1, "masked._whiten_kernel": 1}
CASES: dict[str, tuple[Callable[[], None], dict]] = {
    **{
        f"token_logprobs {str(dtype).removeprefix('torch.')} {name}": (
            lambda dtype=dtype, options=options: token_logprobs(dtype, **options),
            LOGPROBS_LOADS if "vocab_size" not in options else {},
        )
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        for name, options in {
            "plain": {},
            "in place": dict(inplace=True),
            "entropy": dict(entropy=True),
            "softcap": dict(softcap=30.0),
            "softcap entropy": dict(softcap=30.0, entropy=True),
            "odd": dict(vocab_size=50257),
            "odd softcap entropy": dict(vocab_size=50257, softcap=30.0, entropy=True),
        }.items()
    },
    **{
        f"token_logprobs_part {str(dtype).removeprefix('torch.')} {name}": (
            lambda dtype=dtype, options=options: token_logprobs_part(dtype, **options),
            LOGPROBS_LOADS if "vocab_size" not in options else {},
        )
        for dtype, options_of in {
            torch.float32: {
                "in place": {},
                "entropy": dict(entropy=True),
                "bfloat16 gradient": dict(gradient=torch.bfloat16),
                "bfloat16 gradient entropy": dict(gradient=torch.bfloat16, entropy=True),
                "bfloat16 gradient softcap entropy": dict(gradient=torch.bfloat16, softcap=30.0, entropy=True),
                "float16 gradient": dict(gradient=torch.float16),
                "bfloat16 gradient odd": dict(gradient=torch.bfloat16, vocab_size=8191, softcap=30.0, entropy=True),
            },
            torch.bfloat16: {"in place": {}, "softcap entropy": dict(softcap=30.0, entropy=True)},
        }.items()
        for name, options in options_of.items()
    },
    "token_logprobs_join": (lambda: logprobs.token_logprobs_join(empty(11, 4, 600), 0.7), {}),
    **{
        f"linear_token_logprobs {name}": (lambda options=options: head(**options), {})
        for name, options in {
            "plain": {},
            "entropy softcap bias": dict(entropy=True, softcap=30.0, bias=True),
            "odd": dict(width=4095, entropy=True),
        }.items()
    },
    "token_logprobs_finish": (lambda: logprobs.token_logprobs_finish(empty(11, 4, 600), 0.7), {}),
    **{
        f"kl_divergence {kind} {str(dtype).removeprefix('torch.')} {name}": (
            lambda dtype=dtype, kind=kind, options=options: kl_divergence(dtype, kind=kind, **options),
            DIVERGENCE_LOADS if "vocab_size" not in options else {},
        )
        for kind in DIVERGENCES
        for dtype, name, options in (
            (torch.float32, "plain", {}),
            (torch.bfloat16, "plain", {}),
            (torch.bfloat16, "softcap", dict(softcap=30.0, teacher_softcap=30.0)),
            (torch.bfloat16, "odd softcap", dict(vocab_size=257, softcap=30.0)),
        )
    },
    "kl_divergence as on a GPU": (
        lambda: kl_divergence(torch.float32, kind="js", gradient=torch.bfloat16),
        DIVERGENCE_LOADS,
    ),
    "kl_divergence of two dtypes": (
        lambda: kl_divergence(torch.bfloat16, kind="js", teacher=torch.float16, teacher_softcap=30.0),
        DIVERGENCE_LOADS,
    ),
    "kl_penalty k1": (lambda: kl_penalty("k1"), KL_LOADS),
    "kl_penalty k2": (lambda: kl_penalty("k2"), KL_LOADS),
    "kl_penalty k3": (lambda: kl_penalty("k3"), KL_LOADS),
    "kl_penalty abs": (lambda: kl_penalty("abs"), KL_LOADS),
    "kl_penalty k3+": (lambda: kl_penalty("k3", straight_through=True), KL_LOADS),
    "shaped_rewards": (lambda: shaped_rewards(), {"kl._rewards_kernel": 2}),
    "shaped_rewards k3": (lambda: shaped_rewards(estimator="k3", with_mask=False), {"kl._rewards_kernel": 2}),
    "shaped_rewards odd": (lambda: shaped_rewards(length=33, rows=1, estimator="k2"), {}),
    "shaped_rewards packed": (
        lambda: shaped_rewards(packed=True, after_last=True, estimator="abs"),
        {"kl._rewards_kernel": 2},
    ),
    "group_advantages": (lambda: group_advantages(), {}),
    "group_advantages ragged batch": (
        lambda: group_advantages(ragged=True, weighted=True, baseline="leave_one_out", scale="batch"),
        {},
    ),
    "group_advantages before sum": (lambda: group_advantages(weighted=True, scale="batch", before_sum=True), {}),
    "masked": (lambda: masked_ops(), MASKED_LOADS),
    "masked unmasked": (
        lambda: masked_ops(with_mask=False, shift_mean=False, unbiased=False, eps_floor=True),
        MASKED_LOADS,
    ),
    "masked odd": (lambda: masked_ops(33, rows=1), {}),
    **{
        f"{name} {case}": (
            lambda name=name, options=options: recur(name, **options),
            {f"recurrence.{kernel}": inputs for kernel in kernels},
        )
        for name, inputs in (("gae", 2), ("discounted_returns", 1), ("td_lambda", 2), ("vtrace", 4))
        for case, options, kernels in (
            ("", {}, ("_sequence_kernel",)),
            ("unmasked", dict(masked=False, bootstrap=False), ("_sequence_kernel",)),
            ("dones", dict(dones=True), ("_sequence_kernel",)),
            ("long", dict(shape=(2, 65536), dones=True), ("_reduce_kernel", "_apply_kernel")),
            ("packed", dict(shape=(65536,), packed=7), ()),
            ("odd", dict(shape=(1024, 4095), dones=True), ()),
        )
    },
    "gae whiten": (
        lambda: recur("gae", whiten=True),
        {"recurrence._sequence_kernel": 2, "recurrence._whiten_kernel": 1},
    ),
    "policy_loss": (lambda: policy(), {"policy_loss._token_kernel": 2}),
    "policy_loss everything": (
        lambda: policy(ref=True, per_token=True, aggregation="seq_mean_token_mean"),
        {"policy_loss._token_kernel": 4},
    ),
    "policy_loss reinforce": (
        lambda: policy(
            objective="reinforce", old=False, masked=False, aggregation="token_sum", ref=True, estimator="k1"
        ),
        {"policy_loss._token_kernel": 2},
    ),
    "policy_loss packed": (
        lambda: policy(packed=True, aggregation="seq_mean_token_mean"),
        {"policy_loss._token_kernel": 2},
    ),
    "policy_loss packed unmasked": (
        lambda: policy(packed=True, aggregation="seq_mean_token_sum", masked=False),
        {"policy_loss._token_kernel": 2},
    ),
    **{
        f"policy_loss {name}": (
            lambda name=name: policy(objective=name, ref=True),
            {"policy_loss._token_kernel": 3, "policy_loss._sequences_kernel": 2}
            if name in ("gspo", "gmpo", "vespo")
            else {"policy_loss._token_kernel": 3},
        )
        for name in OBJECTIVES[2:]
    },
    **{
        f"policy_loss sampler {correction}": (
            lambda correction=correction: policy(sampler=correction, entropy=True),
            {"policy_loss._token_kernel": 4 if correction.startswith("token") else 3},
        )
        for correction in SAMPLER_CORRECTIONS
    },
    "policy_loss gmpo everything": (
        lambda: policy(
            objective="gmpo",
            packed=True,
            per_token=True,
            sampler="token_mask",
            entropy=True,
            ref=True,
            aggregation="seq_mean_token_mean",
        ),
        {"policy_loss._token_kernel": 6},
    ),
    "value_loss": (lambda: value(), {"value_loss._token_kernel": 3}),
    "value_loss packed": (
        lambda: value(packed=True, aggregation="seq_mean_token_mean"),
        {"value_loss._token_kernel": 3},
    ),
    "value_loss unclipped": (
        lambda: value(old=False, masked=False, aggregation="seq_mean_token_sum"),
        {"value_loss._token_kernel": 2},
    ),
    "policy_loss normalizer": (
        lambda: policy(aggregation="seq_mean_token_sum", normalizer=0),
        {"policy_loss._token_kernel": 2},
    ),
}


QUICK_TARGETS = ("sm_90", "gfx942")
# A plain variant of each kernel, whose loads are widest, and the variants that need most registers.
QUICK_CASES = (
    *("token_logprobs float32 plain", "token_logprobs bfloat16 plain", "token_logprobs bfloat16 in place"),
    *("token_logprobs float16 entropy", "token_logprobs bfloat16 softcap entropy"),
    *("token_logprobs float32 odd softcap entropy", "token_logprobs_part bfloat16 in place"),
    "token_logprobs_part float32 bfloat16 gradient softcap entropy",
    *("linear_token_logprobs plain", "linear_token_logprobs entropy softcap bias"),
    *("kl_divergence forward bfloat16 softcap", "kl_divergence reverse bfloat16 plain"),
    *("kl_divergence js bfloat16 softcap", "kl_divergence of two dtypes"),
    *("kl_penalty k3+", "shaped_rewards k3", "shaped_rewards packed"),
    *("group_advantages ragged batch", "group_advantages before sum", "masked", "masked odd"),
    *("gae dones", "gae long", "gae packed", "gae whiten", "discounted_returns ", "td_lambda odd"),
    *("vtrace dones", "vtrace packed", "value_loss", "value_loss packed"),
    *("policy_loss everything", "policy_loss packed", "policy_loss gspo", "policy_loss vespo"),
    *("policy_loss sampler sequence_mask", "policy_loss gmpo everything"),
)


@pytest.mark.parametrize("target", [each if each in QUICK_TARGETS else thorough(each) for each in TARGETS])
@pytest.mark.parametrize("case", [each if each in QUICK_CASES else thorough(each) for each in CASES])
def test_no_spills_and_16_byte_loads(case, target, compile_launches):
    launch, wide_loads = CASES[case]
    compiled = compile_launches(TARGETS[target], launch)
    assert set(wide_loads) <= set(compiled)
    for name, kernels in compiled.items():
        for kernel in kernels:
            assembly = disassemble(kernel)
            assert assembly.bytes_of_stack == 0, f"{name} spills registers"
            spill = MEMORY_SPILL if name.startswith("lm_head.") else SPILL
            assert not spill.search(assembly.text), f"{name} spills registers"
            wanted = wide_loads.get(name, 0)
            if wanted == "loop":
                loops = [loop for loop in innermost_loops_with_loads(assembly.text) if WIDE_LOAD.search(loop)]
                assert loops, name
                for loop in loops:
                    assert all(WIDE_LOAD.fullmatch(load) for load in LOAD.findall(loop)), name
                    assert not BARRIER.search(loop), f"{name} waits for other warps in its loop"
                    assert all(WIDE_STORE.fullmatch(store) for store in STORE.findall(loop)), name
            else:
                assert len(WIDE_LOAD.findall(assembly.text)) >= wanted, name


@pytest.mark.parametrize("case", ["token_logprobs bfloat16 softcap entropy", "kl_divergence forward bfloat16 softcap"])
def test_capped_logits_are_rounded_before_they_are_subtracted(case, compile_launches):
    """softcap * tanh stands in a multiply-add with 0, not with the largest logit."""
    launch, _ = CASES[case]
    for name, kernels in compile_launches(TARGETS["sm_90"], launch).items():
        for kernel in kernels:
            assert re.search(r"\bFFMA [^;]*, RZ\b", disassemble(kernel).text), name


@pytest.mark.parametrize("target", ["sm_90", thorough("sm_100")])
def test_a_warp_scans_tokens_in_few_instructions_and_waits_for_no_other(target, compile_launches):
    """gae of sequences without a mask: four runs of four tokens for each thread."""
    launch, _ = CASES["gae unmasked"]
    ((kernel,),) = compile_launches(TARGETS[target], launch).values()
    counts = count(instructions(innermost_loop_with_loads(disassemble(kernel).text)))
    assert counts.loads == {16: 4 * 2, 4: 4} and counts.stores == {16: 4 * 2}
    assert counts.instructions <= 4 * 140
    assert counts.shuffles <= 4 * 22
    assert counts.barriers == 0


@pytest.mark.parametrize("target", ["sm_90", thorough("sm_100")])
@pytest.mark.parametrize(
    ("case", "kernel", "at_most"),
    [
        ("plain", "_forward_kernel", 7.1),
        ("entropy", "_forward_kernel", 9.3),
        ("plain", "_backward_kernel", 6.8),
        ("entropy", "_backward_kernel", 8.8),
    ],
)
def test_a_logit_takes_few_instructions(case, kernel, at_most, target, compile_launches):
    """Four words of 16 bytes for each thread, that is 32 logits, in parts that lack neither columns nor the target."""
    launch, _ = CASES[f"token_logprobs bfloat16 {case}"]
    (compiled,) = compile_launches(TARGETS[target], launch)[f"logprobs.{kernel}"]
    loops = [count(instructions(loop)) for loop in innermost_loops_with_loads(disassemble(compiled).text)]
    counts = min(counts for counts in loops if counts.loads == {16: 4})
    assert counts.stores == ({16: 4} if "backward" in kernel else {})
    assert counts.instructions <= 32 * at_most
    assert (counts.shuffles, counts.barriers) == (0, 0)


def test_few_rows_keep_a_gpu_busy():
    """64 rows of Qwen's vocabulary: ten programs a row, and then one that joins."""
    grids = grids_for(TARGETS["sm_90"], lambda: token_logprobs(torch.bfloat16, 151_936, rows=(1, 64)))
    forward, backward = "logprobs._forward_kernel", "logprobs._backward_kernel"
    assert grids == [(forward, (64, 10)), (forward, (64, 1)), (backward, (64, 10))]
    many = grids_for(TARGETS["sm_90"], lambda: token_logprobs(torch.bfloat16, 151_936, rows=(1, 8192)))
    assert many == [(forward, (8192, 1)), (backward, (8192, 1))]


def test_few_long_sequences_keep_a_gpu_busy():
    grids = grids_for(TARGETS["sm_90"], lambda: recur("gae", (8, 32768)))
    assert all(programs >= 512 for _, (programs,) in grids), grids


def test_the_quick_cases_exist():
    assert set(QUICK_CASES) <= CASES.keys()


def test_every_kernel_is_compiled_here():
    """A kernel that a launcher launches, found in the source as `kernel[grid](...)`, and no case above reaches."""
    launched = set()
    for source in Path(logprobs.__file__).parent.glob("*.py"):
        for call in ast.walk(ast.parse(source.read_text())):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Subscript):
                launched.add(f"{source.stem}.{ast.unparse(call.func.value)}")
    compiled = set()
    for launch, _ in CASES.values():
        compiled |= set(variants_for(TARGETS["sm_90"], launch))
    assert launched and compiled == launched


@pytest.mark.parametrize("case", CASES)
def test_a_launcher_allocates_and_launches_its_kernels_and_nothing_else(case):
    with Seen() as seen:
        assert variants_for(TARGETS["sm_90"], CASES[case][0])
    assert (seen.launched, seen.waited, seen.own) == ([], [], [])


VOCAB_SIZES = [1, 2, 7, 15, 16, 31, 32, 63, 64, 129, 1000, 1023, 1024, 4096, 32000, 32768, 49152, 50257, 128256, 151936]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_two_variants_serve_every_vocabulary_and_temperature(dtype):
    def launches():
        for vocab_size in VOCAB_SIZES:
            for temperature in (1.0, 0.5, 0.7):
                token_logprobs(dtype, vocab_size, temperature=temperature)
        token_logprobs(dtype, 4096, rows=(1, 1))
        token_logprobs(dtype, 4096, rows=(1, 70000))
        token_logprobs(dtype, 4096, rows=(2, 3), strides=(2**33, 8192), inplace=True)

    compiled = variants_for(TARGETS["sm_90"], launches)
    assert {name: len(kernels) for name, kernels in compiled.items()} == {
        "logprobs._forward_kernel": 2,
        "logprobs._backward_kernel": 2,
    }


@pytest.mark.parametrize("gradient", [None, torch.bfloat16])
def test_few_variants_serve_every_tile(gradient):
    """A third where rows are not aligned though the vocabulary is whole words."""

    def launches():
        for vocab_size in VOCAB_SIZES:
            for vocab_start in (0, 1, 16, 151_936, 2**31):
                token_logprobs_part(torch.float32, vocab_size, gradient=gradient, vocab_start=vocab_start)
        for temperature in (0.5, 0.7):
            token_logprobs_part(torch.float32, gradient=gradient, temperature=temperature)
        for rows in (1, 16, 70_000):
            token_logprobs_part(torch.float32, 4096, gradient=gradient, rows=rows)
        for stride in (8192, 8191, 2**33):
            token_logprobs_part(torch.float32, 4096, gradient=gradient, stride=stride)

    compiled = variants_for(TARGETS["sm_90"], launches)
    assert {name: len(kernels) for name, kernels in compiled.items()} == {
        "logprobs._forward_kernel": 3,
        "logprobs._backward_kernel": 2,
    }


def test_two_variants_of_kl_divergence_serve_every_tile():
    def launches():
        for vocab_size in VOCAB_SIZES:
            kl_divergence(torch.bfloat16, vocab_size)
        for temperature in (1.0, 0.5, 0.7):
            kl_divergence(torch.bfloat16, temperature=temperature)
        for rows in (1, 70_000):
            kl_divergence(torch.bfloat16, 4096, rows=rows)
        kl_divergence(torch.bfloat16, 4096, stride=2**33)

    compiled = variants_for(TARGETS["sm_90"], launches)
    assert {name: len(kernels) for name, kernels in compiled.items()} == {
        "kl_divergence._part_kernel": 2,
        "kl_divergence._part_backward_kernel": 2,
    }


LENGTHS = [1, 2, 7, 15, 16, 17, 63, 64, 129, 1000, 1023, 1024, 1025, 4096, 8192, 32768, 32769, 50257, 131072, 2**21]
"""Twenty numbers of tokens: one, odd ones, powers of two and their neighbours, and those at which kernels change."""


def test_two_variants_of_kl_penalty_serve_every_length():
    def launches():
        for length in LENGTHS:
            for clamps in ((INF, INF), (20.0, 10.0)):
                values = empty(length)
                kl.kl_penalty_forward(values, values, 2, False, *clamps)
                kl.kl_penalty_backward(values, values, values, 2, False, *clamps, True)

    compiled = variants_for(TARGETS["sm_90"], launches)
    assert {name: len(kernels) for name, kernels in compiled.items()} == {
        "kl._forward_kernel": 2,
        "kl._backward_kernel": 2,
    }


def test_one_variant_of_group_advantages_serves_every_length():
    options = (BASELINES.index("mean"), SCALES.index("batch"), 1e-4, False, False)

    def launches():
        for length in LENGTHS:
            for size in {1, length}:
                groups.group_advantages(empty(length, 1), None, None, None, size, *options)

    compiled = variants_for(TARGETS["sm_90"], launches)
    assert {name: len(kernels) for name, kernels in compiled.items()} == {
        "groups._batch_divisor_kernel": 1,
        "groups._group_kernel": 1,
    }


@pytest.mark.parametrize("packed", [False, True])
def test_two_variants_serve_rewards_of_every_length(packed):
    def launches():
        for length in VOCAB_SIZES:
            shaped_rewards(length=length, rows=1, packed=packed)
        shaped_rewards(length=4096, rows=70_000, packed=packed)

    assert len(variants_for(TARGETS["sm_90"], launches)["kl._rewards_kernel"]) == 2


def test_two_variants_serve_masked_tensors_of_every_length():
    def launches():
        for length in VOCAB_SIZES:
            masked_ops(length, rows=1)

    compiled = variants_for(TARGETS["sm_90"], launches)
    assert {name: len(kernels) for name, kernels in compiled.items()} == {
        "masked._sums_kernel": 2,
        "masked._mean_kernel": 1,
        "masked._spread_kernel": 2,
        "masked._block_moments_kernel": 2,
        "masked._moments_kernel": 1,
        "masked._whiten_kernel": 2,
    }


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_two_variants_serve_every_batch_of_tokens(packed):
    def launches():
        for length in LENGTHS[packed:]:  # packed, one advantage a sequence of one token is one a token
            for sequences in (1, 3, 16):
                options = dict(aggregation="seq_mean_token_mean", packed=packed, shape=(sequences, length))
                policy(objective="gspo", sampler="sequence_mask", **options)
                policy(**options)

    compiled = variants_for(TARGETS["sm_90"], launches)
    expected = {
        "policy_loss._sequences_kernel": 2,
        "policy_loss._token_kernel": 4,  # with its factors of sequences, and without
        "policy_loss._finish_kernel": 1,
        "_token_losses._lengths_kernel": 2,
        "_token_losses._scale_kernel": 2,
    }
    if packed:
        expected["_sequences._valid_kernel"] = 1
    assert {name: len(kernels) for name, kernels in compiled.items()} == expected


@pytest.mark.parametrize("kind", RECURRENCES)
def test_two_variants_serve_every_length_and_discount(kind):
    def launches():
        for length in LENGTHS:
            for gamma in (1.0, 0.5, 0.99):
                recur(kind, (3, length), gamma=gamma, whiten=kind == "gae")
        for rows in (1, 16, 70_000):
            recur(kind, (rows, 64), whiten=kind == "gae")

    compiled = variants_for(TARGETS["sm_90"], launches)
    assert all(len(kernels) <= 2 for name, kernels in compiled.items()), compiled
    assert {name for name, kernels in compiled.items() if len(kernels) == 2} >= {
        "recurrence._sequence_kernel",
        "recurrence._reduce_kernel",
        "recurrence._apply_kernel",
    }
