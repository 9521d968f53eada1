import os
import signal
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.utils.checkpoint
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import rlkernels
from cases import ALSO_EMULATED, COMPILERS, THOROUGH_EMULATED, thorough, thorough_emulated
from head_problems import IGNORE, NAN, Problem, eager, random_problem, rows_under_a_cap
from op_calls import OpCalls
from peak_memory import peak_memory
from rlkernels import _backends, _registry, linear_token_logprobs, token_logprobs
from rlkernels.ops import linear_logprobs
from rlkernels.ops.lm_head.inputs import Options
from rlkernels.ops.lm_head.tiles import POOL, tile_size
from tolerance import assert_as_accurate_as_torch

# Triton's kernels serve NVIDIA GPUs too.
pytestmark = [pytest.mark.only("reference", *_backends.BACKENDS_OF["linear_token_logprobs"]), THOROUGH_EMULATED]
kernels_only = pytest.mark.only("cpu", "triton")
WORKER = Path(__file__).with_name("lm_head_worker.py")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OUTPUTS = ("log_sum_sq_probs", "mean_logit", "is_top1")
TILE = (8, 64)
FROZEN = {
    "nothing": (),
    "weight": ("weight", "bias", "adapter_weight"),
    "hidden": ("hidden", "adapter"),
    "weight but not the adapter": ("weight", "bias"),
}


def ours(*args, **options):
    return linear_token_logprobs(*args, return_entropy=True, **options)


def alone(function):
    """Log-probabilities without the entropy."""

    def logprobs(*args, **options):
        result = function(*args, **options)
        return (result[0] if isinstance(result, tuple) else result,)

    return logprobs


def upstream_for(token_ids, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(token_ids.shape, generator=generator).to(token_ids.device) for _ in range(2)]


def run(function, problem, token_ids, upstream, frozen=(), **options):
    """Outputs of `function` and the gradients of all that is differentiated, by name."""
    leaves = problem.leaves(frozen)
    outputs = leaves.call(function, token_ids, **options)
    named = leaves.differentiated()
    upstream = [g.to(output.dtype) for g, output in zip(upstream, outputs, strict=False)]
    gradients = torch.autograd.grad(outputs[: len(upstream)], list(named.values()), upstream)
    results = dict(zip(("logprobs", "entropy"), (output.detach() for output in outputs), strict=False))
    return results | dict(zip(named, gradients, strict=True))


def assert_matches_reference(function, naive, problem, token_ids, upstream, frozen=(), *, head=None, **options):
    got = run(function, problem, token_ids, upstream, frozen, **options, **(head or {}))
    oracle = run(function, problem.to(torch.float64), token_ids, upstream, frozen, **options)
    eager_results = run(naive, problem, token_ids, upstream, frozen, **options)
    assert got.keys() == oracle.keys() == eager_results.keys()
    for name, value in got.items():
        gradient = name not in ("logprobs", "entropy")
        assert_as_accurate_as_torch(value, oracle[name], eager_results[name], what=name, gradient=gradient)
    assert not (got["logprobs"] > 0).any()
    return got


@ALSO_EMULATED
@given(
    # With few rows eager PyTorch may happen to round each of them well, and would be too strict a measure.
    rows=st.integers(24, 48),
    vocab_size=st.sampled_from([1, 2, 63, 64, 65, 129, 300]),
    ignored=st.sampled_from([0.0, 0.4, 1.0]),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    rank=st.sampled_from([0, 5]),
    frozen=st.sampled_from(list(FROZEN)),
    with_entropy=st.booleans(),
    temperature=st.sampled_from([1.0, 0.7]),
    softcap=st.sampled_from([None, 5.0]),
    scale=st.sampled_from([1.0, 0.25, 3.0]),
    budget=st.sampled_from([0.0, 0.01, 100.0]),
    tile=st.sampled_from([(8, 64), (16, 100), (8, 512)]),
    seed=st.integers(0, 99),
)
def test_matches_reference(
    backend,
    device,
    rows,
    vocab_size,
    ignored,
    dtype,
    bias,
    rank,
    frozen,
    with_entropy,
    temperature,
    softcap,
    scale,
    budget,
    tile,
    seed,
):
    if dtype != torch.float32:
        # As few rows of weight are as few rows; and an adapter's product is rounded, and so the logits, in another way.
        vocab_size, rank = max(vocab_size, 63), 0
    problem, token_ids = random_problem((rows,), vocab_size, device, dtype, bias=bias, rank=rank, seed=seed)
    out = torch.rand(rows, generator=torch.Generator().manual_seed(seed)) < ignored
    token_ids = token_ids.masked_fill(out.to(device), IGNORE)
    problem.hidden[token_ids == IGNORE] = NAN
    select = (lambda function: function) if with_entropy else alone
    function = ours if with_entropy else linear_token_logprobs
    upstream = upstream_for(token_ids, seed)[: 1 + with_entropy]
    options = dict(temperature=temperature, softcap=softcap, scale=scale)
    # On a CPU hidden's gradient, computed again in 16 bits, is a sum of rounded products; of few rows eager PyTorch's
    # one product may happen to be rounded better than that can be. test_many_rows_and_tokens has enough of them.
    if dtype != torch.float32 and device.type == "cpu" and frozen != "hidden":
        budget = 100.0
    head = dict(tile=tile, logits_budget_mb=budget)
    got = assert_matches_reference(
        select(function), select(eager), problem, token_ids, upstream, FROZEN[frozen],
        head=head, **options
    )  # fmt: skip
    for name in ("logprobs", "entropy", "hidden", "adapter"):
        if name in got:
            assert not got[name][token_ids == IGNORE].any(), name


