"""`rlkernels bench`: wrong results are not timed, nothing is saved by halves, and a bad value ends in one line."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import bench
import reporting
import suite
from peak_memory import peak_memory
from rlkernels import cli

TINY = """
import os
import signal

import torch

import rlkernels
from suite import Bar, Case, Peer


def inputs():
    logprobs = torch.linspace(-3, 0, 64)
    return logprobs, logprobs.flip(0)


def not_installed():
    raise ModuleNotFoundError("No module named 'elsewhere'", name="elsewhere")


def interrupted():
    os.kill(os.getpid(), signal.SIGINT)


def slightly_wrong(logprobs, ref):
    return logprobs - ref + (logprobs == 0) * 1e-3


def wasteful(logprobs, ref):
    torch.ones(2000, 2000).exp()
    return logprobs - ref


CASES = [
    Case(
        "bars",
        (64,),
        inputs,
        ours=lambda *inputs: rlkernels.kl_penalty(*inputs, estimator="k1"),
        gradient=1,
        peers={"naive": Peer(lambda: torch.sub), "naive wasteful": Peer(lambda: wasteful)},
        bars={"naive": Bar(time=1000, memory=0.001), "floor": Bar(time=1000)},
        floors={"floor": lambda *inputs: lambda: wasteful(*inputs)},
        most_bytes=10**6,
        with_reference=False,
    ),
    Case("bars", (64,), inputs, ours=lambda *inputs: inputs[0] - inputs[1], label="once", once=True),
    Case(
        "tiny",
        (64,),
        inputs,
        ours=lambda *inputs: rlkernels.kl_penalty(*inputs, estimator="k1"),
        peers={
            "subtraction": Peer(lambda: torch.sub),
            "mistaken": Peer(lambda: slightly_wrong),
            "elsewhere": Peer(not_installed),
        },
        moved=768,
        wanted={"subtraction": 1000},
    ),
    Case("other", (64,), inputs, ours=lambda *inputs: inputs[0] - inputs[1]),
    Case("interrupt", (64,), inputs, ours=torch.sub, peers={"Ctrl-C": Peer(interrupted)}),
]


def test_tiny(case, implementation, measure):
    measure(case, implementation)
