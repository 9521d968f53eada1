"""Reward functions that hang, crash or return nonsense, here and in worker processes: what becomes of the others."""

import asyncio
import contextlib
import functools
import itertools
import math
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import threading
import time
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback, TrainerState

import reward_functions as functions
from reward_functions import rows, values, wait_until
from rlkernels.trainers import GRPOConfig, GRPOTrainer, PPOConfig, PPOTrainer, RewardError
from rlkernels.trainers.base.interrupts import Terminated
from rlkernels.trainers.rewards import functions as rewards
from rlkernels.trainers.rewards import process_settings as settings
from rlkernels.trainers.rewards.functions import RewardFunctions, whole_groups
from rlkernels.trainers.rewards.model import RewardModel

LIMIT = 0.25
TOO_LATE = "did not return within 0.25 s (reward_timeout)"
NO_NUMBER = "must return finite numbers, or None where it does not apply; got"
FAILURES = {
    "raises": "raised ValueError: invalid literal for int() with base 10: 'six'",
    "exits": "raised SystemExit: 3",
    "odd": "raised Odd: odd",
    "hangs": TOO_LATE,
    "swallows": TOO_LATE,
    "nan": f"{NO_NUMBER} nan",
    "inf": f"{NO_NUMBER} inf",
    "text": f"{NO_NUMBER} 'good'",
}
OF_A_PROCESS = {
    "quits": "ended its worker process (exit code 3)",
    "crashes": "ended its worker process (Segmentation fault)",
    "stuck": TOO_LATE,
}
EVERY_FAILURE = [(kind, "here") for kind in FAILURES] + [(kind, "workers") for kind in FAILURES | OF_A_PROCESS]


@pytest.fixture
def make():
    """Functions that are called here, or in two workers."""
    with contextlib.ExitStack() as made:

        def make(where, policy, *chosen, timeout=LIMIT):
            count = 2 if where == "workers" else 0
            result = RewardFunctions(chosen, timeout=timeout, workers=count, on_error=policy)
            made.callback(result.close)
            return result

        yield make


@pytest.fixture
def warned(monkeypatch):
    lines = []
    monkeypatch.setattr(rewards.logger, "warning", lines.append)
    return lines


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def workers():
    return [process for process in multiprocessing.active_children() if process.name == "reward_worker"]


# Every failure, by either policy


@pytest.mark.parametrize("kind, where", EVERY_FAILURE)
def test_raise(make, kind, where):
    message = f"reward function 'act' {(FAILURES | OF_A_PROCESS)[kind]}, at row 4: prompt 'b', completion '{kind}'"
    called = make(where, "raise", functions.length, functions.act)
    with pytest.raises(RewardError) as caught:
        called(rows("x", "x", "x", "x", kind, "x"))
    assert str(caught.value) == message


@pytest.mark.parametrize("kind, where", EVERY_FAILURE)
def test_none(make, warned, kind, where):
    """The failing row has no reward, nor is it seen by the call that the others have theirs from. And life goes on."""
    called = make(where, "none", functions.length, functions.act)
    metrics = []
    result = values(called(rows("x", "x", "x", "x", kind, "x"), log_metric=lambda *each: metrics.append(each)))
    seen = 6.0 if where == "here" else 3.0
    alone = seen if "got" in FAILURES.get(kind, "") else seen - 1  # of what it returned only that row is wrong
    first = alone if where == "here" else 3.0
    length = float(len(kind))
    assert result == [[1.0, 1.0, 1.0, 1.0, length, 1.0], [first, first, first, alone, None, alone]]
    (line,) = warned
    reason = (FAILURES | OF_A_PROCESS)[kind]
    assert line == (
        f"reward function 'act' {reason}, at row 4: prompt 'b', completion '{kind}'. It gives no reward there."
    )
    assert metrics == [("rewards/length/failed", 0.0, 1.0), ("rewards/act/failed", 1 / 6, 1.0)]
    assert values(called(rows("x", "x"))) == [[1.0, 1.0], [2.0, 2.0] if where == "here" else [1.0, 1.0]]


@pytest.mark.parametrize("where", ["here", "workers"])
def test_several_rows_are_named(make, warned, where):
    batch = rows("exits", "x", "exits", "inf", "raises", "none")
    seen = 3.0 if where == "here" else 1.0
    assert values(make(where, "none", functions.act)(batch)) == [[None, seen, None, None, None, None]]
    (line,) = warned
    assert "raised SystemExit: 3, at rows 0, 2 (row 0: prompt 'a', completion 'exits'); " in line
    assert "'six', at row 4: prompt 'b', completion 'raises'" in line
    assert "got inf, at row 3: prompt 'b', completion 'inf'" in line


