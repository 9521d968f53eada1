"""What takes the place of `openrlhf.models.loss`, beside the originals: every option, result and dtype."""

import pytest
import torch

import openrlhf_modules
from beside import assert_as_theirs

VERSION = openrlhf_modules.version_or_skip()
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MASK_DTYPES = (torch.bool, torch.long, torch.float32)
SINCE_0_11_2 = VERSION.release >= (0, 11, 2)
# dp_size, tokens and sequences of the whole step.
TOTALS = ((1, None, None), (2, 50.0, 7), (4, torch.tensor(33.0), torch.tensor(2.5)))


@pytest.fixture(scope="module", autouse=True)
def loaded():
    openrlhf_modules.load()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def losses(name, *arguments, **options):
    """Ours and theirs of a class, with `self` bound."""
    ours, theirs = openrlhf_modules.pair(f"loss:{name}.forward")
    module = getattr(__import__("openrlhf.models.loss", fromlist=[name]), name)(*arguments, **options)
    return (lambda *inputs: ours(module, *inputs)), (lambda *inputs: theirs(module, *inputs)), module


def masks(dtype=torch.bool):
    mask = torch.rand(6, 20) < 0.7
    mask[1] = False
    mask[2] = True
    mask[3, -5:] = False
    mask[4] = torch.arange(20) == 0
    return mask.to(dtype)


def slack(dtype, token_level):
    """Theirs adds 1e-8 to the number of a sequence's tokens, which float64 can tell."""
    return 4 if token_level or dtype != torch.float64 else 1e7


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("mask_dtype", MASK_DTYPES)
@pytest.mark.parametrize("token_level", [True, False])
@pytest.mark.parametrize("totals", TOTALS)
def test_aggregate_loss(dtype, mask_dtype, token_level, totals):
    ours, theirs = openrlhf_modules.pair("loss:aggregate_loss")
    loss, mask = torch.randn(6, 20).to(dtype), masks(mask_dtype)
    near = slack(dtype, token_level)
    assert_as_theirs(ours, theirs, loss, mask, token_level, *totals, slack=near)
    assert_as_theirs(ours, theirs, loss.T, mask.T, token_level, *totals, slack=near)
    assert_as_theirs(ours, theirs, loss, mask * 0, token_level, *totals, slack=near)
    assert_as_theirs(ours, theirs, loss[:0], mask[:0], token_level, *totals, slack=near)
    assert_as_theirs(ours, theirs, loss, mask[:1].expand(6, 20), token_level, *totals, slack=near)
    assert_as_theirs(ours, theirs, loss, mask[:1], token_level, *totals, slack=near)
    if token_level and totals[1] is None:
        assert_as_theirs(ours, theirs, loss, None)
    else:
        for function in (ours, theirs):
            with pytest.raises((TypeError, AttributeError)):
                function(loss, None, token_level, *totals)


def policies(dtype=torch.float32, own_advantages=True):
    """Ratios on both sides of every bound, one beyond the clamp, and samplers far from and near the policy. Advantages
    of both signs, and 0."""
    old = -3 * torch.rand(6, 20)
    new = old + 0.4 * torch.randn(6, 20) + torch.linspace(-0.8, 0.8, 6)[:, None]
    rollout = old + 0.7 * torch.randn(6, 20)
    rollout[5] = old[5] + 0.01 * torch.randn(20)
    advantages = torch.randn(6, 20)
    if not own_advantages:
        advantages = advantages[:, :1].expand(6, 20)
    advantages[0, :3] = 0.0
    new[2, :2], old[2, :2] = torch.tensor([-1.0, -26.0]), torch.tensor([-26.0, -1.0])
    return tuple(value.to(dtype) for value in (new, old, advantages, rollout))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("token_level", [True, False])