@ALSO_EMULATED
@pytest.mark.parametrize("temperature", [0.01, thorough_emulated(0.05)])
def test_softcap_at_a_low_temperature(backend, device, temperature):
    """No product has rounded these logits: the hidden states are the identity."""
    rows, token_ids = rows_under_a_cap(80, 37, 50.0)
    problem = Problem(torch.eye(80), rows.T.contiguous(), None, None, None).to(device)
    token_ids = token_ids.to(device)
    head = dict(tile=(16, 64))
    options = dict(head=head, temperature=temperature, softcap=50.0)
    got = assert_matches_reference(
        ours, eager, problem, token_ids, upstream_for(token_ids), FROZEN["hidden"], **options
    )
    assert not (got["entropy"] < 0).any()


@pytest.mark.thorough_on("reference", "triton")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("budget", [0.0, 100.0], ids=["again", "kept"])
def test_many_rows_and_tokens(backend, device, emulated, dtype, budget):
    """Enough of both for the signed-bias check of all three gradients to see half an ulp, in the default tiles."""
    rows, vocab_size = (40, 300) if emulated else (600, 5003)
    problem, token_ids = random_problem((rows,), vocab_size, device, dtype, width=48, bias=True)
    token_ids[::3] = IGNORE
    options = dict(head=dict(logits_budget_mb=budget))
    assert_matches_reference(ours, eager, problem, token_ids, upstream_for(token_ids), **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("budget", [0.0, 100.0], ids=["again", "kept"])
def test_adapter_alone(backend, device, emulated, dtype, budget):
    """The other logits are 0, so that the adapter's product is rounded once, as eager PyTorch's is."""
    rows, vocab_size = (40, 300) if emulated else (300, 2003)
    problem, token_ids = random_problem((rows,), vocab_size, device, dtype, rank=16)
    problem.hidden.zero_()
    token_ids[::3] = IGNORE
    head = dict(tile=(8, 64) if emulated else None, logits_budget_mb=budget)
    assert_matches_reference(ours, eager, problem, token_ids, upstream_for(token_ids), head=head)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_frozen_weight_in_groups_of_rows(backend, device, emulated, dtype):
    """The gradient is made in the forward pass, group by group of those whose logits fit."""
    rows, vocab_size, budget = (40, 300, 0.02) if emulated else (600, 5003, 6.0)
    problem, token_ids = random_problem((rows,), vocab_size, device, dtype, width=48, bias=True)
    token_ids[::3] = IGNORE
    head = dict(logits_budget_mb=budget, tile=(8, 64) if emulated else None)
    function, naive, upstream = alone(linear_token_logprobs), alone(eager), upstream_for(token_ids)[:1]
    assert_matches_reference(function, naive, problem, token_ids, upstream, FROZEN["weight"], head=head)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weight_gradient_of_rows_in_several_chunks(backend, device, dtype, monkeypatch):
    """In 16 bits their sum is kept in float32 until it is complete."""
    monkeypatch.setattr("rlkernels.ops.lm_head.head.CHUNK_ROWS", 16)
    problem, token_ids = random_problem((60,), 130, device, dtype, bias=True, rank=3)
    for budget in (0.0, 100.0):
        options = dict(head=dict(tile=TILE, logits_budget_mb=budget))
        assert_matches_reference(ours, eager, problem, token_ids, upstream_for(token_ids), FROZEN["hidden"], **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_huge_logits(backend, device, dtype):
    """Logits of +-1e4 and beyond; the largest float16 is 65504. Rows are nearly certain, and eager PyTorch is exact."""
    problem, token_ids = random_problem((24,), 130, device, dtype, spread=1e4)
    got = assert_matches_reference(ours, eager, problem, token_ids, upstream_for(token_ids), head=dict(tile=TILE))
    assert (got["logprobs"] < -1e4).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_vocabulary_masked_by_the_lowest_number(backend, device, dtype):
    problem, token_ids = random_problem((16,), 300, device, dtype, bias=True)
    problem.bias[70:] = torch.finfo(dtype).min
    token_ids %= 70
    values = run(ours, problem, token_ids, upstream_for(token_ids), tile=TILE)
    alone = replace(problem, weight=problem.weight[:70], bias=problem.bias[:70])
    for name, wanted in run(ours, alone, token_ids, upstream_for(token_ids), tile=TILE).items():
        value = values[name][:70] if name in ("weight", "bias") else values[name]
        torch.testing.assert_close(value, wanted, msg=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_confident_tokens_keep_their_precision(backend, device, dtype):
    """Where z_t - logsumexp would be 0: log p is -e^-30 or so, and so is the gradient."""
    problem, token_ids = random_problem((16,), 130, device, dtype)
    problem.weight[token_ids] = (8 * problem.hidden.float() / 24**0.5).to(dtype)
    got = run(alone(linear_token_logprobs), problem, token_ids, upstream_for(token_ids)[:1], tile=TILE)
    exact = run(alone(linear_token_logprobs), problem.to(torch.float64), token_ids, upstream_for(token_ids)[:1])
    confident = exact["logprobs"] > -1e-7
    assert confident.sum() > 3
    assert (got["logprobs"][confident] < 0).all()
    with_logits = token_logprobs((problem.hidden @ problem.weight.T), token_ids)
    torch.testing.assert_close(got["logprobs"], with_logits, rtol=1e-4, atol=0)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 3), (0, 4), (2, 0), (2, 2, 2)], ids=str)