def test_many_ways_to_fail_are_still_one_short_line(make, warned):
    def each(completions, **kwargs):
        return [f"{row}{text}" for row, text in enumerate(completions)]

    make("here", "none", each)(rows(*["x" * 10_000] * 8))
    (line,) = warned
    assert len(line) < 3000 and line.endswith("; and at rows 3, 4, 5, 6, 7. It gives no reward there.")


@pytest.mark.parametrize("where", ["here", "workers"])
def test_a_wrong_length(make, warned, where):
    """Is of no row: those of the call have no reward."""
    size = 6 if where == "here" else 3
    reason = f"must return one reward for each of the {size} completions; got {size - 1}"
    with pytest.raises(RewardError, match=f"^reward function 'short' {reason}$"):
        make(where, "raise", functions.length, functions.short)(rows(*"xxxxxx"))
    assert values(make(where, "none", functions.length, functions.short)(rows(*"xxxxxx"))) == [[1.0] * 6, [None] * 6]
    (line,) = warned
    assert f"'short' {reason}, at rows 0, 1, 2, 3, 4, 5 (row 0" in line


@pytest.mark.parametrize("where", ["here", "workers"])
def test_a_batch_that_no_row_is_to_blame_for(make, warned, where):
    reason = "'in_company' raised MemoryError: too many"
    with pytest.raises(RewardError, match=f"{reason}, on the whole batch but on no row alone"):
        make(where, "raise", functions.in_company)(rows(*"xxxx"))
    assert values(make(where, "none", functions.in_company, functions.length)(rows(*"xxxx"))) == [[None] * 4, [1.0] * 4]
    assert f"{reason}, at rows 0, 1, 2, 3" in warned[0]


def test_a_batch_is_not_called_again_in_vain(make, warned):
    seen = []

    def fails_once(completions, **kwargs):
        seen.append(len(completions))
        return functions.in_company(completions) if len(seen) == 1 else [1.0] * len(completions)

    assert values(make("here", "none", fails_once)(rows(*"xxx"))) == [[None] * 3]
    assert seen == [3, 1, 1, 1]


def test_rows_that_fail_only_without_those_that_fail(make, warned):
    def act(completions, **kwargs):
        if len(completions) == 3:
            raise OSError("three")
        return functions.act(completions)

    assert values(make("here", "none", act)(rows("x", "raises", "x", "x"))) == [[None] * 4]
    assert "'six', at row 1: " in warned[0] and "raised OSError: three, at rows 0, 2, 3 " in warned[0]


@pytest.mark.parametrize("where", ["here", "workers"])
def test_the_search_ends_with_the_second_time_out(make, where, warned):
    """Each row would take the whole time again."""
    began = time.monotonic()
    result = make(where, "none", functions.act)(rows(*["hangs"] * 40, "x"))
    assert values(result)[0] == [None] * 41
    assert time.monotonic() - began < 20 * LIMIT


def test_ctrl_c_passes(make):
    def press(**kwargs):
        signal.raise_signal(signal.SIGINT)

    for policy in ("raise", "none"):
        with pytest.raises(KeyboardInterrupt):
            make("here", policy, press)(rows("x"))


def test_sigterm_passes(make):
    def stop(**kwargs):
        raise Terminated

    with pytest.raises(Terminated):
        make("here", "none", stop)(rows("x"))


# What functions see, and what they log


def test_whole_groups():
    assert whole_groups(list("aabbccdd"), 2) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert whole_groups(list("aabbccdd"), 3) == [[0, 1, 2, 3], [4, 5], [6, 7]]
    assert whole_groups(list("abcd"), 8) == [[0], [1], [2], [3]]
    assert whole_groups(list("aaaa"), 2) == [[0, 1, 2, 3]]
    assert whole_groups(list("aaaaab"), 2) == [[0, 1, 2, 3, 4], [5]]
    for prompts, count in itertools.product(["abbcccdddd" * 3, "a" * 7 + "bcdefg", "abcdefg"], range(1, 12)):
        parts = whole_groups(list(prompts), count)
        assert list(itertools.chain(*parts)) == list(range(len(prompts))) and 0 < len(parts) <= count
        assert all(prompts[before[-1]] != prompts[after[0]] for before, after in itertools.pairwise(parts))


