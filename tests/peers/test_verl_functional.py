"""Our log-probabilities, entropies, whitening and fused heads beside verl's."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.utils.checkpoint

import verl_rows
from beside import assert_as_theirs
from verl_rows import DTYPES, MASK_DTYPES, pair, slack

verl_rows.rows()

WORKER = Path(__file__).parents[1] / "verl_worker.py"


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def logits_and_labels(dtype, shape=(3, 5), vocab=37):
    return (2 * torch.randn(*shape, vocab)).to(dtype), torch.randint(vocab, shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inplace_backward", [True, False])
@pytest.mark.parametrize("shape", [(7,), (3, 5)])
def test_logprobs_from_logits(dtype, inplace_backward, shape):
    ours, theirs = pair("logprobs_from_logits")
    logits, labels = logits_and_labels(dtype, shape)
    call = [lambda logits, f=f: f(logits, labels, inplace_backward=inplace_backward) for f in (ours, theirs)]
    assert_as_theirs(*call, logits)
    call = [lambda logits, f=f: f(logits[..., ::2][..., 1:, :], labels[..., 1:] % 19) for f in (ours, theirs)]
    assert_as_theirs(*call, logits)
    assert ours(logits[:0], labels[:0]).shape == (0, *shape[1:])


def test_logits_are_used_again():
    """verl leaves them alone where it has no flash-attn, whatever inplace_backward says."""
    ours, _ = pair("logprobs_from_logits")
    entropy_from_logits, _ = pair("entropy_from_logits")
    logits, labels = logits_and_labels(torch.float32)
    leaf = logits.clone().requires_grad_()
    middle = leaf * 1
    kept = middle.detach().clone()
    (ours(middle, labels).sum() + entropy_from_logits(middle).sum()).backward()
    torch.testing.assert_close(middle.detach(), kept, rtol=0, atol=0)
    ours(leaf, labels).sum().backward()  # a leaf is not written over


def test_beside_flash_attn(monkeypatch, verl_functional):
    """Where verl uses it, results are float32, and the gradient takes the memory of logits that are no leaf."""
    ours, _ = pair("logprobs_from_logits")
    monkeypatch.setattr(verl_functional, "FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE", True)
    logits, labels = logits_and_labels(torch.bfloat16)
    assert ours(logits, labels).dtype == torch.float32
    leaf = logits.clone().requires_grad_()
    for inplace in (True, False):
        middle = leaf * 1
        ours(middle, labels, inplace).sum().backward()
        assert middle.detach().equal(logits) is not inplace
    ours(leaf, labels).sum().backward()
    monkeypatch.setenv("VERL_DISABLE_FLASH_ATTN_CE", "1")
    assert ours(logits, labels).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", DTYPES)
def test_entropy_from_logits(dtype):
    ours, theirs = pair("entropy_from_logits")
    logits, _ = logits_and_labels(dtype)
    assert_as_theirs(ours, theirs, logits)
    assert_as_theirs(lambda x: ours(x[::2, 1:]), lambda x: theirs(x[::2, 1:]), logits)
    assert_as_theirs(lambda x: ours(x.transpose(0, 2)), lambda x: theirs(x.transpose(0, 2)), logits)
    assert_as_theirs(ours, theirs, logits[:0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk_size", [3, 2048])
def test_entropy_from_logits_with_chunking(dtype, chunk_size):
    """float32 throughout, of float64 too: the truth is the other's."""
    ours, theirs = pair("entropy_from_logits_with_chunking")
    _, exact = pair("entropy_from_logits")
    logits, _ = logits_and_labels(dtype, (7,))
    if dtype == torch.float64:
        got, want = ours(logits, chunk_size), theirs(logits, chunk_size)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
        return
    assert_as_theirs(
        lambda x: ours(x, chunk_size), lambda x: exact(x) if x.dtype == torch.float64 else theirs(x, chunk_size), logits
    )
    assert_as_theirs(ours, theirs, logits[:0], leaves=())


