"""benchmarks/drop_in.py: what it times is compared first, and what is wrong is said."""

import pytest
import torch

import drop_in


@pytest.fixture(autouse=True)
def small(monkeypatch):
    cases = (
        drop_in.Case("verl", "compute_gae_advantage_return", "[2, 8]", lambda: drop_in.verl_gae(2, 8)),
        drop_in.Case("verl", "compute_grpo_outcome_advantage", "[16, 8]", lambda: drop_in.verl_grpo(16, 8)),
        drop_in.Case("verl", "logprobs_from_logits", "[4, 50]", lambda: drop_in.verl_logprobs(4, 50, torch.bfloat16)),
        drop_in.Case("openrlhf", "PolicyLoss", "[4, 8]", lambda: drop_in.openrlhf_policy_loss(4, 8)),
    )
    assert {(case.project, case.name) for case in cases} == {(case.project, case.name) for case in drop_in.CASES}
    monkeypatch.setattr(drop_in, "CASES", cases)


@pytest.mark.parametrize(("project", "lines"), [("verl", 3), ("openrlhf", 1)])
def test_a_line_for_each_function(project, lines, capsys):
    assert drop_in.main(["--only", project, "--rounds", "1"]) == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith(f"| {project}")]
    assert len(printed) == lines
    for line in printed:
        assert line.count("|") == 7
        assert float(line.split("|")[4].strip().removesuffix("x")) > 0


def test_a_result_that_differs_is_not_timed(monkeypatch):
    from rlkernels.integrations import openrlhf

    build = drop_in.openrlhf_policy_loss

    def wrong():
        call = build(4, 8)
        return lambda: tuple(t * (1.001 if openrlhf.PATCH._found else 1.0) for t in call())

    monkeypatch.setattr(drop_in, "CASES", (drop_in.Case("openrlhf", "PolicyLoss", "[4, 8]", wrong),))
    with pytest.raises(
        SystemExit, match=r"error: openrlhf PolicyLoss: patched, a result differs by 0\.001 of its norm"
    ):
        drop_in.main(["--only", "openrlhf", "--rounds", "1"])


@pytest.mark.parametrize("arguments", [["--rounds", "0"], ["--only", "nemo"], ["--steps", "-1"]])
def test_wrong_options_are_refused(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        drop_in.main(arguments)
    assert arguments[0] in capsys.readouterr().err
