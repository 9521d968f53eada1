"""Two processes, under DDP and under FSDP2 (gloo, on the CPU), give what one gives."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

WORKER = Path(__file__).with_name("processes_worker.py")
sys.path.insert(0, str(WORKER.parent))
from processes_worker import CASES, OF_DDP, run  # noqa: E402

RUNS = [("ddp", case) for case in OF_DDP] + [("fsdp2", case) for case in CASES]
RESUMED = [("fsdp2", case) for case, (_, options) in CASES.items() if "save_steps" in options]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def results(folder) -> list[dict]:
    """What each of two processes saw."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=localhost:0", str(WORKER), str(folder)]
    path = os.pathsep.join([str(WORKER.parent), *sys.path])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def alone(folder):
    found = {}

    def of(case):
        if case not in found:
            found[case] = run(f"{folder}/one/{case}", case)
        return found[case]

    return of


def assert_same(found, wanted):
    """Weights, and every metric of every log, to 1e-4."""
    torch.testing.assert_close(found["weights"], wanted["weights"], rtol=0, atol=1e-4)
    assert len(found["logs"]) == len(wanted["logs"]) >= 5
    for log, other in zip(found["logs"], wanted["logs"], strict=True):
        assert log == pytest.approx(other, rel=1e-4, abs=1e-4, nan_ok=True)


@pytest.mark.parametrize("kind, case", RUNS)
def test_two_processes_are_as_one(results, alone, kind, case):
    for rank in range(2):
        found = results[rank][kind, case]
        assert_same(found, alone(case))
        # Or else it would be DDP: on a CPU Accelerate shards nothing, and does not say so.
        assert [step["sharded"] for step in found["steps"]] == [kind == "fsdp2"] * 5
        assert max(step["micro_batches"] for step in found["steps"]) > 1


@pytest.mark.parametrize("case", OF_DDP)
def test_gradients_are_added_up_once_a_step(results, case):
    for rank in range(2):
        assert [step["reductions"] for step in results[rank]["ddp", case]["steps"]] == [1] * 5


@pytest.mark.parametrize("case", ["sft", "dpo", "grpo", "grpo, groups on both", "ppo"])
def test_the_head_is_gathered_once_a_step(results, case):
    """And once more for each evaluation, whose log is between the steps'."""
    (_, options), evaluations = CASES[case], [0] * 5
    if "eval_steps" in options:
        evaluations = [0, 0, 1, 0, 1]  # a step is over before it is evaluated
    for rank in range(2):
        gathers = [step["gathers"] for step in results[rank]["fsdp2", case]["steps"]]
        assert gathers == [1 + evaluation for evaluation in evaluations]


@pytest.mark.parametrize("kind, case", RESUMED)
def test_a_sharded_run_goes_on_from_its_checkpoint(results, kind, case):
    """Bit for bit."""
    for rank in range(2):
        whole = results[rank][kind, case]
        assert torch.equal(whole["resumed"]["weights"], whole["weights"])
        assert whole["resumed"]["logs"] == whole["logs"]
        assert len(whole["resumed"]["steps"]) == 3


def test_a_sharded_model_is_saved_whole(results, folder):
    """As any other, in each checkpoint."""
    weights = {case: results[0]["fsdp2", case]["weights"] for case in ("sft", "ppo, sampled")}
    model = AutoModelForCausalLM.from_pretrained(folder / "fsdp2" / "sft" / "checkpoint-4")
    saved = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    assert saved.shape == weights["sft"].shape and (saved - weights["sft"]).abs().max() < 1e-2
    assert (folder / "fsdp2" / "ppo, sampled" / "checkpoint-4" / "value" / "model.safetensors").is_file()


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_both_stop_where_one_meets_a_loss_that_is_not_finite(results, kind, folder):
    first, second = (rank[kind, "stop"] for rank in results)
    assert first == second and first.startswith("step 3: the loss is nan, on rows ")
    assert len(first.partition("rows ")[2].partition(" of")[0].split(", ")) == 8  # of both
    assert (folder / kind / "stop" / "checkpoint-2" / "trainer_state.json").is_file()
