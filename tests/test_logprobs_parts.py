"""The ops under the LM head: what a tile of logits has in log p and entropy, and the gradient of a tile."""

import itertools
import math
import mmap

import pytest
import torch

import rlkernels
from cases import THOROUGH_EMULATED, thorough_emulated
from rlkernels import _backends, _registry, token_logprobs
from rlkernels.reference import logprobs as reference
from tolerance import assert_as_accurate_as_torch

# Triton's kernels serve NVIDIA GPUs too.
pytestmark = pytest.mark.only("reference", *_backends.BACKENDS_OF["linear_token_logprobs"])
kernels_only = pytest.mark.only("cpu", "triton")

IGNORE = -100
INF = float("inf")
NAN = float("nan")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = {
    1: "one logit, the target's or not",
    63: "less than a vector of 64, and odd",
    129: "one past a block of 128",
    1000: "many vectors and a tail of 8",
    4097: "one past a block of 4096",
}
# A small softcap shows what stands in for logits past the end of a row: -inf is finite once capped.
OPTIONS = {"plain": (1.0, 0.0), "temperature": (0.7, 0.0), "softcap": (1.5, 5.0)}
BEFORE, AFTER = 5, 3
"""Tokens of a row before its tile and after it."""
SCORED = ("plain", "masked vocabulary", "target masked", "target alone", "huge", "far from zero", "confident")
ELSEWHERE = ("target before", "target after", "masked vocabulary, target after", "nothing, target before")
UNDEFINED = ("nothing", "an inf", "target inf", "a nan", "target nan", "an inf and a nan", "no such token")
KINDS = (*SCORED, *ELSEWHERE, *UNDEFINED, "ignored", "ignored nan")


def op(name, backend):
    return getattr(reference, name) if backend == "reference" else _registry.op(name, backend)


def random_row(kind, size, generator):
    """All logits of a row, and its target. Its tile begins at BEFORE."""
    row = 3 * torch.randn(BEFORE + size + AFTER, generator=generator)
    tile, chance = row[BEFORE : BEFORE + size], torch.rand(size, generator=generator)
    at = int(chance[0] * size)
    other = (at + 1) % size
    target = BEFORE + at
    if "masked vocabulary" in kind:
        tile[chance < 0.5] = -INF
        tile[at] = 0.5
    if "target before" in kind or kind in ("an inf", "a nan", "an inf and a nan"):
        target = BEFORE - 1
    if "target after" in kind:
        target = BEFORE + size
    match kind:
        case "target masked":
            tile[at] = -INF
        case "target alone" | "nothing, target before":
            tile[:] = -INF
            row[target] = 0.5
        case "huge":
            tile[chance < 0.2] = 1e4
            tile[chance > 0.8] = -1e4
        case "far from zero":
            row += 30.0
        case "confident":
            row[target] += 40.0
        case "nothing":
            row[:] = -INF
        case "an inf":
            tile[at] = INF
        case "target inf":
            tile[at] = INF
        case "a nan" | "target nan":
            tile[at] = NAN
        case "an inf and a nan":
            tile[at] = INF
            tile[other] = NAN
        case "no such token":
            target = (-1, 2**32 + BEFORE, -(2**40), 2**62, -(2**63))[int(chance[0] * 5)]
        case "ignored":
            target = IGNORE
        case "ignored nan":
            row[:] = NAN
            target = IGNORE
    return row, target


