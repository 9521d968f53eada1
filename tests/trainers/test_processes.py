"""Two processes, under DDP and under FSDP2 (gloo, on the CPU), give what one gives."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from transformers import AutoModelForCausalLM

from cases import thorough
from rlkernels import cli

WORKER = Path(__file__).with_name("processes_worker.py")
sys.path.insert(0, str(WORKER.parent))
from processes_worker import CASES, OF_DDP, TEXTS, build_model, build_tokenizer, run  # noqa: E402

TORCHRUN = ["torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
QUICK = {("ddp", "reward"), ("ddp", "grpo, groups on both")}
QUICK |= {("fsdp2", case) for case in ("sft", "dpo", "grpo, sampled", "ppo, sampled", "ppo, scored with a graph")}


def runs(kind, cases):
    return [(kind, case) if (kind, case) in QUICK else thorough(kind, case) for case in cases]


DDP, FSDP2 = runs("ddp", OF_DDP), runs("fsdp2", CASES)
SHARING = [("ddp", "reward"), ("fsdp2", "dpo"), ("fsdp2", "grpo, sampled")]
RESUMED = runs("fsdp2", (case for case, (_, options) in CASES.items() if "save_steps" in options))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def results(folder, forked):
    """What each of two processes saw of a run, which is made when it is first asked for."""
    found = {}

    def of(kind: str, case: str) -> list[dict]:
        if (kind, case) not in found:
            code, printed = forked.run_together(2, str(WORKER), f"{folder}/{kind}/{case}", kind, case)
            assert code == 0, printed[-4000:]
            found[kind, case] = [torch.load(folder / kind / case / f"{n}.pt", weights_only=False) for n in range(2)]
        return found[kind, case]

    return of


@pytest.fixture(scope="module")
def alone(folder):
    found = {}

    def of(case):
        if case not in found:
            found[case] = run(f"{folder}/one/{case}", case)
        return found[case]

    return of


def assert_same(found, wanted):
    """Weights, and every metric of every log, to 1e-4. Each process counts its own tokens, and how many are run depends
    on how groups are split."""
    torch.testing.assert_close(found["weights"], wanted["weights"], rtol=0, atol=1e-4)
    assert len(found["logs"]) == len(wanted["logs"]) >= 5
    for log, other in zip(found["logs"], wanted["logs"], strict=True):
        apart, together = (each.get("tokens", 0) for each in (log, other))
        assert apart * 2 == together
        log, other = ({k: v for k, v in each.items() if not k.startswith("tokens")} for each in (log, other))
        assert log == pytest.approx(other, rel=1e-4, abs=1e-4, nan_ok=True)


@pytest.mark.parametrize("kind, case", DDP + FSDP2)
def test_two_processes_are_as_one(results, alone, kind, case):
    for found in results(kind, case):
        assert_same(found, alone(case))
        # Or else it would be DDP: on a CPU Accelerate shards nothing, and does not say so.
        assert [step["sharded"] for step in found["steps"]] == [kind == "fsdp2"] * 5
        assert (max(step["micro_batches"] for step in found["steps"]) > 1) == (case != "ppo, scored with a graph")


@pytest.mark.parametrize("kind, case", SHARING)
def test_prefixes_are_shared_on_each_process(results, kind, case):
    """Which the tests above hold to what one process gives."""
    for found in results(kind, case):
        logs = [log for log in found["logs"] if "tokens" in log]
        assert all(log["tokens_run"] <= log["tokens"] for log in logs)
        assert sum(log["tokens_run"] for log in logs) < sum(log["tokens"] for log in logs)


@pytest.mark.parametrize("kind, case", DDP)
def test_gradients_are_added_up_once_a_step(results, kind, case):
    for found in results(kind, case):
        assert [step["reductions"] for step in found["steps"]] == [1] * 5


@pytest.mark.parametrize("kind, case", runs("fsdp2", ["sft", "dpo", "grpo", "grpo, groups on both", "ppo"]))
def test_the_head_is_gathered_once_a_step(results, kind, case):
    """And once more for each evaluation, whose log is between the steps'."""
    (_, options), evaluations = CASES[case], [0] * 5
    if "eval_steps" in options:
        evaluations = [0, 0, 1, 0, 1]  # a step is over before it is evaluated
    for found in results(kind, case):
        gathers = [step["gathers"] for step in found["steps"]]
        assert gathers == [1 + evaluation for evaluation in evaluations]


