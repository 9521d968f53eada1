"""verl's own tests, as its wheel has them, on verl as it is and on ours: the same of them must pass."""

import importlib.metadata
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
PASSING = {"0.9.1": 145}
# Rows of the table that no test of verl's comes to.
UNREACHED = {
    "verl.trainer.ppo.core_algos:compute_gdpo_outcome_advantage",
    "verl.trainer.ppo.core_algos:compute_gpg_outcome_advantage",
    "verl.trainer.ppo.core_algos:compute_policy_loss_cispo",
    "verl.trainer.ppo.core_algos:compute_policy_loss_dppo_kl",
    "verl.trainer.ppo.core_algos:compute_policy_loss_dppo_tv",
    "verl.trainer.ppo.core_algos:compute_policy_loss_geo_mean",
    "verl.trainer.ppo.core_algos:compute_policy_loss_gpg",
    "verl.trainer.ppo.core_algos:compute_policy_loss_gspo",
    "verl.trainer.ppo.core_algos:compute_policy_loss_reinforce",
    "verl.trainer.ppo.core_algos:compute_policy_loss_sapo",
    "verl.trainer.ppo.core_algos:compute_reinforce_plus_plus_baseline_outcome_advantage",
    "verl.trainer.ppo.core_algos:compute_remax_outcome_advantage",
    "verl.utils.experimental.torch_functional:FusedLinearForPPO.forward",
    "verl.utils.kernel.linear_cross_entropy:linear_cross_entropy",
    "verl.utils.torch_functional:entropy_from_logits",
    "verl.utils.torch_functional:entropy_from_logits_with_chunking",
    "verl.utils.torch_functional:logprobs_from_logits",
    # The estimators that whiten are ours, and call ours by themselves.
    "verl.utils.torch_functional:masked_whiten",
}
KERNELS = {
    "rlkernels::group_advantages",
    "rlkernels::kl_penalty_backward",
    "rlkernels::kl_penalty_forward",
    "rlkernels::masked_mean",
    "rlkernels::policy_loss_forward",
    "rlkernels::recurrence",
    "rlkernels::value_loss_forward",
}


def run(folder, *options, **environment):
    """Runs verl's tests in a process of their own; every test's outcome by its name."""
    where = Path(str(importlib.metadata.distribution("verl").locate_file("tests/trainer/ppo")))
    paths = [str(TESTS.parent), str(TESTS), str(TESTS / "peers"), os.environ.get("PYTHONPATH", "")]
    report = folder / "report.xml"
    command = [
        *(sys.executable, "-m", "pytest", "-q", *options, str(where)),
        f"--ignore={where / 'test_spec_decode_metrics_on_cpu.py'}",
        *("-c", os.devnull, f"--rootdir={where.parents[2]}", "--import-mode=importlib", "-p", "no:cacheprovider"),
        f"--junitxml={report}",
    ]
    environment = os.environ | dict(PYTHONPATH=os.pathsep.join(paths), OMP_NUM_THREADS="1") | environment
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert report.exists(), done.stdout + done.stderr
    cases = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = case.get("classname"), case.get("name")
        assert name not in cases
        cases[name] = "passed"
        for outcome in case:
            if outcome.tag in ("failure", "error", "skipped"):
                cases[name] = f"{outcome.tag}: {outcome.get('message')}"
    return cases


def test_verls_own_tests_pass_on_ours(tmp_path):
    try:
        version = importlib.metadata.version("verl")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("verl is not installed: make test-peers")
    from rlkernels.integrations.verl import PATCH

    for name in ("theirs", "ours"):
        (tmp_path / name).mkdir()
    theirs = run(tmp_path / "theirs")
    counts = tmp_path / "calls.json"
    ours = run(tmp_path / "ours", "-p", "patched", PATCHED="verl", CALLS=str(counts))
    assert ours == theirs
    assert len(ours) == PASSING[version]
    assert set(ours.values()) == {"passed"}

    calls = json.loads(counts.read_text())
    assert {row.target for row in PATCH.rows} - calls.keys() == UNREACHED
    assert {name for name in calls if name.startswith("rlkernels::")} == KERNELS
