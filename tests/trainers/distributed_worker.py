"""One process of `test_distributed.py`: trains a tiny model under some options and leaves what it saw in
`<folder>/<rank>.pt`."""

import dataclasses
import json
import os
import sys
from pathlib import Path

import torch

from rlkernels.trainers import GRPOConfig, GRPOTrainer, PPOConfig, PPOTrainer, SFTConfig, SFTTrainer
from tiny_model import build_model, build_tokenizer


def one_group_differs(completions, index, **kwargs):
    """Rewards differ for the first of the two prompts of a step only."""
    return [float(row % 2) if i % 2 == 0 else 1.0 for row, i in enumerate(index)]


def record(function, results: list):
    def recording(*args):
        results.append(function(*args))
        return results[-1]

    return recording


def shortened(engine):
    """Completions of two tokens, so that processes have unequally many."""

    def sample(*args):
        return [dataclasses.replace(each, completion_ids=each.completion_ids[:2]) for each in engine(*args)]

    return sample


def train(folder: str, options: dict) -> dict:
    is_ppo = "num_ppo_epochs" in options
    own = {"response_length": 6} if is_ppo else {"num_generations": 4, "max_completion_length": 6}
    options = {"token_budget": 24} | own | options
    args = (PPOConfig if is_ppo else GRPOConfig)(
        output_dir=folder,
        learning_rate=3e-3,
        max_steps=3,
        logging_steps=1,
        bf16=False,
        use_cpu=True,
        ddp_backend="gloo",
        report_to="none",
        save_strategy="no",
        activation_checkpointing=False,
        shuffle_dataset=False,
        disable_tqdm=True,
        **options,
    )
    # The rows of PPO's second process, which has short prompts and completions, fit in one micro-batch.
    dataset = [{"prompt": "ab" + "c" * (7 - i if is_ppo else i), "index": i} for i in range(8)]
    trainer_class = PPOTrainer if is_ppo else GRPOTrainer
    trainer = trainer_class(build_model(), one_group_differs, args, dataset, dataset[:3], build_tokenizer())
    if is_ppo and os.environ["RANK"] == "1":
        trainer.collector.engine = shortened(trainer.collector.engine)
    rollouts, micro_batches = [], []
    trainer.make_experience = record(trainer.make_experience, rollouts)
    trainer.micro_batches = record(trainer.micro_batches, micro_batches)
    trainer.train()
    return {
        "weights": torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()]),
        "logs": [log for log in trainer.state.log_history if "loss" in log],
        "rollouts": [vars(each) for each in rollouts],
        "micro_batches": [len(each) for each in micro_batches],
        "scored_with_graph": [getattr(each[0], "forward_pass", None) is not None for each in micro_batches],
        "table": trainer.completions,
        "eval": trainer.evaluate(),
    }


def fine_tune(folder: str, processes: int = 1) -> dict:
    """The same rows in each step, and the same evaluation, whatever the number of processes: none has a row for each
    process in the last batch."""
    args = SFTConfig(
        output_dir=folder,
        per_device_train_batch_size=4 // processes,
        per_device_eval_batch_size=6 // processes,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        max_steps=3,
        logging_steps=1,
        bf16=False,
        use_cpu=True,
        ddp_backend="gloo" if processes > 1 else None,
        report_to="none",
        save_strategy="no",
        token_budget=24,
        disable_tqdm=True,
    )
    rows = [{"prompt": "ab" * (i % 4) + ":", "completion": "cdefgh"[: i % 6]} for i in range(24)]
    trainer = SFTTrainer(build_model(), args, rows, rows[:7], build_tokenizer())
    micro_batches: list = []
    trainer.micro_batches = record(trainer.micro_batches, micro_batches)
    trainer.train()
    return {
        "weights": torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()]),
        "logs": [log for log in trainer.state.log_history if "loss" in log],
        "micro_batches": [len(each) for each in micro_batches],
        "eval": trainer.evaluate(),
    }


if __name__ == "__main__":
    folder, options = sys.argv[1], json.loads(sys.argv[2])
    result = fine_tune(folder, processes=2) if options is None else train(folder, options)
    torch.save(result, Path(folder) / f"{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()
