"""Ours in the place of TRL's functions of logits, each against the one it replaces, whatever TRL is installed."""

import importlib
import inspect
import sys

import pytest
import torch

trl = pytest.importorskip("trl")
from rlkernels.integrations.trl import PATCH  # noqa: E402
from trl_functions import DTYPES, ROWS, VOCAB, assert_as_near, compare, differentiated, pair  # noqa: E402


def test_ours_has_the_parameters_of_its_row():
    for row in PATCH.rows:
        parameters = inspect.signature(row.ours).parameters.values()
        ours = inspect.Signature([p.replace(annotation=inspect.Parameter.empty) for p in parameters])
        assert str(ours) == row.signature.replace("(ctx, ", "("), row.target


def test_every_module_of_trl_has_ours_while_patched():
    names = ["trl.trainer.utils", "trl.trainer.distillation_trainer", "trl.experimental.sdpo.loss_utils"]
    modules = [importlib.import_module(name) for name in names]
    originals = {name: PATCH.original(row.target) for name, row in ROWS.items() if "." not in row.target.split(":")[1]}
    with PATCH.patched():
        # One that nothing has imported before, and which takes what it finds.
        modules.append(importlib.import_module("trl.experimental.orpo.orpo_trainer"))
        held = {
            name: getattr(module, held)
            for module in [*modules, *(m for n, m in sys.modules.items() if n.split(".")[0] == "trl")]
            for held, name in [(("_" if n.startswith("chunked") else "") + n, n) for n in originals]
            if held in vars(module)
        }
        assert held == {name: ROWS[name].ours for name in originals}
        function = importlib.import_module("trl.trainer.utils")._ChunkedLogProbFunction
        fused = next(row for name, row in ROWS.items() if "LogProbFunction" in name)
        assert function.apply is fused.ours
    assert function.apply == PATCH.original(fused.target)
    for name, original in originals.items():
        for module in modules:
            assert vars(module).get(name, original) is original
    assert "apply" not in vars(function)


def layouts(logits):
    """The same values in memory of another kind."""
    wide = torch.full((*logits.shape[:-1], 2 * logits.shape[-1]), 7.0, dtype=logits.dtype)
    wide[..., ::2] = logits
    longer = torch.cat([logits, logits[:, :1] + 1], 1)
    yield "longer", longer[:, :-1]
    yield "every second", wide[..., ::2]
    yield "transposed", logits.transpose(0, 1).contiguous().transpose(0, 1)


def scored(logits, ids, temperature=1.0, mask=None):
    logps = (logits / temperature).log_softmax(-1)
    picked = logps.gather(-1, ids if ids.dim() == logits.dim() else ids.unsqueeze(-1))
    picked = picked if ids.dim() == logits.dim() else picked.squeeze(-1)
    entropy = -torch.special.xlogy(logps.exp(), logps.exp()).sum(-1)
    if mask is not None:
        picked = picked.masked_fill(mask == 0, 0.0)
        entropy = entropy.masked_fill(mask == 0, 0.0) if mask.shape == entropy.shape else entropy
    return picked, entropy


def random_logits(shape=(3, 7), dtype=torch.float32, tokens=(), seed=0, spread=3.0):
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(*shape, VOCAB, generator=g) * spread).to(dtype)
    ids = torch.randint(VOCAB, (*shape, *tokens), generator=g)
    upstream = torch.randn(2, *shape, *tokens, generator=g)
    return logits, ids, upstream


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 7), (6,), (2, 1), (2, 3, 4), (2, 0), (1, 300)], ids=str)
def test_selective_log_softmax(dtype, shape):
    theirs, ours = pair("selective_log_softmax")
    logits, ids, upstream = random_logits(shape, dtype)

    def truth(z):
        return scored(z, ids)[0]

    compare(lambda z: ours(z, ids), lambda z: theirs(z, ids), truth, [logits], upstream[:1])
    expected = ours(logits, ids)
    if logits.dim() == 3:
        for name, other in layouts(logits):
            assert torch.equal(ours(other, ids), expected), name
            assert_as_near(ours(other, ids), theirs(other, ids), truth(logits.double()), name)
        assert torch.equal(ours(logits, ids.t().contiguous().t()), expected)
    if dtype != torch.bfloat16:
        assert torch.equal(ours(logits, ids.int()), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [0.7, 1, 2.5])
