"""What holds of every op: its derivatives, what it takes and refuses, and that it can be compiled."""

import pytest
import torch

from op_cases import CASES
from rlkernels.ops import _registry

PLAIN = ("preference_loss", "reward_pair_loss", "masked_mean")
"""Ops whose second derivatives are PyTorch's own, or of a linear function."""


def case_of(name, device):
    return CASES[name].to(device)


def weighted(results):
    """Of every output that is differentiable, each element by another weight."""
    values = torch.cat([value.flatten() for value in results if value.requires_grad])
    return (values * torch.arange(1, 1 + len(values), dtype=values.dtype, device=values.device)).sum()


def test_every_op_is_here():
    assert {case.op.__name__.removeprefix("inplace_") for case in CASES.values()} == set(_registry.PREFERENCE)


def leaves_of(case):
    """Every differentiable input alone, and all together."""
    names = list(case.differentiable)
    for chosen in ([name] for name in names) if len(names) == 1 else (*([name] for name in names), names):
        yield {name: case.differentiable[name].clone().requires_grad_() for name in chosen}


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """A process group of one."""
    store = tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


FUSED = [name for name, case in CASES.items() if case.differentiable and not name.startswith(PLAIN)]


def check_second_derivatives_are_refused(case):
    for leaves in leaves_of(case):
        inputs = list(leaves.values())
        gradients = torch.autograd.grad(weighted(case(**leaves)), inputs, create_graph=True)
        for gradient in gradients:
            for leaf in inputs:
                with pytest.raises(RuntimeError, match="differentiated again"):
                    torch.autograd.grad(gradient.square().sum(), leaf, retain_graph=True, allow_unused=True)
        weighted(case(**leaves)).backward(create_graph=True)
        with pytest.raises(RuntimeError, match="differentiated again"):
            sum(leaf.grad.square().sum() for leaf in inputs).backward()
        for leaf, gradient in zip(inputs, gradients, strict=True):
            assert torch.equal(leaf.grad, gradient)
            leaf.grad = None  # a cycle of references


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.only("cpu", "triton", "cuda")
@pytest.mark.parametrize("name", FUSED)
def test_second_derivatives_are_refused(backend, device, name):
    """By each input from the gradient of each, rather than left out of the graph."""
    check_second_derivatives_are_refused(case_of(name, device))


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.only("cpu")
@pytest.mark.parametrize("name", ["linear_token_logprobs", "linear_policy_loss", "linear_preference_logps"])
def test_second_derivatives_of_a_shared_vocabulary_are_refused(backend, device, group, name):
    case = case_of(name, device)
    case.others["group"] = group
    check_second_derivatives_are_refused(case)


@pytest.mark.only("cpu", "triton", "cuda")
@pytest.mark.parametrize("inplace", [False, True])
def test_a_gradient_penalty_is_refused(backend, device, inplace):
    """Through the layer that made the logits, whose own second derivative exists."""
    case = case_of("token_logprobs, in place" if inplace else "token_logprobs", device)
    hidden, weight = (torch.randn(shape, device=device, requires_grad=True) for shape in ((2, 3, 4), (4, 5)))
    (gradient,) = torch.autograd.grad(weighted(case(logits=hidden @ weight)), hidden, create_graph=True)
    for leaf in (hidden, weight):
        with pytest.raises(RuntimeError, match="differentiated again"):
            torch.autograd.grad(gradient.square().sum(), leaf, retain_graph=True)


@pytest.mark.only("reference")
@pytest.mark.parametrize(
    "name",
    # PyTorch has no second derivative of segment_reduce, and says so.
    [name for name, case in CASES.items() if case.differentiable and name != "linear_preference_logps, packed"],
)
def test_second_derivatives_of_what_is_plain_pytorch(backend, device, name):
    case = case_of(name, device).to(torch.float64)
    inputs = {key: value.clone().requires_grad_() for key, value in case.differentiable.items()}
    torch.autograd.gradgradcheck(
        lambda *values: case(**dict(zip(inputs, values, strict=True)))[0], list(inputs.values())
    )


@pytest.mark.parametrize("name", ["masked_mean", "masked_mean, of rows"])
def test_second_derivatives_of_a_mean(backend, device, name):
    x = case_of(name, device).differentiable["x"].requires_grad_()
    mask = CASES[name].others["mask"].to(device)

    def second(mean):
        (gradient,) = torch.autograd.grad(mean(x**3).square().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), x)[0]

    def mean(value):
        value, scored = value.where(mask, 0.0), mask.float()
        return value.sum(1) / scored.sum(1) if "rows" in name else value.sum() / scored.sum()

    torch.testing.assert_close(second(lambda value: case_of(name, device)(x=value)[0]), second(mean))
