"""One trainer of `test_survival.py`: a run that nothing interrupts, then runs that are killed at random moments and go
on from their last checkpoint, which must be the same bit for bit.

A run is a child process, forked from one that has imported all it needs and computed nothing."""

import gc
import hashlib
import importlib
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import pyarrow.parquet
import torch

from rlkernels import trainers
from rlkernels.trainers.base import checkpoints
from rlkernels.trainers.base.reporting import CurvesCallback
from tiny_model import build_model, build_tokenizer

RUNTIME = ("_runtime", "_per_second")
PROMPTS = [{"prompt": "ab" + "c" * (i % 5) + "d"} for i in range(9)]
TEXTS = [{"prompt": "ab" * (i % 4) + ":", "completion": "cdefgh"[: 1 + i % 6]} for i in range(14)]
PAIRS = [
    {"prompt": "ab" + "c" * (i % 5), "chosen": "de" * (1 + i % 2), "rejected": "fgh"[: 1 + i % 3]} for i in range(14)
]

# Rows and options of each trainer. With them logs, checkpoints, evaluations, epochs and rollouts fall on other steps.
METHODS = {
    "SFT": (TEXTS, {"save_steps": 2, "logging_steps": 3, "eval_strategy": "epoch"}),
    "Reward": (PAIRS, {"save_steps": 1, "logging_steps": 4, "eval_strategy": "steps", "eval_steps": 3}),
    "DPO": (
        PAIRS,
        {
            "save_steps": 3,
            "logging_steps": 2,
            "logging_strategy": "epoch",
            "sync_ref_model": True,
            "ref_model_sync_steps": 2,
        },
    ),
    "PPO": (
        PROMPTS,
        {
            "save_steps": 1,
            "logging_steps": 4,
            "response_length": 6,
            "num_ppo_epochs": 2,
            "num_mini_batches": 2,
            "adap_kl_ctrl": True,
            "horizon": 80,
            "eval_strategy": "steps",
            "eval_steps": 3,
            "eval_on_start": True,
        },
    ),
    "GRPO": (
        PROMPTS,
        {
            "save_steps": 2,
            "logging_steps": 3,
            "max_completion_length": 6,
            "num_generations": 2,
            "num_iterations": 2,
            "steps_per_generation": 4,
            "beta": 0.1,
        },
    ),
}


def noisy(completions, log_extra, log_metric, **columns):
    """Draws from the streams that a reward function may draw from: a run that goes on has them where they were."""
    log_extra("letters", [np.float32(len(text)) for text in completions])
    log_metric("drawn", random.random())
    return [sum(letter in "aeiou" for letter in text) + random.random() + np.random.rand() for text in completions]


def build(method: str, folder: str):
    rows, options = METHODS[method]
    options = {
        "output_dir": folder,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 3e-3,
        "max_steps": 9,
        "save_total_limit": 2,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "activation_checkpointing": False,
        "token_budget": 64,
        **({"num_completions_to_print": 0} if method in ("PPO", "GRPO") else {}),
        **options,
    }
    model, args = build_model(), getattr(trainers, f"{method}Config")(**options)
    if method == "Reward":
        model = to_classifier(model)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    rewards = [noisy] if method in ("PPO", "GRPO") else []
    trainer = getattr(trainers, f"{method}Trainer")
    return trainer(model, *rewards, args, rows, rows[:3], processing_class=build_tokenizer())


def to_classifier(model):
    from transformers import LlamaForSequenceClassification

    model.config.num_labels = 1
    torch.manual_seed(1)
    classifier = LlamaForSequenceClassification(model.config)
    classifier.model.load_state_dict(model.model.state_dict())
    return classifier


def digest(value) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def as_bytes(value):
    """The values of tensors, not their layout in memory."""
    if isinstance(value, torch.Tensor):
        return value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: as_bytes(each) for key, each in value.items()}
    return [as_bytes(each) for each in value] if isinstance(value, list | tuple) else value


def record_steps(trainer, file: Path) -> None:
    """A line for each step, also those that are taken again."""
    take = trainer.training_step

    def training_step(*args, **kwargs):
        start = {
            "step": trainer.state.global_step,
            "python": digest(random.getstate()),
            "numpy": digest(np.random.get_state()[1].tobytes()),
            "torch": digest(torch.get_rng_state().numpy().tobytes()),
        }
        loss = take(*args, **kwargs)
        sampled = trainer.collector.buffer.experience if trainer.collector else None
        found = {
            **start,
            "loss": loss.item().hex(),
            "sampled": digest(as_bytes(vars(sampled))) if sampled else "",
            "rewards": digest(getattr(trainer, "completions", None)),
            "metrics": digest(as_bytes(trainer.metrics.sums)),
            "seen": trainer.state.num_input_tokens_seen,
        }
        with file.open("a") as stream:
            stream.write(json.dumps(found) + "\n")
        return loss

    trainer.training_step = training_step


