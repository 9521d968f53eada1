"""Checkpoints that are whole or not there; and what of a run is in them."""

import json
import os
import resource
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import EarlyStoppingCallback, TrainerCallback

from rlkernels.trainers import CheckpointError, GRPOConfig, GRPOTrainer, NonFiniteLoss, PPOConfig, PPOTrainer
from rlkernels.trainers import checkpoints as c

ARGS = type("Args", (), {"should_save": True, "world_size": 1})


def write(folder: Path, content: str = "x", name: str = "model") -> Path:
    def part(aside: str) -> None:
        (Path(aside) / "within").mkdir()
        (Path(aside) / "within" / name).write_text(content)

    c.write(folder, [part], ARGS)
    return folder


def content(folder: Path) -> str:
    return (folder / "within" / "model").read_text()


@pytest.mark.parametrize(
    ("tear", "why"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "it has no manifest.json"),
        (lambda folder: (folder / "within" / "model").unlink(), "within/model is missing"),
        (lambda folder: (folder / "within" / "model").write_text("xx"), "within/model has 2 bytes, not 1"),
        (lambda folder: (folder / "manifest.json").write_text('{"fi'), "its manifest.json cannot be read"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "its manifest.json cannot be read"),
        (lambda folder: (folder / "manifest.json").write_text('{"files": 3}'), "its manifest.json cannot be read"),
    ],
)
def test_a_torn_one_is_recognised_and_passed_over(tmp_path, monkeypatch, tear, why):
    warnings: list[str] = []
    monkeypatch.setattr(c.logger, "warning", warnings.append)
    write(tmp_path / "checkpoint-9")
    torn = [write(tmp_path / f"checkpoint-{step}") for step in (10, 11)]
    assert c.last_checkpoint(tmp_path) == torn[1] and not warnings
    for folder in torn:
        tear(folder)
        assert not c.is_whole(folder) and why in c.fault(folder)
    assert c.last_checkpoint(tmp_path) == tmp_path / "checkpoint-9"
    assert len(warnings) == 1 and all(str(folder) in warnings[0] for folder in torn) and "\n" not in warnings[0]
    with pytest.raises(ValueError, match=r"checkpoint-11: not a whole checkpoint: .*the last whole one is .*-9$"):
        c.check(torn[1])
    c.rotate(tmp_path, 1, [tmp_path / "checkpoint-9"])
    assert c.numbered(tmp_path) == [tmp_path / "checkpoint-9", *torn]


def test_there_is_none(tmp_path):
    (tmp_path / "checkpoint-x").mkdir()
    assert c.last_checkpoint(tmp_path) is None and c.last_checkpoint(tmp_path / "absent") is None


class Killed(BaseException):
    pass


def killed_at_each_write(folder: Path, function) -> int:
    """Calls function until it comes through, each time breaking it off at a later write; yields after each."""
    state = {"count": 0, "last": 0, "on": True}

    def hear(event, args):
        writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        moves = event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")
        if state["on"] and (writes or moves) and os.fsdecode(args[0]).startswith(str(folder)):
            state["count"] += 1
            if state["count"] >= state["last"]:
                raise Killed

    sys.addaudithook(hear)  # for good
    for last in range(1, 1000):
        state.update(count=0, last=last, on=True)
        try:
            function()
        except Killed:
            state["on"] = False
            yield last
        else:
            state["on"] = False
            return


def test_at_each_moment_one_of_two_of_a_step_is_whole(tmp_path):
    """The one that replaces it, or the one that it replaces."""
    folder, outcomes = write(tmp_path / "checkpoint-3", "old"), []
    for _ in killed_at_each_write(tmp_path, lambda: write(folder, "new")):
        c.settle(tmp_path)
        assert c.last_checkpoint(tmp_path) == folder and list(tmp_path.iterdir()) == [folder]
        outcomes.append(content(folder))
        write(folder, "old")
    assert set(outcomes) == {"old", "new"} and outcomes == sorted(outcomes, reverse=True)


def test_rotation_leaves_the_last_whole_at_each_moment(tmp_path):
    """The one that was written last, which need not be that of the latest step; and never half of another."""

    def fill() -> list[Path]:
        return [write(tmp_path / f"checkpoint-{step}") for step in (7, 8, 3)]

    folders = fill()
    for _ in killed_at_each_write(tmp_path, lambda: c.rotate(tmp_path, 1, [folders[2]])):
        assert folders[2] in c.whole_checkpoints(tmp_path) == c.numbered(tmp_path)
        c.settle(tmp_path)
        assert {path.name[0] for path in tmp_path.iterdir()} == {"c"}
        fill()
    assert list(tmp_path.iterdir()) == [folders[2]]
    fill()
    c.rotate(tmp_path, 2, [folders[2], folders[0]])
    assert c.numbered(tmp_path) == [folders[2], folders[0]]
    fill()
    for limit in (None, 0, 3):
        c.rotate(tmp_path, limit, [folders[2]])
        assert len(c.numbered(tmp_path)) == 3