@pytest.mark.parametrize("dual_clip", [None, 1.1])
@pytest.mark.parametrize("totals", TOTALS)
@pytest.mark.parametrize("kind", ["ppo", "gspo"])
def test_policy_loss(dtype, token_level, dual_clip, totals, kind):
    ours, theirs, module = losses("PolicyLoss", 0.2, 0.28, dual_clip, token_level, kind)
    new, old, advantages, _ = policies(dtype)
    if dtype == torch.float16:
        new, old = new.clamp(min=-4), old.clamp(min=-4)  # exp(20) is beyond it
    near = slack(dtype, module.token_level_loss)
    for mask_dtype in MASK_DTYPES:
        mask = masks(mask_dtype)
        _, clipped, _, vllm_kl, *_ = assert_as_theirs(
            ours, theirs, new, old, advantages, mask, None, *totals, slack=near
        )
        assert 0.1 < clipped < 0.9 and vllm_kl is None
    assert_as_theirs(ours, theirs, new, old.float(), advantages.float(), mask, None, *totals, slack=near)
    transposed = (new.T, old.T, advantages.T, mask.T)
    assert_as_theirs(ours, theirs, *transposed, None, *totals, slack=near)


@pytest.mark.parametrize("kind", ["ppo", "gspo"])
@pytest.mark.parametrize("token_level", [True, False])
@pytest.mark.parametrize("totals", TOTALS)
def test_policy_loss_of_nothing(kind, token_level, totals):
    ours, theirs, _ = losses("PolicyLoss", token_level_loss=token_level, policy_loss_type=kind)
    new, old, advantages, _ = policies()
    # The loss is NaN where no total is given, and of its gradient the part that is differs.
    assert_as_theirs(ours, theirs, new, old, advantages, masks() & False, None, *totals, leaves=())
    assert_as_theirs(ours, theirs, *(value[:0] for value in (new, old, advantages, masks())), None, *totals)
    none = torch.tensor(0.0)
    got, want = (function(new, old, advantages, masks() & False, None, 1, none, none)[0] for function in (ours, theirs))
    assert got.isnan() and want.isnan()


def corrections():
    if not SINCE_0_11_2:
        for kind in ("tis", "icepop", "seq-mask-tis"):
            yield dict(
                enable_vllm_is_correction=True, vllm_is_correction_type=kind, vllm_is_truncated_threshold=[0.7, 1.5]
            )
        return
    for level, mode, gating, threshold in (
        ("token", "clip", "ratio", (0.7, 1.5)),
        ("token", "mask", "ratio", (0.7, 1.5)),
        ("seq", "mask", "ratio", (0.9, 1.1)),
        ("token", "mask", "binary_kl", (0, 0.05)),
        ("seq", "mask", "binary_kl", (0, 0.06)),
        ("token", "mask", "tv", (0.0, 0.1)),
        ("seq", "mask", "tv", (0.0, 0.1)),
        ("token", "clip", "ratio", (0.0, 1.0)),
    ):
        yield dict(
            is_correction_level=level,
            is_correction_mode=mode,
            is_correction_gating=gating,
            is_correction_threshold=threshold,
        )


