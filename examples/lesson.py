"""What sft.py, reward.py, dpo.py, ppo.py and grpo.py share: the task, its data, measurements and the training run.

Each teaches SmolLM2-135M-Instruct by another method to answer a sum with the sentence "The answer is 8." and stop. If
only told to, the model rambles five times out of six. Held-out sums are not among those trained on, even with their
terms swapped.
"""

import json
import random
import re
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import transformers
from datasets import Dataset
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback

from arithmetic import problems
from program import Run
from progress import ProgressCallback
from rlkernels.trainers.base.trainer import BaseTrainer
from rlkernels.trainers.rollouts.engine import SamplingOptions
from rlkernels.trainers.rollouts.generate import TransformersEngine
from smollm2 import model_folder

Row = dict[str, Any]

SYSTEM_PROMPT = "Answer like this: The answer is 5."
"""Without it no completion is the sentence, and reinforcement learning would have nothing to start from."""


def asked(row: Row) -> Row:
    return {**row, "prompt": [{"role": "system", "content": SYSTEM_PROMPT}, row["prompt"][-1]]}


TRAIN, HELD_OUT = ([asked(row) for row in rows] for rows in problems())
SAMPLES = 2
"""Completions of each of the 50 held-out sums; rates are over these 100 completions."""
SAMPLING = SamplingOptions(temperature=1.0, max_completion_length=16)
"""The sentence takes half of these tokens."""

# Rejected answers of preference pairs, besides the model's own, give the answer in other words. Held-out pairs use
# words that no training pair has.
OTHER_WORDS = (
    "{answer}",
    "The answer is {answer}",
    "Answer: {answer}.",
    "{expression} = {answer}.",
    "The final answer is {answer}.",
    "The answer to {expression} is {answer}.",
    "The answer is {answer}. Is there anything else",
    "To find the answer, we compute {expression}.",
)
HELD_OUT_WORDS = (
    "It is {answer}.",
    "So the answer is {answer}.",
    "The answer is {answer}. To see why, consider",
    "Let us compute {expression} step by step.",
)


def sentence(row: Row) -> str:
    return f"The answer is {row['answer']}."


def is_sentence(text: str) -> bool:
    return re.fullmatch(r"The answer is -?\d+\.", text) is not None


# The model and its completions


def load() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = str(model_folder())
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def completions(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[Row], seed: int
) -> list[tuple[str, bool]]:
    """A completion of each row, and whether it ended with the end token."""
    engine = TransformersEngine(model, tokenizer)
    rollouts = engine([row["prompt"] for row in rows], replace(SAMPLING, seed=seed))
    texts = tokenizer.batch_decode([rollout.completion_ids for rollout in rollouts], skip_special_tokens=True)
    return [(text, rollout.ended) for text, rollout in zip(texts, rollouts, strict=True)]


def rates(trainer: BaseTrainer, model: PreTrainedModel) -> dict[str, float]:
    """Over completions of the held-out sums: the share that is the sentence and nothing else, and the share in which
    the number is right too."""
    rows = [row for row in HELD_OUT for _ in range(SAMPLES)]
    with trainer.accelerator.autocast():
        said = completions(model, trainer.processing_class, rows, trainer.args.seed)
    format_ = [ended and is_sentence(text) for text, ended in said]
    right = [good and text == sentence(row) for good, (text, _), row in zip(format_, said, rows, strict=True)]
    return {"format rate": sum(format_) / len(rows), "right answers": sum(right) / len(rows)}


# Data


def demonstrations(rows: list[Row]) -> Dataset:
    return Dataset.from_list(
        [{"prompt": row["prompt"], "completion": [{"role": "assistant", "content": sentence(row)}]} for row in rows]
    )


def pairs(
    rows: list[Row], words: tuple[str, ...], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Dataset:
    """Two preference pairs per sum: the sentence is preferred to other words, and to the model's own completion."""
    rng = random.Random(0)
    own = [text for text, _ in completions(model, tokenizer, rows, seed=0)]
    made = []
    for row, text in zip(rows, own, strict=True):
        prompt = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        others = [rng.choice(words).format(**row), text]
        made += [
            {"prompt": prompt, "chosen": sentence(row), "rejected": other} for other in others if not is_sentence(other)
        ]
    return Dataset.from_list(made)


# The run


def options(run: Run) -> dict[str, Any]:
    """Options for the config of every trainer."""
    return {
        "output_dir": str(run.folder),
        "seed": run.seed,
        "max_steps": run.steps,
        "lr_scheduler_type": "constant",
        "activation_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
    }


def learn(run: Run, trainer: BaseTrainer, measure: Callable[[], dict[str, float]], shown: dict[str, str]) -> list[Any]:
    """Trains, then saves the model and what `measure` gave before and after. Returns what to print."""
    progress = ProgressCallback(run, shown)
    trainer.add_callback(progress)
    trainer.remove_callback(PrinterCallback)
    before = measure()
    with progress.bar:
        trainer.train()
    after = measure()
    trainer.save_model(str(run.folder / "model"))
    seconds = round(time.perf_counter() - run.start, 1)
    steps = trainer.state.global_step
    result = {"seed": run.seed, "steps": steps, "seconds": seconds, "before": before, "after": after}
    (run.folder / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    table = Table("held out", "before", "after")
    for name in before:
        table.add_row(name, f"{before[name]:.3f}", f"{after[name]:.3f}")
    return [table, f"{steps} steps, {seconds:.0f} s; everything is in {run.output_dir}"]