def test_a_layer_is_gathered_once_to_sample(results):
    """Not for each token; and for each micro-batch twice, forward and backward."""
    for found in results("fsdp2", "grpo, sampled"):
        steps = found["steps"]
        for step in (steps[0], steps[1], steps[3]):  # the others come after an evaluation, which samples too
            assert step["layer_gathers"] == 1 + 2 * step["micro_batches"]


@pytest.mark.parametrize("kind, case", RESUMED)
def test_a_sharded_run_goes_on_from_its_checkpoint(results, kind, case):
    """Bit for bit."""
    for whole in results(kind, case):
        assert torch.equal(whole["resumed"]["weights"], whole["weights"])
        assert whole["resumed"]["logs"] == whole["logs"]
        assert len(whole["resumed"]["steps"]) == 3


def test_a_sharded_model_is_saved_whole(results, folder):
    """As any other, in each checkpoint."""
    weights = {case: results("fsdp2", case)[0]["weights"] for case in ("sft", "ppo, sampled")}
    model = AutoModelForCausalLM.from_pretrained(folder / "fsdp2" / "sft" / "checkpoint-4")
    saved = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    assert saved.shape == weights["sft"].shape and (saved - weights["sft"]).abs().max() < 1e-2
    assert (folder / "fsdp2" / "ppo, sampled" / "checkpoint-4" / "value" / "model.safetensors").is_file()


@pytest.mark.parametrize("kind", ["ddp", thorough("fsdp2")])
def test_both_stop_where_one_meets_a_loss_that_is_not_finite(results, kind, folder):
    first, second = results(kind, "stop")
    assert first == second and first.startswith("step 3: the loss is nan, on rows ")
    assert len(first.partition("rows ")[2].partition(" of")[0].split(", ")) == 8  # of both
    assert (folder / kind / "stop" / "checkpoint-2" / "trainer_state.json").is_file()


# Commands


CONFIGS = sorted((Path(__file__).parents[2] / "examples" / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_accelerate_knows_every_option_of_the_configs(file):
    config = load_config_from_file(str(file))  # refuses a key that it does not know
    assert config.distributed_type.value in ("MULTI_GPU", "FSDP", "DEEPSPEED") and config.num_processes == 8
    known = vars(launch_command_parser().parse_args(["script"]))
    assert set(config.fsdp_config) | set(config.deepspeed_config) <= set(known)
    assert f"--config_file examples/accelerate/{file.name} " in file.read_text()


@pytest.fixture(params=[pytest.param(True, id="forked"), thorough(False, id="launched")])
def launch(request, tmp_path, forked):
    """Runs a command in two processes, which the launcher starts or, instead of any but torchrun, the tests do. Returns
    exit code and what was printed."""
    build_model().save_pretrained(tmp_path / "model")
    build_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "rows.json").write_text(json.dumps(TEXTS))

    def launch(launcher: list[str], *arguments: str) -> tuple[int, str]:
        command = ["-m", "rlkernels", "sft", "--model", "model", "--max_steps", "2", "--dataset", "rows.json"]
        command += ["--output_dir", "out", "--report_to", "none", "--bf16", "False", *arguments]
        if request.param and launcher is not TORCHRUN:
            code, printed = forked.run_together(2, *command, cwd=tmp_path)
            return int(code != 0), printed
        path = os.pathsep.join(map(os.path.abspath, sys.path))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        command = [sys.executable, "-m", *launcher, *command]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
        return done.returncode, done.stdout + done.stderr

    return launch


def test_a_command_in_two_processes_says_all_once(launch, tmp_path):
    # Without a GPU the processes of this config train on the CPU.
    accelerate = ["accelerate.commands.launch", "--config_file", str(CONFIGS[0]), "--num_processes", "2"]
    code, printed = launch(accelerate, "--padding_free", "False")
    assert code == 0, printed
    assert printed.count("saved in out") == printed.count("'train_runtime'") == 1
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["train_batch_size"] == 8 and state["epoch"] == pytest.approx(2 / 3)  # of 48 rows, 16 in a step
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "rows.json"]

    code, printed = launch(TORCHRUN)
    assert code == 1
    assert printed.count("rlkernels sft: error:") == 1
    assert "--output_dir out: holds checkpoint-2 of an earlier run" in printed


@pytest.mark.parametrize("rank, seconds", [("0", []), ("1", [cli.SECONDS_ALONE])])
def test_an_error_of_one_process_alone_is_told(monkeypatch, capsys, rank, seconds):
    """By another than the first once that had time to tell it, and the launcher to end the others."""
    slept: list[float] = []
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setattr(time, "sleep", slept.append)
    assert cli.main(["sfft"]) == 2
    assert slept == seconds
    assert "sfft" in capsys.readouterr().err
