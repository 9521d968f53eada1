"""benchmarks/steps.py: both sides take the same steps, and it notices where they do not."""

import contextlib
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl")
import step_worker
import steps
from cases import thorough

SIZES = {
    "grpo": {"completions": 8, "group": 4, "prompt": 4, "length": 3},
    "dpo": {"pairs": [(4, 5, 3), (2, 3, 7)]},
    "ppo": {"completions": 2, "prompt": 4, "length": 3},
}


@pytest.fixture
def make_job(make_model, tokenizer, tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return lambda method: step_worker.Job(method, "rlkernels", str(tmp_path / "model"), SIZES[method])


@pytest.fixture
def run(tokenizer):
    def run(job, count):
        answers, left = [], iter(range(count))
        step_worker.run(job, tokenizer, lambda: next(left, None) is not None, answers.append)
        return answers

    return run


@pytest.mark.parametrize(
    ("method", "side"),
    [
        ("grpo", steps.PATCHED),
        ("dpo", "rlkernels"),
        ("grpo-given", "rlkernels"),
        thorough("grpo", "rlkernels"),
        thorough("dpo", steps.PATCHED),
    ],
)
def test_both_compute_the_same(method, side, make_job, run, monkeypatch):
    from trl.kernels import ChunkedLogProbFunction

    from rlkernels.integrations.trl import chunked_logprobs, unpatch

    patched = {}

    def loss_and_gradient(job, _):
        try:
            run(replace(job, gradient=f"{job.model}/gradient"), 1)
            patched[job.side] = ChunkedLogProbFunction.apply is chunked_logprobs
        finally:
            unpatch()  # which a process of its own, as the benchmark has, need not do
        return torch.load(f"{job.model}/gradient")

    monkeypatch.setattr(steps, "loss_and_gradient", loss_and_gradient)
    compared = steps.METHODS[method]
    steps.check(make_job(compared.trainer), compared, side)
    assert patched == {side: side == steps.PATCHED, compared.other: False}


# The newest TRL has no PPO trainer.
@pytest.mark.parametrize(
    ("method", "side"),
    [
        ("grpo", "rlkernels"),
        ("dpo", "TRL"),
        ("ppo", "rlkernels"),
        thorough("grpo", "TRL"),
        thorough("dpo", "rlkernels"),
    ],
)
def test_parts_of_a_step(method, side, make_job, run):
    warm, step = run(replace(make_job(method), side=side), 2)
    parts = {"backward", "optimizer"}
    parts |= {"generation", "reward"} if method != "dpo" else set()
    parts |= {"reference"} if side == "rlkernels" and method != "grpo" else set()
    parts |= {"scoring"} if method == "ppo" else set()
    assert parts <= set(step_worker.PARTS)
    assert warm.keys() == step.keys() == {"seconds", *parts, "peak", "whole"}
    # One pass of PPO's scores completions and serves the loss, where one update learns from them.
    assert all(step[part] > 0 for part in parts - {"scoring"})
    assert sum(step[part] for part in parts) < step["seconds"]


def test_completions_never_end_early(make_job, run, monkeypatch):
    seen = []
    monkeypatch.setattr(step_worker, "reward", lambda completion_ids, **_: seen.extend(completion_ids) or [0.0] * 8)
    job = replace(make_job("grpo"), sizes=SIZES["grpo"] | {"length": 60})
    run(job, 1)
    run(replace(job, side="TRL"), 1)
    assert [len(ids) for ids in seen] == [60] * 16


@pytest.mark.parametrize(("side", "share"), [("rlkernels", "auto"), (steps.UNSHARED, "false")])
def test_a_step_without_sampling(side, share, make_job, run, monkeypatch):
    from rlkernels.trainers import GRPOTrainer

    seen, shares = [], []
    micro_batches = GRPOTrainer.micro_batches
    monkeypatch.setattr(step_worker, "reward", lambda completion_ids, **_: seen.append(completion_ids) or [0.0] * 8)
    monkeypatch.setattr(
        GRPOTrainer,
        "micro_batches",
        lambda trainer, rows: shares.append(trainer.args.share_prefixes) or micro_batches(trainer, rows),
    )
    run(replace(make_job("grpo"), side=side, given=True), 2)
    assert shares == [share] * 2
    assert seen[0] == seen[1] and [len(ids) for ids in seen[0]] == [3] * 8


def test_passes_alone(make_job, run):
    job = replace(make_job("grpo"), method="passes", given=True, bf16=False)
    warm, step = run(job, 2)
    assert warm.keys() == step.keys() == {"rlkernels", steps.UNSHARED}
    assert all(each["seconds"] > 0 for each in step.values())
    # Two prompts of 4 tokens, the last of each in the branches, which have 3 completed tokens.
    assert {side: each["tokens"] for side, each in step.items()} == {
        "rlkernels": 2 * 3 + 8 * (1 + 3),
        steps.UNSHARED: 8 * (4 + 3),
    }


def test_medians_of_passes(make_job, monkeypatch):
    taken = iter([9.0, 1.0, 3.0, 2.0])

    @contextlib.contextmanager
    def both(job, method):
        assert (job.method, job.given) == ("passes", True)
        yield lambda: {"rlkernels": {"seconds": next(taken), "tokens": 5}, steps.UNSHARED: {"seconds": 4, "tokens": 9}}

    monkeypatch.setattr(steps, "started", both)
    (method, *_) = steps.PASSES
    measured = steps.measure_passes(method.job("model", False, "eager"), method, 3)
    assert measured == {"rlkernels": {"seconds": 2, "tokens": 5}, steps.UNSHARED: {"seconds": 4, "tokens": 9}}
    line, met = steps.row_of_passes(method, measured)
    assert not met and line.endswith("| 2.00 | 4.00 | 0.50x | 0.48 MISSED | 5 | 9 |")
    measured["rlkernels"]["seconds"] = 1.9
    line, met = steps.row_of_passes(method, measured)
    assert met and "| 0.47x | 0.48 met |" in line
    assert len({row.count("|") for row in (line, *steps.HEADER_OF_PASSES.splitlines())}) == 1


def test_both_sides_take_their_steps(make_job, monkeypatch):
    job = make_job("grpo")
    started = []

    @contextlib.contextmanager
    def side(job, method):
        started.append(job.side)
        numbers = iter(range(10))
        yield lambda: {"seconds": float(next(numbers)), "peak": 1, "whole": 2}

    monkeypatch.setattr(steps, "started", side)
    measured = steps.measure(job, steps.METHODS["grpo"], 3)
    assert started == ["rlkernels", "TRL"]
    assert measured == {name: {"seconds": 2.0, "peak": 1, "whole": 2} for name in started}


@pytest.mark.thorough
def test_a_side_in_a_process_of_its_own(make_job):
    job, method = make_job("grpo"), steps.METHODS["grpo"]
    with steps.started(job, method) as side:
        assert side()["seconds"] > 0 and side()["seconds"] > 0
    assert side.process.returncode == 0


def test_a_side_that_fails(make_job, tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "WORKER", tmp_path / "worker.py")
    steps.WORKER.write_text("import sys; sys.stdin.readline(); raise OSError('no such model')")
    for fail in (steps.loss_and_gradient, lambda job, method: steps.measure(job, method, 1)):
        with pytest.raises(SystemExit, match="error: grpo of rlkernels ended: OSError: no such model"):
            fail(make_job("grpo"), steps.METHODS["grpo"])


def test_a_difference_is_told():
    exact = {"rlkernels": (1.0, torch.ones(4)), "TRL": (1.0, torch.ones(4))}
    rounded = {"rlkernels": (1.0, torch.full((4,), 1.02)), "TRL": (1.0, torch.full((4,), 1.01))}
    assert steps.disagreement(exact, rounded | {"rlkernels": rounded["TRL"]}) is None
    assert "not in bfloat16" in steps.disagreement(exact, exact | {"TRL": rounded["TRL"]})
    assert "in bfloat16 ours is 0.02 of" in steps.disagreement(exact, rounded)
    assert "losses are 1.01 and 1" in steps.disagreement(exact | {"rlkernels": (1.01, torch.ones(4))}, exact)
    off = exact | {"rlkernels": (1.0, torch.tensor([1.0, 1.0, 1.0, 0.9]))}
    assert "gradients differ by 0.05" in steps.disagreement(off, exact)
    unknown = exact | {"rlkernels": (float("nan"), torch.ones(4))}
    assert "losses are nan" in steps.disagreement(unknown, exact)


def test_the_table_says_what_is_missed():
    theirs = {"seconds": 10.0, "generation": 4.0, "reward": 1.0, "backward": 3.0, "optimizer": 1.0, "peak": 1e8}
    theirs["whole"] = 1e9
    ours = theirs | {"seconds": 6.0, "generation": 2.0, "reward": 0.5, "backward": 1.0, "peak": 5e7}
    ours |= {"reference": 0.2, "scoring": 0.3}
    method = replace(steps.METHODS["ppo"], time=0.6, memory=0.5, trl=None)

    def rows(ours, method=method, bf16=True):
        return steps.rows(method, {"rlkernels": ours, method.other: theirs}, bf16)

    lines, met = rows(ours)
    parts = "| 6.00 | 2.00 | 0.50 | 0.20 | 0.30 | 1.00 | 1.00 | 1.00 |"
    assert met and f"{parts} 0.60x | 0.6 met | 50 | 0.50x | 0.5 met |" in lines[0]
    assert "| 10.00 | 4.00 | 1.00 |  |  | 1.00 | 3.00 | 1.00 |  |  | 100 |  |  | 1,000 |" in lines[1]
    assert len({line.count("|") for line in (*lines, *steps.HEADER.splitlines())}) == 1
    lines, met = rows(ours | {"peak": 7e7})
    assert not met and "| 0.70x | 0.5 MISSED |" in lines[0]
    lines, met = rows(ours | {"seconds": 8.0})
    assert not met and "| 0.80x | 0.6 MISSED |" in lines[0]
    # Bars that depend on the precision, and none on memory.
    lines, met = rows(ours, replace(method, time=0.5, float32_time=0.7), bf16=False)
    assert met and "| 0.60x | 0.7 met |" in lines[0]
    lines, met = rows(ours, replace(method, time=0.5, float32_time=0.7))
    assert not met and "| 0.60x | 0.5 MISSED |" in lines[0]
    lines, met = rows(ours, replace(method, memory=None, other=steps.UNSHARED))
    assert met and "| 50 | 0.50x |  |" in lines[0] and steps.UNSHARED in lines[1]


@pytest.mark.parametrize(
    ("only", "arguments", "capabilities", "bf16", "bars"),
    [
        ("grpo", [], {"avx512_bf16": True}, True, ["0.33"]),
        ("grpo", ["--float32"], {"avx512_bf16": True}, False, ["0.6"]),
        ("grpo", [], {"avx2": True}, False, ["0.6"]),
        ("prefixes", [], {"avx512_bf16": True}, False, ["0.48", "0.4", "0.3"]),
    ],
)
def test_the_command(only, arguments, capabilities, bf16, bars, monkeypatch, capsys):
    measured, checked = {"seconds": 1.0, "backward": 0.5, "peak": 1e6, "whole": 2e6, "tokens": 4}, []
    monkeypatch.setitem(sys.modules, "smollm2", SimpleNamespace(model_folder=lambda: "model"))
    monkeypatch.setattr(steps, "check", lambda job, method: checked.append(job.bf16))
    for name in ("measure", "measure_passes"):
        monkeypatch.setattr(steps, name, lambda job, method, rounds: {"rlkernels": measured, method.other: measured})
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert steps.main(["--only", only, *arguments]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" MISSED")[0].split()[-1] for line in lines if " MISSED" in line] == bars
    assert checked == [bf16] * len(bars)
