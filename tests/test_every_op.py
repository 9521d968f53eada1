"""What holds of every op: its derivatives, what it takes and refuses, and that it can be compiled."""

import inspect
import math
import re
import warnings
from decimal import Decimal

import numpy
import pytest
import torch
from torch.autograd import forward_ad
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

from cases import thorough
from op_cases import CASES
from rlkernels import _backends

PLAIN = ("preference_loss", "reward_pair_loss", "masked_mean")
"""Ops whose second derivatives are PyTorch's own, or of a linear function."""


def case_of(name, device):
    return CASES[name].to(device)


def weighted(results):
    """The sum of every output that is differentiable, each element by another weight."""
    values = torch.cat([value.flatten() for value in results if value.requires_grad])
    return (values * torch.arange(1, 1 + len(values), dtype=values.dtype, device=values.device)).sum()


def test_every_op_is_here():
    assert {case.op.__name__.removeprefix("inplace_") for case in CASES.values()} == set(_backends.BACKENDS_OF)


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
@pytest.mark.parametrize("name", FUSED)
def test_first_derivatives_in_a_graph_under_checkpointing(backend, device, name):
    """It lets a backward pass ask once for what was saved."""
    case = case_of(name, device)
    names = list(case.differentiable)
    plain, checkpointed = ([value.clone().requires_grad_() for value in case.differentiable.values()] for _ in range(2))

    def run(*inputs):
        return weighted(case(**dict(zip(names, inputs, strict=True))))

    wanted = torch.autograd.grad(run(*plain), plain)
    value = checkpoint(run, *checkpointed, use_reentrant=False)
    for got, expected in zip(torch.autograd.grad(value, checkpointed, create_graph=True), wanted, strict=True):
        assert torch.equal(got, expected)


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
    x = case_of(name, device).differentiable["x"].clone().requires_grad_()
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
@pytest.mark.parametrize("name", ["kl_penalty", *map(thorough, ("token_logprobs", "gae", "masked_whiten"))])
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
@pytest.mark.parametrize("name", [thorough("gae, packed"), "linear_policy_loss, packed"])
def test_compiled_for_any_number_of_sequences(backend, device, name):
    """Sizes become symbols at the second call."""
    case = CASES[name]
    torch._dynamo.reset()
    compiled = torch.compile(lambda arguments: case(**arguments), backend="eager", fullgraph=True)
    for lengths in ([2, 4], [2, 1, 5], [5]):
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


# Every number that an op takes, with what else it needs.
NUMBERS = {
    "token_logprobs": ("temperature", "softcap"),
    "kl_penalty": ("log_ratio_clamp", "value_clamp"),
    "linear_token_logprobs": ("temperature", "softcap", "scale", "logits_budget_mb"),
    "linear_policy_loss": ("temperature", "softcap", "scale", "logits_budget_mb", "normalizer"),
    "linear_kl_divergence": (
        *("temperature", "softcap", "scale", "teacher_softcap", "teacher_scale", "beta", "logits_budget_mb"),
    ),
    "linear_preference_logps": ("temperature", "softcap", "scale", "logits_budget_mb"),
    "policy_loss": (
        *("clip_low", "clip_high", "dual_clip", "delta", "log_ratio_clamp"),
        *("kl_coef", "entropy_coef", "sampler_cap", "normalizer"),
    ),
    "value_loss": ("clip", "normalizer"),
    "gae": ("gamma", "lam"),
    "td_lambda": ("gamma", "lam"),
    "discounted_returns": ("gamma",),
    "vtrace": ("gamma", "lam", "rho_clip", "c_clip"),
    "shaped_rewards": ("kl_coef",),
    "group_advantages": ("eps",),
    "masked_whiten": ("eps",),
    "preference_loss": ("beta", "alpha", "discopop_tau", "simpo_gamma", "label_smoothing"),
    "preference_loss, kto": ("kl", "desirable_weight", "undesirable_weight"),
}
OF_OBJECTIVES = {
    "sapo_temperature_pos": "sapo",
    "sapo_temperature_neg": "sapo",
    **dict.fromkeys(("vespo_k_pos", "vespo_k_neg", "vespo_lambda_pos", "vespo_lambda_neg"), "vespo"),
}
EVERY_NUMBER = [(op, name, {}) for op, names in NUMBERS.items() for name in names] + [
    ("policy_loss", name, {"objective": objective}) for name, objective in OF_OBJECTIVES.items()
]
NUMBER_OF = pytest.mark.parametrize(
    ("op", "name", "others"), [pytest.param(*given, id=f"{given[0]}-{given[1]}") for given in EVERY_NUMBER]
)
NOT_IN_FLOAT32 = [1e-46, 1e-38, 1e39, 1e300, 5e-324, 10**400, -(10**400), 10**5000, math.nan, -1e-46]
NOT_NUMBERS = ["0.5", Decimal("0.5"), True, numpy.bool_(True), [0.5], 1j]


def test_every_number_is_here():
    for op, case in CASES.items():
        if op in NUMBERS:
            given = inspect.signature(case.op).parameters.values()
            numeric = {p.name for p in given if re.search(r"\bfloat\b", str(p.annotation))} - {"weights"}
            named = {name for key, name, _ in EVERY_NUMBER if key.split(",")[0] == op.split(",")[0]}
            assert numeric <= named | {"kl"}, op


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@NUMBER_OF
def test_numbers_that_float32_cannot_hold_are_refused(op, name, others, dtype):
    """Neither taken for 0 or infinity nor, in float64, taken as they are. 1e-38 it holds with fewer digits."""
    case = CASES[op].to(dtype)
    for value in NOT_IN_FLOAT32:
        with pytest.raises(ValueError, match=rf"^{name} must be .*; got "):
            case(**{**others, name: value})