def test_shapes(backend, device, shape):
    problem, token_ids = random_problem(shape, 65, device)
    got = run(ours, problem, token_ids, upstream_for(token_ids), tile=TILE)
    wanted = run(eager, problem, token_ids, upstream_for(token_ids))
    for name, value in got.items():
        assert value.shape == wanted[name].shape
        torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("budget", [0.0, 100.0], ids=["again", "kept"])
@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_scored(backend, device, budget, frozen, dtype):
    problem, token_ids = random_problem((5,), 65, device, dtype, bias=True, rank=2)
    problem.hidden[:] = NAN
    token_ids[:] = IGNORE
    results = run(ours, problem, token_ids, upstream_for(token_ids), FROZEN[frozen], logits_budget_mb=budget)
    for name, value in results.items():
        assert torch.equal(value, torch.zeros_like(value)), name
    values = problem.call(linear_token_logprobs, token_ids, outputs=OUTPUTS)
    for value in values:
        assert not value.any()


def test_any_strides_and_integer_dtypes(backend, device):
    problem, token_ids = random_problem((6, 4), 65, device, bias=True)
    wanted = run(ours, problem, token_ids, upstream_for(token_ids), tile=TILE)
    problem.hidden = problem.hidden.transpose(0, 1).contiguous().transpose(0, 1)
    problem.weight = problem.weight.T.contiguous().T
    problem.bias = torch.stack([problem.bias, problem.bias], -1)[:, 0]
    upstream = [u.T.contiguous().T for u in upstream_for(token_ids)]
    for dtype in (torch.int32, torch.int16, torch.uint8):
        got = run(ours, problem, token_ids.to(dtype), upstream, tile=TILE)
        for name, value in got.items():
            torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-6)


def test_strided_token_ids_of_whole_blocks(backend, device):
    problem, token_ids = random_problem((16,), 65, device)
    wanted = problem.call(linear_token_logprobs, token_ids, tile=TILE)
    for strided in (torch.stack([token_ids, token_ids + 1], -1)[:, 0], token_ids.flip(0).contiguous().flip(0)):
        assert torch.equal(problem.call(linear_token_logprobs, strided, tile=TILE), wanted)
    same = token_ids[:1].expand(16)
    wanted = problem.call(linear_token_logprobs, same.contiguous(), tile=TILE)
    assert torch.equal(problem.call(linear_token_logprobs, same, tile=TILE), wanted)


@kernels_only
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_the_others(backend, device, emulated, dtype):
    """Not one bit, in the default tile: neither on how many there are, nor on its place among them."""
    rows = 11 if emulated else 300
    options = dict(tile=TILE) if emulated else {}
    problem, token_ids = random_problem((rows,), 130, device, dtype)
    upstream = upstream_for(token_ids)
    whole = run(ours, problem, token_ids, upstream, **options)
    for some in (slice(1, 2), slice(2, None)) if emulated else (slice(1, 2), slice(0, 3), slice(2, None, 2)):
        part = problem.to(dtype)
        part.hidden = part.hidden[some]
        got = run(ours, part, token_ids[some], [u[some] for u in upstream], **options)
        for name in ("logprobs", "entropy", "hidden"):
            assert torch.equal(got[name], whole[name][some]), (name, some)


@kernels_only
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_on_every_run_kept_or_computed_again(backend, device, emulated, dtype):
    """Except where the docstring says otherwise."""
    problem, token_ids = random_problem((8 if emulated else 40,), 130 if emulated else 300, device, dtype, bias=True)
    options = [dict(logits_budget_mb=budget) for budget in (0.0, 0.0, 100.0, 100.0)]
    results = [run(ours, problem, token_ids, upstream_for(token_ids), tile=TILE, **o) for o in options]
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name
        assert torch.equal(results[2][name], results[3][name]), name
        if dtype == torch.float32 or (backend != "triton" and (name != "hidden" or device.type != "cpu")):
            assert torch.equal(value, results[2][name]), name