"""


class Run:
    """Runs the command on the suite above, in a process of its own."""

    def __init__(self, folder: Path, forked: ModuleType) -> None:
        self.folder, self.forked = folder, forked
        (folder / "test_tiny.py").write_text(TINY)
        (folder / "conftest.py").write_text((bench.FOLDER / "conftest.py").read_text())

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess:
        (self.folder / "program.py").write_text(
            "import sys, pathlib; from rlkernels import cli; cli.bench_folder()\n"
            "import bench, reporting, suite; suite.BUDGET, suite.COPIED = 0.001, 2**20\n"
            f"bench.SUITES = [pathlib.Path({str(self.folder / 'test_tiny.py')!r})]\n"
            f"bench.IMAGES = pathlib.Path({str(self.folder)!r})\n"
            "sys.exit(cli.main(sys.argv[1:]))"
        )
        command = [*self.forked.FORKED, str(self.folder / "program.py"), "bench", "--device", "cpu", *arguments]
        # pytest-benchmark times nothing in a worker of pytest-xdist, which it knows by this.
        outer = {"PYTEST_XDIST_WORKER", "PYTEST_ADDOPTS"}  # the options of this run are not those of the benchmarks
        environment = {name: value for name, value in os.environ.items() if name not in outer}
        return subprocess.run(command, cwd=bench.FOLDER.parent, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory, forked):
    return Run(tmp_path_factory.mktemp("tiny"), forked)


@pytest.fixture(scope="module")
def saved(run):
    """A run of the first case, and where it was saved."""
    path = run.folder / "out.json"
    return run("--op", "tiny", "--save", str(path)), path


def test_a_wrong_result_is_told_and_not_timed(saved):
    done, path = saved
    results = {result["implementation"]: result for result in json.loads(path.read_text())["results"]}
    assert "p50" not in results["mistaken"] and "off by 0.001" in results["mistaken"]["wrong"]
    assert "WRONG, not timed: output 0 is off by 0.001" in done.stdout
    assert done.returncode == 1


def test_a_peer_that_is_not_installed_is_told(saved):
    done, _ = saved
    assert "elsewhere is not installed: make test-peers" in done.stdout


def test_what_is_saved(saved):
    _, path = saved
    run = json.loads(path.read_text())
    assert run["device"] == reporting.device_name("cpu")
    assert len(run["commit"].split()[0]) == 40 or run["commit"].startswith("unknown")
    assert run["versions"]["torch"] == torch.__version__
    timed = [result for result in run["results"] if "p50" in result]
    assert [result["implementation"] for result in timed] == ["reference", "cpu", "subtraction"]
    for result in timed:
        assert 0 < result["p20"] <= result["p50"] <= result["p80"]
        assert result["rounds"] >= suite.ROUNDS[0]
        assert result["peak_bytes"] >= 256
        assert result["op"] == "tiny"


def test_the_table_fits_a_terminal_and_says_what_is_missed(saved):
    done, _ = saved
    lines = done.stdout.splitlines()
    assert done.stdout.startswith("CPU: ") and max(map(len, lines)) <= 120
    assert [line for line in lines if line.startswith("  subtraction") and "1,000x MISSED" in line]
    assert [line for line in lines if line.startswith("  cpu") and "the best peer (subtraction)" in line]
    assert "test session starts" not in done.stdout and done.stderr == ""


def test_compare_and_plot(run, saved):
    _, path = saved
    done = run("--op", "tiny", "--compare", str(path), "--plot")
    ratios = [line.split()[-1] for line in done.stdout.splitlines() if line.startswith("  tiny [64] forward")]
    assert len(ratios) == 3 and all(float(ratio) > 0 for ratio in ratios)
    assert (run.folder / "bench_cpu.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def barred(run):
    """What was said of the first case, and the results of both."""
    path = run.folder / "bars.json"
    done = run("--op", "bars", "--save", str(path), "--plot")
    assert done.returncode == 0 and max(map(len, done.stdout.splitlines())) <= 120
    table = next(part for part in done.stdout.split("\n\n") if part.startswith("bars [64] forward"))
    results = reporting.by_case(json.loads(path.read_text())["results"])
    return table.splitlines(), results["bars [64] forward, float32"], results["bars [64] once"]


def test_bars_of_time_and_memory(barred):
    cells = {line[2:24].strip(): line[24:] for line in barred[0] if line.startswith("  ")}
    assert cells["cpu"].endswith("1 met")  # 1 MB
    assert "1000.00 met" in cells["naive"] and "0.00 MISSED" in cells["naive"]
    # The faster of two ways counts; the other's shares are told.
    assert "x" in cells["naive wasteful"] and "1000.00" not in cells["naive wasteful"]
    assert "1000.00 met" in cells["floor"] and "MISSED" not in cells["floor"]


def test_a_floor_is_no_peer(barred):
    results = barred[1]
    assert [result["implementation"] for result in results] == ["cpu", "naive", "naive wasteful", "floor"]
    ours, peers = reporting.ours_and_peers(results, "cpu")
    assert ours is results[0] and peers == results[1:3]
    assert all(result["gradient_bytes"] == (0 if result["floor"] else 256) for result in results)
    assert reporting.net_peak(results[2]) == results[2]["peak_bytes"] - 256 > 31 * 10**6


def test_once(barred):
    for result in barred[2]:
        assert result["rounds"] == 1 and 0 < result["p20"] == result["p50"] == result["p80"]


def test_nothing_in_common_is_told(run, saved):
    _, path = saved
    done = run("--op", "other", "--compare", str(path))
    assert "nothing was measured in both" in done.stdout and done.returncode == 0


def test_an_interrupted_run_leaves_the_older_file(run):
    path = run.folder / "kept.json"
    path.write_text("as it was")
    done = run("--op", "interrupt", "--save", str(path))
    assert done.returncode == 130 and done.stderr == "interrupted: nothing was saved\n"
    assert path.read_text() == "as it was"
    assert not list(run.folder.glob(".kept*"))


def test_a_suite_that_does_not_import_is_told(tmp_path, forked):
    other = Run(tmp_path, forked)
    (tmp_path / "test_tiny.py").write_text("CASES = [no_such_name]\n")
    done = other()
    assert done.returncode == 1 and "NameError: name 'no_such_name' is not defined" in done.stderr


def refusal(capsys, *arguments):
    assert cli.main(["bench", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("rlkernels bench: error: ")
    return captured.err


@pytest.fixture(autouse=True)
def _nothing_runs_in_this_process(monkeypatch):
    monkeypatch.setattr(pytest, "main", None)
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_bad_values(capsys, tmp_path):
    assert "--op gea: want one of call_overhead, " in refusal(capsys, "--op", "gea")
    assert "invalid choice: 'tpu'" in refusal(capsys, "--device", "tpu")
    assert "unrecognized arguments: --frobnicate" in refusal(capsys, "--frobnicate")
    (tmp_path / "file").write_text("")
    assert "cannot write in" in refusal(capsys, "--save", str(tmp_path / "file" / "out.json"))
    assert "No such file" in refusal(capsys, "--compare", str(tmp_path / "none.json"))
    assert "File name too long" in refusal(capsys, "--save", f"{'x' * 300}.json")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(capsys):
    assert "--device cuda: no GPU is available" in refusal(capsys, "--device", "cuda")


@pytest.mark.parametrize(
    "text",
    [
        *("", "{}", "[1]", "null", '{"results": 3}', '{"device": "x", "results": [{}]}', "\xff", "[" * 100_000),
        '{"device": "x", "commit": 3, "date": "d", "versions": {}, "results": []}',
        '{"device": "x", "commit": "c", "date": "d", "versions": [], "results": []}',
        '{"device": "x", "commit": "c", "date": "d", "versions": {}, '
        '"results": [{"case": "c", "implementation": "i", "p50": "fast"}]}',
    ],
)
def test_not_the_file_of_a_run(capsys, tmp_path, text):
    path = tmp_path / "old.json"
    path.write_bytes(text.encode("latin-1"))
    assert "not a file that `rlkernels bench --save` wrote" in refusal(capsys, "--compare", str(path))


def test_a_run_of_another_device(capsys, tmp_path):
    path = tmp_path / "old.json"
    reporting.write(path, dict(device="Z80, 1 thread", commit="c", date="d", versions={}, results=[]))
    assert "measured on Z80, 1 thread; this is " in refusal(capsys, "--device", "cpu", "--compare", str(path))


def test_a_package_without_the_benchmarks(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(cli.rlkernels, "__file__", str(tmp_path / "rlkernels" / "__init__.py"))
    assert "not installed with the package" in refusal(capsys)


def test_a_folder_gets_a_file_named_after_the_device(tmp_path):
    assert bench.place(tmp_path / "results", "cpu") == tmp_path / "results" / reporting.file_name("cpu")
    assert bench.place(tmp_path / "out.json", "cpu") == tmp_path / "out.json"


def test_writing_is_all_or_nothing(tmp_path):
    path = tmp_path / "out.json"
    path.write_text("as it was")
    with pytest.raises(TypeError):
        reporting.write(path, {"results": object()})
    with pytest.raises(OSError):
        reporting.write(tmp_path, {})
    assert path.read_text() == "as it was" and list(tmp_path.iterdir()) == [path]
    assert not list(tmp_path.parent.glob(f".{tmp_path.name}*"))


WANT = torch.linspace(-1, 1, 40, dtype=torch.float64).view(4, 10)
MASK = torch.ones(4, 10, dtype=torch.bool)
MASK[0, 0] = False
UNSCORED = WANT.float().clone()
UNSCORED[0, 0] = float("nan")


def checked(got, want=(WANT,), **options):
    case = suite.Case("op", (4, 10), lambda: (), ours=None, **options)
    suite.check(case, (MASK,), got, want)


def test_rounding_is_no_error():
    checked((WANT.float() * (1 + 1e-6),))
    checked((UNSCORED,), mask=0)


@pytest.mark.parametrize(
    ("got", "message"),
    [
        ((WANT.float() + 1e-5,), "output 0 is off by 1e-05"),
        ((UNSCORED,), "output 0 is off by nan"),
        ((WANT[:2].float(),), "has the shape"),
        ((), "0 outputs, wanted 1"),
    ],
)
def test_a_wrong_result_is_refused(got, message):
    with pytest.raises(suite.WrongResult, match=message):
        checked(got)


def test_a_wrong_gradient_is_refused():
    """By upstream gradients other than 1, which a sign or a transposed gradient would survive."""
    x = torch.linspace(1, 2, 64)
    want = suite.Call(lambda x: x.square(), (x.double(),), gradient=True).run()
    case = suite.Case("op", (64,), lambda: (), ours=None)

    def detached(x):
        return x.detach() * x

    suite.check(case, (x,), suite.Call(lambda x: x * x, (x,), gradient=True).run(), want)
    with pytest.raises(suite.WrongResult, match="output 1"):
        suite.check(case, (x,), suite.Call(detached, (x,), gradient=True).run(), want)


@pytest.mark.parametrize(("seconds", "count"), [(1e-9, 1000), (0.01, 100), (1, 5), (2.9, 5), (3.1, 2)])
def test_rounds(seconds, count):
    assert suite.rounds(seconds) == count


def test_gradients_of_several_inputs():
    x, y = torch.linspace(1, 2, 64), torch.linspace(-1, 1, 64)
    want = suite.Call(torch.mul, (x.double(), y.double()), gradient=2).run()
    assert len(want) == 3
    case = suite.Case("op", (64,), lambda: (), ours=None)

    def of_one_alone(x, y):
        return x * y.detach() + 0 * y

    suite.check(case, (x, y), suite.Call(torch.mul, (x, y), gradient=2).run(), want)
    with pytest.raises(suite.WrongResult, match="output 2"):
        suite.check(case, (x, y), suite.Call(of_one_alone, (x, y), gradient=2).run(), want)


def test_products_of_fewer_digits_are_given_their_rounding():
    off = (WANT.float() * (1 + 1e-2),)
    checked(off, precision=torch.bfloat16)
    with pytest.raises(suite.WrongResult):
        checked(off)


def test_inputs_that_are_not_rows_stay_whole():
    def inputs():
        return torch.randn(6, 3), torch.randn(5, 3)

    options = dict(inputs=inputs, ours=lambda x, weight: x @ weight.T, gradient=1, rows=2, whole=(1,))
    case = suite.Case("op", (6, 3), **options)
    output, gradient = suite.prepared(case, "cpu")[1]
    assert output.shape == (2, 5) and gradient.shape == (2, 3)
    suite.prepare(case, "reference", "cpu")


def test_each_metric_is_compared_by_itself():
    want = torch.tensor([1e-3, 1e5], dtype=torch.float64)
    checked((torch.tensor([1e-3, 1e5]),), (want,))
    with pytest.raises(suite.WrongResult):
        checked((torch.tensor([1.1e-3, 1e5]),), (want,))


def test_overwritten_inputs_are_restored():
    call = suite.Call(lambda x: x.mul_(2), (torch.ones(3),), gradient=False, overwrites=True)
    for _ in range(2):
        call.restore()
        assert torch.equal(call.run()[0], torch.full((3,), 2.0))
    assert torch.equal(call.source, torch.ones(3))


def test_peak_memory_counts_what_is_held_at_a_time():
    x = torch.ones(1000)
    assert peak_memory(lambda: x.exp()) == 4000
    assert peak_memory(lambda: x.exp().exp()) == 8000
    assert peak_memory(lambda: x.exp().sum() + x.exp().sum()) < 8000
