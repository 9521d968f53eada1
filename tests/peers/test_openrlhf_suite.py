"""OpenRLHF's own tests, from its wheel, on our kernels: what passes without them passes with them."""

import importlib.metadata
import json
import os
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import pytest

import openrlhf_modules
from rlkernels.integrations.openrlhf import MAKER

pytest.importorskip("aiohttp", reason="aiohttp is not installed: make test-peers")
VERSION = openrlhf_modules.version_or_skip()
HERE = Path(__file__).parent
SUITES = ("test_loss_aggregation", "test_kl_estimator_gradient", "test_reward_shaping", "test_experience")
ACTOR = ("test_actor_entropy_temperature",)
PASSED = {"0.11.2": 63}
# What these tests call; all of the table is compared with the originals in test_openrlhf_utils and _losses.
REACHED = {
    *("openrlhf.models.utils:compute_approx_kl", "openrlhf.models.utils:compute_reward"),
    *("openrlhf.models.utils:log_probs_from_logits", "openrlhf.models.utils:compute_entropy"),
    *("openrlhf.models.loss:aggregate_loss", "openrlhf.models.loss:PolicyLoss.forward"),
    *(f"{MAKER}.get_advantages_and_returns", f"{MAKER}.get_cumulative_returns"),
}
KERNELS = {
    *("policy_loss_forward", "kl_penalty_forward", "kl_penalty_backward", "shaped_rewards", "masked_mean"),
    *("recurrence", "token_logprobs_forward"),
}


def run(folder: Path, suites: tuple[str, ...], *options: str) -> set[str]:
    """The ids of the tests that passed, all of them."""
    site = Path(importlib.metadata.distribution("openrlhf").locate_file(""))
    stub = folder / "stubs"
    stub.mkdir(exist_ok=True)
    (stub / "deepspeed.py").write_text("")
    report = folder / "report.xml"
    ours = (HERE, HERE.parent, HERE.parents[1] / "benchmarks")
    path = [str(folder) for folder in (stub, site, *ours)] + list(filter(None, [os.environ.get("PYTHONPATH")]))
    options = ("-q", "-p", "no:cacheprovider", f"--junitxml={report}", f"--rootdir={site}", "-c", os.devnull, *options)
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *(str(site / "tests" / f"{suite}.py") for suite in suites)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path), "CALLS": str(folder / "calls.json")},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    cases = xml.etree.ElementTree.parse(report).getroot().iter("testcase")
    return {f"{case.get('classname')}::{case.get('name')}" for case in cases if not list(case)}


def test_the_same_tests_pass_patched(tmp_path):
    theirs = run(tmp_path, (*SUITES, *ACTOR))
    assert len([name for name in theirs if ACTOR[0] not in name]) == PASSED[str(VERSION)]
    assert run(tmp_path, (*SUITES, *ACTOR), "-p", "patched_openrlhf") == theirs
    calls = json.loads((tmp_path / "calls.json").read_text())
    assert {name for name in calls if not name.startswith("rlkernels::")} == REACHED
    assert {name.removeprefix("rlkernels::") for name in calls if name.startswith("rlkernels::")} == KERNELS