def test_groups_go_to_different_workers(make):
    (pids,) = values(make("workers", "raise", functions.process)(rows(*"xxxxxx")))
    assert pids[:3] == [pids[0]] * 3 and pids[3:] == [pids[3]] * 3
    assert len({pids[0], pids[3], os.getpid()}) == 3


@pytest.mark.parametrize("where", ["here", "workers"])
def test_what_is_logged(make, where, warned):
    """In the order of the rows, in one list per column, without what failed calls have logged."""
    extra, metrics = [], []
    log = {"log_extra": lambda *each: extra.append(each), "log_metric": lambda *each: metrics.append(each)}
    called = make(where, "none", functions.logs)
    called(rows("1", "22", "333", "4444"), **log)
    assert extra == [("one by one", ["1", "22", "333", "4444"]), ("letters", [1, 2, 3, 4])]
    sizes = [("size", 4.0, 1.0)] if where == "here" else [("size", 2.0, 0.5)] * 2
    assert metrics == [*sizes, ("rewards/logs/failed", 0.0, 1.0)]

    extra.clear(), metrics.clear()
    called(rows("1", "22", "raises", "4444"), **log)
    assert extra == [("one by one", ["1", "22", None, "4444"]), ("letters", [1, 2, None, 4])]
    sizes = [("size", 3.0, 0.75)] if where == "here" else [("size", 2.0, 0.5), ("size", 1.0, 0.25)]
    assert metrics == [*sizes, ("rewards/logs/failed", 0.25, 1.0)]


def test_the_state_of_the_trainer_goes_over(make):
    state = TrainerState(global_step=7)
    assert values(make("workers", "raise", functions.sees_step)(rows("x"), trainer_state=state)) == [[7.0]]


def test_what_cannot_go_over(make):
    called = make("workers", "raise", functions.length)
    with pytest.raises(RewardError, match=r"'length' could not be given its arguments in a worker process: .*at row 0"):
        called(rows("x", column=lambda: 0))
    assert values(called(rows("x"))) == [[1.0]]


@pytest.mark.parametrize("where", ["here", "workers"])
def test_what_is_logged_goes_over_as_text(make, where):
    logged = []
    make(where, "raise", functions.logs_a_function)(rows("x", "x"), log_extra=lambda *each: logged.append(each))
    assert logged == [("functions", ["<built-in function len>"] * 2)]


# What a worker does with its pipe

NO_ANSWER = "wrote something other than an answer into the pipe of its worker process"
SABOTAGED = {
    "garbage": NO_ANSWER,
    "part": TOO_LATE,
    "oversize": NO_ANSWER,
    "no answer": NO_ANSWER,
    "another's": None,
    "another's size": NO_ANSWER,
    "endless": TOO_LATE,
    "no builtins": "ended its worker process (exit code 1)",
    "no stdout": None,
    "child keeps the pipe": "ended its worker process (exit code 3)",
    "stopped": TOO_LATE,
}


@pytest.mark.parametrize("kind", SABOTAGED)
def test_a_pipe_is_not_waited_for(make, warned, kind):
    """Beyond the limit; and the other row has its reward."""
    began = time.monotonic()
    called = make("workers", "none", functions.sabotages)
    result = values(called(rows(kind, "x")))
    assert time.monotonic() - began < 20 * LIMIT
    assert values(called(rows("x", "x"))) == [[2.0, 2.0]]
    if SABOTAGED[kind] is None:
        assert (result, warned) == ([[1.0, 2.0]], [])
    else:
        assert result == [[None, 2.0]]
        assert warned[0].startswith(f"reward function 'sabotages' {SABOTAGED[kind]}, at row 0: prompt 'a'")


def test_a_function_that_forks_gives_each_call_its_own(make):
    """The child returns too, and must neither answer nor take a later call."""
    called = make("workers", "raise", functions.forks, timeout=20)
    for texts in (["x"], ["xx"], ["xxx"], ["xxxx"]):
        assert values(called(rows(*texts))) == [[float(len(texts[0]))]]
        time.sleep(0.15)


def test_a_function_that_forks_here(make):
    """Its child would go on to train."""
    process = os.getpid()
    for function in (functions.forks, functions.forks_async):
        assert values(make("here", "raise", function, timeout=20)(rows("x"))) == [[1.0]]
        if os.getpid() != process:
            os._exit(99)
        assert os.waitstatus_to_exitcode(os.wait()[1]) == 0