def test_inputs_are_left_as_they_are(backend, device):
    problem, token_ids = random_problem((16,), 130, device, bias=True, rank=2)
    before, ids_before = problem.leaves(), token_ids.clone()
    leaves = problem.leaves()
    for budget in (0.0, 100.0):
        logprobs = leaves.call(linear_token_logprobs, token_ids, tile=TILE, logits_budget_mb=budget)
        logprobs.sum().backward()
    for one, other in zip(leaves.values(), before.values(), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(token_ids, ids_before)


@pytest.mark.parametrize("frozen", ["nothing", "weight"])
def test_a_second_backward_pass(backend, device, frozen):
    """The first has overwritten the logits that were kept."""
    problem, token_ids = random_problem((16,), 130, device)
    leaves = problem.leaves(FROZEN[frozen])
    logprobs = leaves.call(linear_token_logprobs, token_ids, tile=TILE)
    inputs = list(leaves.differentiated().values())
    first = torch.autograd.grad(logprobs.sum(), inputs, retain_graph=True)
    second = torch.autograd.grad(logprobs.sum(), inputs)
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other)


@kernels_only
def test_no_second_derivative(backend, device):
    problem, token_ids = random_problem((4,), 65, device)
    leaves = problem.leaves()
    (gradient,) = torch.autograd.grad(
        leaves.call(linear_token_logprobs, token_ids).sum(), [leaves.hidden], create_graph=True
    )
    with pytest.raises(NotImplementedError, match="cannot be differentiated again"):
        gradient.sum().backward()


# Products of [R, H] x [H, V]
PRODUCTS = {
    "computed again": (dict(logits_budget_mb=0), "nothing", True, 4),
    "kept": (dict(logits_budget_mb=100), "nothing", True, 3),
    "frozen hidden": (dict(logits_budget_mb=0), "hidden", True, 3),
    "frozen hidden, kept": (dict(logits_budget_mb=100), "hidden", True, 2),
    "frozen weight": (dict(logits_budget_mb=100), "weight", False, 2),
    "frozen weight, in groups": (dict(logits_budget_mb=0.01), "weight", False, 2),
    "frozen weight, entropy": (dict(logits_budget_mb=0), "weight", True, 3),
    "nothing differentiated": (dict(), "all", False, 1),
}


@kernels_only
@pytest.mark.parametrize("case", PRODUCTS)
def test_products(backend, device, case):
    """Counted, of the scored rows alone, filled up to blocks of 8."""
    options, frozen, with_entropy, wanted = PRODUCTS[case]
    problem, token_ids = random_problem((40,), 130, device)
    token_ids[3:20] = IGNORE
    token_ids[21:24] = IGNORE
    names = ("hidden", "weight", "adapter", "adapter_weight") if frozen == "all" else FROZEN[frozen]
    leaves = problem.leaves(names)
    with FlopCounterMode(display=False) as counter:
        result = leaves.call(linear_token_logprobs, token_ids, return_entropy=with_entropy, tile=TILE, **options)
        if frozen != "all":
            before = counter.get_total_flops()
            (sum(result) if with_entropy else result).sum().backward()
            if case.startswith("frozen weight") and not with_entropy:
                assert counter.get_total_flops() == before, "the backward pass needs no product"
    assert counter.get_total_flops() == wanted * 2 * 24 * 130 * 24


@pytest.mark.only("cpu")
def test_memory(backend, device):
    """Besides inputs and gradients there are a tile, its rows' sums, and little else."""
    rows, vocab_size, width = 1024, 20_000, 32
    problem, token_ids = random_problem((rows,), vocab_size, device, width=width)
    results = 4 * (rows * width + vocab_size * width)
    tile = 4 * rows * 2048
    for budget, logits in ((0, tile), (100, 4 * rows * vocab_size)):
        options = dict(logits_budget_mb=budget, tile=(256, 2048))
        peak = peak_memory(lambda options=options: run(ours, problem, token_ids, upstream_for(token_ids), **options))
        copies = results  # run() makes leaves of the inputs
        assert logits < peak - results - copies < logits + 1.5e6


@pytest.mark.only("cpu")
def test_memory_of_kept_logits_is_used_again(backend, device):
    """By the next call, unless its logits are still needed; and never seen by it."""
    POOL.clear()
    problem, token_ids = random_problem((40,), 130, device)
    wanted = run(ours, problem, token_ids, upstream_for(token_ids), logits_budget_mb=0.0, tile=TILE)
    run(ours, problem, token_ids, upstream_for(token_ids), tile=TILE)
    POOL.give(POOL.take(4 * 40 * 130).fill_(255))
    first, second = (problem.leaves() for _ in range(2))
    kept = [leaves.call(ours, token_ids, tile=TILE) for leaves in (first, second)]
    assert POOL.take(0) is None
    for leaves, outputs in zip((first, second), kept, strict=True):
        torch.autograd.backward(outputs, upstream_for(token_ids))
        assert torch.equal(leaves.hidden.grad, wanted["hidden"])
        assert torch.equal(leaves.weight.grad, wanted["weight"])
    larger, ids = random_problem((80,), 130, device)
    run(ours, larger, ids, upstream_for(ids), tile=TILE)
    assert POOL.take(4 * 80 * 130) is not None
    assert POOL.take(0) is None


