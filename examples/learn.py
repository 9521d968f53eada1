"""The GRPO run of demo.py: SmolLM2 on single-digit sums, and the measurements of the run."""

import gc
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from datasets import Dataset
from rich.console import Console
from transformers import AutoTokenizer, PrinterCallback, TrainerCallback

from arithmetic import Grader, problems
from calibration import FEWEST_STEPS, OVERTIME, StepTimer, steps_within
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
        self.step = -1  # the last one that was evaluated

    def on_evaluate(self, args, state, control, metrics, **_) -> None:
        self.step, accuracy = state.global_step, metrics["eval_rewards/correct/mean"]
        self.console.print(f"step {state.global_step:3d}  held-out accuracy {accuracy:.2f}")


def config(run: Run, steps: int) -> GRPOConfig:
    # On a CPU and at these lengths, the backward pass of fused attention is several times slower than the eager one.
    attention = "sdpa" if torch.accelerator.is_available() else "eager"
    return GRPOConfig(
        output_dir=str(run.folder),
        seed=run.seed,
        max_steps=steps,
        learning_rate=2e-5,
        lr_scheduler_type="linear",
        per_device_train_batch_size=64,
        num_generations=8,
        max_completion_length=12,
        activation_checkpointing=False,
        model_init_kwargs={"attn_implementation": attention},
        reward_weights=list(Grader.weights),
        eval_strategy="steps",
        eval_steps=0.5,
        per_device_eval_batch_size=100,
        num_generations_eval=4,
        logging_steps=1,
        log_completions=False,  # completions.jsonl holds all that were graded, held-out ones included
        save_strategy="no",
        disable_tqdm=True,
        report_to="none",
    )


def make_trainer(
    args: GRPOConfig, tokenizer: Any, rewards: list[Callable[..., list[float]]], callbacks: list[TrainerCallback]
) -> GRPOTrainer:
    train, held_out = map(Dataset.from_list, problems())
    trainer = GRPOTrainer(str(model_folder()), rewards, args, train, held_out, tokenizer, callbacks=callbacks)
    trainer.remove_callback(PrinterCallback)
    return trainer


def calibrate(run: Run, tokenizer: Any) -> tuple[int, float]:
    """(optimizer steps that fit into the minutes, seconds that are left for them). The two steps that are measured have
    a trainer of their own, so that the run has the same bits as one with --steps."""
    start, seconds = time.perf_counter(), 60 * run.minutes
    run.console.print("calibrating by two steps that are not kept")
    args = config(run, steps=2)
    args.eval_strategy, args.reward_weights = "no", None
    # The first step of a process is slower than others. It is the only one where two would take too long.
    timer = StepTimer(limit=seconds / 10, fewest=1)
    trainer = make_trainer(args, tokenizer, [timer.sampled], [timer])
    trainer.train()
    del trainer
    gc.collect()  # it refers to itself, and holds a model, gradients and the optimizer's state
    step, sampling = min(zip(timer.seconds, timer.sampling, strict=True))
    left = seconds - (time.perf_counter() - start)
    steps = steps_within(left, sampling, step - sampling)
    run.console.print(f"a step takes {step:.1f} s at first; --steps {steps} repeats this run")
    return steps, left


def learn(run: Run) -> Learned:
    """Trains, measures before and after, and saves the model to `run.folder`/model."""
    start = time.perf_counter()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    progress = ProgressCallback(run, {"reward": "reward", "length": "completions/mean_length"})
    accuracy = AccuracyCallback(run.console)
    callbacks = [progress, accuracy]
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    grader = Grader(tokenizer.eos_token_id)
    steps = run.steps
    if steps is None:
        steps, seconds = calibrate(run, tokenizer)
        callbacks.append(StepTimer(OVERTIME * seconds, FEWEST_STEPS))
    trainer = make_trainer(config(run, steps), tokenizer, grader.rewards, callbacks)
    trainer.evaluate()
    with progress.bar:
        trained = trainer.train()
    if trainer.state.global_step < steps and not run.stop.number:
        run.console.print(f"the time is over after step {trainer.state.global_step} of {steps}: no --steps repeats it")
    if accuracy.step < trainer.state.global_step:  # it ended before its last step
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
