import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import rlkernels
from cases import ALSO_EMULATED, THOROUGH_EMULATED
from head_problems import IGNORE, NAN, eager, random_problem
from peak_memory import peak_memory
from rlkernels import _backends, linear_policy_loss, linear_token_logprobs, policy_loss
from rlkernels._codes import AGGREGATIONS, OBJECTIVES, SAMPLER_CORRECTIONS
from tolerance import assert_as_accurate_as_torch

# Triton's kernels serve NVIDIA GPUs too.
pytestmark = [pytest.mark.only("reference", *_backends.BACKENDS_OF["linear_policy_loss"]), THOROUGH_EMULATED]
kernels_only = pytest.mark.only("cpu", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TILE = (8, 64)
WIDTH = 24
# Budgets for logits of 130 tokens in float32.
MB = 2**20
BUDGETS = {"one block": 0.0, "two blocks": 16 * 130 * 4 / MB, "all": 100.0}


def composed(
    hidden, weight, token_ids, old_logprobs, advantages, mask=None, *, function=linear_token_logprobs, **options
):
    """The two functions one after the other."""
    names = ("bias", "adapter", "temperature", "softcap", "scale")
    head = {name: options.pop(name) for name in names if name in options}
    head |= {} if function is eager else {"return_entropy": True}
    logprobs, entropy = function(hidden, weight, token_ids, **head)
    scored = token_ids != IGNORE if mask is None else mask & (token_ids != IGNORE)
    return policy_loss(logprobs, old_logprobs, advantages, scored, entropy=entropy, **options)


def naive(*args, **options):
    """All logits, then the reference: what eager PyTorch does."""
    with rlkernels.use_backend("reference"):
        return composed(*args, function=eager, **options)


def random_batch(problem_options, shape=(5, 11), packed=False, seed=0):
    """A problem and the other arguments of the loss. Sequences have different lengths, and one has no token."""
    problem, token_ids = random_problem(shape, 130, *problem_options, seed=seed)
    device = token_ids.device
    g = torch.Generator().manual_seed(seed + 1)
    lengths = torch.randint(3, shape[1] + 1, (shape[0],), generator=g)
    lengths[1] = 0
    mask = (torch.arange(shape[1]) < lengths.unsqueeze(1)) & (torch.rand(shape, generator=g) < 0.9)
    old = eager(problem.hidden.float(), problem.weight.float(), token_ids)[0].cpu()
    old = old + 0.3 * torch.randn(shape, generator=g)
    advantages = torch.randn(shape[0], generator=g)
    others = {
        "ref_logprobs": old + 0.3 * torch.randn(shape, generator=g),
        "sampler_logprobs": old + 0.1 * torch.randn(shape, generator=g),
    }
    if packed:
        inside = torch.arange(shape[1]) < lengths.unsqueeze(1)
        problem.hidden = problem.hidden[inside.to(device)]
        token_ids, mask, old = token_ids[inside.to(device)], mask[inside], old[inside]
        others = {name: value[inside].to(device) for name, value in others.items()}
        others["cu_seqlens"] = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int().to(device)
    others = {name: value.to(device) for name, value in others.items()}
    return problem, (token_ids, old.to(device), advantages.to(device), mask.to(device)), others


def run(function, problem, arguments, frozen=(), upstream=1.0, **options):
    leaves = problem.leaves(frozen)
    arguments = [a if a is None or not a.is_floating_point() else a.to(_working(problem)) for a in arguments]
    options = {n: v.to(_working(problem)) if _floats(v) else v for n, v in options.items()}
    loss, metrics = leaves.call(function, *arguments, **({"tile": TILE} | options))
    named = leaves.differentiated()
    gradients = torch.autograd.grad(loss * upstream, list(named.values()))
    return {"loss": loss.detach(), "metrics": metrics} | dict(zip(named, gradients, strict=True))


def _floats(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _working(problem):
    return torch.float64 if problem.hidden.dtype == torch.float64 else torch.float32


def assert_matches_reference(problem, arguments, frozen=(), *, head=None, **options):
    got = run(linear_policy_loss, problem, arguments, frozen, **options, **(head or {}))
    oracle = run(linear_policy_loss, problem.to(torch.float64), arguments, frozen, **options)
    same_dtype = run(naive, problem, arguments, frozen, **options)
    assert got.keys() == oracle.keys() == same_dtype.keys()
    for name, value in got.items():
        gradient = name not in ("loss", "metrics")
        if name == "loss":
            # Eager PyTorch may happen to round every step of one number well. What it is made of is held to the rule
            # in the tests of linear_token_logprobs and policy_loss, and in one group it is theirs bit for bit.
            error = (same_dtype[name] - oracle[name]).abs()
            assert (value - oracle[name]).abs() <= 2 * error + 1e-6 * oracle[name].abs() + 5e-7
        elif name == "metrics":
            error = (same_dtype[name] - oracle[name]).abs()
            assert ((value - oracle[name]).abs() <= 2 * error + 1e-5 * oracle[name].abs() + 1e-6).all()
        else:
            assert_as_accurate_as_torch(value, oracle[name], same_dtype[name], what=name, gradient=gradient)
    return got


def assert_close_to_reference(problem, arguments, frozen=(), *, head=None, **options):
    """To the precision of float32. Other tests, and those below, show how exact the parts are."""
    got = run(linear_policy_loss, problem, arguments, frozen, **options, **(head or {}))
    oracle = run(composed, problem.to(torch.float64), arguments, frozen, **options)
    assert got.keys() == oracle.keys()
    for name, value in got.items():
        scale = oracle[name].abs().max().item()
        torch.testing.assert_close(value.double(), oracle[name].double(), rtol=1e-4, atol=1e-5 * scale + 1e-9, msg=name)


@kernels_only
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective(backend, device, emulated, objective, budget):
    for packed in (False, True) if not emulated else (budget == "all",):
        problem, arguments, others = random_batch((device,), packed=packed, seed=int(packed))
        others.pop("sampler_logprobs")
        options = dict(objective=objective, kl_coef=0.1, entropy_coef=0.05, temperature=0.8, **others)
        head = dict(tile=TILE, logits_budget_mb=BUDGETS[budget])
        assert_close_to_reference(problem, arguments, head=head, **options)


@kernels_only
@pytest.mark.parametrize("correction", SAMPLER_CORRECTIONS)
@pytest.mark.parametrize("on_policy", [False, True], ids=["old", "on policy"])
def test_every_sampler_correction(backend, device, emulated, correction, on_policy):
    problem, (token_ids, old, *rest), others = random_batch((device,))
    others.pop("ref_logprobs")
    arguments = (token_ids, None if on_policy else old, *rest)
    options = dict(sampler_correction=correction, sampler_cap=1.05, entropy_coef=0.05, **others)
    for budget in list(BUDGETS.values())[emulated:2] if emulated else BUDGETS.values():
        assert_close_to_reference(problem, arguments, head=dict(tile=TILE, logits_budget_mb=budget), **options)


@kernels_only
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("normalizer", [None, 7.0])
def test_every_aggregation(backend, device, aggregation, normalizer):
    problem, arguments, _ = random_batch((device,))
    options = dict(aggregation=aggregation, normalizer=normalizer, softcap=5.0, scale=1.5)
    assert_close_to_reference(
        problem, arguments, head=dict(tile=TILE, logits_budget_mb=BUDGETS["two blocks"]), **options
    )


@kernels_only
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("objective", ["ppo", "gspo"])
def test_dtypes(backend, device, emulated, dtype, objective):
    """Enough tokens for every measure, in one group of rows and in several."""
    shape = (4, 12) if emulated else (12, 40)
    problem, arguments, _ = random_batch((device, dtype), shape)
    for budget in (0.05,) if emulated else (100.0, 0.05):
        head = dict(tile=TILE, logits_budget_mb=budget)
        assert_matches_reference(problem, arguments, head=head, objective=objective, entropy_coef=0.01)


@kernels_only
def test_bias_and_adapter(backend, device):
    problem, arguments, _ = random_batch((device,))
    full, _ = random_problem((5, 11), 130, device, bias=True, rank=3)
    problem.bias, problem.adapter, problem.adapter_weight = full.bias, full.adapter, full.adapter_weight
    for frozen in ((), ("weight", "bias"), ("weight", "bias", "adapter_weight"), ("hidden", "adapter")):
        assert_close_to_reference(problem, arguments, frozen, head=dict(tile=TILE), entropy_coef=0.1)


@ALSO_EMULATED
def test_is_the_two_functions_bit_for_bit(backend, device):
    """With one group of rows; in several the weight's gradient is another sum."""
    problem, arguments, others = random_batch((device,))
    options = dict(kl_coef=0.1, entropy_coef=0.05, **others)
    got = run(linear_policy_loss, problem, arguments, **options)
    wanted = run(composed, problem, arguments, **options)
    for name, value in got.items():
        assert torch.equal(value, wanted[name]), name


@kernels_only
@pytest.mark.parametrize("objective", ["ppo", "gspo"])
def test_products(backend, device, objective):
    """For 40 rows: three, two with a frozen head, and four where a sequence does not fit."""
    problem, token_ids = random_problem((4, 10), 130, device)
    arguments = (token_ids, None, torch.ones(4, device=device))
    unit = 2 * 40 * 130 * WIDTH
    one, two, all_rows = BUDGETS.values()
    cases = [((), all_rows, 3), (("weight",), all_rows, 2)]
    if objective == "ppo":
        cases += [((), two, 3), (("weight",), one, 2)]
    else:
        cases += [((), one, 4)]
    for frozen, budget, wanted in cases:
        with FlopCounterMode(display=False) as counter:
            run(linear_policy_loss, problem, arguments, frozen, tile=TILE, logits_budget_mb=budget, objective=objective)
        assert counter.get_total_flops() == wanted * unit, (frozen, budget)


@kernels_only
def test_sequences_are_whole_in_their_group(backend, device):
    """Sequences of 5, 9 and 6 tokens, 16 at a time: the third one is the second group, padded to blocks of 8."""
    problem, token_ids = random_problem((20,), 130, device)
    cu_seqlens = torch.tensor([0, 5, 14, 20], dtype=torch.int32, device=device)
    arguments = (token_ids, torch.full((20,), -5.0, device=device), torch.ones(3, device=device))
    options = dict(objective="gspo", cu_seqlens=cu_seqlens)
    with FlopCounterMode(display=False) as counter:
        got = run(linear_policy_loss, problem, arguments, tile=TILE, logits_budget_mb=BUDGETS["two blocks"], **options)
    assert counter.get_total_flops() == 3 * 2 * (16 + 8) * 130 * WIDTH
    wanted = run(composed, problem, arguments, **options)
    for name, value in got.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-7)


@pytest.mark.only("cpu")
def test_memory(backend, device):
    """Besides inputs and gradients there are a group's logits, in 16 bits a float32 sum, and little else."""
    rows, width, vocab_size = 1024, 32, 20_000
    for dtype in (torch.float32, torch.bfloat16):
        problem, token_ids = random_problem((4, 256), vocab_size, device, dtype, width=width)
        arguments = (token_ids, None, torch.ones(4))
        size = dtype.itemsize
        results = size * (rows * width + vocab_size * width)
        logits = size * 512 * vocab_size
        in_float32 = 0 if size == 4 else 4 * vocab_size * width
        options = dict(tile=(256, 2048), logits_budget_mb=logits / MB)
        peak = peak_memory(lambda: run(linear_policy_loss, problem, arguments, **options))  # noqa: B023
        assert logits < peak - 2 * results - in_float32 < logits + 2e6


def test_nothing_scored(backend, device):
    problem, (token_ids, old, advantages, mask), _ = random_batch((device,))
    problem.hidden[:] = NAN
    for ids, scored in ((token_ids, mask & False), (torch.full_like(token_ids, IGNORE), mask)):
        for objective in ("ppo", "gspo"):
            results = run(linear_policy_loss, problem, (ids, old, advantages, scored), objective=objective)
            for name, value in results.items():
                assert torch.equal(value, torch.zeros_like(value)), name


def test_what_is_not_scored_leaves_no_trace(backend, device):
    problem, (token_ids, old, advantages, mask), _ = random_batch((device,))
    clean = run(linear_policy_loss, problem, (token_ids, old, advantages, mask), tile=TILE)
    problem.hidden[~mask] = NAN
    old = old.masked_fill(~mask, NAN)
    for ids, scored in ((token_ids, mask), (token_ids.masked_fill(~mask, IGNORE), None)):
        dirty = run(linear_policy_loss, problem, (ids, old, advantages, scored), tile=TILE)
        for name, value in dirty.items():
            torch.testing.assert_close(value, clean[name], rtol=1e-5, atol=1e-7)


def test_ids_that_the_mask_leaves_out_may_be_anything(backend, device):
    for dtype in (torch.float32, torch.float64):
        problem, token_ids = random_problem((2, 4), 130, device, dtype)
        mask = torch.tensor([[1, 1, 0, 1], [1, 0, 1, 1]], device=device)
        arguments = (None, torch.ones(2, device=device), mask)
        wanted, _ = problem.call(linear_policy_loss, token_ids, *arguments)
        loss, _ = problem.call(linear_policy_loss, token_ids.masked_fill(mask == 0, 7777), *arguments)
        assert torch.equal(loss, wanted)


@pytest.mark.parametrize("objective", ["ppo", "gspo"])
def test_cu_seqlens_that_are_wrong(backend, device, objective):
    problem, token_ids = random_problem((20,), 130, device)
    options = dict(objective=objective, tile=TILE, logits_budget_mb=BUDGETS["two blocks"])

    def loss(cu_seqlens, problem=problem, token_ids=token_ids):
        arguments = (token_ids, None, torch.ones(2, device=device))
        return problem.leaves().call(linear_policy_loss, *arguments, cu_seqlens=cu_seqlens, **options)

    with pytest.raises(ValueError, match=r"token_ids.*\[B, T\].*\[20\]"):
        loss(None)
    with pytest.raises(TypeError, match="cu_seqlens must be a tensor; got list"):
        loss([0, 10, 20])
    if device.type == "cpu":
        for wrong, message in (([0, 10, 90], "20.*0 to 90"), ([0, 12, 9, 20], "decrease")):
            with pytest.raises(ValueError, match=f"cu_seqlens.*{message}"):
                loss(torch.tensor(wrong, dtype=torch.int32))


def test_num_scored(backend, device):
    problem, arguments, _ = random_batch((device,))
    scored = int(arguments[-1].sum())
    wanted = run(linear_policy_loss, problem, arguments, tile=TILE)
    for number in (scored, scored + 9):
        got = run(linear_policy_loss, problem, arguments, tile=TILE, num_scored=number)
        for name, value in got.items():
            torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-7)
    if device.type == "cpu" and backend != "reference":
        with pytest.raises(ValueError, match="num_scored"):
            run(linear_policy_loss, problem, arguments, num_scored=scored - 1)


