"""One process of `test_stopping.py`: a run that is stopped and goes on, and one whose second process cannot write."""

import errno
import os
import shutil
import signal
import sys
from pathlib import Path

import torch

from rlkernels.trainers import CheckpointError, GRPOConfig, GRPOTrainer, Terminated
from rlkernels.trainers.base import checkpoints
from tiny_model import build_model, build_tokenizer

RUNTIME = ("_runtime", "_per_second")
SECOND = os.environ["RANK"] == "1"
STOPS: list = []


def build(folder: Path, max_steps: int = 5) -> GRPOTrainer:
    args = GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        num_generations=4,
        steps_per_generation=2,
        max_completion_length=6,
        learning_rate=3e-3,
        max_steps=max_steps,
        logging_steps=3,
        save_steps=2,
        eval_strategy="steps",
        eval_steps=5,
        bf16=False,
        use_cpu=True,
        ddp_backend="gloo",
        report_to="none",
        activation_checkpointing=False,
        num_completions_to_print=0,
        disable_tqdm=True,
    )
    rows = [{"prompt": "ab" + "c" * i} for i in range(8)]
    return GRPOTrainer(build_model(), vowels, args, rows, rows[:2], processing_class=build_tokenizer())


def vowels(completions, trainer_state, **columns):
    """In the first step of a run that is to be stopped the second process alone is asked to."""
    if SECOND and STOPS and trainer_state.global_step == 0:
        os.kill(os.getpid(), signal.SIGTERM)
    return [float(sum(letter in "aeiou" for letter in text)) for text in completions]


def results(trainer: GRPOTrainer) -> tuple[torch.Tensor, list]:
    weights = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
    logs = [
        {name: value for name, value in log.items() if not name.endswith(RUNTIME)} for log in trainer.state.log_history
    ]
    return weights, logs


def checkpoint_of_one(folder: Path, copy: Path) -> None:
    """As if the first process had been alone."""
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*_1.pth", checkpoints.MANIFEST))
    checkpoints.seal(copy)


def save_model(trainer: GRPOTrainer, folder: Path) -> list[str]:
    """What is in it, where the second process comes while the first is writing."""
    save = trainer._save_whole

    def waiting(aside: str) -> None:
        save(aside)
        torch.distributed.barrier()
        torch.distributed.barrier()

    if SECOND:
        torch.distributed.barrier()
        trainer.save_model(str(folder))
        torch.distributed.barrier()
    else:
        trainer._save_whole = waiting
        trainer.save_model(str(folder))
    torch.distributed.barrier()
    return [path.name for path in folder.iterdir()]


def main(folder: Path) -> None:
    found: dict = {"logs": {}}
    trainer = build(folder / "whole")
    trainer.train()
    found["whole"], found["logs"]["whole"] = results(trainer)

    trainer = build(folder / "stopped")
    STOPS.append("now")
    try:
        trainer.train()
    except Terminated as error:
        found["stopped"] = (type(error).__name__, trainer.state.global_step)
    STOPS.clear()
    trainer = build(folder / "stopped")
    trainer.train(resume_from_checkpoint=True)
    found["resumed"], found["logs"]["resumed"] = results(trainer)

    if not SECOND:
        checkpoint_of_one(folder / "whole" / "checkpoint-5", folder / "of_one" / "checkpoint-5")
    trainer = build(folder / "of_one", max_steps=7)
    trainer.train(resume_from_checkpoint=True)
    found["of_one"] = [(log["step"], log["loss"]) for log in results(trainer)[1] if "loss" in log]

    trainer = build(folder / "full")
    if SECOND:

        def full(output_dir):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        trainer._save_rng_state = full
    try:
        trainer.train()
    except CheckpointError as error:
        found["full"] = str(error)
    found["model"] = save_model(trainer, folder / "model")
    found["left"] = [path.name for path in (folder / "full").iterdir() if "checkpoint" in path.name]
    torch.save(found, folder / f"{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
