"""`HFTrainer`: which of transformers' private methods it builds on, its hooks, and what its checkpoints keep."""

import ast
import functools
import importlib.util
import inspect
import json
from pathlib import Path

import pytest
import torch
import transformers
from transformers import TrainerCallback

from rlkernels import trainers
from rlkernels.trainers.base import hf, hf_private
from rlkernels.trainers.base.checkpoints import BadCheckpoint
from rlkernels.trainers.base.kept import Kept, State, reading

FOLDER = Path(trainers.__file__).parent
PROMPTS = [{"prompt": "ab" + "c" * (i % 5) + "d"} for i in range(9)]
TEXTS = [{"prompt": "ab" * (i % 4) + ":", "completion": "cdefgh"[: 1 + i % 6]} for i in range(16)]


def private_names() -> set[str]:
    """Methods of transformers.Trainer and attributes that it sets."""
    tree = ast.parse(inspect.getsource(transformers.Trainer))
    found = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
    }
    return {name for name in found | {*dir(transformers.Trainer)} if name[0] == "_" and name[1] != "_"}


def names_in(path: Path) -> set[str]:
    nodes = [*ast.walk(ast.parse(path.read_text()))]
    called = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    return called | {node.name for node in nodes if isinstance(node, ast.FunctionDef)}


def test_one_file_touches_private_methods_of_transformers_trainer():
    private = private_names()
    assert {"_save", "_run_epoch", "_tr_loss", "_train_batch_size"} < private
    touched = {path.relative_to(FOLDER).as_posix(): private & names_in(path) for path in FOLDER.rglob("*.py")}
    assert [name for name, found in touched.items() if found] == ["base/hf.py"]
    known = {*hf_private.METHODS, *hf_private.ATTRIBUTES}
    assert touched["base/hf.py"] == known - {"save_model"}


def test_no_trainer_swaps_its_model():
    for path in (*FOLDER.glob("*.py"), FOLDER / "base" / "hf.py", FOLDER / "base" / "trainer.py"):
        assert "self.model = " not in path.read_text(), path


def changed_signature(self, folder, *, state_dict=None):
    pass


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        (
            "_save",
            changed_signature,
            "Trainer._save takes (self, folder, *, state_dict=None), but (self, output_dir=None, "
            "state_dict=None) was expected",
        ),
        ("_load_scaler", None, "Trainer._load_scaler does not exist, but (self, checkpoint) was expected"),
        (
            "_inner_training_loop",
            changed_signature,
            "Trainer._inner_training_loop does not set _globalstep_last_logged; Trainer._inner_training_loop does not "
            "set _total_loss_scalar; Trainer._inner_training_loop does not set _tr_loss",
        ),
    ],
)
def test_another_transformers_is_refused_at_import(monkeypatch, name, value, why):
    if value is None:
        monkeypatch.delattr(transformers.Trainer, name)
    else:
        monkeypatch.setattr(transformers.Trainer, name, value)
    spec = importlib.util.spec_from_file_location("rlkernels.trainers.base.hf_again", hf.__file__)
    with pytest.raises(ImportError) as error:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert str(error.value) == (
        f"rlkernels.trainers supports transformers 5.17 to 5.23; got {transformers.__version__}, in which {why}: "
        "pip install 'transformers>=5.17,<5.24'"
    )


def test_methods_that_another_library_has_wrapped_are_accepted(monkeypatch):
    for name in ("__init__", "_inner_training_loop", "_save"):
        own = getattr(transformers.Trainer, name)
        monkeypatch.setattr(transformers.Trainer, name, functools.wraps(own)(lambda *args, own=own: own(*args)))
    hf_private.verify(transformers.Trainer)


# gradient_accumulation_steps


class Notes(TrainerCallback):
    """What each event of a run sees."""

    def __init__(self):
        self.seen = {}

    def __getattribute__(self, name):
        if not name.startswith("on_"):
            return super().__getattribute__(name)

        def note(args, state, control, **kwargs):
            self.seen.setdefault(name, set()).add(args.gradient_accumulation_steps)

        return note


