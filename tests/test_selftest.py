"""`rlkernels selftest`: what passes, what it says of a kernel that is wrong, and what it refuses."""

import re

import pytest
import torch

import rlkernels
from rlkernels import _backends, cli, selftest


def test_every_check_passes_on_this_machine(capsys):
    assert cli.main(["selftest", "--device", "cpu"]) == 0
    table, versions, last = capsys.readouterr().out.strip().split("\n\n")
    _, *rows = table.splitlines()
    assert {row.split()[0] for row in rows} == {op for op in _backends.BACKENDS_OF if selftest.serving(op, "cpu")}
    for op in _backends.BACKENDS_OF:
        found = {tuple(row.split()[1:3]) for row in rows if row.split()[0] == op}
        dtypes = ("float32", "bfloat16", "float16")
        assert found == {(backend, dtype) for backend in selftest.serving(op, "cpu") for dtype in dtypes}
    assert re.search(r"^torch +\d", versions, re.MULTILINE) and re.search(r"^CPU +", versions, re.MULTILINE)
    assert last == f"all {len(rows)} checks passed"


def test_cases_cover_every_op_and_layout():
    (sizes,) = selftest.QUICK_SIZES
    layouts = {(case.op, case.layout) for case in selftest.cases(sizes)}
    assert {op for op, _ in layouts} == {op for op, backends in _backends.BACKENDS_OF.items() if backends}
    assert {op for op, layout in layouts if layout == "packed"} >= {"gae", "policy_loss", "linear_policy_loss"}


def broken(op: str, change):
    """The public function, with the low-precision results of the kernels changed."""
    right = getattr(rlkernels, op)

    def wrong(*args, **kwargs):
        result = right(*args, **kwargs)
        by_kernel = _backends._forced not in (None, "reference") and result.dtype != torch.float64
        return change(result) if by_kernel else result

    return wrong


@pytest.fixture
def few(monkeypatch):
    """Checks of two ops alone, which is enough of what follows."""
    if _backends.status("cpu", "cpu"):
        pytest.skip("the C++ extension is not built")
    names = ("kl_penalty", "masked_mean")
    monkeypatch.setattr(_backends, "BACKENDS_OF", dict.fromkeys(names, ("cpu",)))
    cases = selftest.cases
    monkeypatch.setattr(selftest, "cases", lambda *drawn: (case for case in cases(*drawn) if case.op in names))


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        return 1.02 * grad


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda value: value * 1.001, "output 0: maximum error"),
        (_WrongGradient.apply, "gradient of logprobs: maximum error"),
        (lambda value: value * float("nan"), "not finite where they should be"),
        (lambda value: value.double(), "dtype torch.float64, wanted torch.float32"),
        (lambda value: value.no_such_attribute, "AttributeError"),
    ],
    ids=["value", "gradient", "NaN", "dtype", "raises"],
)
def test_a_broken_kernel_is_named(capsys, monkeypatch, few, change, said):
    monkeypatch.setattr(rlkernels, "kl_penalty", broken("kl_penalty", change))
    assert cli.main(["selftest", "--device", "cpu", "--quick"]) == 1
    out = capsys.readouterr().out
    failed = [line for line in out.splitlines() if "FAILED" in line]
    assert [line.split()[:2] for line in failed] == 3 * [["kl_penalty", "cpu"]]
    assert all(said in line for line in failed)
    assert out.endswith("\n3 of 6 checks failed\n")


def test_what_is_not_checked_is_told(capsys, few):
    assert cli.main(["selftest", "--device", "cpu", "--quick"]) == 0
    assert "not checked on cpu: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "cuda"], "--device cuda: PyTorch finds no GPU on this machine"),
        (["--device", "tpu"], "--device must be cuda or cpu; got 'tpu'"),
        (["--absent"], "unrecognized arguments: --absent"),
    ],
)
def test_refuses(capsys, monkeypatch, arguments, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["selftest", *arguments]) == 2
    done = capsys.readouterr()
    assert done.err == f"rlkernels selftest: error: {said}\n"
    assert done.out == ""
