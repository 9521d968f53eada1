"""The command line as a whole, and `rlkernels info`; what trains is in test_cli_train.py."""

import os
import re
import subprocess
import sys

import pytest
import torch

import rlkernels
from rlkernels import _backends, cli


def shell(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "rlkernels", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_bad_value_in_a_shell():
    done = shell("sft", "--model", "any", "--dataset", "absent.csv")
    assert done.returncode == 2
    assert done.stderr == "rlkernels sft: error: --dataset absent.csv: no such file\n"
    assert done.stdout == ""


def test_no_library_is_loaded_before_a_command_needs_it():
    code = (
        "import sys; from rlkernels import cli; codes = [cli.main(['absent']), cli.main(['info', '--absent'])]; "
        "print(codes, {'transformers', 'trl', 'datasets', 'peft'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[2, 2] set()\n"


MISSING = """
import os, sys
from importlib.machinery import PathFinder
from rlkernels import cli

class WithoutIt(PathFinder):
    @staticmethod
    def find_spec(name, *args):
        return None if name == missing else PathFinder.find_spec(name, *args)

sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutIt
for missing in sys.argv[1:]:
    if not os.fork():
        try:
            from rlkernels.trainers import GRPOTrainer
        except ImportError as error:
            print(error, flush=True)
        os._exit(cli.main(["grpo"]) if missing == "accelerate" else 0)
    code = os.waitstatus_to_exitcode(os.wait()[1])
    print(code, flush=True)
"""


def test_what_the_trainers_need_is_told():
    """The first that they import is left out for the command line, too."""
    names = ["transformers", "datasets", "accelerate"]
    done = subprocess.run([sys.executable, "-c", MISSING, *names], capture_output=True, text=True)
    told = [f"{name} is not installed; pip install rlkernels[trainers]" for name in names]
    assert done.stdout.splitlines() == [part for line, code in zip(told, "002", strict=True) for part in (line, code)]
    assert done.stderr == f"rlkernels grpo: error: {told[-1]}\n"


@pytest.mark.parametrize("arguments", [[], ["absent"], ["info", "--absent"], ["--absent", "info"]])
def test_bad_command(capsys, arguments):
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("rlkernels") and error.count("\n") == 1


def test_version(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"rlkernels {rlkernels.__version__}\n"


def rows_of_info(text: str) -> dict[str, list[str]]:
    return {line.split()[0]: line.split(maxsplit=2)[1:] for line in text.splitlines() if line}


def test_info(capsys):
    assert cli.main(["info"]) == 0
    rows = rows_of_info(capsys.readouterr().out)
    # Only the one that torch gives itself names the build, such as +cu130, in every wheel.
    (version,) = rows["torch"]
    assert version.partition("+")[0] == torch.__version__.partition("+")[0]
    for op, backends in _backends.BACKENDS_OF.items():
        assert rows[op][0] == _backends.select(torch.empty(0), op)
        if not torch.cuda.is_available():
            assert ("cuda: no NVIDIA GPU is available" in rows[op][1]) == ("cuda" in backends)


def test_columns_of_info_are_aligned(capsys):
    cli.main(["info"])
    versions, table, *_ = capsys.readouterr().out.split("\n\n")
    assert {re.match(r"\S+ +", line).end() for line in versions.splitlines()} == {len("rlkernels     ")}
    header, *rows = table.splitlines()
    columns = [re.search(name, header).start() for name in ("serves", "why")]
    assert len(rows) == len(_backends.BACKENDS_OF)
    for row in rows:
        assert [match.end() for match in re.finditer(r"  +", row)] == columns


def test_info_names_what_serves_each_op_on_a_gpu(monkeypatch):
    """Where an op has no CUDA kernels, Triton, and nothing faster is missing."""
    for name, devices in (("cuda", ("meta",)), ("triton", ("meta",)), ("cpu", ())):
        monkeypatch.setitem(_backends._devices, name, devices)
    serving = cli.serving_backends("meta")
    assert (serving["policy_loss"], serving["masked_whiten"]) == ("cuda", "triton")
    assert cli.faster_backends("masked_whiten", "triton", "meta") == {}


def test_info_says_why_the_faster_backend_does_not_serve(capsys, monkeypatch):
    monkeypatch.setitem(_backends._devices, "cpu", ())
    monkeypatch.setitem(_backends._reasons, "cpu", "the C++ extension is not built")
    cli.main(["info"])
    backend, reasons = rows_of_info(capsys.readouterr().out)["token_logprobs"]
    assert backend == _backends.select(torch.empty(0), "token_logprobs") != "cpu"
    assert "cpu: the C++ extension is not built" in reasons


def test_info_under_a_forced_backend(capsys):
    with rlkernels.use_backend("reference"):
        cli.main(["info"])
    backend, reasons = rows_of_info(capsys.readouterr().out)["policy_loss"]
    assert backend == "reference"
    if _backends.status("cpu", "cpu") is None:
        assert "cpu: another was asked for" in reasons