def test_upstream_gradient(backend, device):
    problem, arguments, _ = random_batch((device,))
    once = run(linear_policy_loss, problem, arguments)
    for factor in (0.5, -3.0, 0.0):
        scaled = run(linear_policy_loss, problem, arguments, upstream=factor)
        for name in ("hidden", "weight"):
            torch.testing.assert_close(scaled[name], once[name] * factor)


@kernels_only
@pytest.mark.parametrize("budget", BUDGETS)
def test_float16_under_a_gradient_scaler(backend, device, emulated, budget):
    """An advantage over N times a small probability is 0 in float16, but not times the scale of the loss."""
    tokens = 64 if emulated else 2048
    problem, token_ids = random_problem((1, tokens), 130, device, torch.float16)
    arguments = (token_ids, None, torch.full((1,), tokens / 2048 * 1e-3, device=device))
    options = dict(upstream=65536.0, tile=TILE, logits_budget_mb=BUDGETS[budget])
    got = run(linear_policy_loss, problem, arguments, **options)
    wanted = run(linear_policy_loss, problem.to(torch.float64), arguments, upstream=65536.0)
    for name in ("hidden", "weight"):
        assert got[name].dtype == torch.float16
        assert (got[name] - wanted[name]).norm() < 2e-3 * wanted[name].norm()


