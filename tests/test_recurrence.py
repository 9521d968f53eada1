import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rlkernels
from cases import COMPILERS_AND_LAYOUTS, THOROUGH_EMULATED, thorough, thorough_emulated
from op_calls import check_ops
from rlkernels import discounted_returns, gae, td_lambda, vtrace
from tolerance import assert_as_accurate_as_torch

NAN = float("nan")
INF = float("inf")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FUNCTIONS = {"gae": gae, "discounted_returns": discounted_returns, "td_lambda": td_lambda, "vtrace": vtrace}
TENSORS = {
    "gae": ("rewards", "values"),
    "discounted_returns": ("rewards",),
    "td_lambda": ("rewards", "values"),
    "vtrace": ("rewards", "values", "logprobs", "behavior_logprobs"),
}
PER_TOKEN = ("rewards", "values", "logprobs", "behavior_logprobs", "mask", "dones")


FEW_SEQUENCES = 528
"""Where there are fewer, a GPU does the blocks of long ones side by side."""
FEW_SEQUENCES_ON_CPUS = 6


@pytest.fixture(autouse=True)
def short_blocks(request, monkeypatch):
    """Where an interpreter runs the blocks, lengths that take several of them, and the way of few long sequences, all
    the same. The CUDA kernels' are compiled in."""
    if "backend" in request.fixturenames and request.node.callspec.params["backend"] == ("triton", "cpu"):
        monkeypatch.setattr("rlkernels.triton.recurrence.BLOCK", 256)
        monkeypatch.setattr("rlkernels.triton.recurrence.FEW_SEQUENCES", FEW_SEQUENCES_ON_CPUS)
        monkeypatch.setattr("rlkernels.triton.recurrence.LONGEST_OF_FEW", 1000)
        monkeypatch.setattr("rlkernels.triton.recurrence.FOLD", 4)


def run(name, inputs, **options):
    """The results of function `name`, as a tuple, from those of `inputs` that it takes."""
    taken = (*TENSORS[name], "mask", "dones", "bootstrap_values", "cu_seqlens")
    if name == "discounted_returns":
        options.pop("lam", None)
    result = FUNCTIONS[name](**{key: inputs[key] for key in taken if key in inputs}, **options)
    return result if isinstance(result, tuple) else (result,)


def spans(inputs):
    if "cu_seqlens" in inputs:
        return [(slice(start, end),) for start, end in itertools.pairwise(inputs["cu_seqlens"].tolist())]
    return [(row, slice(None)) for row in range(inputs["rewards"].shape[0])]


def brute_force(name, inputs, gamma=1.0, lam=1.0, rho_clip=1.0, c_clip=1.0):
    """Not the recurrences but the sums that they are short for, over each episode's scored tokens."""
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    advantages, returns = torch.zeros_like(inputs["rewards"]), torch.zeros_like(inputs["rewards"])
    for number, span in enumerate(spans(inputs)):
        length = len(inputs["rewards"][span])
        get = {key: inputs[key][span].tolist() for key in PER_TOKEN if key in inputs}
        episodes, bootstraps = [[]], [0.0]
        for token in range(length):
            if "mask" not in get or get["mask"][token]:
                episodes[-1].append(token)
            if "dones" in get and get["dones"][token]:
                episodes.append([])
                bootstraps.append(0.0)
        if "bootstrap_values" in inputs:
            bootstraps[-1] = inputs["bootstrap_values"][number].item()
        for episode, bootstrap in zip(episodes, bootstraps, strict=True):
            a, g = episode_sums(name, get, episode, bootstrap, gamma, lam, rho_clip, c_clip)
            for token, advantage, result in zip(episode, a, g, strict=True):
                advantages[span][token], returns[span][token] = advantage, result
    return (advantages, returns) if name in ("gae", "vtrace") else (returns,)


def episode_sums(name, get, episode, bootstrap, gamma, lam, rho_clip, c_clip):
    size = len(episode)
    r = [get["rewards"][token] for token in episode]
    v = [*(get["values"][token] for token in episode), bootstrap]
    rho, c = [1.0] * size, [lam] * size
    if name == "vtrace":
        ratio = [math.exp(get["logprobs"][token] - get["behavior_logprobs"][token]) for token in episode]
        rho, c = [min(rho_clip, w) for w in ratio], [lam * min(c_clip, w) for w in ratio]

    def n_step(t, n):
        return sum(gamma**k * r[t + k] for k in range(n)) + gamma**n * v[t + n]

    if name == "discounted_returns":
        returns = [n_step(t, size - t) for t in range(size)]
        return returns, returns
    if name == "td_lambda":
        returns = [
            (1 - lam) * sum(lam ** (n - 1) * n_step(t, n) for n in range(1, size - t))
            + lam ** (size - t - 1) * n_step(t, size - t)
            for t in range(size)
        ]
        return returns, returns
    delta = [rho[t] * (r[t] + gamma * v[t + 1] - v[t]) for t in range(size)]
    above = [sum(gamma ** (k - t) * math.prod(c[t:k]) * delta[k] for k in range(t, size)) for t in range(size)]
    vs = [*(v[t] + above[t] for t in range(size)), bootstrap]
    if name == "gae":
        return above, vs[:-1]
    return [rho[t] * (r[t] + gamma * vs[t + 1] - v[t]) for t in range(size)], vs[:-1]


