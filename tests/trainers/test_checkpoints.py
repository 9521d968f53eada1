"""Checkpoints that are whole or not there; and what of a run is in them."""

import dataclasses
import errno
import importlib
import json
import os
import platform
import resource
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import EarlyStoppingCallback, TrainerCallback

from rlkernels.trainers import (
    CheckpointError,
    GRPOConfig,
    GRPOTrainer,
    NonFiniteLoss,
    PPOConfig,
    PPOTrainer,
    SFTConfig,
    SFTTrainer,
)
from rlkernels.trainers.base import checkpoints as c
from rlkernels.trainers.base import lock
from rlkernels.trainers.base import trainer as base_trainer
from rlkernels.trainers.rollouts import collector, experience
from rlkernels.trainers.rollouts.completions import CompletionsCallback

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
        lambda folder: Tokenizer(WordLevel({f"word {i}": i for i in range(9000)})).save(f"{folder}/x"),
    ],
    ids=["torch", "safetensors", "python", "tokenizers"],
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


# Checkpoints of trainers

PROMPTS = [{"prompt": "ab" + "c" * (i % 5) + "d"} for i in range(9)]


def vowels(completions, **kwargs):
    return [sum(letter in "aeiou" for letter in text) / (1 + len(text)) for text in completions]


@pytest.fixture
def make_trainer(make_model, tokenizer, run_options):
    def make(trainer=GRPOTrainer, callbacks=None, **options):
        config = GRPOConfig if trainer is GRPOTrainer else PPOConfig
        own = {"num_generations": 2, "max_completion_length": 4} if trainer is GRPOTrainer else {"response_length": 4}
        options = {**run_options, "per_device_train_batch_size": 4, "learning_rate": 3e-3, **own, **options}
        rows, reward = options.pop("rows", PROMPTS), options.pop("reward", vowels)
        return trainer(make_model(), reward, config(**options), rows, PROMPTS[:2], tokenizer, callbacks=callbacks)

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
    """Checkpoints hold the count of early stopping: a run that is killed at each step stops where the whole run did."""
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


# What a checkpoint holds is looked at before anything of it is used


@pytest.fixture
def saved(make_trainer):
    """A trainer whose run has stopped amid the steps of a batch of completions, and its checkpoint."""
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "num_iterations": 2, "beta": 0.1}
    trainer = make_trainer(callbacks=[Breaks()], **options)
    with pytest.raises(Killed):
        trainer.train()
    return lambda **others: make_trainer(**{**options, **others}), Path(trainer.args.output_dir, "checkpoint-1")


def refused(trainer, checkpoint) -> str:
    with pytest.raises(ValueError, match=r"^resume_from_checkpoint ") as error:
        trainer.train(resume_from_checkpoint=checkpoint if checkpoint is True else str(checkpoint))
    assert "\n" not in str(error.value) and trainer.state.global_step <= 1
    return str(error.value)


