"""Loss and gradient of one GRPO step of SmolLM2 in this project's GRPOTrainer and in TRL's, given the same completions.

    python benchmarks/grpo_step.py > docs/grpo_step.md

Both trainers are made from the same options, both defaults but for what is said below, and get one prepared batch:
prompts of 38 tokens, completions of 64, bfloat16 autocast over float32 weights, beta 0. What is timed is each trainer's
own compute_loss and backward, alternately. Memory is the most that PyTorch's allocator holds at a time above what is
there before the step, less the gradients that it leaves.

First, loss and gradients of both are compared: they must be equal in float32, and in bfloat16 ours no further from
float32 than TRL's. Ends with 1 if they are not, or if ours takes more than 0.75 times the time or 0.6 times the memory.
"""

import argparse
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    sys.path.extend(str(Path(__file__).parents[1] / folder) for folder in ("examples", "tests"))

import torch
import transformers
from datasets import Dataset
from torch import Tensor
from transformers import AutoTokenizer

import reporting
from peak_memory import peak_memory
from rlkernels.trainers import GRPOConfig, GRPOTrainer
from rlkernels.trainers.grpo import Rollouts
from rlkernels.trainers.packing import IGNORE

COMPLETIONS, GROUP, PROMPT, LENGTH = 16, 8, 38, 64
TIME, MEMORY = 0.75, 0.6
"""What ours may take of TRL's."""
TOLERANCE = 1e-3
"""Of the loss and of the gradient's norm: in float32 two orders of summation stay below it, bfloat16 does not."""
FURTHER = 1.1
"""How many times as far from float32 as TRL's our gradient in bfloat16 may be."""

SETTINGS = {"activation checkpointing (default)": True, "no checkpointing": False}

Step = Callable[[], Tensor]


