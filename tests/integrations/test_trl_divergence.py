"""Ours in the place of the loss of TRL's distillation trainer."""

import importlib
from contextlib import contextmanager

import pytest
import torch

trl = pytest.importorskip("trl")
from trl_functions import (  # noqa: E402
    DTYPES,
    ROWS,
    THEIRS_RUN,
    VOCAB,
    differentiated,
    needs_theirs,
    pair,
    partitioned,
    random_head,
    transformed,
)

SHAPE = (4, 60)


def problem(dtype=torch.float32, teacher_dtype=None, bias=True):
    """Student, teacher, and a mask of which one row is empty."""
    student = random_head(SHAPE, dtype, bias=bias)
    teacher = random_head(SHAPE, teacher_dtype or dtype, width=24, seed=1, bias=bias)
    mask = (torch.rand(SHAPE, generator=torch.Generator().manual_seed(2)) > 0.3).long()
    mask[1] = 0
    return student, teacher, mask


def call(function, student, teacher, mask, beta=0.5, **options):
    chunk = (64,) if "chunk_size" in ROWS["chunked_divergence_loss"].signature else ()
    biases = dict(zip(("student_lm_head_bias", "teacher_lm_head_bias"), (*student[2:], *teacher[2:]), strict=False))
    return function(student[0], teacher[0], student[1], teacher[1], mask, beta, *chunk, **biases, **options)


def truth(student, teacher, mask, beta=0.5, num_items_in_batch=None, temperature=1.0, **options):
    logps = []
    for name, head in (("student", student), ("teacher", teacher)):
        softcap, scale = options.get(f"{name}_final_logit_softcapping"), options.get(f"{name}_logit_scale", 1.0)
        logps.append(transformed(*head, temperature=temperature, softcap=softcap, scale=scale).log_softmax(-1))
    s, t = logps[0], logps[1].detach()
    m = torch.logsumexp(torch.stack([s, t]) + torch.tensor([1 - beta, beta]).double().log().view(2, 1, 1, 1), 0)
    if beta == 0:
        divergence = t.exp() * (t - s)
    elif beta == 1:
        divergence = s.exp() * (s - t)
    else:
        divergence = beta * t.exp() * (t - m) + (1 - beta) * s.exp() * (s - m)
    total = (divergence.sum(-1) * mask).sum()
    items = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    return total / items, (-(s.exp() * s).sum(-1) * mask).sum().detach(), mask.sum()


OPTIONS = [
    {},
    {"beta": 0.0},
    {"beta": 1.0, "temperature": 0.7},
    {"beta": 0.1, "num_items_in_batch": 77},
    {"num_items_in_batch": torch.tensor(77)},
    {"student_logit_scale": 0.25, "teacher_logit_scale": 0.5, "student_final_logit_softcapping": 2.0},
    {"teacher_final_logit_softcapping": 3.0, "student_final_logit_softcapping": 5.0, "temperature": 1.5},
    {"student_logit_scale": -0.5, "teacher_logit_scale": 0.0},
]


def compare(dtype, teacher_dtype=None, bias=True, mask=None, autocast=None, product=None, **options):
    theirs, ours = pair("chunked_divergence_loss")
    student, teacher, given = problem(dtype, teacher_dtype, bias)
    mask = given if mask is None else mask
    right_teacher = [value.double() for value in teacher]

    def of(function, teacher):
        def results(*student):
            with torch.autocast("cpu", autocast, enabled=autocast is not None):
                loss, entropy, count = call(function, student, teacher, mask, **options)
            return loss, entropy.detach(), count

        return results

    def right(*student):
        return truth(student, right_teacher, mask, **options)

    upstream = [torch.tensor(1.5)] * 3
    of_ours = differentiated(of(ours, teacher), student, upstream)
    of_theirs = differentiated(of(theirs, teacher), student, upstream)
    expected = differentiated(right, [value.double() for value in student], upstream)
    results = zip(*([*values, *gradients] for values, gradients in (of_ours, of_theirs, expected)), strict=True)
    for value, other, right_value in results:
        assert value.dtype == other.dtype and value.shape == other.shape
        assert value.requires_grad == other.requires_grad
        error, allowed, size = (
            each.double().square().mean().sqrt() for each in (value - right_value, other - right_value, right_value)
        )
        # A sum over the rows is one number, which theirs may have right by luck.
        ulp = torch.finfo(value.dtype if value.is_floating_point() else torch.float32).eps
        assert error <= 1.1 * allowed + (2 if value.dim() else 4) * ulp * size, (error / size, allowed / size)


@needs_theirs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_divergence_entropy_and_count(dtype, options):
    compare(dtype, **options)