def test_a_changed_byte_is_seen(saved, monkeypatch):
    """In the middle of any file of it; with True it is passed over."""
    make, folder = saved
    trainer, warnings = make(), []
    monkeypatch.setattr(c.logger, "warning", warnings.append)
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != c.MANIFEST]
    names = {path.relative_to(folder).as_posix() for path in files}
    assert names > {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "rollouts_0.pth"}
    assert names > {"completions.json", "tokenizer.json", "reference/model.safetensors", "trainer_state.json"}
    for file in files:
        content = file.read_bytes()
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        name = file.relative_to(folder).as_posix()
        assert f"the content of {name} is not what was written" in refused(trainer, folder)
        file.write_bytes(content)
    file.write_bytes(bytes(len(content)))
    assert refused(trainer, True).endswith("there is no whole checkpoint in " + trainer.args.output_dir)
    assert len(warnings) == 1 and f"{folder} (the content of {name} is not" in warnings[0]
    file.write_bytes(content)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda manifest: None, "want a JSON object; got a NoneType"),
        (lambda manifest: [manifest], "want a JSON object; got a list"),
        (lambda manifest: 3, "want a JSON object; got a int"),
        (lambda manifest: {"files": manifest["files"]}, "'written' must be a time in seconds; got None"),
        (lambda manifest: manifest | {"written": float("nan")}, "'written' must be a time in seconds; got nan"),
        (lambda manifest: manifest | {"written": [1]}, "'written' must be a time in seconds; got [1]"),
        (lambda manifest: {"written": 1.0}, "'files' must be an object of sizes by path; got None"),
        (lambda manifest: manifest | {"files": {}}, "'files' must be an object of sizes by path; got {}"),
        (lambda manifest: manifest | {"files": {"../x": 1}}, "'files' has '../x', which is no path within the folder"),
        (lambda manifest: manifest | {"files": {"/x": 1}}, "'files' has '/x', which is no path within the folder"),
        (lambda manifest: manifest | {"files": {"x\n": 1}}, r"'files' has 'x\n', which is no path within the folder"),
        (lambda manifest: manifest | {"files": {"x": True}}, "'files' must give the size of x; got True"),
        (lambda manifest: manifest | {"files": {"x": -1}}, "'files' must give the size of x; got -1"),
        (
            lambda manifest: manifest | {"sha256": None},
            "'sha256' must be an object with the paths of 'files'; got None",
        ),
        (lambda manifest: manifest | {"sha256": {}}, "'sha256' must be an object with the paths of 'files'; got {}"),
        (
            lambda manifest: manifest | {"sha256": dict.fromkeys(manifest["files"], 3)},
            "'sha256' must give text for within/model; got 3",
        ),
    ],
)
def test_a_manifest_that_is_none(tmp_path, change, why):
    folder = write(tmp_path / "checkpoint-1")
    whole = write(tmp_path / "checkpoint-2")
    manifest = json.loads((folder / c.MANIFEST).read_text())
    (folder / c.MANIFEST).write_text(json.dumps(change(manifest)))
    with pytest.raises(ValueError) as error:
        c.check(folder)
    assert str(error.value) == (
        f"resume_from_checkpoint {folder}: not a whole checkpoint: its {c.MANIFEST} cannot be read: {why}; "
        f"the last whole one is {whole}"
    )
    c.rotate(tmp_path, 1, [whole])
    assert c.last_checkpoint(tmp_path) == whole and folder.is_dir()


def test_a_manifest_that_cannot_be_read_or_leaves_something_out(tmp_path):
    folder = write(tmp_path / "checkpoint-1", name="model.safetensors")
    manifest = json.loads((folder / c.MANIFEST).read_text())
    long = "x" * 300
    for text, why in (
        ("[" * 100_000, "it is nested too deeply"),
        ("9" * 10_000, "cannot be read"),
        (json.dumps(manifest | {"files": {long: 1}, "sha256": {long: ""}}), "File name too long"),
    ):
        (folder / c.MANIFEST).write_text(text)
        assert why in c.fault(folder) and "\n" not in c.fault(folder)
    (folder / c.MANIFEST).write_text(json.dumps(manifest))
    assert c.is_whole(folder)
    for name in ("eval_results.json", "notes.txt", "samples/results.json", "._model.safetensors"):  # which no run reads
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    assert c.is_whole(folder)
    for name in ("model.safetensors.index.json", "adapter_config.json", "trainer_state.json", "completions.json"):
        (folder / name).write_text("{}")
        assert c.fault(folder) == f"'{name}' is not in its manifest.json"
        (folder / name).unlink()
    (folder / "optimizer.pt").write_text("of another run")
    assert c.fault(folder) == "'optimizer.pt' is not in its manifest.json"


def test_one_of_before_contents_were_sealed_is_read(saved, monkeypatch):
    """And told; it does not tell for what its completions were sampled, either."""
    make, folder = saved
    (folder / "settings.json").unlink()
    c.seal(folder)
    manifest = json.loads((folder / c.MANIFEST).read_text())
    del manifest["sha256"], manifest["files"][c.MANIFEST]
    (folder / c.MANIFEST).write_text(json.dumps(manifest))
    warnings: list[str] = []
    monkeypatch.setattr(c.logger, "warning", warnings.append)
    trainer = make()
    trainer.train(resume_from_checkpoint=str(folder))
    assert trainer.state.global_step == 3
    assert warnings == [f"{folder} was written before contents were sealed: the sizes of its files alone are checked"]


def edit(folder: Path, name: str, change) -> None:
    """As a program would that also seals it: what is in it must be looked at all the same."""
    file = folder / name
    content = json.loads(file.read_text()) if name.endswith("json") else torch.load(file, weights_only=False)
    changed = change(content)
    content = content if changed is None else changed
    file.write_text(json.dumps(content)) if name.endswith("json") else torch.save(content, file)
    (folder / c.MANIFEST).unlink()
    c.seal(folder)


def state(content) -> dict:
    return content["state"][0]