@pytest.mark.only("cpu")
def test_memory_that_is_left_goes_to_one_thread(backend, device):
    problem, token_ids = random_problem((40,), 130, device)
    wanted = run(ours, problem, token_ids, upstream_for(token_ids), logits_budget_mb=0.0, tile=TILE)

    def call(number):
        return run(ours, problem, token_ids, upstream_for(token_ids), tile=TILE)

    with ThreadPoolExecutor(4) as threads:
        for got in threads.map(call, range(16)):
            assert all(torch.equal(got[name], wanted[name]) for name in wanted)
        POOL.give(torch.empty(1000))
        taken = [memory for memory in threads.map(lambda number: POOL.take(4000), range(16)) if memory is not None]
    assert [len(memory) for memory in taken] == [4000]


@pytest.mark.only("cpu")
def test_a_forked_process_does_not_wait_for_a_thread_that_it_does_not_have(backend, device):
    """Another thread of the parent may be at the memory that is left, just then."""
    with POOL._lock:
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # not the handler of pytest-timeout
            signal.alarm(10)
            POOL.give(torch.empty(10))
            os._exit(POOL.take(40) is None)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.only("cpu")
def test_memory_of_an_odd_number_of_16_bit_logits_is_used_again(backend, device):
    POOL.clear()
    problem, token_ids = random_problem((3,), 101, device)
    wanted = run(ours, problem, token_ids, upstream_for(token_ids), tile=(1, 64), logits_budget_mb=0)
    run(ours, problem.to(torch.bfloat16), token_ids, upstream_for(token_ids), tile=(1, 64))
    problem.hidden, token_ids = problem.hidden[:1], token_ids[:1]
    got = run(ours, problem, token_ids, upstream_for(token_ids), tile=(1, 64))
    assert torch.equal(got["logprobs"], wanted["logprobs"][:1])


@kernels_only
def test_a_backward_pass_after_one_that_broke_off(backend, device, monkeypatch):
    problem, token_ids = random_problem((40,), 130, device)
    wanted = run(ours, problem, token_ids, upstream_for(token_ids), tile=TILE)
    leaves = problem.leaves()
    outputs = leaves.call(ours, token_ids, tile=TILE)
    arguments = (outputs, [leaves.hidden, leaves.weight], upstream_for(token_ids))
    with monkeypatch.context() as patch:

        def multiply(*args, **options):
            raise KeyboardInterrupt

        patch.setattr("rlkernels.ops.lm_head.head.multiply", multiply)
        with pytest.raises(KeyboardInterrupt):
            torch.autograd.grad(*arguments, retain_graph=True)
    for name, value in zip(("hidden", "weight"), torch.autograd.grad(*arguments), strict=True):
        torch.testing.assert_close(value, wanted[name])


@kernels_only
@pytest.mark.parametrize("rows", [16, 17])
def test_hidden_states_are_kept_by_autograd_alone(backend, device, rows):
    """A checkpointed forward pass leaves none of them, in whole blocks or gathered."""
    problem, token_ids = random_problem((rows,), 130, device)
    leaves, alive = problem.leaves(), []

    def function(hidden):
        hidden = hidden * 1
        alive.append(weakref.ref(hidden))
        with tile_size(TILE):
            return linear_token_logprobs(hidden, leaves.weight, token_ids, logits_budget_mb=0).sum()

    result = torch.utils.checkpoint.checkpoint(function, leaves.hidden, use_reentrant=False)
    assert alive[0]() is None
    assert torch.equal(*(torch.autograd.grad(v, leaves.hidden)[0] for v in (result, function(leaves.hidden))))


def test_num_scored(backend, device, emulated):
    size = 16 if emulated else 40
    problem, token_ids = random_problem((size,), 130, device)
    token_ids[::3] = IGNORE
    problem.hidden[::3] = NAN
    scored = int((token_ids != IGNORE).sum())
    wanted = run(ours, problem, token_ids, upstream_for(token_ids), tile=TILE)
    for number in (scored, scored + 1, size):
        got = run(ours, problem, token_ids, upstream_for(token_ids), tile=TILE, num_scored=number)
        for name, value in got.items():
            torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-6)


def test_more_are_scored_than_said(backend, device):
    problem, token_ids = random_problem((40,), 130, device)
    if device.type == "cpu":
        with pytest.raises(ValueError, match=r"num_scored.*40; got 39"):
            problem.call(linear_token_logprobs, token_ids, num_scored=39)
    else:
        results = run(ours, problem, token_ids, upstream_for(token_ids), num_scored=39)
        assert results["logprobs"].isnan().all()


