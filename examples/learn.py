"""The GRPO run of demo.py: SmolLM2 on single-digit sums, and the measurements of the run."""

import resource
import time
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from datasets import Dataset
from rich.console import Console
from transformers import AutoTokenizer, PrinterCallback, TrainerCallback

from arithmetic import Grader, problems
from program import Run
from progress import ProgressCallback
from rlkernels.cli import serving_backends
from rlkernels.trainers import GRPOConfig, GRPOTrainer
from smollm2 import model_folder


@dataclass
class Learned:
    result: dict[str, Any]
    grader: Grader


class AccuracyCallback(TrainerCallback):
    """Prints a line for each evaluation."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def on_evaluate(self, args, state, control, metrics, **_) -> None:
        accuracy = metrics["eval_rewards/correct/mean"]
        self.console.print(f"step {state.global_step:3d}  held-out accuracy {accuracy:.2f}")


def config(run: Run) -> GRPOConfig:
    # On a CPU and at these lengths, the backward pass of fused attention is several times slower than the eager one.
    attention = "sdpa" if torch.accelerator.is_available() else "eager"
    return GRPOConfig(
        output_dir=str(run.folder),
        seed=run.seed,
        max_steps=run.steps,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        # 8 prompts x 8 completions per step, in two halves, which halves the memory of the activations.
        per_device_train_batch_size=32,
        gradient_accumulation_steps=2,
        num_generations=8,
        max_completion_length=12,
        activation_checkpointing=False,
        model_init_kwargs={"attn_implementation": attention},
        reward_weights=list(Grader.weights),
        eval_strategy="steps",
        eval_steps=0.25,
        per_device_eval_batch_size=100,
        num_generations_eval=4,
        logging_steps=1,
        log_completions=False,  # completions.jsonl holds all that were graded, held-out ones included
        save_strategy="no",
        disable_tqdm=True,
        report_to="none",
    )


def learn(run: Run) -> Learned:
    """Trains, measures before and after, and saves the model to `run.folder`/model."""
    start = time.perf_counter()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = str(model_folder())
    tokenizer = AutoTokenizer.from_pretrained(model)
    grader = Grader(tokenizer.eos_token_id)
    train, held_out = problems()
    progress = ProgressCallback(run, {"reward": "reward", "length": "completions/mean_length"})
    trainer = GRPOTrainer(
        model,
        grader.rewards,
        config(run),
        Dataset.from_list(train),
        Dataset.from_list(held_out),
        tokenizer,
        callbacks=[progress, AccuracyCallback(run.console)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.evaluate()
    with progress.bar:
        trained = trainer.train()
    if trainer.state.global_step % trainer.state.eval_steps:
        trainer.evaluate()
    trainer.save_model(str(run.folder / "model"))
    result = {
        "seed": run.seed,
        "steps": trainer.state.global_step,
        "wall_s": round(time.perf_counter() - start, 1),
        "accuracy_before": round(grader.accuracy("held_out", 0), 4),
        "accuracy_after": round(grader.accuracy("held_out", trainer.state.global_step), 4),
        "tokens_per_s": round(trainer.state.num_input_tokens_seen / trained.metrics["train_runtime"], 1),
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "backends": serving_backends(trainer.args.device.type),
    }
    return Learned(result, grader)