OTHERS = {
    "a shorter state": ("optimizer.pt", lambda o: state(o).update(exp_avg=torch.zeros(1)), "exp_avg of parameter 0 "),
    "a longer state": ("optimizer.pt", lambda o: state(o).update(exp_avg_sq=torch.zeros(9, 9, 9)), "exp_avg_sq of par"),
    "another dtype": ("optimizer.pt", lambda o: state(o).update(exp_avg=state(o)["exp_avg"].long()), "is int64 ["),
    "no tensor": ("optimizer.pt", lambda o: state(o).update(exp_avg=3.0), "exp_avg of parameter 0 in its optimizer is"),
    "many steps": ("optimizer.pt", lambda o: state(o).update(step=torch.zeros(4)), "step of parameter 0 in its opti"),
    "a state without steps": ("optimizer.pt", lambda o: state(o).pop("step") and None, "no step of parameter 0"),
    "a state alone": ("optimizer.pt", lambda o: o["state"].update({99: {"step": 1}}), "a state of parameter 99"),
    "fewer parameters": ("optimizer.pt", lambda o: o["param_groups"][0]["params"].pop() and None, "parameters in its"),
    "another optimizer": (
        "optimizer.pt",
        lambda o: o["param_groups"][0].pop("betas") and None,
        "its optimizer is another: its groups have no betas",
    ),
    "an option of text": ("optimizer.pt", lambda o: o["param_groups"][0].update(eps="x"), "optimizer.eps is str; want"),
    "no optimizer": ("optimizer.pt", lambda o: [1], "its optimizer and scheduler cannot be loaded: "),
    "scheduler": ("scheduler.pt", lambda s: s.update(base_lrs=[0.1]), "scheduler.pt.base_lrs has 1 values; want 2"),
    "scheduler of text": ("scheduler.pt", lambda s: s.update(last_epoch="x"), "scheduler.pt.last_epoch is str; want"),
    "random state": (
        "rng_state.pth",
        lambda r: r.update(numpy=(*r["numpy"][:2], 10**6, *r["numpy"][3:])),
        "its random states cannot be loaded: ",
    ),
    "random state of torch": ("rng_state.pth", lambda r: r.update(cpu=r["cpu"][:9]), "its random states cannot be"),
    "rollouts": ("rollouts_0.pth", lambda r: {"rows": ""}, "its completions cannot be loaded: KeyError: 'rollouts'"),
    "completions": ("completions.json", lambda c: [], "its completions cannot be loaded: TypeError"),
    "state": ("trainer_state.json", lambda s: s.update(global_step="1"), "its trainer_state.json cannot be read: "),
    "logs": ("trainer_state.json", lambda s: s.update(log_history=[3]), "state.log_history must be a list of"),
    "batch of null": ("trainer_state.json", lambda s: s.update(train_batch_size=None), "state.train_batch_size is"),
    "callbacks": ("trainer_state.json", lambda s: s.update(stateful_callbacks={"X": 3}), "X has no attributes"),
}


@pytest.mark.parametrize("name, change, why", OTHERS.values(), ids=OTHERS)
def test_what_does_not_fit_is_refused(saved, name, change, why):
    """Before the fused AdamW writes past its end, and in one line."""
    make, folder = saved
    edit(folder, name, change)
    assert why in refused(make(), folder)


@pytest.mark.parametrize("peft", [False, True], ids=["model", "adapters"])
@pytest.mark.parametrize(
    "change, why",
    [
        (lambda name, value: (name, value.half()), " is float16 ["),
        (lambda name, value: (name, value[:, :1].contiguous()), "size mismatch"),
        (lambda name, value: (name + "x", value), " in one alone"),
        (lambda name, value: None, " in one alone"),
    ],
    ids=["dtype", "shape", "name", "missing"],
)
def test_weights_that_do_not_fit_are_refused(make_model, tokenizer, run_options, peft, change, why):
    config = None
    if peft:
        config = pytest.importorskip("peft").LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")

    def make():
        args = SFTConfig(**run_options | {"save_strategy": "steps", "save_steps": 1, "max_steps": 2})
        return SFTTrainer(make_model(), args, [{"text": "abcd"}] * 8, None, tokenizer, peft_config=config)

    make().train()
    folder = Path(run_options["output_dir"]) / "checkpoint-1"
    file = folder / ("adapter_model.safetensors" if peft else "model.safetensors")
    weights = load_file(file)
    first = next(name for name in weights if "q_proj" in name)
    changed = change(first, weights.pop(first))
    save_file(weights | ({} if changed is None else dict([changed])), file, metadata={"format": "pt"})
    (folder / c.MANIFEST).unlink()
    c.seal(folder)
    assert (why if why != "size mismatch" else "float32 [") in refused(make(), folder)


