"""Ours in the place of TRL's functions of hidden states and LM heads, each against the one it replaces."""

import importlib
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from counting import patched_and_counted

trl = pytest.importorskip("trl")
from rlkernels.integrations.trl import PATCH  # noqa: E402
from trl_functions import (  # noqa: E402
    DTYPES,
    ROWS,
    VERSION,
    VOCAB,
    WIDTH,
    assert_as_near,
    compare,
    differentiated,
    needs_theirs,
    pair,
    partitioned,
    random_head,
    transformed,
)

CHUNK = 20
HALF = (torch.bfloat16, torch.float16)
FUSED = next(name for name in ROWS if "LogProbFunction" in name)
OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def fused(*parameters):
    return pair(FUSED, *parameters)


def call(function, head, targets, temperature=1.0, softcap=None, scale=1.0, outputs=OUTPUTS):
    bias = head[2] if len(head) > 2 else None
    more = (
        (outputs,) if "outputs" in ROWS.get("ChunkedLogProbFunction", ROWS["selective_log_softmax"]).signature else ()
    )
    return function(*head[:2], bias, targets, temperature, CHUNK, softcap, scale, *more)


OPTIONS = [
    {},
    {"temperature": 0.7},
    {"softcap": 5.0, "temperature": 1.3},
    {"scale": 0.25, "softcap": 2.0},
    {"scale": -0.5},
    {"scale": 0.0},
]


@needs_theirs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_log_probabilities_and_entropy(dtype, bias, options):
    theirs, ours = fused()
    head = random_head((300,), dtype, bias=bias)
    g = torch.Generator().manual_seed(1)
    targets, upstream = torch.randint(VOCAB, (300,), generator=g), torch.randn(2, 300, generator=g)

    def of(function):
        return lambda *head: call(function, head, targets, **options)[:2]

    def truth(*head):
        logps = transformed(*head[:2], head[2] if bias else None, **options).log_softmax(-1)
        return logps.gather(-1, targets.unsqueeze(-1)).squeeze(-1), -(logps.exp() * logps).sum(-1)

    def plain(*head):
        linear = nn.functional.linear(*head[:2], head[2] if bias else None).float()
        return truth(linear, torch.eye(VOCAB)) if not bias else truth(linear, torch.eye(VOCAB), torch.zeros(VOCAB))

    # Before 1.15 theirs multiplied gradients in float32 only. Since then it rounds them as PyTorch does, as ours.
    rounded = plain if dtype in HALF and "outputs" not in ROWS[FUSED].signature else None
    compare(of(ours), of(theirs), truth, head, upstream, ("hidden", "weight", "bias")[: len(head)], rounded)


@needs_theirs
@pytest.mark.parametrize("needed", ["logprobs", "entropy", "hidden", "weight", "bias"])
def test_parts_of_the_gradient(needed):
    """The gradient of one result, or with respect to one input, where the rest is frozen."""
    theirs, ours = fused()
    targets = torch.arange(60) % VOCAB
    gradients = []
    for function in (theirs, ours):
        head = random_head((60,))
        for value, name in zip(head, ("hidden", "weight", "bias"), strict=True):
            value.requires_grad_(needed in (name, "logprobs", "entropy"))
        logprobs, entropy, *_ = call(function, head, targets)
        ((entropy if needed == "entropy" else logprobs) * torch.linspace(-1, 2, 60)).sum().backward()
        gradients.append([value.grad for value in head])
    for value, other in zip(*gradients, strict=True):
        assert (value is None) == (other is None)
        if value is not None:
            torch.testing.assert_close(value, other, rtol=1e-5, atol=2e-5)