def in_double(inputs):
    return {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}


def assert_matches_reference(name, inputs, **options):
    """The backend against the reference in float64. Returns both."""
    got = run(name, inputs, **options)
    with rlkernels.use_backend("reference"):
        oracle = run(name, in_double(inputs), **options)
        naive = run(name, inputs, **options)
    scored = inputs.get("mask")
    for what, *three in zip(("advantages", "returns")[-len(got) :], got, oracle, naive, strict=True):
        assert_as_accurate_as_torch(*three, what=f"{name} {what}")
        if scored is not None:
            assert not three[0][~scored].any()
    return got, oracle


def make_inputs(
    lengths,
    width,
    device="cpu",
    dtype=torch.float32,
    packed=False,
    masked=True,
    drop=0.2,
    done=0.0,
    bootstrap=True,
    distance=0.3,
    garbage=True,
    seed=0,
):
    """Sequences of `lengths` tokens, a part of which (`drop`) is not scored, as if a tool had written it, padded to
    `width` or packed. Every value at a token that is not scored is NaN or infinite."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), width)
    values = {name: torch.randn(shape, generator=generator) for name in ("rewards", "values", "logprobs")}
    values["behavior_logprobs"] = values["logprobs"] + distance * torch.randn(shape, generator=generator)
    within = torch.arange(width) < torch.tensor(lengths, dtype=torch.int64).view(-1, 1)
    mask = within & (torch.rand(shape, generator=generator) >= drop)
    if garbage and masked:
        junk = torch.tensor([NAN, INF, -INF])[torch.randint(3, shape, generator=generator)]
        values = {name: torch.where(mask, value, junk) for name, value in values.items()}
    inputs = {name: value.to(dtype) for name, value in values.items()}
    if masked:
        inputs["mask"] = mask
    if done:
        inputs["dones"] = within & (torch.rand(shape, generator=generator) < done)
    if packed:
        inputs = {name: value[within] for name, value in inputs.items()}
        inputs["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0).int()
    if bootstrap:
        inputs["bootstrap_values"] = torch.randn(len(lengths), generator=generator).to(dtype)
    return {name: value.to(device) for name, value in inputs.items()}


@given(
    name=st.sampled_from(list(FUNCTIONS)),
    lengths=st.lists(st.integers(0, 12), min_size=0, max_size=6),
    padding=st.integers(0, 40),
    packed=st.booleans(),
    masked=st.booleans(),
    drop=st.sampled_from([0.0, 0.2, 0.8, 1.0]),
    done=st.sampled_from([0.0, 0.2, 1.0]),
    bootstrap=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    gamma=st.sampled_from([0, 0.5, 0.99, 1]),
    lam=st.sampled_from([0, 0.5, 0.95, 1]),
    clips=st.sampled_from([(1.0, 1.0), (2.0, 1.2), (INF, INF), (0.8, 0.9)]),
    seed=st.integers(0, 99),
)
def test_matches_oracles(
    backend,
    device,
    name,
    lengths,
    padding,
    packed,
    masked,
    drop,
    done,
    bootstrap,
    dtype,
    gamma,
    lam,
    clips,
    seed,
):
    inputs = make_inputs(
        lengths,
        max(lengths, default=0) + padding,
        device,
        dtype,
        packed=packed,
        masked=masked,
        drop=drop,
        done=done,
        bootstrap=bootstrap,
        seed=seed,
    )
    options = dict(gamma=gamma, lam=lam)
    if name == "vtrace":
        options |= dict(rho_clip=clips[0], c_clip=clips[1])
    _, oracle = assert_matches_reference(name, inputs, **options)
    by_sums = brute_force(name, {key: value.cpu() for key, value in inputs.items()}, **options)
    for one, other in zip(oracle, by_sums, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_gamma_and_lam(backend, device, name, gamma, lam):
    if name == "discounted_returns" and lam < 1:
        return
    for inputs in (
        make_inputs([70, 33], 70, device, masked=False),
        make_inputs([70, 33], 70, device, packed=True, drop=0.5, done=0.05),
    ):
        _, oracle = assert_matches_reference(name, inputs, gamma=gamma, lam=lam)
        by_sums = brute_force(name, {key: value.cpu() for key, value in inputs.items()}, gamma=gamma, lam=lam)
        for one, other in zip(oracle, by_sums, strict=True):
            torch.testing.assert_close(one.cpu(), other, rtol=1e-9, atol=1e-9)


@pytest.mark.only("cpu", "triton", "cuda")
@pytest.mark.parametrize("length", [1, thorough(16), 63, 64, 129, thorough(1025), thorough_emulated(2049)])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_lengths(backend, device, name, length):
    """1: no neighbour; 63, 129, 1025: beside a block's end; 2049: past several, and in the interpreter one of the
    sequences that are too long for one program."""
    lengths = [length, max(length - 5, 0)]
    for options in (
        dict(masked=False),
        dict(drop=0.3, done=2 / length),
        dict(packed=True, drop=0.3),
        dict(packed=True, masked=False),
    ):
        assert_matches_reference(name, make_inputs(lengths, length, device, **options), gamma=0.99, lam=0.95)


@pytest.mark.only("cpu", "triton", "cuda")
@pytest.mark.parametrize(
    ("name", "packed"),
    [
        *(
            ("gae", False),
            thorough_emulated("discounted_returns", True),
            thorough_emulated("td_lambda", False),
            ("vtrace", True),
        ),
        *(thorough("gae", True), thorough("discounted_returns", False)),
        *(thorough("td_lambda", True), thorough("vtrace", False)),
    ],
)
def test_sequences_too_long_for_one_program(backend, device, name, packed):
    """The tool's answer that is not scored spans several blocks."""
    if device.type == "cuda":
        lengths = [36_000, 900]
    else:
        lengths = [1700, 900] if backend == "triton" else [4200, 900]
    inputs = make_inputs(lengths, lengths[0], device, packed=packed, masked=True, drop=0.1)
    inputs["mask"].view(-1)[lengths[0] // 4 : lengths[0] // 2] = False
    for key in TENSORS[name]:
        inputs[key].view(-1)[lengths[0] // 4 : lengths[0] // 2] = NAN
    assert_matches_reference(name, inputs, gamma=1.0, lam=0.999)
    inputs["dones"] = torch.zeros_like(inputs["mask"])
    inputs["dones"].view(-1)[lengths[0] // 3] = True
    got, _ = assert_matches_reference(name, inputs, gamma=0.999, lam=1.0)
    alone = {key: value[:1] if key != "cu_seqlens" else value[:2] for key, value in inputs.items()}
    if packed:
        alone |= {key: inputs[key][: lengths[0]] for key in PER_TOKEN}
    for one, other in zip(run(name, alone, gamma=0.999, lam=1.0), got, strict=True):
        assert torch.equal(one, other[: lengths[0]] if packed else other[:1])


@pytest.mark.only("triton", "cuda")
@pytest.mark.parametrize("options", [{}, {"packed": True, "drop": 0.4, "done": 0.01}], ids=["dense", "packed"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_few_and_many_sequences_give_the_same_bits(backend, device, name, options):
    """A warp goes through a sequence of many alone; the blocks of a long one of few are done side by side."""
    few, length = (FEW_SEQUENCES, 2700) if device.type == "cuda" else (FEW_SEQUENCES_ON_CPUS, 1400)
    lengths = [length] + [40] * (few - 1)
    masked = bool(options)
    many = make_inputs(lengths, length, device, masked=masked, **options)
    alone = {key: value[:1] if key != "cu_seqlens" else value[:2] for key, value in many.items()}
    if "packed" in options:
        alone |= {key: many[key][:length] for key in PER_TOKEN if key in many}
    one, other = (run(name, inputs, gamma=0.999, lam=0.97) for inputs in (alone, many))
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.flatten(), b.flatten()[:length])


@pytest.mark.only("triton", "cuda")
@pytest.mark.parametrize("gamma", [0.999, 0.99])
def test_the_product_of_many_factors_keeps_its_digits(backend, device, gamma):
    """Whose rounding, the same in each squaring, would be that of a hundred factors after seven of them."""
    rewards = torch.zeros(1, 1300, device=device)
    rewards[0, -1] = 1.0
    exact = torch.tensor(gamma).double() ** torch.arange(1299, -1, -1).double()
    got = discounted_returns(rewards, gamma=gamma).flatten().cpu().double()
    assert (got / exact - 1).abs().max() < 4 * torch.finfo(torch.float32).eps


@pytest.mark.only("cpu", "triton", "cuda")
def test_more_blocks_than_are_added_up_at_once(backend, device):
    length = 3000 if (backend, device.type) == ("triton", "cpu") else 270_000
    returns = discounted_returns(torch.ones(1, length, device=device))
    assert torch.equal(returns.flatten().cpu(), torch.arange(length, 0, -1.0))


@pytest.mark.thorough
@pytest.mark.only("cpu")
def test_length_of_131072(backend, device):
    """The reference takes seconds for it, so it runs on a CPU alone, and once."""
    assert_matches_reference("gae", make_inputs([131_072], 131_072, masked=False), gamma=1.0, lam=0.9999)


def test_more_rows_than_a_grid_axis_holds(backend, device, emulated):
    if emulated:
        pytest.skip("65,537 programs, one after another")
    padded = make_inputs([2] * 65_537, 2, device)
    (advantages, _), _ = assert_matches_reference("gae", padded, gamma=0.9, lam=0.8)
    if backend != "reference":
        packed = make_inputs([2] * 65_537, 2, device, packed=True)
        assert torch.equal(run("gae", packed, gamma=0.9, lam=0.8)[0], advantages.flatten())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_padded_equals_packed(backend, device, name):
    lengths = [6, 0, 150, 1, 64]
    padded = run(name, make_inputs(lengths, 150, device, done=0.02), gamma=0.9)
    packed = run(name, make_inputs(lengths, 150, device, done=0.02, packed=True), gamma=0.9)
    within = torch.arange(150, device=device) < torch.tensor(lengths, device=device).view(-1, 1)
    for one, other in zip(packed, padded, strict=True):
        torch.testing.assert_close(one, other[within])
        assert not other[~within].any()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_packed_sequences_do_not_leak(backend, device, name):
    inputs = make_inputs([70, 130, 9], 130, device, packed=True)
    wanted = run(name, inputs)
    changed = dict(inputs)
    for key in TENSORS[name]:
        changed[key] = inputs[key].clone()
        changed[key][70:200] += 1.0
        changed[key][[70, 199]] = NAN
    changed["bootstrap_values"] = inputs["bootstrap_values"] * torch.tensor([1, 3, 1], device=device)
    changed["mask"] = inputs["mask"].clone()
    changed["mask"][[70, 199]] = True
    for one, other in zip(run(name, changed), wanted, strict=True):
        for outside in (slice(0, 70), slice(200, None)):
            assert torch.equal(one[outside], other[outside])
        assert not torch.equal(one[70:200], other[70:200])


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_row_does_not_depend_on_the_others(backend, device, name, packed):
    """Bit for bit, also where it comes to lie elsewhere in memory."""
    lengths = [140, 200, 33] if packed else [200] * 3
    inputs = make_inputs(lengths, 200, device, packed=packed, done=0.01)
    together = run(name, inputs, gamma=0.97, lam=0.9)
    starts = [0, *itertools.accumulate(lengths)]
    for row in range(3):
        alone = {"bootstrap_values": inputs["bootstrap_values"][row : row + 1]}
        at = slice(starts[row], starts[row + 1]) if packed else slice(row, row + 1)
        alone |= {key: inputs[key][at] for key in PER_TOKEN}
        if packed:
            alone["cu_seqlens"] = torch.tensor([0, lengths[row]], dtype=torch.int32, device=device)
        for one, other in zip(run(name, alone, gamma=0.97, lam=0.9), together, strict=True):
            assert torch.equal(one, other[at])


@THOROUGH_EMULATED
def test_same_bits_on_every_run(backend, device):
    length = 20_000 if backend == "cpu" else 700
    inputs = make_inputs([length, length // 2, 1, 0], length, device)
    for name in FUNCTIONS:
        options = dict(whiten=True) if name == "gae" else {}
        first, *others = (run(name, inputs, gamma=0.99, **options) for _ in range(3))
        for other in others:
            for one, two in zip(first, other, strict=True):
                assert torch.equal(one, two)


@pytest.mark.only("cpu")
def test_bits_do_not_depend_on_the_number_of_threads(backend, device):
    threads = torch.get_num_threads()
    for packed in (False, True):
        inputs = make_inputs([40_000, 3, 0, 20_000, 9000, 1], 40_000, packed=packed)
        results = []
        try:
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                results.append(run("gae", inputs, gamma=0.99, lam=0.95, whiten=True))
        finally:
            torch.set_num_threads(threads)
        for result in results[1:]:
            for one, two in zip(results[0], result, strict=True):
                assert torch.equal(one, two)


@pytest.mark.parametrize("garbage", [NAN, INF, -INF])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_not_scored_leaves_no_trace(backend, device, name, garbage):
    """Leading, trailing, in the midst of a row, and all of it; that a row of tokens is not scored passes everything
    on."""
    clean = make_inputs([40] * 4, 40, device, drop=0.3, done=0.05, garbage=False)
    clean["mask"][1, :20] = False
    clean["mask"][2, 15:] = False
    clean["mask"][3] = False
    dirty = dict(clean)
    for key in TENSORS[name]:
        dirty[key] = clean[key].masked_fill(~clean["mask"], garbage)
    for one, other in zip(run(name, dirty, gamma=0.9), run(name, clean, gamma=0.9), strict=True):
        assert torch.equal(one, other)
        assert not one[~clean["mask"]].any()
        assert one[clean["mask"]].isfinite().all()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_masked_tokens_are_as_if_they_were_not_there(backend, device, name):
    inputs = make_inputs([90], 90, device, drop=0.5)
    kept = inputs["mask"][0].nonzero().flatten()
    short = {key: inputs[key][:, kept] for key in TENSORS[name]}
    got = run(name, inputs, gamma=0.9)
    wanted = run(name, short | {"bootstrap_values": inputs["bootstrap_values"]}, gamma=0.9)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one[:, kept], other)


@pytest.mark.parametrize("scored", [True, False], ids=["scored", "not scored"])
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("end", [75, 76, 128])
def test_nothing_flows_back_over_the_end_of_an_episode(backend, device, name, scored, end):
    """Not even what is not finite; where the end is the last token that one thread looks at, or another's first."""
    inputs = make_inputs([150, 150], 150, device, drop=0.0, done=0.0)
    inputs["dones"] = torch.zeros_like(inputs["mask"])
    inputs["dones"][:, end] = True
    inputs["mask"][:, end] = scored
    wanted = run(name, inputs)
    changed = dict(inputs)
    for key in TENSORS[name]:
        changed[key] = inputs[key].clone()
        changed[key][:, end + 1 :] = torch.tensor([INF, NAN], device=device).view(2, 1)
    for one, other in zip(run(name, changed), wanted, strict=True):
        assert torch.equal(one[:, : end + 1], other[:, : end + 1])
    until = {key: inputs[key][:, : end + 1] for key in PER_TOKEN if key != "dones"}
    for one, other in zip(run(name, until), wanted, strict=True):
        torch.testing.assert_close(one, other[:, : end + 1])


def test_by_hand(backend, device):
    rewards = torch.tensor([[1.0, NAN, 2.0]], device=device)
    values = torch.tensor([[0.5, NAN, 0.25]], device=device)
    inputs = {"rewards": rewards, "values": values, "mask": torch.tensor([[1, 0, 1]], device=device)}
    inputs["bootstrap_values"] = torch.tensor([4.0], device=device)
    last = 2 + 0.5 * 4 - 0.25
    first = 1 + 0.5 * 0.25 - 0.5 + 0.5 * 0.5 * last
    advantages, returns = run("gae", inputs, gamma=0.5, lam=0.5)
    assert advantages.tolist() == [[first, 0, last]]
    assert returns.tolist() == [[first + 0.5, 0, last + 0.25]]
    assert run("discounted_returns", inputs, gamma=0.5)[0].tolist() == [[1 + 0.5 * (2 + 0.5 * 4), 0, 2 + 0.5 * 4]]
    assert run("td_lambda", inputs, gamma=0.5, lam=0.5)[0].tolist() == [[first + 0.5, 0, last + 0.25]]
    halved = {"logprobs": torch.full((1, 3), math.log(0.5), device=device), "behavior_logprobs": rewards * 0}
    advantages, returns = run("vtrace", inputs | halved, gamma=0.5)
    vs_last = 0.25 + 0.5 * last
    vs_first = 0.5 + 0.5 * (1 + 0.5 * 0.25 - 0.5) + 0.5 * 0.5 * (vs_last - 0.25)
    torch.testing.assert_close(returns.cpu(), torch.tensor([[vs_first, 0, vs_last]]))
    torch.testing.assert_close(advantages.cpu(), torch.tensor([[0.5 * (1 + 0.5 * vs_last - 0.5), 0, 0.5 * last]]))


def test_the_functions_agree_where_they_mean_the_same(backend, device):
    inputs = make_inputs([90, 40], 90, device, done=0.05)
    options = dict(gamma=0.95, lam=0.9)
    returns = run("gae", inputs, **options)[1]
    torch.testing.assert_close(run("td_lambda", inputs, **options)[0], returns, rtol=1e-5, atol=1e-5)
    on_policy = inputs | {"behavior_logprobs": inputs["logprobs"]}
    torch.testing.assert_close(run("vtrace", on_policy, **options)[1], returns, rtol=1e-5, atol=1e-5)
    of_everything = run("gae", inputs, gamma=0.95, lam=1.0)[1]
    torch.testing.assert_close(run("discounted_returns", inputs, gamma=0.95)[0], of_everything, rtol=1e-5, atol=1e-5)
    assert torch.equal(run("gae", inputs, gamma=0, lam=1)[0], run("gae", inputs, gamma=0, lam=0)[0])


@pytest.mark.parametrize(
    ("packed", "masked"), [(False, False), (True, True), thorough_emulated(True, False), thorough_emulated(False, True)]
)
def test_whitening(backend, device, packed, masked, emulated, quick):
    lengths = [300, 0, 17, 1200] if emulated or (quick and backend == "reference") else [3000, 0, 17, 5000]
    inputs = make_inputs(lengths, max(lengths), device, packed=packed, masked=masked)
    (got, returns), _ = assert_matches_reference("gae", inputs, gamma=0.99, lam=0.95, whiten=True)
    plain, plain_returns = run("gae", inputs, gamma=0.99, lam=0.95)
    assert torch.equal(returns, plain_returns)
    scored = inputs["mask"] if masked else torch.ones_like(plain, dtype=torch.bool)
    values = plain.double()[scored]
    wanted = torch.zeros_like(plain, dtype=torch.float64)
    wanted[scored] = (values - values.mean()) / (values.var() + 1e-8).sqrt()
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-6)


def test_whitening_of_nearly_equal_advantages(backend, device):
    """What a sum of squares in float32 would lose: a spread of a thousandth of the mean."""
    generator = torch.Generator().manual_seed(0)
    rewards = 1000 + torch.randn(3, 400, generator=generator)
    inputs = {"rewards": rewards.to(device), "values": torch.zeros(3, 400, device=device)}
    whitened, _ = run("gae", inputs, gamma=0.0, whiten=True)
    exact = rewards.double()
    wanted = (exact - exact.mean()) / exact.std()
    torch.testing.assert_close(whitened.double().cpu(), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("size", [1e20, 1e30, 3e37])
def test_whitening_of_large_advantages(backend, device, size):
    """Also where the squares of their deviations overflow."""
    inputs = make_inputs([700, 300], 700, device, masked=True)
    inputs["rewards"] *= size
    inputs["values"] *= size
    (got, _), _ = assert_matches_reference("gae", inputs, gamma=0.9, lam=0.5, whiten=True)
    assert got.std() > 0.5


def test_whitening_of_the_largest_advantages(backend, device):
    """Their differences from the mean overflow, and 1 / std has lost digits."""
    rewards = torch.full((4, 100), 3.3e38)
    rewards[:, ::7] *= -1
    inputs = {"rewards": rewards.to(device), "values": torch.zeros(4, 100, device=device)}
    whitened, _ = run("gae", inputs, gamma=0.0, whiten=True)
    exact = rewards.double()
    wanted = (exact - exact.mean()) / exact.std()
    torch.testing.assert_close(whitened.double().cpu(), wanted, rtol=1e-5, atol=0)


def test_whitening_of_fewer_than_two(backend, device):
    inputs = make_inputs([5, 5], 5, device, drop=1.0)
    assert not run("gae", inputs, whiten=True)[0].any()
    inputs["mask"][1, 3] = True
    for value in (2.0, NAN, INF):
        inputs["rewards"][1, 3], inputs["values"][1, 3] = value, 0.5
        assert not run("gae", inputs, whiten=True)[0].any()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_nothing_there(backend, device, name):
    for lengths, width, packed in (([], 4, False), ([0, 0], 0, False), ([0, 0], 3, True), ([], 3, True)):
        inputs = make_inputs(lengths, width, device, packed=packed)
        for options in (dict(), dict(whiten=True)) if name == "gae" else (dict(),):
            for result in run(name, inputs, **options):
                assert result.shape == inputs["rewards"].shape
                assert not result.any()


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float32, torch.bfloat16], ids=str)
def test_masks_and_dones_of_other_dtypes(backend, device, dtype):
    inputs = make_inputs([40, 30], 40, device, done=0.1)
    others = inputs | {key: 2 * inputs[key].to(dtype) for key in ("mask", "dones")}
    for one, other in zip(run("gae", others), run("gae", inputs), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_strides_and_alignment(backend, device, name):
    inputs = make_inputs([64] * 3, 64, device, done=0.05)
    wanted = run(name, inputs, gamma=0.9)
    strided = {key: value.t().contiguous().t() for key, value in inputs.items()}
    shifted = {}
    for key, value in inputs.items():
        room = torch.empty(value.numel() + 1, dtype=value.dtype, device=device)
        shifted[key] = room[1:].view(value.shape).copy_(value)
    for other in (strided, shifted):
        for one, two in zip(run(name, other, gamma=0.9), wanted, strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_dtypes(backend, device, name):
    inputs = make_inputs([40, 30], 40, device, torch.bfloat16)
    floats = {key: value.float() if value.is_floating_point() else value for key, value in inputs.items()}
    wanted = run(name, floats)
    for result, other in zip(run(name, inputs), wanted, strict=True):
        assert result.dtype == torch.float32
        assert torch.equal(result, other)
    mixed = inputs | {"rewards": floats["rewards"]}
    for result, other in zip(run(name, mixed), wanted, strict=True):
        assert torch.equal(result, other)
    assert all(result.dtype == torch.float64 for result in run(name, in_double(inputs)))


class Allocations(TorchDispatchMode):
    """Adds up the bytes of all tensors that come out of an op and did not go into it."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        before = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() not in before:
                self.sizes.append(value.untyped_storage().nbytes())
        return result


def allocated_by_the_allocator(function):
    """Bytes that PyTorch's allocator gave out, whoever asked: what is allocated in C++ is none of a dispatch mode's."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = profile.profiler.kineto_results.events()
    return [event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0]


@pytest.mark.only("cpu", "triton", "cuda")
@pytest.mark.parametrize("whiten", [False, True], ids=["", "whiten"])
def test_memory(backend, device, whiten, emulated):
    """Masks and float32 inputs are used where they lie: the outputs, and no more than T / 256 numbers a row beside."""
    rows, length = (2, 1024) if emulated else (4, 8192)
    inputs = make_inputs([length] * rows, length, device, done=0.01)
    with Allocations() as record:
        run("gae", inputs, gamma=0.99, lam=0.95, whiten=whiten)
    outputs = 2 * 4 * rows * length
    allowed = outputs + 4 * rows * length // 256 + 256
    assert outputs <= sum(record.sizes) <= allowed
    if backend == "cpu":
        sizes = allocated_by_the_allocator(lambda: run("gae", inputs, gamma=0.99, lam=0.95, whiten=whiten))
        assert outputs <= sum(sizes) <= allowed


@pytest.mark.parametrize("bounds", [[1, 12], [0, 11], [0, 13], [0, 8, 4, 12], [0, -1, 12], [0, 20, 12]], ids=str)
def test_bad_cu_seqlens(backend, device, bounds, monkeypatch):
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)
    tokens = torch.zeros(12, device=device)
    mask = torch.arange(12, device=device) != 5

    def call(whiten=False):
        return gae(tokens, tokens, mask, cu_seqlens=cu_seqlens, whiten=whiten)

    if device.type == "cpu" and backend in ("reference", "cpu"):
        with pytest.raises(ValueError, match=r"cu_seqlens.*got"):
            call()
    else:
        for whiten in (False, True):
            assert all(result.isnan().all() for result in call(whiten))
    monkeypatch.setattr("rlkernels.ops._checks.CHECK_VALUES", True)
    with pytest.raises(ValueError, match=r"cu_seqlens.*got"):
        call()


def test_without_grad_mode_the_inputs_may_require_a_gradient(backend, device):
    inputs = make_inputs([5, 5], 5, device, masked=False)
    wanted = run("gae", inputs)
    leaves = inputs | {key: inputs[key].clone().requires_grad_() for key in TENSORS["gae"]}
    with torch.no_grad():
        got = run("gae", leaves)
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(one, other)
        assert not one.requires_grad


@pytest.mark.only("cpu", "triton", "cuda")
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", [name if name == "gae" else thorough_emulated(name) for name in FUNCTIONS])
def test_opcheck(backend, device, name, packed):
    inputs = make_inputs([3, 0, 4], 4, device, packed=packed, garbage=False, done=0.2)
    check_ops(lambda: run(name, inputs, gamma=0.9), backend, "recurrence")


@COMPILERS_AND_LAYOUTS
def test_compile(backend, device, compiler, packed):
    torch._dynamo.reset()
    inputs = make_inputs([3, 0, 4], 4, device, packed=packed, done=0.2)

    def function(rewards, **rest):
        given = rest | {"rewards": rewards * 1.5}
        return *(2 * result for result in run("gae", given, gamma=0.9, whiten=True)), *run("vtrace", given, lam=0.9)

    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    for one, other in zip(compiled(**inputs), function(**inputs), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.only("reference", "cpu")
@pytest.mark.thorough_on("reference")
def test_compile_once_for_changing_options(backend, device):
    """Floats that change become inputs of the graph, which the checks must let through."""
    torch._dynamo.reset()
    inputs = make_inputs([3, 0, 4], 4, device)

    def function(number):
        return run("vtrace", inputs, gamma=number, lam=number, rho_clip=2 * number, c_clip=number)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for number in (0.5, 0.75, 1.0):
        torch.testing.assert_close(compiled(number), function(number))


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_nothing_is_read_back_by_the_host(backend, device, name, packed, monkeypatch):
    """Fake tensors have no values: an .item(), a comparison or a data-dependent shape on the way raises. As on a GPU,
    where values are not checked."""
    monkeypatch.setattr("rlkernels.ops._checks.cu_seqlens_values", lambda *values: None)
    inputs = make_inputs([3, 0, 4], 4, device, packed=packed, done=0.2)
    with FakeTensorMode() as mode:
        fake = {key: mode.from_tensor(value) for key, value in inputs.items()}
        results = run(name, fake, gamma=0.9, **(dict(whiten=True) if name == "gae" else {}))
    assert len(results) == (2 if name in ("gae", "vtrace") else 1)
    assert all(result.shape == inputs["rewards"].shape for result in results)


TOKENS = torch.zeros(2, 3)
LEAF = torch.zeros(2, 3, requires_grad=True)
BAD_INPUT = {
    "rewards no tensor": ("gae", dict(rewards=[0.0]), TypeError, ("rewards", "list")),
    "rewards integer": ("gae", dict(rewards=TOKENS.long()), TypeError, ("rewards", "float32", "int64")),
    "rewards 1-d": ("discounted_returns", dict(rewards=torch.zeros(6)), ValueError, ("rewards", "[B, T]", "[6]")),
    "rewards 3-d": ("gae", dict(rewards=torch.zeros(2, 3, 1)), ValueError, ("rewards", "[B, T]", "[2, 3, 1]")),
    "rewards gradient": ("gae", dict(rewards=LEAF), ValueError, ("rewards", "gradient", "detach")),
    "values shape": ("gae", dict(values=torch.zeros(2, 4)), ValueError, ("values", "[2, 3]", "[2, 4]")),
    "values None": ("td_lambda", dict(values=None), TypeError, ("values", "NoneType")),
    "values integer": ("vtrace", dict(values=TOKENS.int()), TypeError, ("values", "float32", "int32")),
    "values gradient": ("td_lambda", dict(values=LEAF), ValueError, ("values", "gradient", "detach")),
    "values device": ("gae", dict(values=torch.zeros(2, 3, device="meta")), ValueError, ("values", "cpu", "meta")),
    "logprobs shape": ("vtrace", dict(logprobs=torch.zeros(2)), ValueError, ("logprobs", "[2, 3]", "[2]")),
    "logprobs gradient": ("vtrace", dict(logprobs=LEAF), ValueError, ("logprobs", "gradient", "detach")),
    "behavior_logprobs None": ("vtrace", dict(behavior_logprobs=None), TypeError, ("behavior_logprobs", "NoneType")),
    "mask shape": ("gae", dict(mask=torch.ones(3) > 0), ValueError, ("mask", "[2, 3]", "[3]")),
    "mask a list": ("gae", dict(mask=[[1] * 3] * 2), TypeError, ("mask", "list")),
    "mask complex": ("gae", dict(mask=TOKENS.to(torch.complex64)), TypeError, ("mask", "bool", "complex64")),
    "mask device": ("gae", dict(mask=torch.ones(2, 3, device="meta")), ValueError, ("mask", "cpu", "meta")),
    "dones shape": ("gae", dict(dones=torch.ones(2) > 0), ValueError, ("dones", "[2, 3]", "[2]")),
    "dones complex": ("gae", dict(dones=TOKENS.to(torch.complex64)), TypeError, ("dones", "bool", "complex64")),
    "dones device": ("gae", dict(dones=torch.ones(2, 3, device="meta")), ValueError, ("dones", "cpu", "meta")),
    "bootstrap_values shape": (
        "gae",
        dict(bootstrap_values=torch.zeros(3)),
        ValueError,
        ("bootstrap_values", "[2]", "[3]"),
    ),
    "bootstrap_values integer": (
        "discounted_returns",
        dict(bootstrap_values=torch.zeros(2).long()),
        TypeError,
        ("bootstrap_values", "float32", "int64"),
    ),
    "bootstrap_values gradient": (
        "gae",
        dict(bootstrap_values=torch.zeros(2, requires_grad=True)),
        ValueError,
        ("bootstrap_values", "gradient", "detach"),
    ),
    "bootstrap_values device": (
        "gae",
        dict(bootstrap_values=torch.zeros(2, device="meta")),
        ValueError,
        ("bootstrap_values", "cpu", "meta"),
    ),
    "cu_seqlens with padded": (
        "gae",
        dict(cu_seqlens=torch.tensor([0, 6], dtype=torch.int32)),
        ValueError,
        ("rewards", "cu_seqlens", "[2, 3]"),
    ),
    "cu_seqlens int64": ("gae", dict(cu_seqlens=torch.tensor([0, 6])), TypeError, ("cu_seqlens", "int32", "int64")),
    "cu_seqlens a list": ("gae", dict(cu_seqlens=[0, 6]), TypeError, ("cu_seqlens", "list")),
    "cu_seqlens of no sequence": (
        "discounted_returns",
        dict(rewards=torch.zeros(3), cu_seqlens=torch.zeros(1, dtype=torch.int32)),
        ValueError,
        ("cu_seqlens", "3", "no sequence"),
    ),
    "gamma above 1": ("gae", dict(gamma=1.01), ValueError, ("gamma", ">= 0", "<= 1", "1.01")),
    "gamma negative": ("discounted_returns", dict(gamma=-0.1), ValueError, ("gamma", ">= 0", "-0.1")),
    "gamma nan": ("td_lambda", dict(gamma=NAN), ValueError, ("gamma", "<= 1", "nan")),
    "gamma a string": ("gae", dict(gamma="1"), TypeError, ("gamma", "number", "str")),
    "lam above 1": ("vtrace", dict(lam=2), ValueError, ("lam", ">= 0", "<= 1", "2")),
    "lam negative": ("td_lambda", dict(lam=-1), ValueError, ("lam", ">= 0", "-1")),
    "lam None": ("gae", dict(lam=None), TypeError, ("lam", "number", "NoneType")),
    "rho_clip 0": ("vtrace", dict(rho_clip=0), ValueError, ("rho_clip", "> 0", "0")),
    "c_clip negative": ("vtrace", dict(c_clip=-1.0), ValueError, ("c_clip", "> 0", "-1")),
    "c_clip nan": ("vtrace", dict(c_clip=NAN), ValueError, ("c_clip", "> 0", "nan")),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(backend, device, case):
    name, changes, error, fragments = BAD_INPUT[case]
    arguments = dict.fromkeys(TENSORS[name], TOKENS)
    with pytest.raises(error) as raised:
        FUNCTIONS[name](**(arguments | changes))
    for fragment in fragments:
        assert fragment in str(raised.value)
