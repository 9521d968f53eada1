"""What holds of every op: its derivatives, what it takes and refuses, and that it can be compiled."""

import pytest
import torch
from torch.autograd import forward_ad

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


def dual_numbers(function, value, tangent):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(value, tangent))).tangent


FORWARD = {
    "jvp": lambda function, value, tangent: torch.func.jvp(function, (value,), (tangent,))[1],
    "jacfwd": lambda function, value, tangent: (torch.func.jacfwd(function)(value) * tangent).sum(),
    "dual numbers": dual_numbers,
    "jvp of vmap": lambda function, value, tangent: torch.func.jvp(
        lambda x: torch.func.vmap(function)(x.unsqueeze(0))[0], (value,), (tangent,)
    )[1],
}


@pytest.mark.parametrize("name", CASES)
def test_forward_mode_is_right_or_refused(backend, device, name):
    """Nowhere is a tangent of 0 given instead."""
    case = case_of(name, device)
    right = backend == "reference" or name.startswith(("preference_loss", "reward_pair_loss"))
    right = right and name != "linear_preference_logps, packed"  # PyTorch's segment_reduce refuses it
    result = case()[0]
    weights = torch.arange(1.0, 1 + result.numel(), device=device).view(result.shape)
    for key, value in {**case.differentiable, **case.data}.items():

        def first(x, key=key):
            return (case(**{key: x})[0] * weights).sum()

        tangent = torch.linspace(1, 2, value.numel(), device=device).view(value.shape)
        for way, forward in FORWARD.items():
            if key in case.differentiable and right:
                if "vmap" in way:  # of what the reference does, PyTorch has no rule for some
                    continue
                leaf = value.clone().requires_grad_()
                (gradient,) = torch.autograd.grad(first(leaf), leaf)
                torch.testing.assert_close(forward(first, value, tangent), (gradient * tangent).sum())
            else:
                with pytest.raises(RuntimeError, match=r"forward mode|forward AD|functorch"):
                    forward(first, value, tangent)


@pytest.mark.only("cpu")
@pytest.mark.parametrize("name", ["token_logprobs", "kl_penalty", "gae", "masked_whiten"])
def test_forward_mode_is_refused_under_compile(backend, device, name):
    case = case_of(name, device)
    key, value = next(iter({**case.differentiable, **case.data}.items()))
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: torch.func.jvp(lambda x: case(**{key: x})[0], (x,), (x,))[1], backend="eager", fullgraph=True
    )
    with pytest.raises(RuntimeError, match="forward"):
        compiled(value)


TRANSFORMS = {
    "grad": (torch.func.grad, lambda function, value: torch.autograd.functional.jacobian(function, value)),
    "vmap": (
        lambda function: lambda value: torch.func.vmap(function)(torch.stack([value, 2 * value])),
        lambda function, value: torch.stack([function(value), function(2 * value)]),
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", CASES)
def test_transforms_are_right_or_refused(backend, device, name, transform):
    case = case_of(name, device)
    transformed, expected = TRANSFORMS[transform]
    for key, value in {**case.differentiable, **case.data}.items():

        def first(x, key=key):
            return case(**{key: x})[0].sum()

        try:
            result = transformed(first)(value)
        except (RuntimeError, ValueError) as error:
            text = str(error)
            assert any(word in text for word in ("functorch", "vmap", "must not require a gradient", "Batching rule"))
        else:
            # A teacher's gradient is 0, as its docstring says.
            assert transform == "vmap" or key in case.differentiable or key.startswith("teacher_")
            torch.testing.assert_close(result, expected(first, value))


@pytest.mark.parametrize("name", CASES)
def test_data_must_not_require_a_gradient(backend, device, name):
    """Floating-point masks are data too. Of a teacher it is told that no gradient reaches it."""
    case = case_of(name, device)
    masks = {key: value.float() for key, value in case.others.items() if key in ("mask", "labels")}
    for key, value in {**case.data, **masks}.items():
        if not key.startswith("teacher_"):
            with pytest.raises(ValueError, match=rf"^{key} must not require a gradient .*: detach it$"):
                case(**{key: value.clone().requires_grad_()})
            with torch.no_grad():
                case(**{key: value.clone().requires_grad_()})


def resized(case, lengths):
    """`case`, of packed sequences, with as many as there are lengths."""
    tokens = sum(lengths)

    def of_size(key, value):
        if key == "cu_seqlens":
            return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        if not torch.is_tensor(value) or key in ("weight", "bias", "adapter_1"):
            return value
        count = tokens if len(value) == 6 else len(lengths)
        return value[torch.arange(count) % len(value)]

    given = {**case.differentiable, **case.data, **case.others}
    return {key: of_size(key, value) for key, value in given.items()}


@pytest.mark.only("cpu")
@pytest.mark.parametrize("name", ["gae, packed", "linear_policy_loss, packed"])
def test_compiled_for_any_number_of_sequences(backend, device, name):
    """Sizes become symbols at the second call."""
    case = CASES[name]
    torch._dynamo.reset()
    compiled = torch.compile(lambda arguments: case(**arguments), backend="eager", fullgraph=True)
    for lengths in ([2, 4], [2, 1, 5], [2, 7], [5]):
        arguments = resized(case, lengths)
        torch.testing.assert_close(compiled(arguments), case(**arguments))


@pytest.mark.only("cpu")
@pytest.mark.parametrize("dynamic", [None, True])
def test_a_mean_is_compiled_for_any_dimension(backend, device, dynamic):
    case = CASES["masked_mean, of rows"]
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda dim, x: case(x=x, mask=x > 0, dim=dim), backend="eager", fullgraph=True, dynamic=dynamic
    )
    for dim, shape in ((0, (2, 3)), (1, (4, 5)), (-1, (3, 3))):
        x = torch.randn(shape)
        torch.testing.assert_close(compiled(dim, x), case(x=x, mask=x > 0, dim=dim))
