"""What logging takes of an optimizer step: GRPO of SmolLM2, 16 completions of 38 + 64 tokens, with all that is logged
by default: metrics, the printed table of completions, their parquet file.

    make bench-logging

A log is timed from the call of the trainer's `log` to its return, once it has been through every callback. Ends with 1
if it takes more than 1% of a step, even in a run that logs each step; by default one in ten is.
"""

import contextlib
import io
import statistics
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in ("", "examples")]

import torch
from datasets import Dataset
from transformers import TrainerCallback

from step_worker import Batch, Job, reward
from steps import METHODS

MOST, STEPS = 0.01, 6


class Steps(TrainerCallback):
    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args, **options) -> None:
        self.ends.append(time.perf_counter())


def measure(model: str, sizes: dict[str, int]) -> tuple[list[float], list[float]]:
    """Seconds of each step, its log included, and of each log; the first ones are left out."""
    from transformers import AutoTokenizer

    from rlkernels.trainers import GRPOConfig, GRPOTrainer

    tokenizer, steps, logs = AutoTokenizer.from_pretrained(model), Steps(), []
    batch = Batch(Job("grpo", "rlkernels", model, sizes), tokenizer)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        args = GRPOConfig(
            output_dir=folder,
            max_steps=STEPS,
            logging_steps=1,
            per_device_train_batch_size=sizes["completions"],
            num_generations=sizes["group"],
            max_completion_length=sizes["length"],
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            report_to="none",
        )
        rows = Dataset.from_list(batch.rows)
        trainer = GRPOTrainer(model, reward, args, rows, processing_class=tokenizer, callbacks=[steps])
        batch.sample_all(trainer.model)
        log = trainer.log

        def timed(values: dict[str, float], *others: object) -> None:
            begin = time.perf_counter()
            log(values, *others)
            if "loss" in values:
                logs.append(time.perf_counter() - begin)

        trainer.log = timed
        trainer.train()
    return [end - begin for begin, end in zip(steps.ends, steps.ends[1:], strict=False)], logs[1:]


def main() -> int:
    from smollm2 import model_folder

    seconds, logs = measure(str(model_folder()), METHODS["grpo"].sizes)
    step, log = statistics.median(seconds), statistics.median(logs)
    print(f"a step {step:.2f} s, a log {1e3 * log:.1f} ms (most {1e3 * max(logs):.1f}): {log / step:.2%} of each step")
    print(f"that logs, and of a run that logs one in ten {log / step / 10:.3%}")
    return 0 if log <= MOST * step else 1


if __name__ == "__main__":
    sys.exit(main())