@needs_theirs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_other_outputs(dtype, options):
    theirs, ours = fused("outputs")
    head, targets = random_head((300,), dtype), torch.arange(300) % VOCAB
    targets[:100] = transformed(*head, **options)[:100].argmax(-1)
    head = [value.requires_grad_() for value in head]
    z = transformed(*(value.double() for value in head), **options).detach()
    logps = z.log_softmax(-1)
    truth = [None, None, (2 * logps).logsumexp(-1), z.mean(-1)]
    of_ours, of_theirs = (call(function, head, targets, **options) for function in (ours, theirs))
    for i in (2, 3):
        assert_as_near(of_ours[i], of_theirs[i], truth[i], OUTPUTS[i - 1])
    assert of_ours[4].dtype == of_theirs[4].dtype == torch.bool
    if dtype in (torch.float32, torch.float64):
        assert torch.equal(of_ours[4], of_theirs[4])
    assert (of_ours[4] != of_theirs[4]).float().mean() < 0.02  # logits that rounding makes equal
    assert [value.requires_grad for value in of_ours] == [value.requires_grad for value in of_theirs]
    assert [value.requires_grad for value in of_ours] == [True, True, False, False, False]


def test_only_what_is_asked_for():
    _, ours = fused("outputs")
    head, targets = random_head((30,)), torch.arange(30)
    everything = call(ours, head, targets)
    for asked in [(), ("log_probs",), *((each,) for each in OUTPUTS), ("is_top1", "entropy"), ["mean_logits"]]:
        values = call(ours, head, targets, outputs=asked)
        assert len(values) == 5
        for value, expected, output in zip(values, everything, ("log_probs", *OUTPUTS), strict=True):
            if output in asked or output == "log_probs":
                assert torch.equal(value, expected), (asked, output)
            else:
                assert value is None, (asked, output)


@needs_theirs
def test_ties_are_won_by_the_first():
    theirs, ours = fused("outputs")
    hidden, weight = random_head((VOCAB,), bias=False)
    weight[30] = weight[10]
    hidden[:10], hidden[30] = 0.0, 100 * weight[10]
    hidden[10] = hidden[30]
    targets = torch.arange(VOCAB)
    values = [call(function, [hidden, weight], targets)[4] for function in (ours, theirs)]
    assert torch.equal(*values)
    assert values[0][0] and values[0][10]
    assert not values[0][1:10].any() and not values[0][30]


@needs_theirs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(dtype, rows):
    theirs, ours = fused()
    targets = torch.zeros(rows, dtype=torch.long)
    found = []
    for function in (ours, theirs):
        head = [value.requires_grad_() for value in random_head((rows,), dtype)]
        results = call(function, head, targets)
        (results[0].sum() + results[1].sum()).backward()
        found.append([*results, *(value.grad for value in head)])
    tolerance = {torch.bfloat16: 5e-2, torch.float16: 5e-3}.get(dtype, 2e-5)
    for value, other in zip(*found, strict=True):
        torch.testing.assert_close(value, other, rtol=tolerance, atol=tolerance)


@needs_theirs
def test_layouts_of_memory():
    theirs, ours = fused()
    hidden, weight, bias = random_head((30,))
    targets = torch.arange(30)
    wide = torch.zeros(30, 2 * WIDTH)
    wide[:, ::2] = hidden
    odd = [wide[:, ::2], weight.t().contiguous().t(), torch.stack([bias, bias], 1)[:, 0]]
    # Their kernel takes ids for contiguous, whatever they are.
    for function, ids in ((ours, torch.stack([targets, targets], 1)[:, 0]), (theirs, targets)):
        for value, expected in zip(call(function, odd, ids), call(ours, [hidden, weight, bias], targets), strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)


@needs_theirs
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
def test_weight_of_another_dtype(autocast, dtypes):
    """Products are of the dtype of autocast, or of hidden's. The weight's gradient is rounded to it, theirs is not."""
    theirs, ours = fused()
    if VERSION.startswith("1.13."):
        pytest.skip("TRL 1.13 multiplies matrices of one dtype only")
    targets = torch.arange(300) % VOCAB
    product = autocast or dtypes[0]
    hidden, *rest = random_head((300,))
    head = [hidden.to(dtypes[0]), *(value.to(dtypes[1]) for value in rest)]

    def of(function):
        def results(*head):
            with torch.autocast("cpu", autocast, enabled=autocast is not None):
                return call(function, head, targets)[:2]

        return results

    def truth(*head):
        logps = transformed(*head).log_softmax(-1)
        return logps.gather(-1, targets.unsqueeze(-1)).squeeze(-1), -(logps.exp() * logps).sum(-1)

    upstream = torch.randn(2, 300, generator=torch.Generator().manual_seed(1))
    given = [value.to(product).double() for value in head]
    found = [differentiated(*case, upstream) for case in ((of(ours), head), (of(theirs), head), (truth, given))]
    for value, other, right in zip(*([*results, *gradients] for results, gradients in found), strict=True):
        assert value.dtype == other.dtype
        error, allowed, size = (each.double().square().mean().sqrt() for each in (value - right, other - right, right))
        assert error <= 1.1 * allowed + torch.finfo(product).eps * size / 2