@kernels_only
@pytest.mark.parametrize("frozen", ["nothing", "weight"])
def test_more_are_scored_than_said_where_the_host_does_not_look(backend, device, monkeypatch, frozen):
    """As on a GPU: everything is NaN, the gradients too."""

    def without_looking(scored, num_scored):
        index = torch.nonzero_static(scored, size=num_scored, fill_value=scored.numel()).squeeze(1)
        return index, scored.sum() > num_scored

    monkeypatch.setattr("rlkernels.ops.lm_head.inputs.scored_index", without_looking)
    problem, token_ids = random_problem((40,), 130, device)
    function = alone(linear_token_logprobs)
    results = run(function, problem, token_ids, upstream_for(token_ids), FROZEN[frozen], num_scored=39)
    assert all(value.isnan().all() for value in results.values())
    results = run(function, problem, token_ids, upstream_for(token_ids), FROZEN[frozen], num_scored=40)
    assert not any(value.isnan().any() for value in results.values())


@pytest.mark.gpu
def test_waits_for_the_device_never_with_num_scored(backend, device):
    if device.type == "cpu":
        pytest.skip("no GPU: nothing to wait for")
    problem, token_ids = random_problem((40,), 130, device)
    token_ids[::3] = IGNORE
    run(ours, problem, token_ids, upstream_for(token_ids), num_scored=30)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(ours, problem, token_ids, upstream_for(token_ids), num_scored=30)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs(backend, device, emulated, dtype):
    problem, token_ids = random_problem((16 if emulated else 40,), 130, device, dtype, bias=True)
    token_ids[::2] = (problem.hidden @ problem.weight.T + problem.bias).argmax(-1)[::2]
    token_ids[5] = IGNORE
    options = dict(temperature=0.7, softcap=4.0, scale=1.5)
    values = problem.call(linear_token_logprobs, token_ids, outputs=OUTPUTS, tile=TILE, **options)
    assert [v.dtype for v in values] == [torch.float32] * 3 + [torch.bool]
    with rlkernels.use_backend("reference"):
        same_dtype = problem.call(linear_token_logprobs, token_ids, outputs=OUTPUTS, **options)
    exact = problem.to(torch.float64).call(linear_token_logprobs, token_ids, outputs=OUTPUTS, **options)
    for name, value, oracle, naive in zip(OUTPUTS, values[1:], exact[1:], same_dtype[1:], strict=True):
        if name == "is_top1":
            assert torch.equal(value, naive)
            assert value[6::2].all()
            assert not value.all()
        else:
            assert_as_accurate_as_torch(value, oracle, naive, what=name)
    alone = problem.call(linear_token_logprobs, token_ids, outputs=("is_top1",), return_entropy=True, **options)
    assert len(alone) == 3
    assert torch.equal(alone[2], values[3])


def test_the_first_of_equal_logits_is_top1(backend, device):
    hidden, weight = torch.ones(3, 1, device=device), torch.zeros(130, 1, device=device)
    weight[[70, 100]] = 1.0  # in two tiles
    with tile_size(TILE):
        _, top = linear_token_logprobs(hidden, weight, torch.tensor([70, 100, 3], device=device), outputs=("is_top1",))
    assert top.tolist() == [True, False, False]


def test_outputs_are_not_differentiable(backend, device):
    problem, token_ids = random_problem((4,), 65, device)
    logprobs, *others = problem.leaves().call(linear_token_logprobs, token_ids, outputs=OUTPUTS)
    assert logprobs.requires_grad
    assert not any(value.requires_grad for value in others)


@kernels_only
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_that_of_linear(backend, device, dtype):
    problem, token_ids = random_problem((16,), 130, device, bias=True)
    upstream = upstream_for(token_ids)

    def under_autocast(*args, **options):
        with torch.autocast(device.type, dtype=dtype):
            return ours(*args, **options)

    def cast(hidden, weight, token_ids, *, bias, adapter, **options):
        return ours(hidden.to(dtype), weight.to(dtype), token_ids, bias=bias.to(dtype), **options)

    got = run(under_autocast, problem, token_ids, upstream, tile=TILE)
    wanted = run(cast, problem, token_ids, upstream, tile=TILE)
    for name, value in got.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, wanted[name]), name


@kernels_only
@pytest.mark.parametrize("given", ["hidden", "weight"])
def test_autocast_of_one_factor_that_has_its_dtype_already(backend, device, given):
    problem, token_ids = random_problem((16,), 130, device)
    cast = problem.to(torch.bfloat16)
    setattr(problem, given, getattr(cast, given))
    with torch.autocast(device.type, dtype=torch.bfloat16):
        got = problem.call(linear_token_logprobs, token_ids, tile=TILE)
    assert torch.equal(got, cast.call(linear_token_logprobs, token_ids, tile=TILE))


def test_token_ids_out_of_range(backend, device, monkeypatch):
    problem, token_ids = random_problem((4,), 65, device)
    for wrong in (-1, 65, 2**40):
        token_ids[2] = wrong
        if device.type == "cpu":
            with pytest.raises(ValueError, match=rf"token_ids must be in \[0, 65\).*got {wrong}"):
                problem.call(linear_token_logprobs, token_ids)
        else:
            results = run(ours, problem, token_ids, upstream_for(token_ids))
            assert results["logprobs"].isnan().tolist() == [False, False, True, False]
            assert results["hidden"].isnan().any(-1).tolist() == [False, False, True, False]