@kernels_only
def test_a_second_backward_pass_is_refused(backend, device):
    problem, arguments, _ = random_batch((device,))
    leaves = problem.leaves()
    loss, _ = leaves.call(linear_policy_loss, *arguments)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@kernels_only
def test_checkpointing_computes_it_once_again(backend, device):
    problem, arguments, _ = random_batch((device,))
    leaves, passes = problem.leaves(), []

    def loss(hidden):
        passes.append(hidden)
        return leaves.call(linear_policy_loss, *arguments)[0]

    checkpoint(loss, leaves.hidden, use_reentrant=False).backward()
    assert len(passes) <= 2


@kernels_only
def test_same_bits_on_every_run(backend, device):
    problem, arguments, others = random_batch((device, torch.bfloat16))
    options = dict(tile=TILE, logits_budget_mb=BUDGETS["two blocks"], kl_coef=0.1, **others)
    first, second = (run(linear_policy_loss, problem, arguments, **options) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_without_gradients(backend, device):
    problem, arguments, _ = random_batch((device,))
    wanted = run(linear_policy_loss, problem, arguments)
    loss, metrics = problem.call(linear_policy_loss, *arguments)
    with torch.no_grad():
        again, _ = problem.leaves().call(linear_policy_loss, *arguments)
    assert not loss.requires_grad
    assert not again.requires_grad
    torch.testing.assert_close(torch.stack([loss, again]), wanted["loss"].expand(2))
    torch.testing.assert_close(metrics, wanted["metrics"])


def test_autocast(backend, device):
    problem, arguments, _ = random_batch((device,))

    def under_autocast(*args, **options):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return linear_policy_loss(*args, **options)

    got = run(under_autocast, problem, arguments)
    in_bfloat16 = run(linear_policy_loss, problem.to(torch.bfloat16), arguments)
    for name, value in got.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, in_bfloat16[name].float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("objective", ["ppo", "gspo"])
def test_compile(backend, device, objective):
    torch._dynamo.reset()
    problem, arguments, _ = random_batch((device,))

    def function(*args, **options):
        loss, metrics = linear_policy_loss(*args, objective=objective, entropy_coef=0.1, **options)
        return loss * 2, metrics

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    wanted, got = (run(f, problem, arguments) for f in (function, compiled))
    for name, value in got.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-6)