def test_a_model_is_that_of_before_or_the_new_one_or_none(tmp_path):
    """At each moment; what else the folder holds stays."""

    def save(text):
        def save(aside: str) -> None:
            (Path(aside) / "value").mkdir(parents=True)
            for name in ("config.json", "model.safetensors", "value/config.json", "value/model.safetensors"):
                (Path(aside) / name).write_text(text)

        c.write_model(tmp_path, save, writes=True)

    def save_new():
        return save("new")

    checkpoint = write(tmp_path / "checkpoint-1")
    save("old")
    seen = []
    for _ in killed_at_each_write(tmp_path, save_new):
        files = [path for path in tmp_path.rglob("*") if path.is_file() and checkpoint not in path.parents]
        texts = {path.read_text() for path in files if not path.is_relative_to(tmp_path / ".model.unfinished")}
        if (tmp_path / "config.json").exists():
            assert len(texts) == 1
        seen.append((tmp_path / "config.json").exists())
        assert c.is_whole(checkpoint)
        save("old")
    assert len(seen) > 8 and not all(seen) and not (tmp_path / ".model.unfinished").exists()


@pytest.mark.parametrize(
    "save",
    [
        lambda folder: torch.save(torch.zeros(9000), Path(folder) / "x"),
        lambda folder: save_file({"x": torch.zeros(9000)}, Path(folder) / "x"),
        lambda folder: (Path(folder) / "x").write_bytes(bytes(36000)),
    ],
    ids=["torch", "safetensors", "python"],
)
def test_what_cannot_be_written_says_why_and_leaves_nothing(tmp_path, save):
    """By a real limit on the size of files."""
    write(tmp_path / "checkpoint-1")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    messages = []
    for attempt in (
        lambda: c.write(tmp_path / "checkpoint-2", [save], ARGS),
        lambda: c.write_model(tmp_path, lambda aside: (os.mkdir(aside), save(aside)), writes=True),
    ):
        with pytest.raises(CheckpointError) as error:
            try:
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
                attempt()
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        messages.append(str(error.value))
    for message, what in zip(messages, (str(tmp_path / "checkpoint-2"), f"the model in {tmp_path}"), strict=True):
        assert message == (
            f"{what} could not be written: File too large; {tmp_path / 'checkpoint-1'} stays, and "
            "resume_from_checkpoint goes on from it"
        )
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"] and c.is_whole(tmp_path / "checkpoint-1")


def test_a_defect_of_ours_keeps_its_traceback(tmp_path):
    with pytest.raises(KeyError):
        c.write(tmp_path / "checkpoint-1", [lambda folder: {}["absent"]], ARGS)
    assert not list(tmp_path.iterdir())


# Of trainers

PROMPTS = [{"prompt": "ab" + "c" * (i % 5) + "d"} for i in range(9)]


def vowels(completions, **kwargs):
    return [sum(letter in "aeiou" for letter in text) / (1 + len(text)) for text in completions]


@pytest.fixture
def make_trainer(make_model, tokenizer, run_options):
    def make(trainer=GRPOTrainer, callbacks=None, **options):
        config = GRPOConfig if trainer is GRPOTrainer else PPOConfig
        own = {"num_generations": 2, "max_completion_length": 4} if trainer is GRPOTrainer else {"response_length": 4}
        options = {**run_options, "per_device_train_batch_size": 4, "learning_rate": 3e-3, **own, **options}
        return trainer(make_model(), vowels, config(**options), PROMPTS, PROMPTS[:2], tokenizer, callbacks=callbacks)

    return make


def history(trainer) -> list[dict]:
    logs = trainer.state.log_history
    return [{key: log[key] for key in log if not key.endswith(("_runtime", "_per_second"))} for log in logs]


def test_what_is_finished_takes_no_further_step(make_trainer):
    """Whose epoch had not ended; and its summary is of all steps."""
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2, "logging_steps": 2}
    whole = make_trainer(**options)
    done = whole.train()
    again = make_trainer(**options)
    assert again.train(resume_from_checkpoint=True).training_loss == done.training_loss
    assert again.state.global_step == 3 and history(again) == history(whole)
    assert "train_loss" in history(again)[-1]


def test_a_second_run_logs_its_own_metrics_alone(make_trainer):
    """Not what the first did after its last log, too. Both have the same weights."""
    trainer, logs = make_trainer(max_steps=3, logging_steps=2, learning_rate=0.0), []
    for _ in range(2):
        trainer.train()
        assert trainer.metrics.sums
        logs.append(history(trainer)[0])
    assert logs[0] == logs[1]


def test_a_run_that_goes_on_from_an_earlier_one_removes_none_before_it_has_saved(make_trainer):
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    first = make_trainer(**options)
    first.train()
    folders = c.numbered(Path(first.args.output_dir))

    def breaks(*args):
        raise Killed

    for resumed, left in ((folders[0], folders), (folders[2], folders[2:])):
        again = make_trainer(**options | {"max_steps": 4}, save_total_limit=1)
        again.training_step = breaks
        with pytest.raises(Killed):
            again.train(resume_from_checkpoint=str(resumed))
        assert c.numbered(Path(first.args.output_dir)) == left