def test_a_stopped_worker_that_is_sent_more_than_a_pipe_holds(make, warned):
    called = make("workers", "none", functions.stops_in_the_end, timeout=0.5)
    assert values(called(rows("stop"))) == [[1.0]]
    time.sleep(0.4)
    began = time.monotonic()
    large = rows("x", facts="x" * 10**7)
    assert values(called(large)) == [[None]] and TOO_LATE.replace("0.25", "0.5") in warned[0]
    assert time.monotonic() - began < 10
    assert values(called(large)) == [[1.0]]


def test_the_traceback_of_the_worker_is_kept(make):
    with pytest.raises(RewardError) as caught:
        make("workers", "raise", functions.act)(rows("odd"))
    assert 'raise Odd("odd", 2)' in str(caught.value.__cause__)


# The processes


def test_async_functions_run_while_workers_do(make, tmp_path):
    async def asks(completions, folder, **kwargs):
        (Path(folder[0]) / "asked").touch()
        while not (Path(folder[0]) / "answered").exists():
            await asyncio.sleep(0.01)
        return [2.0] * len(completions)

    called = make("workers", "raise", functions.answers_file, asks, timeout=30)
    assert values(called(rows("x", folder=str(tmp_path)))) == [[1.0], [2.0]]


def test_async_functions_and_reward_models_stay_here(make):
    class Model(RewardModel):
        def __init__(self):
            self.__name__ = "model"
            self.unsendable = lambda: 0

        def __call__(self, completions, **kwargs):
            return functions.process(completions)

    async def process(completions, **kwargs):
        return functions.process(completions)

    assert values(make("workers", "raise", Model(), process)(rows("x"))) == [[float(os.getpid())]] * 2
    assert not workers()


def test_functions_that_cannot_be_sent(make):
    message = (
        "reward function '.*' cannot be sent to a worker process: raised .*; define it at the top level of a module"
    )
    here = functools.partial(functions.length)
    here.lock = threading.Lock()
    for function in (lambda **kwargs: [1.0], here, functions.Loaded("raises")):
        with pytest.raises(RewardError, match=message):
            make("workers", "none", functions.length, function)
    assert not workers()


def test_a_worker_that_does_not_start(make, monkeypatch):
    with pytest.raises(RewardError, match=r"ended while it started \(exit code 3\).* `if __name__ == \"__main__\":`"):
        make("workers", "none", functions.Loaded("quits"))
    monkeypatch.setattr("rlkernels.trainers.rewards.workers.START_LIMIT", 0.2)
    with pytest.raises(RewardError, match=r"a worker process did not start within 0\.2 s") as caught:
        make("workers", "none", functions.Loaded("hangs"))
    assert not workers()  # though the traceback keeps what has started them
    assert caught.tb is not None


def test_a_script_without_a_guard_does_nothing_in_a_worker(make, monkeypatch):
    """multiprocessing imports it there, and marks the process so."""
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    with pytest.raises(SystemExit):
        make("workers", "none", functions.length)


def test_a_worker_that_ends_between_calls(make):
    called = make("workers", "raise", functions.process)
    (before,) = values(called(rows("x", "x")))
    for pid in map(int, before):
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda pid=pid: not is_alive(pid))
    (after,) = values(called(rows("x", "x")))
    assert not set(before) & set(after)


def test_a_worker_that_closes_its_pipe(make):
    with pytest.raises(RewardError, match=r"'act' ended its worker process \(it closed its pipe\), at row 0"):
        make("workers", "raise", functions.act, timeout=None)(rows("closes"))


def test_processes_that_cannot_be_started(make, monkeypatch):
    def refuse(*args):
        raise BlockingIOError("too many")

    called = make("workers", "raise", functions.process)
    called.close()
    with monkeypatch.context() as patch:
        patch.setattr(forkserver._forkserver, "connect_to_new_process", refuse)
        patch.setattr("multiprocessing.popen_forkserver.forkserver.connect_to_new_process", refuse)
        with pytest.raises(RewardError, match="a worker process could not be started: too many"):
            called(rows("x"))
    assert len(values(called(rows("x")))) == 1


def test_an_interrupt_ends_the_calls_of_workers(make, tmp_path):
    """Whose results would else be taken for those of the next."""
    called = make("workers", "none", functions.starts_a_process, timeout=None)
    press = threading.Thread(
        target=lambda: (wait_until((tmp_path / "pid").exists), os.kill(os.getpid(), signal.SIGINT))
    )
    press.start()
    with pytest.raises(KeyboardInterrupt):
        called(rows("x", folder=str(tmp_path)))
    press.join()
    assert not is_alive(int((tmp_path / "pid").read_text()))