@pytest.mark.parametrize("method", ["SFT", "PPO", "GRPO"])
def test_reports_show_the_given_gradient_accumulation_steps(method, make_model, tokenizer, run_options):
    """Callbacks, loggers and saved arguments; transformers' loop takes one batch of ours for one step."""
    options = {**run_options, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 3}
    options |= {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    own = {"GRPO": {"num_generations": 2, "max_completion_length": 2}, "PPO": {"response_length": 2}}
    options |= own.get(method, {})
    rows = TEXTS if method == "SFT" else PROMPTS
    reward = [] if method == "SFT" else [lambda completions, **columns: [len(text) for text in completions]]
    args, notes = getattr(trainers, f"{method}Config")(**options), Notes()
    make = getattr(trainers, f"{method}Trainer")
    trainer = make(make_model(), *reward, args, rows, rows[:2], tokenizer, callbacks=[notes])
    sizes = []
    take = trainer.training_step
    trainer.training_step = lambda model, inputs, *others: sizes.append(len(inputs)) or take(model, inputs, *others)
    trainer.train()
    assert trainer.state.global_step == 3 and sizes == [8] * 3
    assert {"on_init_end", "on_train_begin", "on_step_end", "on_log", "on_evaluate", "on_save"} < notes.seen.keys()
    assert set.union(*notes.seen.values()) == {4}
    assert trainer.args.gradient_accumulation_steps == args.gradient_accumulation_steps == 4
    assert trainer.get_total_train_batch_size(trainer.args) == 8
    trainer.save_model()
    for file in Path(trainer.args.output_dir).rglob("training_args.bin"):
        assert torch.load(file, weights_only=False).gradient_accumulation_steps == 4
    again = make(make_model(), *reward, args, rows, rows[:2], tokenizer)
    again.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-2")
    assert [log["loss"] for log in again.state.log_history if "loss" in log] == [
        log["loss"] for log in trainer.state.log_history if "loss" in log
    ]


# What a checkpoint keeps


class Counter:
    def __init__(self, state=None):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


@pytest.mark.parametrize(
    ("file", "state"),
    [("a.json", {"x": [1, None]}), ("a.json", 0.05), ("a.pth", {"x": torch.ones(2)}), ("a", "text"), ("a.txt", "text")],
)
def test_what_is_kept_comes_back(tmp_path, file, state):
    (tmp_path / "unlogged_0.pth").touch()
    Kept(file, Counter(state), "its count").save(tmp_path, process=0, writes=True)
    found = Counter("older")
    Kept(file, found, "its count").load(tmp_path, process=0)
    assert str(found.state) == str(state) and type(found.state) is type(state)


def test_where_there_is_no_state_there_is_no_file(tmp_path):
    (tmp_path / "unlogged_0.pth").touch()
    kept = Kept("a.json", Counter(None), "its count")
    kept.save(tmp_path, process=0, writes=True)
    assert not (tmp_path / "a.json").exists()
    kept.owner.state = 3
    kept.load(tmp_path, process=0)
    assert kept.owner.state is None


def test_each_process_has_a_file_or_one_writes_for_all(tmp_path):
    """If fewer ranks saved, one that is new reads the file of another."""
    for process in range(2):
        for file in ("each_{process}.json", "all.json", "unlogged_{process}.pth"):
            Kept(file, Counter(process), "its count").save(tmp_path, process, writes=process == 0)
    assert {path.name for path in tmp_path.glob("*.json")} == {"each_0.json", "each_1.json", "all.json"}
    assert json.loads((tmp_path / "all.json").read_text()) == 0
    counter = Counter()
    Kept("each_{process}.json", counter, "its count").load(tmp_path, process=3)
    assert counter.state == 1


def test_what_cannot_be_loaded_names_what_it_is(tmp_path):
    (tmp_path / "unlogged_0.pth").touch()
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(BadCheckpoint) as error, reading(tmp_path, "its count"):
        Kept("a.json", Counter(), "its count").load(tmp_path, process=0)
    assert str(error.value).startswith(
        f"resume_from_checkpoint {tmp_path}: its count cannot be loaded: JSONDecodeError"
    )
    with pytest.raises(BadCheckpoint, match=r": another run's$"), reading(tmp_path, "its count"):
        raise BadCheckpoint(tmp_path, "another run's")


def test_a_trainer_keeps_what_is_registered(make_model, tokenizer, run_options):
    options = {**run_options, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}

    def make():
        trainer = trainers.SFTTrainer(make_model(), trainers.SFTConfig(**options), TEXTS, None, tokenizer)
        steps = []
        trainer.keep("steps.json", State(lambda: [*steps, trainer.state.global_step], steps.extend), "its steps")
        return trainer, steps

    make()[0].train()
    trainer, steps = make()
    trainer.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-1")
    assert steps == [1]
    trainer.save_checkpoint()
    assert json.loads(Path(trainer.args.output_dir, "checkpoint-2", "steps.json").read_text()) == [1, 2]


def test_what_a_step_has_changed_is_undone(make_model, tokenizer, run_options):
    """By whatever has state, if the loss is not finite."""
    trainer = trainers.SFTTrainer(make_model(), trainers.SFTConfig(**run_options, max_steps=1), TEXTS, None, tokenizer)
    counter, streams = Counter(1), []
    trainer.undone.append(counter)
    compute, take = trainer.compute_loss, trainer.training_step

    def breaks(*args):
        counter.state = torch.rand(1).item() + 2
        return compute(*args) * torch.nan

    def training_step(*args):
        streams.append(torch.get_rng_state())
        return take(*args)

    trainer.compute_loss, trainer.training_step = breaks, training_step
    with pytest.raises(trainers.NonFiniteLoss):
        trainer.train()
    assert counter.state == 1 and trainer.state.num_input_tokens_seen == 0 and not trainer.metrics.sums
    assert torch.equal(torch.get_rng_state(), streams[0])