def test_weights_alone_are_refused(make_trainer):
    """With save_only_model, but for the checkpoint of a run that was asked to stop."""
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "save_only_model": True}
    make_trainer(**options).train()
    message = "checkpoint-4: holds the model alone .save_only_model.: give it as model$"
    for checkpoint in (True, c.last_checkpoint(Path(make_trainer(**options).args.output_dir))):
        with pytest.raises(ValueError, match=message):
            make_trainer(**options).train(resume_from_checkpoint=checkpoint)
    with pytest.raises(KeyboardInterrupt):
        make_trainer(callbacks=[Interrupts("on_step_begin")], **options).train()
    again = make_trainer(**options)
    again.train(resume_from_checkpoint=str(Path(again.args.output_dir) / "checkpoint-1"))
    assert again.state.global_step == 4


class Interrupts(TrainerCallback):
    def __init__(self, event):
        setattr(self, event, lambda *args, **kwargs: signal.raise_signal(signal.SIGINT))


def test_interrupted_when_all_steps_are_done(make_trainer):
    """What a program would do after the run is not done."""
    trainer = make_trainer(max_steps=2, save_strategy="steps", callbacks=[Interrupts("on_train_end")])
    with pytest.raises(KeyboardInterrupt, match=r"^stopped after step 2, the last$"):
        trainer.train()
    assert c.last_checkpoint(Path(trainer.args.output_dir)).name == "checkpoint-2"


class Breaks(TrainerCallback):
    """As a kill would, once a checkpoint is there."""

    def on_save(self, args, state, control, **kwargs):
        raise Killed


def test_patience_is_kept(make_trainer, tmp_path):
    """Of a callback that counts; one that has lost it does not go on, but stops as the whole run did."""
    options = {
        "max_steps": 8,
        "save_strategy": "steps",
        "eval_strategy": "steps",
        "eval_on_start": True,
        "logging_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "completions/max_length",
        "greater_is_better": True,
        "save_total_limit": 1,
    }
    options |= {"save_steps": 1, "eval_steps": 1}
    whole = make_trainer(callbacks=[EarlyStoppingCallback(2)], **options, output_dir=str(tmp_path / "whole"))
    whole.train()
    stopped_at = whole.state.global_step
    assert 2 < stopped_at < 8
    for _ in range(stopped_at):
        broken = make_trainer(callbacks=[EarlyStoppingCallback(2), Breaks()], **options)
        with pytest.raises(Killed):
            broken.train(resume_from_checkpoint=c.last_checkpoint(Path(broken.args.output_dir)) is not None)
    again = make_trainer(callbacks=[EarlyStoppingCallback(2)], **options)
    again.train(resume_from_checkpoint=True)
    assert history(again) == history(whole)


class InterruptsEvaluation(TrainerCallback):
    def on_prediction_step(self, args, state, control, **kwargs):
        if not args.output_dir.endswith("whole") and state.global_step == 2:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("epoch_ends", [False, True])
def test_interrupted_in_an_evaluation(make_trainer, tmp_path, epoch_ends):
    """It is finished, logged and saved; so is what the end of an epoch brings."""
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 10, "eval_strategy": "steps", "eval_steps": 2}
    options |= {"per_device_eval_batch_size": 4, "logging_strategy": "epoch", "steps_per_generation": 1}
    options |= {"per_device_train_batch_size": 8} if epoch_ends else {}  # 4 of 9 prompts a step
    whole = make_trainer(callbacks=[InterruptsEvaluation()], **(options | {"output_dir": str(tmp_path / "whole")}))
    whole.train()
    stopped = make_trainer(callbacks=[InterruptsEvaluation()], **options)
    with pytest.raises(KeyboardInterrupt, match=r"after step 2 of 3; resume_from_checkpoint=.*checkpoint-2 goes"):
        stopped.train()
    assert stopped.state.epoch == (1 if epoch_ends else 0.5)
    assert [folder.name for folder in c.numbered(Path(stopped.args.output_dir))] == ["checkpoint-2"]
    again = make_trainer(**options)
    again.train(resume_from_checkpoint=True)
    assert history(again) == history(whole)


@pytest.mark.parametrize("trainer", [GRPOTrainer, PPOTrainer])
def test_the_state_before_a_loss_that_is_not_finite(make_trainer, monkeypatch, trainer):
    """Is that before its step in all that the step had changed: what is logged, counted, shown and adapted."""
    options = {"max_steps": 4, "logging_steps": 4}
    if trainer is PPOTrainer:
        options |= {"num_ppo_epochs": 1, "adap_kl_ctrl": True, "horizon": 80}
    whole = make_trainer(trainer, **options)
    whole.train()
    broken = make_trainer(trainer, **options)
    compute = broken.compute_loss
    monkeypatch.setattr(
        broken, "compute_loss", lambda *args: compute(*args) * (torch.nan if broken.state.global_step == 2 else 1)
    )
    with pytest.raises(NonFiniteLoss):
        broken.train()
    saved = json.loads(Path(broken.args.output_dir, "checkpoint-2", "completions.json").read_text())
    assert saved["step"] == 1
    again = make_trainer(trainer, **options)
    again.train(resume_from_checkpoint=True)
    assert history(again) == history(whole)