def random_rows(kinds, size, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows, targets = zip(*(random_row(kind, size, generator) for kind in kinds), strict=True)
    return torch.stack(rows).to(device, dtype), torch.tensor(targets).to(device)


def tile_of(rows):
    return rows[:, BEFORE : rows.shape[1] - AFTER].contiguous()


def saved_of(rows, token_ids, temperature, softcap):
    """logprobs, entropy and row_stats as the head has them when it comes to the gradient; NaN where nothing is scored,
    which must leave no trace."""
    rows, undefined = rows.double(), (token_ids < 0) | (token_ids >= rows.shape[1])
    ids = token_ids.masked_fill(undefined, 0)
    logprobs, entropy = reference.token_logprobs(
        rows, ids, temperature=temperature, softcap=softcap, ignore_index=IGNORE
    )
    undefined |= logprobs.isnan()
    capped = softcap * torch.tanh(rows / softcap) if softcap > 0 else rows
    top = capped.amax(-1)
    log_sum = ((capped - top.unsqueeze(-1)) / temperature).logsumexp(-1)
    return [stat.masked_fill(undefined, NAN).float() for stat in (logprobs, entropy, torch.stack([top, log_sum]))]


def upstream_for(token_ids, which="both", seed=1):
    generator = torch.Generator().manual_seed(seed)
    pair = [torch.randn(token_ids.shape, generator=generator).to(token_ids.device) for _ in range(2)]
    return [
        value if which in ("both", name) else None for name, value in zip(("logprobs", "entropy"), pair, strict=True)
    ]


def gradient_of(function, upstream, tile, token_ids, saved, options, output=None, start=BEFORE):
    """Written to `output`, by default to memory of its own."""
    output = torch.full_like(tile, NAN) if output is None else output
    function(*upstream, tile, token_ids, start, *saved, *options, IGNORE, output)
    return output


def assert_same_bits(one, other):
    """But for those of NaN."""
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def doubles(values):
    return [None if value is None else value.double() for value in values]


def assert_matches(kinds, softcap, got, oracle, naive, **options):
    """For tensors with one row for each of `kinds`. No error of a usual row hides behind the ulp of a logit of 1e4."""
    large = torch.tensor([kind in ("huge", "far from zero") and not softcap for kind in kinds])
    for at in (large, ~large):
        assert_as_accurate_as_torch(*(value.cpu()[at] for value in (got, oracle, naive)), **options)


def values_of(parts, temperature, softcap):
    """What is compared. A softcap rounds the largest logit: sum and moment, which are relative to it, move with it, and
    what they are for, logsumexp and entropy, does not."""
    top, total, moment, target = parts.double()
    if softcap:
        total, moment = top + temperature * total.log(), total.log() - moment / total
    return {"max": top, "sum": total, "moment": moment, "target": target}


def test_a_tile_by_hand(backend, device):
    """Tokens 10 to 13 of a row whose target is 11, and of one whose target is 14."""
    logits = torch.tensor([[1.0, 7.0, -INF, 3.0], [0.0, 0.0, 0.0, 0.0]], device=device)
    token_ids = torch.tensor([11, 14], device=device)
    e = math.exp(-1.0)
    wanted = [[3.0, 0.0], [1 + e, 4.0], [-e, 0.0], [7.0, NAN]]
    parts = op("token_logprobs_part", backend)(logits, token_ids, 10, 2.0, 0.0, IGNORE, True)
    torch.testing.assert_close(parts, torch.tensor(wanted, device=device), equal_nan=True)

    stats = [torch.tensor(values, device=device) for values in ([-0.25, -2.0], [0.5, 1.5], [[7.0, 0.0], [0.25, 1.5]])]
    upstream = (torch.tensor([2.0, 4.0], device=device), None)
    function = op("token_logprobs_part_backward", backend)
    gradient = gradient_of(function, upstream, logits, token_ids, stats, (2.0, 0.0), start=10)
    others = [-math.exp(-3.25), 1 - math.exp(-0.25), 0.0, -math.exp(-2.25)]
    wanted = torch.tensor([others, [-2 * math.exp(-1.5)] * 4], device=device)
    torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parts_match_reference(backend, device, emulated, dtype, size, options):
    # If there are few rows, eager PyTorch may happen to round all of them well and be too strict a measure.
    kinds = KINDS * (10 if not emulated else 2 if size < 1000 else 1)
    rows, token_ids = random_rows(kinds, size, dtype, device)
    tile, options = tile_of(rows), (*OPTIONS[options], IGNORE)
    got = op("token_logprobs_part", backend)(tile, token_ids, BEFORE, *options, True)
    assert got.shape == (4, len(kinds)) and got.dtype == torch.float32
    oracle = reference.token_logprobs_part(tile.double(), token_ids, BEFORE, *options, True)
    naive = reference.token_logprobs_part(tile, token_ids, BEFORE, *options, True)
    three = [values_of(parts, *options[:2]) for parts in (got, oracle, naive)]
    for what in three[0]:
        got_, oracle_, naive_ = (values[what] for values in three)
        assert_matches(kinds, options[1], got_.float(), oracle_, naive_.float(), what=what)


@pytest.mark.parametrize("dtype", [DTYPES[0], DTYPES[1], thorough_emulated(DTYPES[2])], ids=str)
def test_without_entropy_the_moment_is_0(backend, device, dtype):
    rows, token_ids = random_rows(KINDS, 129, dtype, device)
    inputs = (tile_of(rows), token_ids, BEFORE, 0.7, 0.0, IGNORE)
    wanted = op("token_logprobs_part", backend)(*inputs, True)
    wanted[2] = 0.0
    assert_same_bits(op("token_logprobs_part", backend)(*inputs, False), wanted)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_matches_reference(backend, device, emulated, dtype, size, options):
    assert_gradient_matches_reference(backend, device, emulated, dtype, size, options, "both")


@pytest.mark.parametrize("upstream", ["logprobs", "entropy"])
@pytest.mark.parametrize("dtype", [DTYPES[0], DTYPES[1], thorough_emulated(DTYPES[2])], ids=str)
def test_gradient_of_one_output_alone(backend, device, emulated, dtype, upstream):
    assert_gradient_matches_reference(backend, device, emulated, dtype, 129, "temperature", upstream)


def assert_gradient_matches_reference(backend, device, emulated, dtype, size, options, upstream):
    kinds = KINDS * (10 if not emulated else 2 if size < 1000 else 1)
    rows, token_ids = random_rows(kinds, size, dtype, device)
    tile, options, upstream = tile_of(rows), OPTIONS[options], upstream_for(token_ids, upstream)
    saved = saved_of(rows, token_ids, *options)
    function = op("token_logprobs_part_backward", backend)
    got = gradient_of(function, upstream, tile, token_ids, saved, options)
    inputs = (doubles(upstream), tile.double(), token_ids, doubles(saved), options)
    oracle = gradient_of(reference.token_logprobs_part_backward, *inputs)
    naive = gradient_of(reference.token_logprobs_part_backward, upstream, tile, token_ids, saved, options)
    assert_matches(kinds, options[1], got, oracle, naive, what="gradient", gradient=True)
    in_place = tile.clone()
    gradient_of(function, upstream, in_place, token_ids, saved, options, output=in_place)
    assert_same_bits(in_place, got)


@pytest.mark.only("reference", "triton")
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("size", [1, 64, 129])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradient_in_the_dtype_of_the_next_product(backend, device, dtype, size, options):
    """On a GPU products of bfloat16 are float32, and the gradient is a factor of two more."""
    rows, token_ids = random_rows(KINDS, size, torch.float32, device)
    tile, options, upstream = tile_of(rows), OPTIONS[options], upstream_for(token_ids)
    inputs = (token_ids, saved_of(rows, token_ids, *options), options)
    own = gradient_of(op("token_logprobs_part_backward", backend), upstream, tile, *inputs)
    output = torch.full_like(tile, NAN, dtype=dtype)
    gradient_of(op("token_logprobs_part_backward", backend), upstream, tile, *inputs, output=output)
    assert_same_bits(output, own.to(dtype))


@pytest.mark.only("cpu")
def test_another_dtype_is_refused_on_a_cpu(backend, device):
    rows, token_ids = random_rows(["plain"], 63, torch.float32, device)
    output = torch.zeros(1, 63, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="gradient must have the dtype of logits"):
        gradient_of(
            op("token_logprobs_part_backward", backend),
            *(upstream_for(token_ids), tile_of(rows), token_ids, saved_of(rows, token_ids, 1.0, 0.0), (1.0, 0.0)),
            output=output,
        )
    assert not output.any()


@pytest.mark.parametrize("padding", [1, 8], ids=str)
@pytest.mark.parametrize("size", [63, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_any_stride(backend, device, dtype, size, padding):
    """And of another in the gradient. What lies between them is neither read nor written."""
    rows, token_ids = random_rows(KINDS, size, dtype, device)
    tile, options, upstream = tile_of(rows), (0.7, 30.0), upstream_for(token_ids)
    saved = saved_of(rows, token_ids, *options)
    wide = torch.nn.functional.pad(tile, (padding, 2 * padding), value=NAN)
    strided = wide[:, padding : padding + size]
    part, backward = (op(name, backend) for name in ("token_logprobs_part", "token_logprobs_part_backward"))
    wanted = part(tile, token_ids, BEFORE, *options, IGNORE, True)
    assert_same_bits(part(strided, token_ids, BEFORE, *options, IGNORE, True), wanted)

    wanted = gradient_of(backward, upstream, tile, token_ids, saved, options)
    apart = torch.full((len(tile), size + padding + 5), 7.0, dtype=dtype, device=device)
    gradient_of(backward, upstream, strided, token_ids, saved, options, output=apart[:, padding : padding + size])
    assert_same_bits(apart[:, padding : padding + size], wanted)
    assert (apart[:, :padding] == 7).all() and (apart[:, padding + size :] == 7).all()
    gradient_of(backward, upstream, strided, token_ids, saved, options, output=strided)
    assert_same_bits(wide, torch.nn.functional.pad(wanted, (padding, 2 * padding), value=NAN))


@pytest.mark.parametrize("shift", [1, 2**31, 2**40])
def test_only_the_distance_from_the_tiles_start_counts(backend, device, shift):
    rows, token_ids = random_rows(SCORED + ELSEWHERE, 129, torch.bfloat16, device)
    tile, options, upstream = tile_of(rows), (0.7, 0.0), upstream_for(token_ids)
    saved = saved_of(rows, token_ids, *options)
    part, backward = (op(name, backend) for name in ("token_logprobs_part", "token_logprobs_part_backward"))
    wanted = part(tile, token_ids, BEFORE, *options, IGNORE, True)
    assert_same_bits(part(tile, token_ids + shift, BEFORE + shift, *options, IGNORE, True), wanted)
    wanted = gradient_of(backward, upstream, tile, token_ids, saved, options)
    got = gradient_of(backward, upstream, tile, token_ids + shift, saved, options, start=BEFORE + shift)
    assert_same_bits(got, wanted)


def test_ignore_index_may_be_a_token_of_the_tile(backend, device):
    rows, token_ids = random_rows(["plain", "plain"], 63, torch.float32, device)
    ignore_index = token_ids[0].item()
    token_ids[1] = ignore_index + 1 if ignore_index < BEFORE + 62 else ignore_index - 1
    tile, saved, upstream = tile_of(rows), saved_of(rows, token_ids, 1.0, 0.0), upstream_for(token_ids)
    parts = op("token_logprobs_part", backend)(tile, token_ids, BEFORE, 1.0, 0.0, ignore_index, True)
    assert_same_bits(parts[:, 0], torch.tensor([-INF, 0.0, 0.0, NAN], device=device))
    assert parts[:, 1].isfinite().all()
    gradient = torch.full_like(tile, NAN)
    op("token_logprobs_part_backward", backend)(
        *upstream, tile, token_ids, BEFORE, *saved, 1.0, 0.0, ignore_index, gradient
    )
    assert not gradient[0].any()
    assert gradient[1].isfinite().all() and gradient[1].any()


def joined(parts, temperature):
    """log p and entropy of rows, in float64, from the parts of their tiles [tiles, 4, R]."""
    tops, totals, moments, targets = parts.double().unbind(1)
    target = targets.nan_to_num(0.0, posinf=INF, neginf=-INF).sum(0).masked_fill(targets.isnan().all(0), NAN)
    top = torch.maximum(tops.amax(0), target)
    drops = (tops - top) / temperature
    drops = drops.masked_fill(drops == -INF, -1e30)  # whose product with a sum of 0 is 0
    lead = (target - top) / temperature
    others = (totals * drops.exp()).sum(0)
    moment = ((moments + totals * drops) * drops.exp()).sum(0)
    logprob = -torch.logaddexp(torch.zeros_like(lead), others.log() - lead)
    log_sum = torch.logaddexp(others.log(), lead)
    p = logprob.exp()
    entropy = -(p * logprob).masked_fill(p == 0, 0.0) + (-log_sum).exp() * (others * log_sum - moment)
    return logprob, entropy


CUTS = {"one tile": (), "a block": (64, 128), "ragged": (1, 2, 500, 999)}


@kernels_only
@pytest.mark.parametrize("options", ["temperature", "softcap"])
@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_joined_parts_are_token_logprobs(backend, device, emulated, dtype, cuts, options):
    rows, token_ids = random_rows(SCORED * (1 if emulated else 10), 1000 - BEFORE - AFTER, dtype, device)
    (temperature, softcap), upstream = OPTIONS[options], upstream_for(token_ids)
    part, backward = (op(name, backend) for name in ("token_logprobs_part", "token_logprobs_part_backward"))
    spans = list(itertools.pairwise((0, *CUTS[cuts], 1000)))
    parts = [part(rows[:, a:b], token_ids, a, temperature, softcap, IGNORE, True) for a, b in spans]
    got = [value.float() for value in joined(torch.stack(parts), temperature)]

    saved, gradient = saved_of(rows, token_ids, temperature, softcap), torch.full_like(rows, NAN)
    for a, b in spans:
        tile, output = rows[:, a:b], gradient[:, a:b]
        gradient_of(backward, upstream, tile, token_ids, saved, (temperature, softcap), output, start=a)

    def whole(logits):
        leaf, given = logits.clone().requires_grad_(), softcap or None
        with rlkernels.use_backend("reference"):
            outputs = token_logprobs(leaf, token_ids, temperature=temperature, softcap=given, return_entropy=True)
        torch.autograd.backward(outputs, [u.to(outputs[0].dtype) for u in upstream])
        return *(output.detach() for output in outputs), leaf.grad

    three = zip(("logprobs", "entropy", "gradient"), (*got, gradient), whole(rows.double()), whole(rows), strict=True)
    for what, *values in three:
        assert_as_accurate_as_torch(*values, what=what, gradient=what == "gradient")


@pytest.mark.only("triton")
@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("options", ["temperature", "softcap"])
def test_sums_of_tiles_are_joined_and_finished_as_the_reference_does(backend, device, options, cuts):
    """Of every kind of row, and of more rows than a program has threads."""
    kinds = [kind for kind in KINDS if kind != "no such token"]
    rows, token_ids = random_rows(kinds, 1000 - BEFORE - AFTER, torch.float32, device)
    temperature, softcap = OPTIONS[options]
    inputs = (temperature, softcap, IGNORE, True)
    spans = list(itertools.pairwise((0, *CUTS[cuts], 1000)))
    parts = torch.stack([op("token_logprobs_part", backend)(rows[:, a:b], token_ids, a, *inputs) for a, b in spans])
    parts = parts.repeat(1, 1, 12)
    for name, of_one in (
        ("token_logprobs_join", ("sums",)),
        ("token_logprobs_finish", ("logprobs", "entropy", "stats")),
    ):
        results = [
            function(value, temperature)
            for function, value in (
                (op(name, backend), parts),
                (getattr(reference, name), parts.double()),
                (getattr(reference, name), parts),
            )
        ]
        three = zip(*results, strict=True) if len(of_one) > 1 else [results]
        for what, (got, oracle, naive) in zip(of_one, three, strict=True):
            assert_as_accurate_as_torch(got, oracle, naive, what=what)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", OPTIONS)
def test_reference_is_token_logprobs(kind, options):
    """The oracle itself, against that of token_logprobs in float64: the values, and the gradient of both outputs."""
    rows, token_ids = random_rows([kind] * 4, 63, torch.float64, "cpu")
    temperature, softcap = OPTIONS[options]
    upstream = doubles(upstream_for(token_ids))
    leaf = rows.clone().requires_grad_()
    named = dict(temperature=temperature, softcap=softcap, ignore_index=IGNORE)
    wanted = reference.token_logprobs(leaf, token_ids, **named)
    torch.autograd.backward(wanted, upstream)
    spans = ((0, 40), (40, rows.shape[1]))
    inputs = (temperature, softcap, IGNORE, True)
    parts = torch.stack([reference.token_logprobs_part(rows[:, a:b], token_ids, a, *inputs) for a, b in spans])
    if token_ids[0] != IGNORE:
        for one, other in zip(joined(parts, temperature), wanted, strict=True):
            torch.testing.assert_close(one, other.detach(), rtol=1e-9, atol=1e-11, equal_nan=True)
    if kind == "no such token":
        return  # of which the head gives NaN itself
    capped = softcap * torch.tanh(rows / softcap) if softcap else rows
    top = capped.amax(-1)
    log_sum = ((capped - top.unsqueeze(-1)) / temperature).logsumexp(-1)
    saved = [*(value.detach() for value in wanted), torch.stack([top, log_sum])]
    gradient = torch.empty_like(rows)
    for a, b in spans:
        gradient_of(
            reference.token_logprobs_part_backward,
            *(upstream, rows[:, a:b], token_ids, saved, (temperature, softcap), gradient[:, a:b], a),
        )
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-9, atol=1e-11, equal_nan=True)


def test_a_row_does_not_depend_on_the_others(backend, device):
    rows, token_ids = random_rows(KINDS, 300, torch.bfloat16, device)
    tile, options, upstream = tile_of(rows), (0.7, 0.0), upstream_for(token_ids)
    saved = saved_of(rows, token_ids, *options)
    part, backward = (op(name, backend) for name in ("token_logprobs_part", "token_logprobs_part_backward"))
    parts = part(tile, token_ids, BEFORE, *options, IGNORE, True)
    gradient = gradient_of(backward, upstream, tile, token_ids, saved, options)
    for row in range(len(KINDS)):
        at = slice(row, row + 1)
        assert_same_bits(part(tile[at], token_ids[at], BEFORE, *options, IGNORE, True), parts[:, at])
        alone = (
            [value[at] for value in upstream],
            tile[at],
            token_ids[at],
            [value[..., at].contiguous() for value in saved],
        )
        assert_same_bits(gradient_of(backward, *alone, options), gradient[at])


@THOROUGH_EMULATED
def test_same_bits_on_every_run(backend, device, emulated):
    rows, token_ids = random_rows(KINDS * (1 if emulated else 8), 1000, torch.bfloat16, device)
    tile, options, upstream = tile_of(rows), (0.7, 0.0), upstream_for(token_ids)
    saved = saved_of(rows, token_ids, *options)

    def run():
        parts = op("token_logprobs_part", backend)(tile, token_ids, BEFORE, *options, IGNORE, True)
        backward = op("token_logprobs_part_backward", backend)
        return parts, gradient_of(backward, upstream, tile, token_ids, saved, options)

    first = run()
    for _ in range(2):
        for one, other in zip(run(), first, strict=True):
            assert_same_bits(one, other)


def test_no_rows(backend, device):
    tile, token_ids = torch.zeros(0, 63, device=device), torch.zeros(0, dtype=torch.int64, device=device)
    assert op("token_logprobs_part", backend)(tile, token_ids, BEFORE, 1.0, 0.0, IGNORE, True).shape == (4, 0)
    saved = (torch.zeros(0, device=device), torch.zeros(0, device=device), torch.zeros(2, 0, device=device))
    gradient_of(
        op("token_logprobs_part_backward", backend), upstream_for(token_ids), tile, token_ids, saved, (1.0, 0.0)
    )


@pytest.mark.thorough_on("reference")
def test_more_rows_than_a_grid_dimension_holds(backend, device, emulated):
    """65,535 is the limit of a CUDA grid's second and third dimension."""
    if emulated:
        pytest.skip("70,000 blocks take minutes where GPU kernels run on a CPU")
    rows, token_ids = random_rows(["plain"] * 70_000, 3, torch.float32, device)
    tile, options, upstream = tile_of(rows), (1.0, 0.0), upstream_for(token_ids)
    saved = saved_of(rows, token_ids, *options)
    three = []
    for name, cast in ((backend, torch.float32), ("reference", torch.float64), ("reference", torch.float32)):
        part, backward = (op(one, name) for one in ("token_logprobs_part", "token_logprobs_part_backward"))
        inputs = [[value.to(cast) for value in values] for values in (upstream, saved)]
        parts = part(tile.to(cast), token_ids, BEFORE, *options, IGNORE, True)
        three.append((parts, gradient_of(backward, inputs[0], tile.to(cast), token_ids, inputs[1], options)))
    for what, *values in zip(("parts", "gradient"), *three, strict=True):
        assert_as_accurate_as_torch(*values, what=what, gradient=what == "gradient")


@kernels_only
def test_rows_more_than_2_to_the_31_elements_apart(backend, device):
    distance = 2**31 + 3
    if device.type == "cpu":
        # Anonymous memory costs nothing until touched.
        memory = torch.frombuffer(mmap.mmap(-1, 2 * (distance + 64)), dtype=torch.bfloat16)
    else:
        memory = torch.zeros(distance + 64, dtype=torch.bfloat16, device=device)
    rows, token_ids = random_rows(["plain", "target after"], 63, torch.bfloat16, device)
    tile, options, upstream = tile_of(rows), (1.0, 0.0), upstream_for(token_ids)
    saved = saved_of(rows, token_ids, *options)
    far = memory.as_strided((2, 63), (distance, 1)).copy_(tile)
    part, backward = (op(name, backend) for name in ("token_logprobs_part", "token_logprobs_part_backward"))
    wanted = part(tile, token_ids, BEFORE, *options, IGNORE, True)
    assert_same_bits(part(far, token_ids, BEFORE, *options, IGNORE, True), wanted)
    wanted = gradient_of(backward, upstream, tile, token_ids, saved, options)
    gradient_of(backward, upstream, far, token_ids, saved, options, output=far)
    assert_same_bits(far, wanted)


@kernels_only
def test_opcheck(backend, device):
    rows, token_ids = random_rows(["plain"] * 3, 63, torch.float32, device)  # no NaN, to which opcheck finds none equal
    tile, options, upstream = tile_of(rows), (0.7, 30.0, IGNORE), upstream_for(token_ids)
    saved = saved_of(rows, token_ids, *options[:2])
    torch.library.opcheck(op("token_logprobs_part", backend), (tile, token_ids, BEFORE, *options, True))
    torch.library.opcheck(
        op("token_logprobs_part_backward", backend),
        (*upstream, tile, token_ids, BEFORE, *saved, *options, torch.empty_like(tile)),
    )
