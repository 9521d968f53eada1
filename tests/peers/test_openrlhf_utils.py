"""What takes the place of `openrlhf.models.utils` and the experience maker's loops, beside the originals."""

import inspect

import pytest
import torch

import openrlhf_modules
from beside import assert_as_theirs
from rlkernels.integrations.openrlhf import PATCH

VERSION = openrlhf_modules.version_or_skip()
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SINCE_0_11_1 = pytest.mark.skipif(VERSION.release < (0, 11, 1), reason="not in 0.11.0")
NAMES = [
    *(f"utils:{name}" for name in ("log_probs_from_logits", "compute_entropy", "compute_approx_kl", "compute_reward")),
    *("utils:masked_mean", "utils:masked_normalize", "loss:aggregate_loss", "loss:PolicyLoss.forward"),
    *("loss:ValueLoss.forward", "loss:PairWiseLoss.forward", "loss:DPOLoss.forward"),
    *("maker:get_advantages_and_returns", "maker:get_cumulative_returns"),
]


@pytest.fixture(scope="module", autouse=True)
def loaded():
    openrlhf_modules.load()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def names(function):
    parameters = inspect.signature(function).parameters.values()
    return [(each.name, each.default, each.kind) for each in parameters]


@pytest.mark.parametrize("name", NAMES)
def test_signature(name):
    ours, theirs = openrlhf_modules.pair(name)
    assert names(ours) == names(theirs)


def test_table_fits_and_is_put_back():
    assert len({row.target for row in PATCH.rows}) == len(NAMES)
    originals = {row.target: PATCH.original(row.target) for row in PATCH.rows}
    with PATCH.patched():
        assert {name: PATCH.original(name) for name in originals} == originals
        assert f"openrlhf {VERSION}: {len(NAMES)} functions" in PATCH.table()
    assert {row.target: PATCH.original(row.target) for row in PATCH.rows} == originals


