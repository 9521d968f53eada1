"""Runs that are killed at any moment, while they save too, and go on: see `survival_worker.py`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cases import thorough

WORKER = Path(__file__).with_name("survival_worker.py")
METHODS = ["SFT", "Reward", "DPO", "PPO", "GRPO"]


@pytest.mark.parametrize(("method", "moments"), [("SFT", 3), ("PPO", 3), *(thorough(each, 20) for each in METHODS)])
def test_killed_at_some_moments_is_uninterrupted(method, moments, tmp_path, forked):
    """Losses, rewards, sampled tokens, random states, logs, completions and weights, bit for bit."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(WORKER.parent), *sys.path])}
    command = [*forked.FORKED, str(WORKER), method, str(tmp_path), str(moments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