def test_async_functions_end_with_an_interrupt(make, tmp_path):
    ended = threading.Event()

    async def waits(completions, **kwargs):
        while not (tmp_path / "pid").exists():
            await asyncio.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    with pytest.raises(KeyboardInterrupt):
        make("workers", "none", functions.starts_a_process, waits, timeout=None)(rows("x", folder=str(tmp_path)))
    assert ended.wait(20)


def test_what_a_function_started_ends_with_it(make, tmp_path, warned):
    called = make("workers", "none", functions.starts_a_process)
    assert values(called(rows("x", folder=str(tmp_path)))) == [[None]]
    assert not is_alive(int((tmp_path / "pid").read_text()))


def test_close(make):
    called = make("workers", "raise", functions.process)
    (pids,) = values(called(rows("x", "x")))
    called.close()
    assert not any(map(is_alive, map(int, pids)))
    assert not workers()
    assert values(called(rows("x", "x")))[0] != pids  # starts anew


def test_a_pool_that_is_forgotten_ends():
    called = RewardFunctions([functions.process], workers=1)
    ((pid,),) = values(called(rows("x")))
    del called
    wait_until(lambda: not is_alive(int(pid)))


@pytest.fixture
def other_process(tmp_path):
    """Forks a process, the leader of a group, that calls a function which is stuck in C."""
    started = []

    def start():
        pid = os.fork()
        if pid:
            started.append(pid)
            wait_until(lambda: len(list(tmp_path.glob("pid*"))) == 2)
            return pid, [int(file.read_text()) for file in tmp_path.glob("pid*")]
        # Only the child of its parent may ask whether the server is there.
        forkserver._forkserver.ensure_running = lambda: None
        code = 1
        try:
            os.setpgid(0, 0)
            os.dup2(os.open(tmp_path / "output", os.O_WRONLY | os.O_CREAT), 2)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            called = RewardFunctions([functions.starts_a_process_and_is_stuck], workers=2)
            called(rows("x", folder=str(tmp_path)))
        except KeyboardInterrupt:
            code = 7
            multiprocessing.util._exit_function()  # as at the end of a program
        finally:
            os._exit(code)

    yield start
    for pid in started:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_workers_end_with_a_killed_parent(other_process):
    pid, others = other_process()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    wait_until(lambda: not any(map(is_alive, others)))


def test_ctrl_c_while_a_worker_is_stuck(other_process, tmp_path):
    """The whole group gets it, as in a terminal."""
    pid, others = other_process()
    os.killpg(pid, signal.SIGINT)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 7
    assert not any(map(is_alive, others))
    assert (tmp_path / "output").read_text() == ""


# Training


PROMPTS = [{"prompt": "ab" + "c" * (i % 5) + "d"} for i in range(8)]


@pytest.fixture
def trained(make_model, tokenizer, run_options):
    """A run of two steps; its trainer, and what it logged."""

    def train(method, reward_funcs, prompts=PROMPTS, evaluated=PROMPTS[:2], callbacks=None, **options):
        own = {"max_completion_length": 6, "num_generations": 4}
        if method == "ppo":
            own = {"response_length": 6, "num_ppo_epochs": 1}
        config = {"grpo": GRPOConfig, "ppo": PPOConfig}[method]
        own |= {"per_device_train_batch_size": 8, "learning_rate": 1e-2, "max_steps": 2}
        args = config(**run_options | own | options)
        build = {"grpo": GRPOTrainer, "ppo": PPOTrainer}[method]
        trainer = build(make_model(), reward_funcs, args, prompts, evaluated, tokenizer, callbacks=callbacks)
        trainer.train()
        return trainer, [log for log in trainer.state.log_history if "loss" in log]

    return train


@pytest.mark.parametrize("method", ["grpo", "ppo"])
def test_trains_with_workers(trained, method):
    trainer, logs = trained(method, [functions.length, functions.process], reward_workers=2, on_reward_error="none")
    assert all(log["rewards/length/failed"] == 0.0 and log["rewards/length/mean"] > 0 for log in logs)
    assert not workers()
    assert trainer.evaluate()["eval_rewards/length/mean"] > 0
    trainer.collector.rewards.close()