@pytest.mark.parametrize(
    "correction", list(corrections()), ids=lambda each: "-".join(str(value) for value in each.values())
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("token_level", [True, False])
@pytest.mark.parametrize("dual_clip", [None, 1.1])
@pytest.mark.parametrize("kind", ["ppo", "gspo"])
def test_policy_loss_corrected(correction, dtype, token_level, dual_clip, kind):
    options = dict(token_level_loss=token_level, dual_clip=dual_clip, policy_loss_type=kind)
    ours, theirs, module = losses("PolicyLoss", **options, **correction)
    new, old, advantages, rollout = policies(dtype)
    near = slack(dtype, module.token_level_loss)
    for totals, mask_dtype in zip(TOTALS, MASK_DTYPES, strict=True):
        inputs = (new, old, advantages, masks(mask_dtype), rollout, *totals)
        results = assert_as_theirs(ours, theirs, *inputs, slack=near)
        assert (results[3] is None) == (kind == "gspo")
        if SINCE_0_11_2 and kind == "ppo":
            assert 0 < results[4] < 1
    if correction.get("is_correction_gating", "ratio") == "ratio":  # the others round probabilities to bfloat16
        low = (value.bfloat16() for value in (new, old, advantages))
        assert_as_theirs(ours, theirs, *low, masks(), rollout.float())
    if kind == "ppo" and token_level:
        assert_as_theirs(ours, theirs, new, old, advantages, None, rollout, slack=near)
    for function in (ours, theirs):
        with pytest.raises(TypeError):
            function(new, old, advantages, masks())


def test_corrections_that_overflow_are_filtered():
    for correction in list(corrections())[1:3]:
        ours, theirs, _ = losses("PolicyLoss", **correction)
        new, old, advantages, rollout = policies()
        rollout[0, ::2], rollout[5, 0], rollout[2] = -1000.0, 900.0, float("nan")
        inputs = (new, old, advantages, masks() | True, rollout)
        got = new.clone().requires_grad_()
        want = new.clone().requires_grad_()
        loss, *_, filtered = ours(got, *inputs[1:])
        wanted, *_, wanted_filtered = theirs(want, *inputs[1:])
        if wanted.isfinite():
            torch.testing.assert_close((loss, filtered), (wanted, wanted_filtered), equal_nan=True)
            loss.backward()
            wanted.backward()
            torch.testing.assert_close(got.grad, want.grad)
        else:  # 0.11.0 multiplies infinity by 0
            assert not SINCE_0_11_2 and loss.isfinite()


@pytest.mark.parametrize("kind", ["ppo", "gspo"])
def test_policy_loss_leaves_no_trace_of_what_is_masked(kind):
    ours, _, _ = losses("PolicyLoss", policy_loss_type=kind)
    new, old, advantages, _ = policies()
    mask = masks()
    want = ours(new, old, advantages, mask)
    poisoned = (torch.where(mask, value, float("nan")) for value in (new, old, advantages))
    torch.testing.assert_close(ours(*poisoned, mask), want)


def test_policy_loss_served_by_theirs(monkeypatch):
    """What ours has no place for comes out as theirs, gradients by old log-probabilities and advantages included."""
    from rlkernels.integrations import _openrlhf_losses

    calls = []
    theirs_of = _openrlhf_losses.theirs
    monkeypatch.setattr(_openrlhf_losses, "theirs", lambda name: calls.append(name) or theirs_of(name))
    new, old, advantages, rollout = policies()
    mask = masks()
    ours, theirs, _ = losses("PolicyLoss")
    assert_as_theirs(ours, theirs, new, old, advantages, mask)
    assert not calls
    assert_as_theirs(ours, theirs, new, old, advantages, mask, leaves=(0, 1))
    assert_as_theirs(ours, theirs, new, old, advantages, mask, leaves=(2,))
    assert_as_theirs(ours, theirs, new, old, advantages[:, :1], mask)
    assert_as_theirs(ours, theirs, new[0], old[0], advantages[0], mask[0])
    assert_as_theirs(ours, theirs, new, old, advantages, mask[:1])
    assert len(calls) == 5
    corrected, theirs, _ = losses("PolicyLoss", **next(corrections()))
    assert_as_theirs(corrected, theirs, new, old, advantages, mask, rollout, leaves=(0, 1))
    assert len(calls) == 6
    ours, theirs, module = losses("PolicyLoss")
    module.policy_loss_type = "sapo"
    for function in (ours, theirs):
        with pytest.raises(ValueError, match="Invalid policy loss type: sapo"):
            function(new, old, advantages, mask)
    for options in (dict(policy_loss_type="gspo"), dict(token_level_loss=False)):
        ours, theirs, _ = losses("PolicyLoss", **options)
        for function in (ours, theirs):
            with pytest.raises((TypeError, AttributeError)):
                function(new, old, advantages)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("clip", [None, 0.2, 0.0])
@pytest.mark.parametrize("token_level", [True, False])
@pytest.mark.parametrize("totals", TOTALS)
def test_value_loss(dtype, clip, token_level, totals):
    ours, theirs, _ = losses("ValueLoss", clip, token_level)
    values = torch.randn(6, 20).to(dtype)
    old, returns = (values + torch.randn(6, 20) * 0.5).to(dtype), torch.randn(6, 20).to(dtype)
    near = slack(dtype, token_level)
    for mask_dtype in MASK_DTYPES:
        mask = masks(mask_dtype)
        assert_as_theirs(ours, theirs, values, old, returns, mask, *totals, slack=near)
    assert_as_theirs(ours, theirs, values, old.float(), returns.float(), mask, *totals, slack=near)
    assert_as_theirs(ours, theirs, values.T, old.T, returns.T, mask.T, *totals, slack=near)
    assert_as_theirs(ours, theirs, values, old, returns, mask * 0, *totals, leaves=(), slack=near)
    assert_as_theirs(ours, theirs, values[:0], old[:0], returns[:0], mask[:0], *totals, slack=near)
    assert_as_theirs(ours, theirs, values, old, returns, mask, *totals, leaves=(0, 1, 2), slack=near)
    assert_as_theirs(ours, theirs, values, old, returns, mask[:1], *totals, slack=near)
    if token_level and totals[1] is None:
        assert_as_theirs(ours, theirs, values, old, returns)
    if clip is None:
        assert_as_theirs(ours, theirs, values, None, returns, mask, *totals, slack=near)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("margin", [None, "each", "integers", "one"])
def test_pair_wise_loss(dtype, margin):
    ours, theirs, _ = losses("PairWiseLoss")
    chosen, rejected = 5 * torch.randn(2, 9, dtype=torch.float64).to(dtype)
    margins = {
        "each": torch.rand(9).to(dtype),
        "integers": torch.arange(9),
        "one": torch.tensor([0.5]).to(dtype),
        None: None,
    }[margin]
    assert_as_theirs(ours, theirs, chosen, rejected, margins, leaves=(0, 1))
    assert_as_theirs(ours, theirs, chosen[:, None], rejected[:, None], None, leaves=(0, 1))
    assert_as_theirs(ours, theirs, chosen[:0], rejected[:0], None, leaves=())
    assert_as_theirs(ours, theirs, chosen, rejected[:1], None, leaves=(0, 1))
    if margin is not None:
        assert_as_theirs(ours, theirs, chosen, rejected, margins[:, None], leaves=(0, 1))
    if margin == "each":
        assert_as_theirs(ours, theirs, chosen, rejected, margins, leaves=(0, 1, 2))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.6, 1.0])