@needs_theirs
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_heads_without_bias(beta):
    compare(torch.float32, bias=False, beta=beta)


@needs_theirs
@pytest.mark.parametrize("kind", [torch.bool, torch.float32], ids=str)
def test_masks(kind):
    compare(torch.float32, mask=(problem()[2]).to(kind))
    compare(torch.float32, mask=torch.ones(SHAPE, dtype=kind))


@needs_theirs
@pytest.mark.parametrize("teacher_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_teacher_of_another_dtype(teacher_dtype):
    compare(torch.float32, teacher_dtype)
    compare(teacher_dtype, torch.float32)


@needs_theirs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(dtype):
    """Theirs rounds what goes into the products, ours on a CPU nothing."""
    compare(dtype, autocast=torch.bfloat16)


@pytest.mark.parametrize("items", [None, 5])
def test_nothing_scored(items):
    """Zero, whose gradients are zero and reach every parameter."""
    theirs, ours = pair("chunked_divergence_loss")
    for function in (ours, theirs) if THEIRS_RUN else (ours,):
        student, teacher, mask = problem()
        student = [value.requires_grad_() for value in student]
        loss, entropy, count = call(function, student, teacher, torch.zeros_like(mask), num_items_in_batch=items)
        loss.backward()
        assert loss == 0 and entropy == 0 and count == 0
        assert all(value.grad is not None and not value.grad.any() for value in student)


@needs_theirs
def test_no_gradient_reaches_the_teacher():
    theirs, ours = pair("chunked_divergence_loss")
    for function in (theirs, ours):
        student, teacher, mask = problem()
        student, teacher = ([value.requires_grad_() for value in head] for head in (student, teacher))
        loss, entropy, _ = call(function, student, teacher, mask)
        assert function is theirs or not entropy.requires_grad
        loss.backward()
        assert all(value.grad is None for value in teacher)
        assert all(value.grad is not None for value in student)
        shared = random_head(SHAPE)
        shared = [value.requires_grad_() for value in shared]
        call(function, shared, shared, mask)[0].backward()  # a teacher that is the student
        assert all(value.grad.abs().max() < 1e-5 for value in shared)


def test_weights_that_are_there_only_while_gathered(monkeypatch):
    """As with ZeRO-3, whose parameters have no data before and after."""
    _, ours = pair("chunked_divergence_loss")
    utils = importlib.import_module("trl.trainer.utils")
    student, teacher, mask = problem()
    student[1:] = [torch.nn.Parameter(value) for value in student[1:]]
    teacher[1:] = [torch.nn.Parameter(value) for value in teacher[1:]]
    parameters = student[1:] + teacher[1:]
    whole = {id(value): value.data for value in parameters}

    @contextmanager
    def gather(*given):
        for value in given:
            value.data = whole[id(value)]
        yield
        for value in given:
            value.data = torch.empty(0)

    monkeypatch.setattr(utils, "maybe_gather_lm_head_ctx", gather)
    gradients = []
    for taken in (False, True):
        with partitioned(*parameters) if taken else gather():
            loss = call(ours, student, teacher, mask)[0]
            gradients.append((loss, *torch.autograd.grad(loss, student[1:])))
        for value in parameters:
            value.data = whole[id(value)]
    assert all(torch.equal(*values) for values in zip(*gradients, strict=True))


def test_distributed_weights(tmp_path):
    """FSDP's DTensors are gathered, and get their gradient."""
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

    _, ours = pair("chunked_divergence_loss")
    student, teacher, mask = problem()
    expected = differentiated(lambda *head: call(ours, head, teacher, mask)[0], student, [torch.tensor(1.0)])
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        head = [student[0].requires_grad_()]
        head += [distribute_tensor(value, mesh, [Shard(0)]).requires_grad_() for value in student[1:]]
        of_teacher = [teacher[0], *(distribute_tensor(value, mesh, [Shard(0)]) for value in teacher[1:])]
        loss = call(ours, head, of_teacher, mask)[0]
        loss.backward()
        assert isinstance(head[1].grad, DTensor)
        assert torch.equal(loss, expected[0][0])
        for value, gradient in zip(head, expected[1], strict=True):
            grad = value.grad.full_tensor() if isinstance(value.grad, DTensor) else value.grad
            assert torch.equal(grad, gradient)
    finally:
        torch.distributed.destroy_process_group()


def test_errors():
    _, ours = pair("chunked_divergence_loss")
    student, teacher, mask = problem()
    with pytest.raises(ValueError, match="beta"):
        call(ours, student, teacher, mask, beta=1.5)
    with pytest.raises(ValueError, match="teacher_weight"):
        call(ours, student, [teacher[0], teacher[1][: VOCAB - 1], teacher[2]], mask)