def test_a_run_that_fails_leaves_no_workers(trained):
    with pytest.raises(RewardError, match="'short' must return one reward for each of the 4 completions; got 3"):
        trained("grpo", functions.short, reward_workers=2)
    assert not workers()


@pytest.mark.parametrize("method", ["grpo", "ppo"])
def test_a_run_without_any_reward(trained, method, warned):
    """Nothing is learned, and the run goes on."""
    trainer, logs = trained(method, functions.short, on_reward_error="none")
    assert [log["grad_norm"] for log in logs] == [0.0, 0.0]
    assert all(math.isfinite(log["loss"]) and log["rewards/short/failed"] == 1.0 for log in logs)
    assert all("reward" not in log for log in logs)
    weights = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
    assert weights.isfinite().all()
    assert all(row["rewards/short"] is None or math.isnan(row["rewards/short"]) for row in trainer.completions)


def sound(completions, **kwargs):
    return [float(len(turns[0]["content"])) for turns in completions]


def hostile(prompts, completions, completion_ids, facts, trainer_state, **kwargs):
    """Gives the same rewards, and changes all that it can reach."""
    rewards = sound(completions)
    for row in range(len(prompts)):
        prompts[row][0]["content"] = facts[row]["a"] = "edited"
        completion_ids[row][:] = [5, 5, 5, 0]
        completions[row].clear()
    trainer_state.global_step += 1
    trainer_state.log_history.append("edited")
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    gone = tempfile.mkdtemp()
    os.chdir(gone)
    os.rmdir(gone)
    sys.stdout = None
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return rewards


hostile.__name__ = "sound"


@pytest.mark.parametrize("method", ["grpo", "ppo"])
def test_a_function_changes_nothing_of_the_training(trained, method):
    """Not the tokens that it learns from, the rows of the dataset, random numbers, weights or logs."""

    def run(function):
        prompts = [{"prompt": [{"role": "user", "content": "ab"[i % 2]}], "facts": {"a": i}} for i in range(8)]
        trainer, logs = trained(method, function, prompts)
        drawn = torch.rand(3).tolist(), np.random.rand()  # not Python's, which imports draw from too
        shown = [{**row, "prompt": str(row["prompt"])} for row in trainer.completions]
        for row in trainer.completions:  # as a callback may
            row["prompt"][0]["content"] = "edited"
        weights = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
        return [prompts, logs, shown, drawn, weights.tolist()]

    with settings.restored():
        first, second = run(sound), run(hostile)
    assert first == second and first[0][1]["prompt"] == [{"role": "user", "content": "b"}]
    assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("method", ["grpo", "ppo"])
@pytest.mark.parametrize("column", ["prompts", "completions", "trainer_state", "log_extra", "log_metric", "_row_id"])
def test_columns_that_would_hide_what_functions_get(trained, method, column):
    """Are refused before anything is sampled."""
    rows = [{**row, column: "mine"} for row in PROMPTS]
    with pytest.raises(ValueError, match=f"^train_dataset has a column '{column}', the name of something else"):
        trained(method, functions.length, rows)
    with pytest.raises(ValueError, match=f"^train_dataset has a column '{column}', the name of something else"):
        trained(method, functions.length, [*PROMPTS, *rows])
    with pytest.raises(ValueError, match=rf"^eval_dataset\['a'\] has a column '{column}', the name of something else"):
        trained(method, functions.length, evaluated={"a": Dataset.from_list(rows)})


def test_a_run_stays_where_it_began(trained, tmp_path, monkeypatch):
    """Whoever changes the current folder: a function, or here a callback, whose change stays."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()

    class Leaves(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            os.chdir(tmp_path / "elsewhere")

    options = {"output_dir": "out", "save_strategy": "steps", "save_steps": 1, "callbacks": [Leaves()]}
    trainer, _ = trained("grpo", functions.length, **options)
    trainer.save_model()
    assert not list((tmp_path / "elsewhere").iterdir())
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"checkpoint-1", "checkpoint-2", "completions", "model.safetensors"} <= written


def test_a_resumed_run_stays_where_it_began(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer, logs = trained("grpo", functions.length, output_dir="out", save_strategy="steps", save_steps=1)
    trainer.train(resume_from_checkpoint="out/checkpoint-1")
    assert trainer.resumed_from == str(tmp_path / "out" / "checkpoint-1")
    assert trainer.state.log_history[-2]["loss"] == logs[-1]["loss"]