def logits(*shape, dtype=torch.float32):
    return (4 * torch.randn(*shape)).to(dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
@pytest.mark.parametrize("layout", ["dense", "shifted", "transposed", "2d"])
def test_log_probs_from_logits(dtype, temperature, layout):
    ours, theirs = openrlhf_modules.pair("utils:log_probs_from_logits")
    x = logits(3, 9, 37, dtype=dtype)
    if layout == "shifted":
        x = x[:, :-1]
    elif layout == "transposed":
        x = x.transpose(0, 1)
    elif layout == "2d":
        x = x[0]
    labels = torch.randint(37, x.shape[:-1])
    assert_as_theirs(ours, theirs, x, labels, temperature)


def test_log_probs_divides_the_logits_in_place_as_theirs():
    ours, theirs = openrlhf_modules.pair("utils:log_probs_from_logits")
    x, labels = logits(2, 5, 7), torch.randint(7, (2, 5))
    mine, other = x.clone(), x.clone()
    ours(mine, labels, 0.5)
    theirs(other, labels, temperature=0.5)
    assert torch.equal(mine, other) and torch.equal(mine, 2 * x)
    ours(mine, labels)
    assert torch.equal(mine, other)
    with pytest.raises(RuntimeError, match="in-place"):
        ours(x.clone().requires_grad_(), labels, 0.5)
    with pytest.raises(RuntimeError, match="in-place"):
        theirs(x.clone().requires_grad_(), labels, 0.5)


def test_log_probs_edges():
    ours, theirs = openrlhf_modules.pair("utils:log_probs_from_logits")
    labels = torch.randint(7, (2, 5))
    for shape in ((0, 5), (2, 0)):
        assert_as_theirs(ours, theirs, torch.empty(*shape, 7), labels.new_empty(shape))
    masked = logits(2, 5, 7).masked_fill(torch.arange(7) == 6, -torch.inf)
    assert_as_theirs(ours, theirs, masked, labels)
    # A confident token: its log-probability is all rounding in theirs, in bfloat16 0.
    confident = torch.zeros(1, 1, 7)
    confident[..., 0] = 20.0
    exact = confident.double().log_softmax(-1)[..., 0]
    assert (ours(confident, labels[:1, :1] * 0) - exact).abs() <= 1e-6 * exact.abs()
    assert ours(logits(2, 5, 7), labels.fill_(-100)).eq(0).all()
    for wrong in (7, -1):
        for function in (ours, theirs):
            with pytest.raises((RuntimeError, ValueError)):
                function(logits(2, 5, 7), labels.fill_(wrong))


@pytest.mark.parametrize("dtype", FLOATS)
def test_compute_entropy(dtype):
    ours, theirs = openrlhf_modules.pair("utils:compute_entropy")
    eager = inspect.unwrap(theirs)
    # Theirs subtracts terms as large as the logits.
    assert_as_theirs(ours, eager, logits(3, 9, 37, dtype=dtype), slack=16)
    assert_as_theirs(ours, eager, logits(3, 9, 37, dtype=dtype)[:, :-1], slack=16)
    assert_as_theirs(ours, eager, torch.empty(0, 9, 37, dtype=dtype))
    masked = logits(3, 9, 37).masked_fill(torch.arange(37) % 2 == 0, -torch.inf)
    torch.testing.assert_close(ours(masked), ours(masked[..., 1::2]))


def log_ratios(dtype=torch.float32):
    """Two log-probabilities with ratios on both sides of and far beyond every clamp, and exactly on it."""
    base = -3 * torch.rand(6, 20)
    x = base + torch.randn(6, 20)
    x[0, :8] = base[0, :8] = 0.0
    x[0, :8] = torch.tensor([-200.0, -90.0, -11.0, -10.0, 10.0, 11.0, 90.0, 200.0])
    return x.to(dtype), base.to(dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_compute_approx_kl(dtype, estimator):
    ours, theirs = openrlhf_modules.pair("utils:compute_approx_kl")
    x, base = log_ratios(dtype)

    def gradients(function):
        leaves = x.clone().requires_grad_(), base.clone().requires_grad_()
        result = function(*leaves, kl_estimator=estimator)
        return result, *torch.autograd.grad((result * torch.arange(1.0, 121).view(6, 20)).sum(), leaves)

    got, want = gradients(ours), gradients(theirs)
    torch.testing.assert_close(got[0], want[0], rtol=1e-6, atol=1e-6)
    assert got[0].abs().max() == 10
    for mine, other in zip(got[1:], want[1:], strict=True):
        # Before 0.11.2 k3's is 0 * inf where the ratio overflows.
        assert mine.isfinite().all()
        torch.testing.assert_close(mine, other.nan_to_num(nan=0.0), rtol=rtol(dtype), atol=1e-5)
    assert_shapes_broadcast(ours, theirs, estimator)


def rtol(dtype):
    """Both compute in float32 whatever comes."""
    return 4 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)


def assert_shapes_broadcast(ours, theirs, estimator):
    x, base = torch.randn(3, 4), torch.randn(4)
    torch.testing.assert_close(ours(x, base, kl_estimator=estimator), theirs(x, base, kl_estimator=estimator))
    empty = torch.empty(0, 4)
    assert ours(empty, empty, kl_estimator=estimator).shape == (0, 4)
    for name in ("abs", "k1+", "k4"):
        with pytest.raises(ValueError, match="nknown"):
            ours(x, x, kl_estimator=name)


@SINCE_0_11_1
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("old", [False, True])
def test_unbiased_gradient(dtype, estimator, old):
    ours, theirs = openrlhf_modules.pair("utils:compute_approx_kl")
    x, base = log_ratios(dtype)
    x_old = (x - torch.randn_like(x)).requires_grad_() if old else None
    if old:
        x_old.data[1, :4] = x[1, :4] - torch.tensor([2.0, 3.0, 4.0, 100.0], dtype=dtype)

    def gradients(function):
        leaves = x.clone().requires_grad_(), base.clone().requires_grad_()
        result = function(*leaves, log_probs_old=x_old, kl_estimator=estimator, unbiased_gradient=True)
        return result, *torch.autograd.grad((result * torch.arange(1.0, 121).view(6, 20)).sum(), leaves)

    got, want = gradients(ours), gradients(theirs)
    # Theirs adds and subtracts the surrogate, which has up to 2e5 where the value has at most 10.
    torch.testing.assert_close(got[0], ours(x, base, kl_estimator=estimator))
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=0.02)
    torch.testing.assert_close(got[0][1:], want[0][1:], rtol=1e-5, atol=1e-5)
    for mine, other in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(mine, other, rtol=rtol(dtype), atol=1e-5)


def masks():
    mask = torch.rand(6, 20) < 0.7
    mask[1] = False
    mask[2] = True
    mask[3, -5:] = False
    mask[4] = torch.arange(20) == 0
    return mask


