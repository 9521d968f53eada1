"""Runs that are killed at any moment, while they save too, and go on: see `survival_worker.py`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("survival_worker.py")


@pytest.mark.parametrize("method", ["SFT", "Reward", "DPO", "PPO", "GRPO"])
def test_killed_at_20_moments_is_uninterrupted(method, tmp_path):
    """Losses, rewards, sampled tokens, random states, logs, completions and weights, bit for bit."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join([str(WORKER.parent), *sys.path]),
    }
    command = [sys.executable, str(WORKER), method, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