@pytest.mark.parametrize("tokens", [(), (5,)], ids=["one", "several"])
@pytest.mark.parametrize("masked", [torch.bool, torch.int64, torch.float32, None], ids=str)
def test_selective_log_softmax_with_temperature_and_mask(dtype, temperature, tokens, masked):
    theirs, ours = pair("selective_log_softmax", "temperature", "row_mask")
    logits, ids, upstream = random_logits(dtype=dtype, tokens=tokens)
    mask = None
    if masked is not None:
        mask = (torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) > 0.4).to(masked)
        mask[1] = 0  # a sequence of which nothing is scored

    def call(function):
        return lambda z: function(z, ids, temperature=temperature, row_mask=mask)

    compare(call(ours), call(theirs), lambda z: scored(z, ids, temperature, mask)[0], [logits], upstream[:1])
    if mask is not None:
        (value,), (gradient,) = differentiated(call(ours), [logits], upstream[:1])
        assert (value[mask == 0] == 0).all()
        assert (gradient[1] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_tokens_of_a_row(dtype):
    """Among them ones twice, the likeliest and ones without probability."""
    theirs, ours = pair("selective_log_softmax")
    logits, ids, upstream = random_logits(dtype=dtype, tokens=(6,))
    logits[..., :3] = -torch.inf
    ids[..., 0], ids[..., 1], ids[..., 4] = 2, logits.argmax(-1), ids[..., 5]
    values = [function(logits, ids) for function in (ours, theirs)]
    assert_as_near(*values, scored(logits.double(), ids)[0], "values")
    assert (values[0][..., 0] == -torch.inf).all()
    ids, upstream = ids[..., 1:], upstream[..., 1:]
    compare(lambda z: ours(z, ids), lambda z: theirs(z, ids), lambda z: scored(z, ids)[0], [logits], upstream[:1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 7), (6,), (), (2, 3, 4), (2, 0), (1, 300)], ids=str)
def test_entropy_from_logits(dtype, shape):
    theirs, ours = pair("entropy_from_logits")
    logits, ids, upstream = random_logits(shape, dtype)
    compare(ours, theirs, lambda z: scored(z, ids)[1], [logits], upstream[1:])
    assert torch.equal(ours(logits, chunk_size=2), ours(logits))
    if logits.dim() == 3:
        for name, other in layouts(logits):
            assert torch.equal(ours(other), ours(logits)), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_selective_log_softmax_and_entropy(dtype, temperature, requires_grad, masked):
    theirs, ours = pair("selective_log_softmax_and_entropy")
    logits, ids, upstream = random_logits(dtype=dtype)
    mask = torch.ones_like(ids)
    mask[1], mask[2, 3] = 0, 0
    mask = mask if masked else None

    def call(function):
        return lambda z: function(z, ids, requires_grad, temperature, mask)

    def truth(z):
        logprobs, entropy = scored(z, ids, temperature, mask)
        return logprobs, entropy if requires_grad else entropy.detach()

    compare(call(ours), call(theirs), truth, [logits], upstream)


HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("tokens", [(), (1,), (8,)], ids=["one", "a list of one", "several"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("where", ["a CPU", "a GPU"])
def test_16_bits_are_those_of_log_softmax(dtype, tokens, temperature, where, monkeypatch):
    """TRL's own tests hold its functions equal to it, bit for bit. On a GPU both are float32 until the end, where one
    in a hundred may be rounded to the other side; here that is shown on a CPU."""
    _, ours = pair("selective_log_softmax", *(["temperature"] if temperature != 1.0 else []))
    _, entropy = pair("entropy_from_logits")
    logits, ids, _ = random_logits((4, 32), dtype, tokens)
    logps = (logits / temperature).log_softmax(-1)
    expected = logps.gather(-1, ids if tokens else ids.unsqueeze(-1)).reshape(ids.shape)
    if where == "a GPU":
        monkeypatch.setattr("rlkernels.integrations.trl._theirs_serves", lambda *given: False)
    found = ours(logits, ids, **({"temperature": temperature} if temperature != 1.0 else {}))
    assert found.dtype == dtype
    if where == "a CPU":
        assert torch.equal(found, expected)
        logps = logits.log_softmax(-1)
        assert torch.equal(entropy(logits), -(logps.exp() * logps).sum(-1))
        if "selective_log_softmax_and_entropy" in ROWS and not tokens:
            both = ROWS["selective_log_softmax_and_entropy"].ours(logits, ids, temperature=temperature)
            logps = (logits / temperature).log_softmax(-1)
            assert torch.equal(both[0], expected) and torch.equal(both[1], -(logps.exp() * logps).sum(-1))
    else:
        expected = (logits / temperature).float().log_softmax(-1).to(dtype)
        expected = expected.gather(-1, ids if tokens else ids.unsqueeze(-1)).reshape(ids.shape)
        assert (found == expected).float().mean() >= 0.99
        torch.testing.assert_close(found, expected, rtol=torch.finfo(dtype).eps, atol=0.0)


def test_temperature_must_be_positive():
    for name in ("selective_log_softmax", "selective_log_softmax_and_entropy"):
        theirs, ours = pair(name, "temperature")
        logits, ids, _ = random_logits()
        for temperature in (0, -1.0):
            for function in (ours, theirs):
                with pytest.raises(ValueError, match="temperature must be positive"):
                    function(logits, ids, temperature=temperature)


@pytest.mark.parametrize("wrong", [-100, -1, VOCAB])
def test_ids_outside_of_the_vocabulary_raise(wrong):
    theirs, ours = pair("selective_log_softmax")
    logits, ids, _ = random_logits()
    ids[1, 2] = wrong
    with pytest.raises(RuntimeError):
        theirs(logits, ids)
    with pytest.raises(ValueError, match="token_ids"):
        ours(logits, ids)
    with pytest.raises(RuntimeError):
        ours(logits, ids.unsqueeze(-1))


def test_masked_vocabulary_has_no_entropy():
    _, ours = pair("entropy_from_logits")
    logits, ids, _ = random_logits()
    logits[..., 5:20] = -torch.inf
    torch.testing.assert_close(ours(logits), scored(logits, ids)[1])


def test_logits_are_left_as_they_are():
    logits, ids, _ = random_logits()
    for name in ("selective_log_softmax", "selective_log_softmax_and_entropy"):
        if name in ROWS:
            grown = logits.clone().requires_grad_() * 1
            results = ROWS[name].ours(grown, ids)
            (results if torch.is_tensor(results) else sum(results)).sum().backward()
            assert torch.equal(grown, logits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["selective_log_softmax", "selective_log_softmax_and_entropy", "entropy_from_logits"])
def test_results_changed_in_place(dtype, name):
    """As the trainers do where a token is masked."""
    theirs, ours = pair(name)
    logits, ids, _ = random_logits(dtype=dtype)
    found = []
    for function in (ours, theirs):
        leaf = logits.clone().requires_grad_()
        results = function(leaf) if name == "entropy_from_logits" else function(leaf, ids)
        results = results if isinstance(results, tuple) else (results,)
        for result in results:
            result[ids > VOCAB // 2] = 0.0
            result *= 2
        sum(result.sum() for result in results).backward()
        assert (leaf.grad[ids > VOCAB // 2] == 0).all()
        found.append(leaf.grad)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-10}.get(dtype, 3e-2)
    torch.testing.assert_close(*found, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes_under_autocast(dtype):
    logits, ids, _ = random_logits(dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        for name in ("selective_log_softmax", "selective_log_softmax_and_entropy", "entropy_from_logits"):
            if name in ROWS:
                arguments = (logits,) if name == "entropy_from_logits" else (logits, ids)
                results = [function(*arguments) for function in pair(name)]
                for ours, theirs in zip(*(r if isinstance(r, tuple) else (r,) for r in results), strict=True):
                    assert ours.dtype == theirs.dtype
                    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


def test_float32_where_their_kernel_would_run(monkeypatch):
    """Which is float32 on a GPU, whatever the logits are."""
    utils = importlib.import_module("trl.trainer.utils")
    _, ours = pair("selective_log_softmax", "row_mask")
    logits, ids, _ = random_logits(dtype=torch.bfloat16)
    asked = []
    monkeypatch.setattr(utils, "_supports_trl_loss_kernel", lambda *given: asked.append(given) or True)
    mask = torch.ones_like(ids)
    assert ours(logits, ids, row_mask=mask).dtype == torch.float32
    assert all(a is b for a, b in zip(asked[0], (logits, ids, mask), strict=True))


def test_dtype_that_autocast_chooses(monkeypatch):
    """As on a GPU, where autocast has log_softmax of bfloat16 give float32."""
    _, ours = pair("selective_log_softmax")
    logits, ids, _ = random_logits(dtype=torch.bfloat16, tokens=(2,))
    log_softmax = torch.nn.functional.log_softmax
    assert ours(logits, ids).dtype == torch.bfloat16
    monkeypatch.setattr(torch.nn.functional, "log_softmax", lambda z, dim: log_softmax(z.float(), dim))
    assert ours(logits, ids).dtype == torch.float32
