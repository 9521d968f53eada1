"""Two processes under DDP (gloo, on the CPU)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("distributed_worker.py")


ONE_GROUP_EACH = {"per_device_train_batch_size": 4}
HALF_A_GROUP_EACH = {
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "num_iterations": 2,
    "beta": 0.1,
}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[list[dict]]:
    """Of each of the two runs, what its two processes saw."""
    folder = tmp_path_factory.mktemp("distributed")
    runs = json.dumps([ONE_GROUP_EACH, HALF_A_GROUP_EACH])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=localhost:0", str(WORKER), str(folder), runs]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    ranks = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]
    return [list(run) for run in zip(*ranks, strict=True)]


def test_a_process_without_signal(results):
    """Each process holds one group, and one of the two has nothing to run: it must not leave the other waiting."""
    first, second = results[0]
    assert any(first["advantages"]) != any(second["advantages"])
    assert torch.equal(first["weights"], second["weights"])
    assert first["completion_ids"] != second["completion_ids"]
    assert first["table"] == second["table"]
    assert len(first["table"]) == 8
    assert [log["frac_reward_zero_std"] for log in first["logs"]] == [0.5] * 3
    assert all(log["grad_norm"] > 0 for log in first["logs"])
    assert first["eval"]["eval_reward"] == second["eval"]["eval_reward"]


def test_a_group_over_two_processes(results):
    """Advantages are those of the whole group, and old log-probabilities and micro-batches stay in step."""
    first, second = results[1]
    assert torch.equal(first["weights"], second["weights"])
    rewards = torch.tensor([row["rewards/one_group_differs"] for row in first["table"]]).view(-1, 4)
    expected = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(torch.tensor([row["advantage"] for row in first["table"]]).view(-1, 4), expected)
    assert len(first["advantages"]) == len(second["advantages"]) == 2
    assert [row["advantage"] for row in first["table"]] == first["advantages"] + second["advantages"]