# Killing


class Killer:
    """Counts what is written in a folder, and kills this process when it is about to write for the last time."""

    def __init__(self, folder: Path, last: int | None) -> None:
        self.folder, self.last, self.count = str(folder), last, 0
        sys.addaudithook(self.hear)
        # Not told to the hook; and it takes time, of which the disk and not the kill is in need.
        checkpoints.sync = lambda path: self.happens(path)

    def hear(self, event: str, args: tuple) -> None:
        if event == "open":
            if args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self.happens(args[0])
        elif event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"):
            self.happens(args[0])

    def happens(self, path) -> None:
        if isinstance(path, int) or not os.fsdecode(path).startswith(self.folder):
            return
        self.count += 1
        if self.count == self.last:
            os.kill(os.getpid(), signal.SIGKILL)


def fork(function, *args) -> int:
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    try:
        function(*args)
        sys.stdout.flush()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def train(method: str, folder: Path, last: int | None) -> None:
    """As a user would: where there is a checkpoint, from there."""
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    CurvesCallback.on_train_end = lambda *args, **kwargs: None
    output = folder / "run"
    killer = Killer(output, last)
    trainer = build(method, str(output))
    record_steps(trainer, folder / "steps")
    done = trainer.train(resume_from_checkpoint=True if checkpoints.last_checkpoint(output) else None)
    trainer.save_model()
    names = sorted(path.name for path in output.iterdir())
    history = [
        {name: value for name, value in log.items() if not name.endswith(RUNTIME)} for log in trainer.state.log_history
    ]
    tables = {file.name: pyarrow.parquet.read_table(file).to_pydict() for file in output.glob("completions/*.parquet")}
    result = {
        "history": history,
        "names": names,
        "train_loss": done.training_loss,
        "completions": digest(sorted(tables.items())),
        "weights": digest(as_bytes(trainer.model.state_dict())),
        "saved": digest((output / "model.safetensors").read_bytes()),
    }
    modules = [name for name in sys.modules if name.split(".")[0] not in ("__main__", "__mp_main__")]
    (folder / "result").write_text(json.dumps({**result, "writes": killer.count, "modules": modules}))


def wait(child: int) -> bool:
    """Whether it went through; False: it was killed."""
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return False
    assert status == 0, "the run failed"
    return True


def run(method: str, folder: Path, moments: list[tuple[str, float]]) -> dict:
    """With a kill at each of some moments: a write, or a time in seconds. A run that has come through is not killed."""
    folder.mkdir(exist_ok=True)
    for kind, moment in [*moments, ("never", 0)]:
        start = time.monotonic()
        child = fork(train, method, folder, moment if kind == "write" else None)
        if kind == "time":
            time.sleep(max(moment - (time.monotonic() - start), 0))
            os.kill(child, signal.SIGKILL)
        if wait(child):
            break
    steps = [json.loads(line) for line in (folder / "steps").read_text().splitlines()]
    result = json.loads((folder / "result").read_text())
    return {**result, "steps": steps}


def compare(found: dict, whole: dict) -> None:
    expected = {step["step"]: step for step in whole["steps"]}
    for step in found["steps"]:
        assert step == expected[step["step"]], (step, expected[step["step"]])
    assert {step["step"] for step in found["steps"]} == expected.keys()
    for name in whole.keys() - {"steps", "writes", "modules"}:
        assert found[name] == whole[name], (name, found[name], whole[name])


def main(method: str, folder: Path, moments: int) -> None:
    threads = [Path(f"/proc/self/task/{each}/comm").read_text().strip() for each in os.listdir("/proc/self/task")]
    assert set(threads) <= {"python", Path(sys.executable).name, "jemalloc_bg_thd"}, threads  # jemalloc's may be forked
    assert len(threads) <= 2, threads
    whole = run(method, folder / "whole", [])
    for name in whole["modules"]:  # those imported on the way
        if name not in sys.modules:
            try:
                importlib.import_module(name)
            except Exception:
                continue
    gc.freeze()
    start = time.monotonic()
    again = run(method, folder / "again", [])
    duration = time.monotonic() - start
    compare(again, whole)
    print(f"{method}: {duration:.2f} s, {whole['writes']} writes")
    draw = random.Random(method)
    for number in range(moments):
        kinds = ["write" if number % 2 else "time"] + ["write"] * (number % 3 == 0)
        when = [
            (kind, draw.randint(1, whole["writes"]) if kind == "write" else round(draw.uniform(0, duration), 3))
            for kind in kinds
        ]
        try:
            compare(run(method, folder / str(number), when), whole)
        except (AssertionError, OSError) as error:
            print((folder / str(number) / "log").read_text()[-4000:])
            raise AssertionError(f"{method}, killed at {when}: {error}") from None


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