def test_entropy_compiled_and_checkpointed():
    """As verl's engine calls it."""
    ours, theirs = pair("entropy_from_logits")
    logits, _ = logits_and_labels(torch.float32, (7,))
    assert_as_theirs(torch.compile(ours, dynamic=True, backend="eager"), theirs, logits)
    assert_as_theirs(lambda x: torch.utils.checkpoint.checkpoint(ours, x, use_reentrant=False), theirs, logits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask_dtype", MASK_DTYPES)
@pytest.mark.parametrize("shift_mean", [True, False])
def test_masked_whiten(dtype, mask_dtype, shift_mean):
    ours, theirs = pair("masked_whiten")
    values, mask = (3 + torch.randn(8, 24)).to(dtype), verl_rows.mask(dtype=mask_dtype)
    call = [lambda *i, f=f: f(*i, shift_mean=shift_mean) for f in (ours, theirs)]
    assert_as_theirs(*call, values, mask, slack=slack(dtype))
    assert_as_theirs(*call, values.T, mask.T, slack=slack(dtype))
    assert_as_theirs(*call, values * 0 + 3, mask, slack=slack(dtype), leaves=())
    for function in call:
        with pytest.raises(ValueError, match="mask"):
            function(values, mask * 0)
        with pytest.raises(ValueError, match="mask"):
            function(values, torch.eye(8, 24) * torch.eye(8, 1))


def test_masked_whiten_of_what_is_not_scored():
    ours, theirs = pair("masked_whiten")
    values, mask = torch.randn(8, 24), verl_rows.mask()
    values[~mask] = 1e6
    assert_as_theirs(ours, theirs, values, mask, leaves=())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("shape", [(7,), (3, 5)])
def test_fused_linear_for_ppo(dtype, temperature, shape):
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    ours, theirs = pair("FusedLinearForPPO.forward")
    hidden, weight, ids = torch.randn(*shape, 16), torch.randn(37, 16) / 4, torch.randint(37, shape)
    module = FusedLinearForPPO(chunk_size=4)

    def call(function):
        def results(hidden, weight):
            logprobs, entropy = function(module, hidden, weight, ids, temperature)
            assert logprobs.dtype == torch.promote_types(torch.float32, hidden.dtype) or function is theirs
            return logprobs.float(), entropy

        return results

    # Theirs asks for float32 and gives float32 throughout: of float64 too.
    if dtype == torch.float64:
        hidden, weight = hidden.double(), weight.double()
        for got, want in zip(call(ours)(hidden, weight), call(theirs)(hidden, weight), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        return
    assert_as_theirs(call(ours), call(theirs), hidden.to(dtype), weight.to(dtype), leaves=(0, 1), slack=16)


def by_hand(hidden, weight, labels, temperature):
    logits = hidden.reshape(-1, hidden.shape[-1]) @ weight.T / temperature
    logprobs = logits.log_softmax(-1)
    return logprobs.gather(-1, labels.reshape(-1, 1)).squeeze(-1), -(logprobs.exp() * logprobs).sum(-1)


@pytest.mark.parametrize("reduction", ["none", "sum", "Mean"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("shape", [(7,), (3, 5)])
def test_linear_cross_entropy(reduction, temperature, shape):
    """verl's runs on GPUs alone: beside the formula."""
    ours, theirs = pair("linear_cross_entropy")
    hidden, weight, labels = torch.randn(*shape, 16), torch.randn(37, 16), torch.randint(37, shape)

    def call(hidden, weight):
        logprobs, entropy = by_hand(hidden, weight, labels, temperature)
        return (logprobs if reduction == "none" else getattr(logprobs, reduction.lower())()), entropy

    assert_as_theirs(lambda *i: ours(*i, labels, temperature, reduction), call, hidden, weight, leaves=(0, 1), slack=16)
    for function in (ours, theirs):
        with pytest.raises(AssertionError):
            function(hidden, weight, labels, 1, "none")
        with pytest.raises(AssertionError):
            function(hidden, weight, labels, 1.0, None)
    with pytest.raises(ValueError, match="reduction"):
        ours(hidden, weight, labels, 1.0, "max")


def test_linear_cross_entropy_over_a_group(tmp_path):
    """The vocabulary in two shares: the gradients of hidden add up, as those of verl's shares do."""
    hidden, weight, labels = torch.randn(7, 16), torch.randn(38, 16), torch.randint(38, (7,))
    torch.save((hidden, weight, labels), tmp_path / "inputs.pt")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", WORKER, tmp_path]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    hidden.requires_grad_(), weight.requires_grad_()
    logprobs, entropy = by_hand(hidden, weight, labels, 0.8)
    (logprobs.sum() + 0.5 * entropy.sum()).backward()
    close = dict(rtol=1e-5, atol=1e-5)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for rank, (got_logprobs, got_entropy, _, gradient) in enumerate(found):
        torch.testing.assert_close(got_logprobs, logprobs.detach(), **close)
        torch.testing.assert_close(got_entropy, entropy.detach(), **close)
        torch.testing.assert_close(gradient, weight.grad.chunk(2)[rank], **close)
    torch.testing.assert_close(found[0][2] + found[1][2], hidden.grad, **close)


@pytest.mark.parametrize("name", verl_rows.rows())
def test_signatures(name):
    row = verl_rows.rows()[name]
    parameters = inspect.signature(row.ours).parameters.values()
    signature = str(inspect.Signature([p.replace(annotation=inspect.Parameter.empty) for p in parameters]))
    assert signature == row.signature.replace("(ctx, ", "(")