def test_a_part_of_sharded_weights_that_lacks_some_is_refused(saved, make_model):
    """Their index alone names all."""
    make, folder = saved
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    make_model().save_pretrained(folder, max_shard_size="30KB", state_dict=weights)
    first, *_ = sorted(folder.glob("model-*.safetensors"))
    part = load_file(first)
    (folder / c.MANIFEST).unlink()
    c.seal(folder)
    make().train(resume_from_checkpoint=str(folder))
    name = sorted(part)[0]
    kept = {other: value for other, value in part.items() if other != name}
    for changed, why in (
        (kept, f"of another model: {name} in one alone"),
        ({**part, name: part[name].half()}, f"{name} is float16 "),
        ({**part, name: part[name][:1].contiguous()}, f"{name} is float32 [1"),
    ):
        save_file(changed, first, metadata={"format": "pt"})
        (folder / c.MANIFEST).unlink()
        c.seal(folder)
        assert why in refused(make(), folder)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("optimizer.pt", ": it has no optimizer.pt"),
        ("scheduler.pt", ": it has no scheduler.pt"),
        ("rng_state.pth", ": its random states cannot be loaded: FileNotFoundError: "),
        ("trainer_state.json", ": its trainer_state.json cannot be read: FileNotFoundError: "),
        ("model.safetensors", ": its weights cannot be loaded: ValueError: Can't find a valid checkpoint"),
        ("completions.json", ": its completions cannot be loaded: FileNotFoundError: "),
    ],
)
def test_what_is_left_out_is_missed(saved, name, why):
    """Also where the manifest does not list it; the Trainer would go on with a new one."""
    make, folder = saved
    for file in (name, c.MANIFEST):
        (folder / file).unlink()
    c.seal(folder)
    assert f"{folder}{why}" in refused(make(), folder)


def test_a_reference_that_lacks_weights_is_refused(saved):
    """It would be filled up with random numbers."""
    make, folder = saved
    file = folder / "reference" / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.0.self_attn.q_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    (folder / c.MANIFEST).unlink()
    c.seal(folder)
    assert "a reference of another kind: model.layers.0.self_attn.q_proj.weight" in refused(make(), folder)


def test_the_best_model_is_that_which_was_written(make_trainer, monkeypatch):
    class Damages(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            raise AssertionError

        def on_save(self, args, state, control, **kwargs):
            file = Path(state.best_model_checkpoint or "", "model.safetensors")
            if state.best_model_checkpoint is not None:
                file.write_bytes(file.read_bytes()[:-1] + b"\x01")

    options = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 1}
    trainer = make_trainer(callbacks=[Damages()], load_best_model_at_end=True, **options)
    with pytest.raises(CheckpointError, match=r"load_best_model_at_end: .*the content of model.safetensors is"):
        trainer.train()


# One run in a folder


def test_a_second_run_into_a_folder_is_refused(tmp_path):
    """While the first is there; not when it was killed, which a process that it has forked outlives."""
    folder = tmp_path / "run"
    told, tells = os.pipe()
    run = os.fork()
    if not run:
        with lock.Lock(folder):
            child = os.fork()
            if child:
                os.write(tells, str(child).encode())
            time.sleep(60)
        os._exit(0)
    child = int(os.read(told, 20))
    try:
        with pytest.raises(lock.FolderInUse) as error:
            lock.Lock(folder).__enter__()
        holder = f"process {run} on {platform.node()}"
        assert str(error.value) == f"output_dir {folder}: another run writes there ({holder})"
        os.kill(run, signal.SIGKILL)
        os.waitpid(run, 0)
        os.kill(child, 0)
        with lock.Lock(folder):
            assert [path.name for path in folder.iterdir()] == [".lock"]
        assert list(folder.iterdir()) == []
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_lock_whose_file_was_closed_is_given_back(tmp_path):
    """By code of the user that closes all files, as a daemon does."""
    held = lock.Lock(tmp_path)
    with held:
        os.close(held._held)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["SFT", "Reward", "DPO", "PPO", "GRPO"])
