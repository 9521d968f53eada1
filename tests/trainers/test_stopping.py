"""Ctrl-C, SIGTERM and a disk that is full: real signals and real limits, on the command line and in two processes."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from rlkernels.trainers import Terminated
from rlkernels.trainers.base.interrupts import DEFAULTS, StopRequest

WORKER = Path(__file__).with_name("stopping_worker.py")
GRADERS = """
import os, pathlib, resource, time

def wait(trainer_state, completions, **columns):
    step = trainer_state.global_step
    pathlib.Path(f"at_{step}").touch()
    while step == 1 and not pathlib.Path("go_on").exists():
        time.sleep(0.02)
    return [float(len(text)) for text in completions]

def fill_the_disk(trainer_state, completions, **columns):
    if trainer_state.global_step == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    return [float(len(text)) for text in completions]
"""


@pytest.fixture
def start(tmp_path, make_model, tokenizer, forked):
    """Starts `rlkernels grpo` in tmp_path, which has a model and reward functions."""
    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "graders.py").write_text(GRADERS)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": letter}) + "\n" for letter in "abcd"))

    def start(reward: str, **options: str) -> subprocess.Popen:
        options = {
            "model": "model",
            "dataset": "rows.jsonl",
            "reward": f"graders:{reward}",
            "output_dir": "out",
            "per_device_train_batch_size": "4",
            "num_generations": "2",
            "max_completion_length": "4",
            "max_steps": "4",
            "save_steps": "1",
            "report_to": "none",
            "use_cpu": "True",
            "bf16": "False",
            "logging_steps": "3",
            "num_completions_to_print": "0",
            **options,
        }
        arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
        return subprocess.Popen(
            [*forked.FORKED, "-m", "rlkernels", "grpo", *arguments],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def wait_for(file: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 300
    while not file.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.02)


@pytest.mark.parametrize(("number", "word", "code"), [("SIGINT", "interrupted", 130), ("SIGTERM", "terminated", 143)])
def test_the_first_signal_saves_and_stops(start, tmp_path, number, word, code):
    """After the step that it came in, with one line at once and one at the end."""
    process = start("wait", save_steps="10")
    wait_for(tmp_path / "at_1", process)
    process.send_signal(getattr(signal, number))
    lines = []
    while "once more stops it at once" not in (line := process.stderr.readline()):
        assert line, lines
        lines.append(line)
    name = "Ctrl-C" if number == "SIGINT" else number
    assert line == (
        f"{name}: the run is saved and stops after this optimizer step (now sampling completions and their rewards); "
        "once more stops it at once\n"
    )
    (tmp_path / "go_on").touch()
    _, error = process.communicate(timeout=300)
    assert process.returncode == code
    assert error.splitlines()[-1] == (
        f"rlkernels grpo: {word} after step 2 of 4; --resume_from_checkpoint out/checkpoint-2 goes on"
    )
    assert "Traceback" not in error
    assert sorted(path.name for path in (tmp_path / "out").glob("*check*")) == ["checkpoint-2"]


def test_the_second_signal_stops_at_once(start, tmp_path):
    process = start("wait")
    wait_for(tmp_path / "at_1", process)
    process.send_signal(signal.SIGINT)
    while "once more stops it at once" not in process.stderr.readline():
        pass
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 130 and "Traceback" not in error
    assert error.splitlines()[-1] == (
        "rlkernels grpo: interrupted after step 1 of 4; --resume_from_checkpoint out/checkpoint-1 goes on"
    )


def test_a_full_disk_is_one_error_and_the_last_checkpoint_stays(start, tmp_path):
    """As are completions/ in it, which cost a warning: the run goes on to its next checkpoint."""
    process = start("fill_the_disk", logging_steps="1", save_steps="1")
    _, error = process.communicate(timeout=300)
    assert process.returncode == 2, error
    (line,) = [line for line in error.splitlines() if "error:" in line]
    assert line == (
        "rlkernels grpo: error: out/checkpoint-2 could not be written: File too large; out/checkpoint-1 stays, and "
        "resume_from_checkpoint goes on from it"
    )
    assert error.count("completions_00002.parquet could not be written: ") == 1 and "Traceback" not in error
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["checkpoint-1", "completions"]
    resumed = start("wait", resume_from_checkpoint="True")
    (tmp_path / "go_on").touch()
    assert resumed.wait(60) == 0, resumed.communicate()[1]
    assert (tmp_path / "out/checkpoint-4").is_dir()


def test_handlers_are_those_of_before():
    """Also where an exception ends what they were for; those of the program's own stay, and other threads set none."""
    before = {number: signal.getsignal(number) for number in DEFAULTS}
    stop = StopRequest()
    with pytest.raises(ValueError), stop.listening(), stop.finishing("it"):
        assert all(signal.getsignal(number) == stop._receive for number in DEFAULTS)
        raise ValueError
    assert {number: signal.getsignal(number) for number in DEFAULTS} == before

    def own(number, frame):
        pass

    signal.signal(signal.SIGTERM, own)
    try:
        with stop.listening():
            assert signal.getsignal(signal.SIGTERM) == own and signal.getsignal(signal.SIGINT) == stop._receive
    finally:
        signal.signal(signal.SIGTERM, before[signal.SIGTERM])
    entered = []

    def listen():
        with stop.listening():
            entered.append(True)

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert entered
    assert {number: signal.getsignal(number) for number in DEFAULTS} == before


