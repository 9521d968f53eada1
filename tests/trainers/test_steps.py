"""The steps that benchmarks/steps.py times are the same in both trainers, which it must notice if they are not."""

import contextlib
from dataclasses import replace

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
    steps.check(make_job(method), steps.METHODS[method], side)
    assert patched == {side: side == steps.PATCHED, "TRL": False}


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
    assert warm.keys() == step.keys() == {"seconds", *step_worker.PARTS, "peak", "whole"}
    timed = {part: step[part] > 0 for part in step_worker.PARTS}
    sampled = method != "dpo"
    assert timed == {"generation": sampled, "reward": sampled, "backward": True, "optimizer": True}
    assert sum(step[part] for part in step_worker.PARTS) < step["seconds"]


def test_completions_never_end_early(make_job, run, monkeypatch):
    seen = []
    monkeypatch.setattr(step_worker, "reward", lambda completion_ids, **_: seen.extend(completion_ids) or [0.0] * 8)
    job = replace(make_job("grpo"), sizes=SIZES["grpo"] | {"length": 60})
    run(job, 1)
    run(replace(job, side="TRL"), 1)
    assert [len(ids) for ids in seen] == [60] * 16


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
    lines, met = steps.rows(steps.METHODS["grpo"], {"rlkernels": ours, "TRL": theirs})
    assert met and "| 6.00 | 2.00 | 0.50 | 1.50 | 1.00 | 1.00 | 0.60x | 0.75 met | 50 | 0.50x | 0.6 met |" in lines[0]
    assert "| 10.00 | 4.00 | 1.00 | 1.00 | 3.00 | 1.00 |" in lines[1]
    lines, met = steps.rows(steps.METHODS["grpo"], {"rlkernels": ours | {"peak": 7e7}, "TRL": theirs})
    assert not met and "| 0.70x | 0.6 MISSED |" in lines[0]
    lines, met = steps.rows(steps.METHODS["grpo"], {"rlkernels": ours | {"seconds": 8.0}, "TRL": theirs})
    assert not met and "| 0.80x | 0.75 MISSED |" in lines[0]
    assert len({line.count("|") for line in (*lines, *steps.HEADER.splitlines())}) == 1