@needs_theirs
@pytest.mark.parametrize("softcap", [0.0, -3.0])
def test_softcaps_that_make_no_sense(softcap):
    theirs, ours = fused(*(["outputs"] if softcap == 0 else []))  # before those it gave NaN
    head, targets = random_head((30,)), torch.arange(30)
    values = [call(function, head, targets, softcap=softcap) for function in (ours, theirs)]
    for value, other in zip(*values, strict=True):
        torch.testing.assert_close(value, other)


@pytest.mark.parametrize("frozen", [False, True])
def test_results_changed_in_place(frozen):
    _, ours = fused()
    found = []
    for changed in (True, False):
        head, targets = random_head((30,)), torch.arange(30)
        head = [value.requires_grad_(i == 0 or not frozen) for i, value in enumerate(head)]
        results = [value for value in call(ours, head, targets) if value is not None and value.requires_grad]
        if changed:
            for value in results:
                value[targets > 20] = 0.0
                value *= 2
        else:
            results = [value.masked_fill(targets > 20, 0.0) * 2 for value in results]
        sum(value.sum() for value in results).backward()
        found.append([value.grad for value in head if value.requires_grad])
    assert all(torch.equal(*values) for values in zip(*found, strict=True))


def test_ids_outside_of_the_vocabulary():
    _, ours = fused()
    head, targets = random_head((30,)), torch.arange(30)
    for wrong in (-1, VOCAB):
        targets[3] = wrong
        with pytest.raises(ValueError, match="token_ids"):
            call(ours, head, targets)
    targets[3] = -100
    values = call(ours, head, targets)
    assert all(value is None or value[3] == 0 for value in values)


@pytest.mark.parametrize("frozen", [False, True])
def test_weight_that_is_taken_away_before_the_backward_pass(frozen):
    _, ours = fused()
    hidden, weight, bias = random_head((300,))
    targets = torch.arange(300) % VOCAB
    gradients = []
    for taken in (False, True):
        leaf = hidden.clone().requires_grad_()
        weight, bias = (nn.Parameter(value.data, requires_grad=not frozen) for value in (weight, bias))
        logprobs, entropy, *_ = call(ours, [leaf, weight, bias], targets)
        given = (leaf,) if frozen else (leaf, weight, bias)
        with partitioned(weight, bias) if taken else nullcontext():
            gradients.append(torch.autograd.grad((logprobs + entropy).sum(), given))
    assert all(torch.equal(*values) for values in zip(*gradients, strict=True))


def test_compiled():
    _, ours = fused()
    targets = torch.arange(30)
    found = []
    for function in (ours, torch.compile(ours, backend="aot_eager", fullgraph=True)):
        head = [value.requires_grad_() for value in random_head((30,))]
        results = call(function, head, targets, temperature=0.7, softcap=5.0)
        (results[0].sum() + results[1].sum()).backward()
        found.append([*results, *(value.grad for value in head)])
    for value, other in zip(*found, strict=True):
        torch.testing.assert_close(value, other)


def test_kernels_are_called():
    head = random_head((30,))
    module, _, path = ROWS[FUSED].target.partition(":")
    function = getattr(importlib.import_module(module), path.split(".")[0])
    with patched_and_counted(PATCH) as calls:
        call(function.apply, head, torch.arange(30))
    assert calls[ROWS[FUSED].target] == 1
    assert any(kernel.startswith("rlkernels::") for kernel in calls)