@pytest.mark.parametrize("budget", [0.0, 100.0], ids=["again", "kept"])
@pytest.mark.parametrize("frozen", FROZEN)
def test_the_tiles_in_float64(frozen, budget):
    """All but the kernels: gathering, tiles, joining and sums, to the last digits."""
    problem, token_ids = random_problem((45,), 333, "cpu", torch.float64, bias=True, rank=3)
    token_ids[::4] = IGNORE
    upstream = upstream_for(token_ids)
    options = dict(temperature=0.7, softcap=5.0)

    def tiled(hidden, weight, token_ids, *, bias, adapter, temperature, softcap):
        options = Options(temperature, softcap, IGNORE, None, None, (8, 50), "reference", True, (), int(budget * 2**20))
        return linear_logprobs._LinearLogprobs.apply(hidden, weight, bias, *adapter, token_ids, options)

    got = run(tiled, problem, token_ids, upstream, FROZEN[frozen], **options)
    wanted = run(ours, problem, token_ids, upstream, FROZEN[frozen], **options)
    for name, value in got.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-12, atol=1e-12)


def test_reference_gradcheck():
    problem, token_ids = random_problem((5,), 7, "cpu", torch.float64, width=4, bias=True, rank=2)
    token_ids[1] = IGNORE
    leaves = problem.leaves()

    def function(hidden, weight, bias, a, b):
        options = dict(bias=bias, adapter=(a, b), temperature=0.7, softcap=5.0, scale=1.5)
        return ours(hidden, weight, token_ids, **options)

    assert torch.autograd.gradcheck(function, leaves.values())


@pytest.mark.parametrize("compiler", COMPILERS)
def test_compile(backend, device, emulated, compiler):
    if emulated and compiler == "inductor":
        pytest.skip("emulated: the kernels are inside an op, which aot_eager shows to be traced")
    torch._dynamo.reset()
    problem, token_ids = random_problem((4, 5), 130, device, bias=True, rank=2)
    token_ids[:, 2] = IGNORE

    def function(hidden, weight, token_ids, **options):
        logprobs, entropy, top = ours(hidden * 2, weight, token_ids, outputs=("is_top1",), **options)
        return logprobs * 3, entropy, top

    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    for frozen in ((), FROZEN["weight"]):
        arguments = (problem, token_ids, upstream_for(token_ids), frozen)
        wanted = run(function, *arguments, tile=TILE)
        got = run(compiled, *arguments, tile=TILE)
        for name, value in got.items():
            torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-6)


@kernels_only
def test_a_compiled_call_has_the_tiles_that_are_set(backend, device):
    torch._dynamo.reset()
    problem, token_ids = random_problem((12,), 130, device)
    compiled_for = []

    def compiler(graph, inputs):
        nodes = [node for node in graph.graph.nodes if "linear_token_logprobs_forward" in str(node.target)]
        compiled_for.extend(node.args[-1] for node in nodes)
        return graph

    compiled = torch.compile(linear_token_logprobs, fullgraph=True, backend=compiler)
    for size in (TILE, None, (4, 100), TILE):
        got = problem.call(compiled, token_ids, tile=size)
        assert torch.equal(got, problem.call(linear_token_logprobs, token_ids, tile=size))
    assert compiled_for == [[8, 64], [], [4, 100]], "each size is compiled once"


def test_no_tile_is_empty():
    with pytest.raises(ValueError, match=r"size .*at least 1; got \(8, 0\)"), tile_size((8, 0)):
        pass


@kernels_only
def test_opcheck(backend, device):
    problem, token_ids = random_problem((12,), 130, device, bias=True, rank=2)
    token_ids[::3] = IGNORE
    leaves = problem.leaves()
    inputs = (*leaves.values(), token_ids)
    options = (0.7, 5.0, IGNORE, True, ["is_top1"], None, list(TILE))
    forward = _registry.op("linear_token_logprobs_forward", backend)
    torch.library.opcheck(forward, (*inputs, *options))
    logprobs, entropy, row_stats, _ = forward(*(v.detach() for v in inputs), *options)
    backward = _registry.op("linear_token_logprobs_backward", backend)
    wanted = [True, True, False, True, True]
    saved = (*(v.detach() for v in inputs), logprobs, entropy, row_stats, wanted, *options)
    torch.library.opcheck(backward, (*upstream_for(token_ids), *saved))


@kernels_only
@ALSO_EMULATED
def test_the_kernels_of_the_backend_are_used(backend, device):
    problem, token_ids = random_problem((12,), 130, device)
    with OpCalls() as record:
        run(ours, problem, token_ids, upstream_for(token_ids), tile=TILE)
    called = {call[0].name() for call in record.calls}
    names = ("part", "part_backward", *(("finish",) if backend == "triton" else ()))
    assert called == {f"rlkernels::token_logprobs_{name}.{backend}" for name in names}