@pytest.mark.parametrize("name", ["temperature", "softcap", "teacher_softcap"])
@pytest.mark.parametrize("op", ["token_logprobs", "linear_token_logprobs", "linear_kl_divergence"])
def test_numbers_beside_which_logits_are_zero_are_refused(backend, device, op, name):
    """Logits are divided by them, and what is too small for float32 is 0 in some kernels."""
    case = case_of(op, device)
    if name in inspect.signature(case.op).parameters:
        largest = 2.0**100
        for result in case(**{name: largest}):
            assert result.isfinite().all()
        if name == "softcap" and op != "linear_kl_divergence":
            for result, expected in zip(case(softcap=largest), case(), strict=True):
                torch.testing.assert_close(result, expected)
        for value in (2 * largest, 1e38):
            with pytest.raises(ValueError, match=rf"^{name}( divided by \w+)? must be .*; got "):
                case(**{name: value})


@NUMBER_OF
def test_numbers_of_numpy_are_numbers_and_text_is_not(op, name, others):
    case = CASES[op]
    half = 1 if name in ("dual_clip", "label_smoothing") else 0.5
    given = numpy.float32(half + 1 if name == "dual_clip" else half if name != "label_smoothing" else 0)
    for result, expected in zip(case(**{**others, name: given}), case(**{**others, name: float(given)}), strict=True):
        assert torch.equal(result, expected)
    with warnings.catch_warnings(action="error"):
        case(**{**others, name: numpy.float16(given)})
    for value in NOT_NUMBERS:
        with pytest.raises(TypeError, match=rf"^{name} must be a number; got {type(value).__name__}$"):
            case(**{**others, name: value})


def test_temperature_and_softcap_are_of_the_logits_before_scale():
    case = CASES["linear_token_logprobs"]
    with pytest.raises(ValueError, match=r"^temperature divided by scale must be .*; got 1e-38"):
        case(scale=1e38)
    with pytest.raises(ValueError, match=r"^softcap divided by scale must be .*; got "):
        case(softcap=1e25, scale=1e-25)


def test_integers():
    case = CASES["token_logprobs"]
    assert torch.equal(case(ignore_index=numpy.int64(-100))[0], case(ignore_index=-100)[0])
    for value in (10**5000, -(2**63) - 1):
        with pytest.raises(ValueError, match=r"^ignore_index must fit in 64 bits; got "):
            case(ignore_index=value)
    for value in (True, 1.0, "1"):
        with pytest.raises(TypeError, match=r"^ignore_index must be an integer; got "):
            case(ignore_index=value)


@pytest.mark.parametrize("weights", [b"ab", "ab", {0.5, 1.0}, {"a": 1.0}])
def test_weights_are_in_order(weights):
    with pytest.raises(TypeError, match=r"^weights must be a (tensor or a sequence of numbers|number); got"):
        CASES["group_advantages"](weights=weights)


GIVEN_AS_THEY_ARE = [name for name in CASES if "in place" not in name]


def _quantised(value):
    return torch.quantize_per_tensor(value.float().contiguous(), 0.1, 0, torch.qint8)


NOT_PLAIN = {
    "sparse": (torch.Tensor.to_sparse, TypeError, "dense tensor; got one of the layout sparse_coo"),
    "nested": (lambda v: torch.nested.nested_tensor([v]), TypeError, "dense tensor; got one of the layout nested"),
    "jagged": (
        lambda v: torch.nested.nested_tensor([v], layout=torch.jagged),
        TypeError,
        "plain tensor; got a NestedTensor, which wraps others",
    ),
    "wrapped": (lambda v: TwoTensor(v, v), TypeError, "plain tensor; got a TwoTensor, which wraps others"),
    "meta": (lambda v: v.to("meta"), ValueError, "on a device that holds values, such as cpu; got meta"),
    "complex": (lambda v: v.to(torch.complex64), TypeError, "one of the dtypes .*; got complex64"),
    "quantised": (_quantised, TypeError, "one of the dtypes .*; got qint8"),
    "unsigned": (lambda v: v.to(torch.uint16), TypeError, "one of the dtypes .*; got uint16"),
    "an array": (torch.Tensor.numpy, TypeError, "(tensor|number|tensor or a sequence of numbers); got ndarray"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", NOT_PLAIN)
@pytest.mark.parametrize("name", GIVEN_AS_THEY_ARE)
def test_tensors_that_are_refused(name, kind):
    """By one rule, whichever argument it is."""
    case = CASES[name]
    of_kind, error, message = NOT_PLAIN[kind]
    for key, value in case.tensors().items():
        if value.dim() or kind not in ("nested", "jagged"):
            named = re.escape({"adapter_0": "adapter[0]", "adapter_1": "adapter[1]"}.get(key, key))
            with pytest.raises(error, match=f"^{named} must (be|have) (a )?{message}"):
                case(**{key: of_kind(value)})


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("name", GIVEN_AS_THEY_ARE)
def test_numbers_are_in_floating_point(name, dtype):
    case = CASES[name]
    for key, value in {**case.differentiable, **case.data}.items():
        with pytest.raises(
            TypeError, match=rf"must have one of the dtypes .*; got {str(dtype).removeprefix('torch.')}$"
        ):
            case(**{key: value.to(dtype)})


@pytest.mark.parametrize("name", ["token_logprobs", "linear_token_logprobs", "gae"])
def test_results_of_collectives_are_tensors(name):
    """What tensor parallelism hands on wraps its own result until that has come."""
    case = CASES[name]
    wrapped = {key: AsyncCollectiveTensor(value) for key, value in {**case.differentiable, **case.data}.items()}
    for result, expected in zip(case(**wrapped), case(), strict=True):
        assert torch.equal(result, expected)