BAD_INPUT = {
    "entropy given": (dict(entropy=torch.zeros(2, 3)), TypeError, ("entropy", "linear_policy_loss")),
    "an unknown option": (dict(clip=0.2), TypeError, ("clip",)),
    "an unknown objective": (dict(objective="trpo"), ValueError, ("objective", "trpo")),
    "mask shape": (dict(mask=torch.ones(2, 2)), ValueError, ("mask", "[2, 3]", "[2, 2]")),
    "hidden of one sequence": (dict(hidden=torch.zeros(3, 4)), ValueError, ("token_ids", "[3]", "[2, 3]")),
    "old_logprobs shape": (dict(old_logprobs=torch.zeros(2)), ValueError, ("old_logprobs", "[2, 3]", "[2]")),
    "old_logprobs integer": (dict(old_logprobs=torch.zeros(2, 3).long()), TypeError, ("old_logprobs", "int64")),
    "advantages shape": (dict(advantages=torch.zeros(3)), ValueError, ("advantages", "[2]", "[3]")),
    "weight shape": (dict(weight=torch.zeros(9, 5)), ValueError, ("weight", "[V, 4]", "[9, 5]")),
    "budget negative": (dict(logits_budget_mb=-1.0), ValueError, ("logits_budget_mb", "-1")),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input(backend, name):
    changes, error, fragments = BAD_INPUT[name]
    arguments = {
        "hidden": torch.zeros(2, 3, 4),
        "weight": torch.zeros(9, 4, requires_grad=True),
        "token_ids": torch.zeros(2, 3, dtype=torch.int64),
        "old_logprobs": torch.zeros(2, 3),
        "advantages": torch.zeros(2),
    }
    for head in ("differentiated", "data"):
        arguments["weight"] = arguments["weight"].detach().requires_grad_(head == "differentiated")
        with pytest.raises(error) as raised:
            linear_policy_loss(**(arguments | changes))
        for fragment in fragments:
            assert fragment in str(raised.value)