BAD_INPUT = {
    "hidden no tensor": (dict(hidden=[1.0]), TypeError, ("hidden", "list")),
    "hidden integer": (dict(hidden=torch.zeros(2, 4, dtype=torch.int64)), TypeError, ("hidden", "int64")),
    "hidden 0-d": (dict(hidden=torch.zeros(())), ValueError, ("hidden", "[]")),
    "weight 1-d": (dict(weight=torch.zeros(4)), ValueError, ("weight", "[V, 4]", "[4]")),
    "weight of another width": (dict(weight=torch.zeros(9, 5)), ValueError, ("weight", "[V, 4]", "[9, 5]")),
    "no vocabulary": (dict(weight=torch.zeros(0, 4)), ValueError, ("weight", "V >= 1", "[0, 4]")),
    "weight of another dtype": (
        dict(weight=torch.zeros(9, 4).bfloat16()),
        TypeError,
        ("weight", "float32", "bfloat16"),
    ),
    "weight device": (dict(weight=torch.zeros(9, 4, device="meta")), ValueError, ("weight", "cpu", "meta")),
    "token_ids shape": (dict(token_ids=torch.zeros(3, dtype=torch.int64)), ValueError, ("token_ids", "[2]", "[3]")),
    "token_ids float": (dict(token_ids=torch.zeros(2)), TypeError, ("token_ids", "float32")),
    "bias shape": (dict(bias=torch.zeros(4)), ValueError, ("bias", "[9]", "[4]")),
    "bias dtype": (dict(bias=torch.zeros(9).half()), TypeError, ("bias", "float32", "float16")),
    "adapter no pair": (dict(adapter=torch.zeros(2, 3)), TypeError, ("adapter", "pair", "Tensor")),
    "adapter rows": (dict(adapter=(torch.zeros(3, 2), torch.zeros(9, 2))), ValueError, ("adapter[0]", "[3, 2]")),
    "adapter rank": (dict(adapter=(torch.zeros(2, 2), torch.zeros(9, 3))), ValueError, ("adapter[1]", "[9, 2]")),
    "temperature 0": (dict(temperature=0.0), ValueError, ("temperature", "> 0")),
    "softcap negative": (dict(softcap=-1.0), ValueError, ("softcap", "> 0", "-1")),
    "scale 0": (dict(scale=0.0), ValueError, ("scale", "> 0")),
    "ignore_index None": (dict(ignore_index=None), TypeError, ("ignore_index", "None")),
    "outputs unknown": (dict(outputs=("top1",)), ValueError, ("outputs", "is_top1", "top1")),
    "outputs a string": (dict(outputs="is_top1"), TypeError, ("outputs", "a sequence of names", "is_top1")),
    "num_scored too many": (dict(num_scored=3), ValueError, ("num_scored", "2", "3")),
    "num_scored negative": (dict(num_scored=-1), ValueError, ("num_scored", "-1")),
    "num_scored a float": (dict(num_scored=1.0), TypeError, ("num_scored", "float")),
    "budget negative": (dict(logits_budget_mb=-1), ValueError, ("logits_budget_mb", ">= 0", "-1")),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input(backend, name):
    changes, error, fragments = BAD_INPUT[name]
    arguments = {
        "hidden": torch.zeros(2, 4),
        "weight": torch.zeros(9, 4),
        "token_ids": torch.zeros(2, dtype=torch.int64),
    }
    with pytest.raises(error) as raised:
        linear_token_logprobs(**(arguments | changes))
    for fragment in fragments:
        assert fragment in str(raised.value)


@pytest.mark.only("reference", "cpu")
@pytest.mark.parametrize("processes", [2, thorough(3)])
def test_vocabulary_shared_by_processes(backend, device, tmp_path, forked, processes):
    """Neither 2 nor 3 divides the 101 tokens. Everything is as in one process, in float64 to the last digits."""
    problem, token_ids = random_problem((21,), 101, "cpu", torch.float64, bias=True, rank=2)
    token_ids[::5] = IGNORE
    torch.save({"problem": problem, "token_ids": token_ids, "backend": backend}, tmp_path / "inputs.pt")
    code, printed = forked.run_together(processes, str(WORKER), str(tmp_path))
    assert code == 0, printed[-4000:]
    shares = [torch.load(tmp_path / f"{rank}.pt") for rank in range(processes)]
    for case, first in shares[0].items():
        whole = first["whole"]
        for name, value in whole.items():
            pieces = [share[case]["shared"][name] for share in shares]
            if name in ("weight", "bias", "adapter_weight"):
                assert len({len(piece) for piece in pieces}) > 1, "shares of different sizes"
                got = [torch.cat(pieces)]
            else:
                got = pieces
                assert all(torch.equal(piece, got[0]) for piece in got), f"{name}: every rank has the same bits"
            limit = 1e-12 if first["dtype"] == torch.float64 else 1e-5
            torch.testing.assert_close(got[0], value, rtol=limit, atol=limit)