MASK_DTYPES = (torch.bool, torch.long, torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("mask_dtype", MASK_DTYPES)
@pytest.mark.parametrize("coef", [0.1, 0.0, -1.0])
@pytest.mark.parametrize("clip", [None, (-0.5, 0.5)])
def test_compute_reward(dtype, mask_dtype, coef, clip):
    ours, theirs = openrlhf_modules.pair("utils:compute_reward")
    kl = torch.randn(6, 20).to(dtype)
    for scores in (torch.randn(6), torch.randn(6).to(dtype), torch.tensor([0, 1, 2, 3, 4, 5])):
        if clip is None or scores.is_floating_point():
            assert_as_theirs(ours, theirs, scores, coef, kl, masks().to(mask_dtype), clip, leaves=())
    assert_as_theirs(ours, theirs, torch.randn(20), coef, kl.T, masks().T.to(mask_dtype), clip, leaves=())
    assert_as_theirs(ours, theirs, torch.randn(0), coef, kl[:0], masks()[:0], clip, leaves=())


def test_compute_reward_of_fractions_and_gradients():
    ours, theirs = openrlhf_modules.pair("utils:compute_reward")
    fractions = masks().float() * 0.5 + masks().float() * 0.5
    assert_as_theirs(ours, theirs, torch.randn(6), 0.1, torch.randn(6, 20), fractions, leaves=())
    assert_as_theirs(ours, theirs, torch.randn(6), 0.1, torch.randn(6, 20), masks(), leaves=(0, 2))
    for function in (ours, theirs):
        with pytest.raises(AttributeError):
            function(torch.randn(6), 0.1, torch.randn(6, 20))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("mask_dtype", MASK_DTYPES)
@pytest.mark.parametrize("dim", [None, 0, 1, -1])
def test_masked_mean(dtype, mask_dtype, dim):
    ours, theirs = openrlhf_modules.pair("utils:masked_mean")
    x, mask = torch.randn(6, 20).to(dtype), masks().to(mask_dtype)
    assert_as_theirs(ours, theirs, x, mask, dim)
    assert_as_theirs(ours, theirs, x.T, mask.T, dim)
    assert_as_theirs(ours, theirs, x, mask * 0, dim)
    assert_as_theirs(ours, theirs, x[:, :0], mask[:, :0], dim)
    assert_as_theirs(ours, theirs, x[:, 0], mask[:, 0], None)
    assert_as_theirs(ours, theirs, x, None, dim)
    assert_as_theirs(ours, theirs, x, mask[:1], dim)
    assert_as_theirs(ours, theirs, masks().long(), mask, dim, leaves=())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("mask_dtype", MASK_DTYPES)
@pytest.mark.parametrize("dim", [1, 0, -1, None])
def test_masked_normalize(dtype, mask_dtype, dim):
    ours, theirs = openrlhf_modules.pair("utils:masked_normalize")
    x, mask = torch.randn(6, 20).to(dtype), masks().to(mask_dtype)
    if dtype == torch.float16:
        # Which has no eps: their rows of one token, or none, are 0 times infinity.
        mask[[1, 4]] = 1
        mask[2:4] = 1
    assert_as_theirs(ours, theirs, 3 * x + 1, mask, dim, slack=8)
    assert_as_theirs(ours, theirs, x, mask, 1, 0.5, slack=8)
    assert_as_theirs(ours, theirs, x.T, mask.T, slack=8)
    assert_as_theirs(ours, theirs, x[:0], mask[:0], slack=8)
    assert_as_theirs(ours, theirs, x, mask[:1], slack=8)
    assert torch.equal(ours(torch.full((2, 4), 3.0), torch.ones(2, 4)), torch.zeros(2, 4))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("mask_dtype", [*MASK_DTYPES, None])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.99, 0.95), (0.9, 0.0), (1.1, 0.9), (0.9, 1.2)])
def test_get_advantages_and_returns(dtype, mask_dtype, gamma, lam):
    ours, theirs = openrlhf_modules.pair("maker:get_advantages_and_returns")
    mask = None if mask_dtype is None else masks().to(mask_dtype)
    values, rewards = torch.randn(2, 6, 20)
    for v, r in ((dtype, dtype), (dtype, torch.float32), (torch.bfloat16, dtype)):
        args = (None, values.to(v), rewards.to(r), mask, gamma, lam)
        advantages, returns = assert_as_theirs(ours, theirs, *args, leaves=(1, 2), slack=16)
        assert not advantages.requires_grad and not returns.requires_grad
    if mask is not None:
        # They go on over masked tokens, where ours alone would give 0.
        assert advantages[~masks()[0:1].expand(6, 20)].any() or gamma == 0
    turned = (None, values.to(dtype).T, rewards.to(dtype).T, None if mask is None else mask.T, gamma, lam)
    assert_as_theirs(ours, theirs, *turned, leaves=(), slack=16)
    empty = (None, values[:0], rewards[:0], None, gamma, lam)
    assert_as_theirs(ours, theirs, *empty, leaves=())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("mask_dtype", [*MASK_DTYPES, None])
@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0, 1.1])
def test_get_cumulative_returns(dtype, mask_dtype, gamma):
    ours, theirs = openrlhf_modules.pair("maker:get_cumulative_returns")
    mask = None if mask_dtype is None else masks().to(mask_dtype)
    rewards = torch.randn(6, 20).to(dtype)
    assert_as_theirs(ours, theirs, None, rewards, mask, gamma, leaves=(1,), slack=8)
    assert_as_theirs(ours, theirs, None, rewards.T, None if mask is None else mask.T, gamma, leaves=(), slack=8)
    assert_as_theirs(ours, theirs, None, rewards[:, :0], None, gamma, leaves=())


def test_compiled():
    """In one graph, as theirs are where a caller compiles them."""
    x, ones = torch.randn(2, 5, 7), torch.ones(5, 7)
    for name, arguments in {
        "log_probs_from_logits": (x, torch.ones(2, 5, dtype=torch.long)),
        "compute_approx_kl": (x[0], x[1]),
        "compute_reward": (torch.randn(5), 0.1, x[0], ones),
        "masked_mean": (x[0], ones, 1),
        "masked_normalize": (x[0], ones),
    }.items():
        ours, theirs = openrlhf_modules.pair(f"utils:{name}")
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*arguments), theirs(*arguments))