class Batch:
    """Token ids and advantages, the same for both trainers."""

    def __init__(self, vocab_size: int, completions: int, prompt: int, length: int) -> None:
        generator = torch.Generator().manual_seed(0)
        groups = torch.randint(vocab_size, (completions // GROUP, prompt), generator=generator)
        self.prompts = groups.repeat_interleave(GROUP, 0)
        self.completions = torch.randint(vocab_size, (completions, length), generator=generator)
        self.advantages = torch.randn(completions, generator=generator)


def no_reward(completions: list, **_: Any) -> list[float]:
    return [0.0] * len(completions)


def options(folder: str, batch: Batch, attention: str, checkpointing: bool, bf16: bool) -> dict[str, Any]:
    return dict(
        output_dir=folder,
        per_device_train_batch_size=len(batch.completions),
        num_generations=GROUP,
        max_completion_length=batch.completions.shape[1],
        bf16=bf16,
        use_cpu=not torch.cuda.is_available(),
        activation_checkpointing=checkpointing,
        model_init_kwargs={"dtype": torch.float32, "attn_implementation": attention},
        report_to="none",
        disable_tqdm=True,
    )


class Prepared(Exception):
    """Ends a training run with the model of its first step."""


def backward(trainer: transformers.Trainer, batches: list[dict[str, Any]]) -> Step:
    """What both trainers' training_step does once the completions are there, with the model that train() hands it: the
    one under autocast and activation checkpointing."""

    def stop(model: torch.nn.Module, *rest: Any) -> None:
        raise Prepared(model)

    trainer.training_step = stop
    try:
        trainer.train()
    except Prepared as prepared:
        (model,) = prepared.args
    model.train()

    def step() -> Tensor:
        total = torch.zeros((), device=trainer.accelerator.device)
        for inputs in batches:
            with trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(model, inputs)
            trainer.accelerator.backward(loss)
            total += loss.detach()
        return total

    return step


def trl_step(model: str, settings: dict[str, Any], batch: Batch, rows: list, tokenizer: Any) -> tuple[Any, Step]:
    import trl

    trainer = trl.GRPOTrainer(
        model, no_reward, trl.GRPOConfig(**settings), Dataset.from_list(rows), processing_class=tokenizer
    )
    device = trainer.accelerator.device
    inputs = {
        "prompt_ids": batch.prompts,
        "prompt_mask": torch.ones_like(batch.prompts),
        "completion_ids": batch.completions,
        "completion_mask": torch.ones_like(batch.completions),
        "advantages": batch.advantages,
        "num_items_in_batch": torch.tensor(batch.completions.numel()),
    }
    return trainer, backward(trainer, [{name: value.to(device) for name, value in inputs.items()}])


def our_step(model: str, settings: dict[str, Any], batch: Batch, rows: list, tokenizer: Any) -> tuple[Any, Step]:
    trainer = GRPOTrainer(model, no_reward, GRPOConfig(**settings), Dataset.from_list(rows), processing_class=tokenizer)
    pairs = list(zip(batch.prompts.tolist(), batch.completions.tolist(), strict=True))
    rollouts = Rollouts(
        input_ids=[prompt + completion for prompt, completion in pairs],
        labels=[[IGNORE] * len(prompt) + completion for prompt, completion in pairs],
        advantages=batch.advantages.tolist(),
        in_loss=[True] * len(batch.completions),
        num_tokens=batch.completions.numel(),
    )
    trainer.roll_out = lambda inputs: rollouts
    return trainer, backward(trainer, trainer.micro_batches(rows))


STEPS = {"rlkernels": our_step, "TRL": trl_step}


def peak_bytes(trainer: Any, step: Step) -> int:
    """Above weights and gradients."""
    trainer.model.zero_grad(set_to_none=True)
    if trainer.accelerator.device.type == "cpu":
        peak = peak_memory(step)
    else:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    return peak - sum(p.grad.nbytes for p in trainer.model.parameters() if p.grad is not None)


def loss_and_gradient(trainer: Any, step: Step) -> tuple[float, Tensor]:
    trainer.model.zero_grad(set_to_none=True)
    loss = step().item()
    gradient = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
    trainer.model.zero_grad(set_to_none=True)
    return loss, gradient


def disagreement(exact: dict[str, tuple[float, Tensor]], rounded: dict[str, tuple[float, Tensor]]) -> str | None:
    """How ours differs from TRL's by more than rounding, in float32 and in bfloat16."""
    (our_loss, ours), (their_loss, theirs) = exact["rlkernels"], exact["TRL"]
    if not abs(our_loss - their_loss) <= TOLERANCE * abs(their_loss):
        return f"the losses are {our_loss:.7g} and {their_loss:.7g}"
    distance = (ours - theirs).norm() / theirs.norm()
    if not distance <= TOLERANCE:
        return f"the gradients differ by {distance:.3g} of their norm"
    our_error, their_error = ((rounded[name][1] - theirs).norm() / theirs.norm() for name in ("rlkernels", "TRL"))
    if not min(our_error, their_error) > TOLERANCE:
        return f"one of both is not in bfloat16: {our_error:.3g} and TRL's {their_error:.3g} from float32"
    if not our_error <= FURTHER * their_error:
        return f"in bfloat16 ours is {our_error:.3g} of the gradient's norm from float32, TRL's {their_error:.3g}"
    return None


def measure(both: dict[str, tuple[Any, Step]], rounds: int) -> dict[str, tuple[float, int]]:
    """Median seconds and peak bytes of each."""
    seconds: dict[str, list[float]] = {name: [] for name in both}
    for _ in range(rounds):
        for name, (trainer, step) in both.items():
            trainer.model.zero_grad(set_to_none=True)
            begin = time.perf_counter()
            step()
            if trainer.accelerator.device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - begin)
    peaks = {}
    for name, (trainer, step) in both.items():
        peaks[name] = peak_bytes(trainer, step)
        trainer.model.zero_grad(set_to_none=True)
    return {name: (statistics.median(seconds[name]), peaks[name]) for name in both}


@dataclass
class Setting:
    """Of both trainers."""

    model: str
    tokenizer: Any
    attention: str
    checkpointing: bool

    def steps(self, folder: str, batch: Batch, *, bf16: bool) -> dict[str, tuple[Any, Step]]:
        rows = [{"prompt": str(row)} for row in range(len(batch.completions))]
        settings = options(folder, batch, self.attention, self.checkpointing, bf16)
        return {name: step_of(self.model, settings, batch, rows, self.tokenizer) for name, step_of in STEPS.items()}


def check(setting: Setting, folder: str, batch: Batch) -> None:
    """Raises SystemExit where the two do not compute the same."""
    exact, rounded = (
        {name: loss_and_gradient(*both) for name, both in setting.steps(folder, batch, bf16=bf16).items()}
        for bf16 in (False, True)
    )
    if difference := disagreement(exact, rounded):
        raise SystemExit(f"error: {difference}: nothing was timed")


def table(measured: dict[str, dict[str, tuple[float, int]]]) -> tuple[str, bool]:
    """In Markdown; and whether every bar is met."""
    lines = [
        "| | ms | of TRL's | at most | peak MB | of TRL's | at most |",
        "|---|---|---|---|---|---|---|",
    ]
    met = True
    for setting, of_trainer in measured.items():
        their_time, their_peak = of_trainer["TRL"]
        for name, (seconds, peak) in of_trainer.items():
            cells = [f"{name}, {setting}", f"{seconds * 1e3:,.0f}", "", "", f"{peak / 1e6:,.0f}", "", ""]
            if name != "TRL":
                time_ratio, peak_ratio = seconds / their_time, peak / their_peak
                cells[2:4] = f"{time_ratio:.2f}x", f"{TIME} {'met' if time_ratio <= TIME else 'MISSED'}"
                cells[5:] = f"{peak_ratio:.2f}x", f"{MEMORY} {'met' if peak_ratio <= MEMORY else 'MISSED'}"
                met = met and time_ratio <= TIME and peak_ratio <= MEMORY
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines), met


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--attention", help="default: eager on a CPU, as in the demo, sdpa on a GPU")
    chosen = parser.parse_args(arguments)
    attention = chosen.attention or ("sdpa" if torch.cuda.is_available() else "eager")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    from smollm2 import model_folder

    model = str(model_folder())
    tokenizer = AutoTokenizer.from_pretrained(model)
    batch = Batch(tokenizer.vocab_size, COMPLETIONS, PROMPT, LENGTH)
    measured = {}
    with tempfile.TemporaryDirectory() as folder:
        check(Setting(model, tokenizer, attention, checkpointing=False), folder, batch)
        for name, checkpointing in SETTINGS.items():
            gc.collect()
            setting = Setting(model, tokenizer, attention, checkpointing)
            measured[name] = measure(setting.steps(folder, batch, bf16=True), chosen.rounds)
    text, met = table(measured)
    run = reporting.environment("cuda" if torch.cuda.is_available() else "cpu")
    versions = ", ".join(f"{name} {run['versions'][name]}" for name in ("rlkernels", "torch", "trl"))
    print("# One GRPO step of SmolLM2-135M beside TRL's\n")
    print(f"Printed by `python benchmarks/grpo_step.py` on {run['device']}; {versions}; {attention} attention.")
    print(f"{' '.join(__doc__.split(chr(10) * 2)[2].split())} {' '.join(__doc__.split(chr(10) * 2)[3].split())}\n")
    print(text)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
