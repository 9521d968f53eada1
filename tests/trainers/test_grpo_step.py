"""The step that benchmarks/grpo_step.py times is the same in both trainers, which it must notice if it is not."""

import pytest
import torch

pytest.importorskip("trl")
import grpo_step


@pytest.fixture
def both(make_model, tokenizer, tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    batch = grpo_step.Batch(38, completions=8, prompt=4, length=3)
    setting = grpo_step.Setting(str(tmp_path / "model"), tokenizer, "eager", checkpointing=False)
    return setting, str(tmp_path / "out"), batch


def test_both_compute_the_same_and_are_measured(both):
    setting, folder, batch = both
    grpo_step.check(setting, folder, batch)
    measured = grpo_step.measure(setting.steps(folder, batch, bf16=True), rounds=1)
    assert all(seconds > 0 and peak > 0 for seconds, peak in measured.values())


def test_a_difference_is_told():
    exact = {"rlkernels": (1.0, torch.ones(4)), "TRL": (1.0, torch.ones(4))}
    rounded = {"rlkernels": (1.0, torch.full((4,), 1.02)), "TRL": (1.0, torch.full((4,), 1.01))}
    assert grpo_step.disagreement(exact, rounded | {"rlkernels": rounded["TRL"]}) is None
    assert "not in bfloat16" in grpo_step.disagreement(exact, exact | {"TRL": rounded["TRL"]})
    assert "in bfloat16 ours is 0.02 of" in grpo_step.disagreement(exact, rounded)
    assert "losses are 1.01 and 1" in grpo_step.disagreement(exact | {"rlkernels": (1.01, torch.ones(4))}, exact)
    off = exact | {"rlkernels": (1.0, torch.tensor([1.0, 1.0, 1.0, 0.9]))}
    assert "gradients differ by 0.05" in grpo_step.disagreement(off, exact)
    unknown = exact | {"rlkernels": (float("nan"), torch.ones(4))}
    assert "losses are nan" in grpo_step.disagreement(unknown, exact)


def test_the_table_says_what_is_missed():
    text, met = grpo_step.table({"here": {"rlkernels": (0.7, 50), "TRL": (1.0, 100)}})
    assert met and "| 0.70x | 0.75 met |" in text and "| 0.50x | 0.6 met |" in text
    text, met = grpo_step.table({"here": {"rlkernels": (0.7, 61), "TRL": (1.0, 100)}})
    assert not met and "0.6 MISSED" in text