def test_every_trainer_is_alone_in_its_folder(method, run_options, monkeypatch):
    """In training and in saving; what the other run is writing stays."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    build = importlib.import_module("survival_worker").build
    folder = Path(run_options["output_dir"])
    trainer = build(method, str(folder))
    unfinished = folder / ".checkpoint-7.unfinished"
    unfinished.mkdir(parents=True)
    with lock.Lock(folder):
        for attempt in (trainer.train, trainer.save_model):
            with pytest.raises(CheckpointError, match=f"^output_dir {folder}: another run writes there"):
                attempt()
        assert unfinished.is_dir() and not (folder / "config.json").exists()
    trainer.save_model()
    assert (folder / "config.json").is_file() and not (folder / ".lock").exists()


@pytest.mark.parametrize("fails", ["open", "flock"])
def test_a_folder_that_cannot_be_locked_is_told(tmp_path, monkeypatch, fails):
    """Read-only ones, and file systems without locks."""
    import fcntl

    warnings: list[str] = []
    monkeypatch.setattr(lock.logger, "warning", warnings.append)

    def fail(*args):
        raise OSError(errno.EROFS if fails == "open" else errno.ENOLCK, os.strerror(errno.EROFS))

    monkeypatch.setattr(*(os, "open") if fails == "open" else (fcntl, "flock"), fail)
    with lock.Lock(tmp_path):
        pass
    monkeypatch.undo()
    assert warnings == [
        f"{tmp_path} cannot be locked (Read-only file system): see to it that no other run writes there"
    ]


# What cannot be written


@pytest.mark.parametrize(
    "writes, number",
    [
        *(("tokenizer", number) for number in (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.ENAMETOOLONG)),
        *((writes, errno.ENOSPC) for writes in ("config", "state", "folder")),
    ],
)
def test_whatever_cannot_be_written_is_one_line(make_trainer, monkeypatch, writes, number):
    """What writes in Rust raises a plain Exception. The checkpoint before stays, and nothing else is left."""
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(**options)
    folder, why = Path(trainer.args.output_dir), os.strerror(number)

    def fail(*args, **kwargs):
        if trainer.state.global_step == 2:
            raise Exception(f"{why} (os error {number})") if writes == "tokenizer" else OSError(number, why)
        return original(*args, **kwargs)

    owner, name = {
        "tokenizer": (trainer.processing_class, "save_pretrained"),
        "config": (type(trainer.model.config), "save_pretrained"),
        "state": (trainer, "_save_state"),
        "folder": (Path, "mkdir"),
    }[writes]
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, fail)
    stays = f"{folder / 'checkpoint-1'} stays, and resume_from_checkpoint goes on from it"
    with pytest.raises(CheckpointError) as error:
        trainer.train()
    assert str(error.value) == f"{folder / 'checkpoint-2'} could not be written: {why}; {stays}"
    if writes in ("tokenizer", "config"):
        with pytest.raises(CheckpointError) as error:
            trainer.save_model()
        assert str(error.value) == f"the model in {folder} could not be written: {why}; {stays}"
    monkeypatch.undo()
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-1", "completions"]
    assert c.fault(folder / "checkpoint-1", contents=True) is None


def test_what_cannot_be_removed_costs_a_warning(tmp_path, monkeypatch):
    folders = [write(tmp_path / f"checkpoint-{step}") for step in (1, 2)]
    warnings: list[str] = []
    monkeypatch.setattr(c.logger, "warning", warnings.append)

    def fail(*args):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "rename", fail)
    c.rotate(tmp_path, 1, [folders[1]])
    assert warnings == [f"{folders[0]} could not be removed (save_total_limit): Permission denied"]


# What the completions of a checkpoint are of


def consonants(completions, **kwargs):
    return [1.0 - reward for reward in vowels(completions)]


OFTEN = {"per_device_train_batch_size", "num_iterations", "num_ppo_epochs", "seed", "temperature", "rows", "reward"}
SHAPING = {
    GRPOTrainer: [
        {"per_device_train_batch_size": 2},
        {"per_device_train_batch_size": 8},
        {"gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"steps_per_generation": 2},
        {"num_generations": 4},
        {"num_iterations": 4},
        {"seed": 7},
        {"shuffle_dataset": False},
        {"max_completion_length": 6},
        {"temperature": 0.5},
        {"beta": 0.2},
        {"reward_weights": [2.0]},
        {"scale_rewards": "none"},
        {"advantage": "rloo"},
        {"mask_truncated_completions": True},
        {"importance_sampling_correction": True},
        {"overlong_buffer_length": 2},
        {"reward": consonants},
        {"rows": [{"prompt": row["prompt"] + "x"} for row in PROMPTS]},
        {"rows": [{**row, "answer": "b"} for row in PROMPTS]},
        {"rows": PROMPTS[::-1]},
        {"rows": PROMPTS[:8]},
    ],
    PPOTrainer: [
        {"per_device_train_batch_size": 8},
        {"num_ppo_epochs": 4},
        {"num_mini_batches": 2},
        {"kl_coef": 0.5},
        {"gamma": 0.5},
        {"whiten_rewards": True},
        {"response_length": 5},
        {"reward": consonants},
    ],
}


@pytest.mark.parametrize(
    "trainer, change",
    [
        pytest.param(
            trainer,
            change,
            id=f"{trainer.__name__}-{'-'.join(change)}-{index}",
            marks=() if OFTEN & change.keys() else pytest.mark.thorough,
        )
        for trainer, changes in SHAPING.items()
        for index, change in enumerate(changes)
    ],
)
def test_completions_of_other_options_are_sampled_anew(make_trainer, monkeypatch, trainer, change):
    """By a run that goes on amid the steps that learn from them; a warning names what has changed."""
    monkeypatch.setattr(CompletionsCallback, "on_log", lambda *args, **kwargs: None)
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    options |= {"num_iterations": 2, "beta": 0.1} if trainer is GRPOTrainer else {"num_ppo_epochs": 2}
    first = make_trainer(trainer, callbacks=[Breaks()], **options)
    with pytest.raises(Killed):
        first.train()
    again, warnings, sampled = make_trainer(trainer, **{**options, **change}), [], []
    monkeypatch.setattr(experience.logger, "warning", warnings.append)
    monkeypatch.setattr(base_trainer.logger, "warning", warnings.append)
    make_experience = again.make_experience

    def note(inputs):
        sampled.append((again.state.global_step, len(inputs)))
        return make_experience(inputs)

    monkeypatch.setattr(again, "make_experience", note)
    again.train(resume_from_checkpoint=str(Path(first.args.output_dir, "checkpoint-1")))
    rows = again.args.per_device_train_batch_size * getattr(again.args, "steps_per_generation", 1)
    wanted = [(1, rows), (2, rows)] if again.collector.buffer.steps == 2 else [(1, rows)]
    assert sampled == wanted and again.state.global_step == 3
    (anew,) = [each for each in warnings if "completed anew" in each]
    names = {"reward": "reward_funcs", "rows": "rows of train_dataset"}
    assert all(names.get(name, name) in anew for name in change) and "\n" not in anew
    moves = {"per_device_train_batch_size", "gradient_accumulation_steps"} & change.keys() or "rows" in change
    moves = moves and (change.get("rows") is None or len(change["rows"]) != len(PROMPTS))
    placed = [each for each in warnings if "this run goes on in the data where 1 steps of its own would have" in each]
    assert len(placed) == bool(moves or "seed" in change)


@pytest.mark.parametrize(
    "change",
    [
        {"epsilon": 0.3, "learning_rate": 1e-2, "loss_type": "grpo", "max_steps": 4},
        {"logging_steps": 2, "on_reward_error": "none", "num_generations_eval": 2, "log_completions": False},
    ],
)
def test_completions_serve_on_where_they_are_the_same(saved, monkeypatch, change):
    make, folder = saved
    trainer, sampled = make(**change), []
    make_experience = trainer.make_experience
    monkeypatch.setattr(
        trainer, "make_experience", lambda inputs: sampled.append(trainer.state.global_step) or make_experience(inputs)
    )
    trainer.train(resume_from_checkpoint=str(folder))
    assert sampled == [2]


def test_completions_serve_on_in_a_run_that_is_resumed_twice(make_trainer, monkeypatch):
    """Both times amid the steps that learn from them."""
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "num_iterations": 3}
    sampled = []
    for checkpoint in (None, "checkpoint-1", "checkpoint-2"):
        trainer = make_trainer(callbacks=[Breaks()], **options)
        make = trainer.make_experience
        monkeypatch.setattr(trainer, "make_experience", lambda rows, make=make: sampled.append(len(rows)) or make(rows))
        with pytest.raises(Killed):
            trainer.train(checkpoint and str(Path(trainer.args.output_dir, checkpoint)))
    assert sampled == [4]


def test_what_completions_do_not_depend_on_is_an_option():
    options = {each.name for config in (GRPOConfig, PPOConfig) for each in dataclasses.fields(config)}
    assert options > collector.LATER