def test_what_is_being_finished_waits_for_the_third_signal(capfd):
    stop, done = StopRequest(), []
    with pytest.raises(KeyboardInterrupt), stop.listening(), stop.finishing("checkpoint-3"):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        done.append("checkpoint-3")
    assert done and capfd.readouterr().err == (
        "\nCtrl-C: the run is saved and stops after this optimizer step (now writing checkpoint-3); once more stops it "
        "at once\n\nCtrl-C: checkpoint-3 is finished first; once more stops it at once\n"
    )
    with pytest.raises(Terminated) as stopped, stop.finishing("the model"):  # after a run the first is waited for
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        pytest.fail("was not broken off")
    assert stopped.value.code == 143


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
def test_a_forked_process_is_not_asked(number, code):
    """Workers of a DataLoader get a terminal's Ctrl-C too, and serve the rest of the step; SIGTERM is how they end."""
    stop = StopRequest()
    with stop.listening():
        child = os.fork()
        if not child:
            signal.raise_signal(number)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == code
        assert not stop.number


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, forked):
    folder = tmp_path_factory.mktemp("two")
    code, printed = forked.run_together(2, str(WORKER), str(folder))
    assert code == 0, printed[-4000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def test_one_of_two_processes_is_asked_to_stop(ranks):
    """Both stop at the same step, and go on to what a run that was not stopped comes to."""
    for rank in ranks:
        assert rank["stopped"] == ("Terminated", 1)
        assert torch.equal(rank["resumed"], rank["whole"])
        assert rank["logs"]["resumed"] == rank["logs"]["whole"] and len(rank["logs"]["whole"]) == 3


def test_one_of_two_processes_cannot_write(ranks):
    """Neither waits for the other, and nothing is left of the checkpoint."""
    for rank in ranks:
        assert rank["full"].endswith(
            "full/checkpoint-2 could not be written: No space left on device; there is no checkpoint"
        )
        assert rank["left"] == []


def test_a_model_is_saved_while_another_process_comes_late(ranks):
    """Which touches nothing of what the first writes."""
    for rank in ranks:
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(rank["model"])
        assert ".model.unfinished" not in rank["model"]


def test_two_processes_go_on_from_a_checkpoint_of_one(ranks):
    """Which holds the rollouts of one alone, in the midst of the steps that learn from them."""
    for rank in ranks:
        assert [step for step, _ in rank["of_one"]] == [3, 6]