@pytest.mark.parametrize("ipo", [False, True])
def test_dpo_loss(dtype, beta, smoothing, ipo):
    ours, theirs, _ = losses("DPOLoss", beta, smoothing, ipo)
    inputs = tuple((-10 * torch.rand(4, 9, dtype=torch.float64)).to(dtype))
    near = 32 if ipo else 4  # of squares up to 200
    assert_as_theirs(ours, theirs, *inputs, leaves=(0, 1), slack=near)
    assert_as_theirs(ours, theirs, *(value[:, None] for value in inputs), leaves=(0, 1), slack=near)
    assert_as_theirs(ours, theirs, *(value[::2] for value in inputs), leaves=(0, 1), slack=near)
    assert_as_theirs(ours, theirs, *inputs, leaves=(0, 1, 2, 3), slack=near)
    assert_as_theirs(ours, theirs, *(value[:0] for value in inputs), leaves=())
    assert_as_theirs(ours, theirs, *inputs[:3], inputs[3][:1], leaves=(0, 1), slack=near)
    loss, chosen, rejected = ours(*(value.clone().requires_grad_() for value in inputs[:2]), *inputs[2:])
    assert loss.requires_grad and not chosen.requires_grad and not rejected.requires_grad


def test_compiled():
    """In one graph, as theirs are where a caller compiles them."""
    new, old, advantages, rollout = policies()
    mask = masks()
    for name, options, arguments in (
        ("PolicyLoss", next(corrections()), (new, old, advantages, mask, rollout)),
        ("PolicyLoss", dict(policy_loss_type="gspo"), (new, old, advantages, mask)),
        ("ValueLoss", dict(clip_eps=0.2), (new, old, advantages, mask)),
        ("DPOLoss", dict(beta=0.1), tuple(new[:4])),
    ):
        ours, theirs, _ = losses(name, **options)
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*arguments), theirs(*arguments))
