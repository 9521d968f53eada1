"""One side of benchmarks/steps.py, in a process of its own: a trainer that takes a step whenever it is told to.

    python benchmarks/step_worker.py '{"method": "grpo", "side": "TRL", "model": "...", "sizes": {...}}'

For each line on stdin it takes a step, and answers with a line of JSON on stdout: what the step took. What the trainers
print goes to stderr.
"""

import contextlib
import json
import os
import random
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

PARTS = ("generation", "reward", "reference", "scoring", "backward", "optimizer")
"""The parts of a step that are timed, where the method has them. The rest is mostly the forward pass; in TRL's trainers
also reference and scoring."""

UNSHARED = "rlkernels, unshared"
"""Our trainer with share_prefixes false."""


@dataclass(frozen=True)
class Job:
    """What one side runs."""

    method: str
    side: str
    model: str
    sizes: dict[str, Any]
    bf16: bool = True
    attention: str | None = None
    given: bool = False
    """Whether completions are given, not sampled."""
    gradient: str | None = None
    """A file for the loss and the gradient of the first step, in which completions are given in any case. Then no
    weight is changed."""


class Ended(Exception):
    """Ends a training run."""


def memory(field: str) -> int:
    """In bytes: VmRSS, what this process holds; VmHWM, the most that it held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


class Stopwatch(TrainerCallback):
    """Waits before each step, and tells afterwards what it took."""

    def __init__(self, job: Job, wait: Callable[[], bool], answer: Callable[[dict[str, Any]], None]) -> None:
        self.job, self.wait, self.answer = job, wait, answer
        self.seconds: dict[str, float] = {}
        self.loss = 0.0
        self.undo = contextlib.ExitStack()

    def start(self, trainer: Any, *models: nn.Module) -> None:
        """With all models of the trainer."""
        self.models = [model for model in models if model is not None]
        self.time(trainer.accelerator, "backward", "backward")
        self.time(trainer.accelerator, "clip_grad_norm_", "optimizer")
        backward = trainer.accelerator.backward

        def recorded(loss: Tensor, **options: Any) -> None:
            self.loss += loss.item()
            backward(loss, **options)

        if self.job.gradient:
            trainer.accelerator.backward = recorded
        with self.undo, contextlib.suppress(Ended):
            trainer.train()

    def time(self, owner: Any, name: str, part: str, applies: Callable[..., bool] = lambda *_, **__: True) -> None:
        """Counts the calls of a function of `owner` as that part of a step."""
        self.seconds.setdefault(part, 0.0)
        function = getattr(owner, name)

        def timed(*args: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                if applies(*args, **options):
                    self.seconds[part] += time.perf_counter() - begin

        setattr(owner, name, timed)
        self.undo.callback(setattr, owner, name, function)

    def parameters(self) -> list[nn.Parameter]:
        return list({id(p): p for model in self.models for p in model.parameters()}.values())

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **rest: Any) -> None:
        self.optimizer = optimizer
        self.time(optimizer, "step", "optimizer")
        if self.job.gradient:
            optimizer.step = self.save_gradient
        self.begin()

    def save_gradient(self, *_: Any, **__: Any) -> None:
        gradients = [p.grad.float().flatten() for p in self.parameters() if p.grad is not None]
        torch.save((self.loss, torch.cat(gradients)), self.job.gradient)
        raise Ended

    def begin(self) -> None:
        if not self.wait():
            raise Ended
        self.seconds = dict.fromkeys(self.seconds, 0.0)
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        seconds = time.perf_counter() - self.began
        gradients = [p for group in self.optimizer.param_groups for p in group["params"]]
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        kept = [*self.parameters(), *gradients, *(value for value in states if isinstance(value, Tensor))]
        peak = memory("VmHWM")
        own = peak - self.imports - sum(tensor.nbytes for tensor in kept)
        self.answer({"seconds": seconds, **self.seconds, "peak": own, "whole": peak})
        self.begin()

    def imported(self) -> None:
        self.imports = memory("VmRSS")


class Batch:
    """What both sides learn from: text of digits, each of them a token."""

    def __init__(self, job: Job, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.random = random.Random(0)
        self.endings = sorted({tokenizer.eos_token_id, tokenizer.pad_token_id} - {None})
        if job.method == "dpo":
            self.rows = [
                # A completion ends with the token for that.
                {"prompt": self.text(prompt), "chosen": self.text(chosen - 1), "rejected": self.text(rejected - 1)}
                for prompt, chosen, rejected in job.sizes["pairs"]
            ]
            return
        self.completions, self.length = job.sizes["completions"], job.sizes["length"]
        self.group = job.sizes.get("group", 1)
        self.rows = [{"prompt": self.text(job.sizes["prompt"])} for _ in range(self.completions // self.group)]
        tokens = [token for token in range(len(tokenizer)) if token not in self.endings]
        # For the loss lengths differ within a group: with equal ones the advantages would add up to a loss of 0.
        lengths = [self.length - (number % self.length if job.gradient else 0) for number in range(self.group)]
        self.given = {
            tuple(tokenizer(row["prompt"]).input_ids): [self.random.choices(tokens, k=length) for length in lengths]
            for row in self.rows
        }

    def text(self, length: int) -> str:
        return "".join(self.random.choices("0123456789", k=length))

    def dataset(self) -> Dataset:
        return Dataset.from_list(self.rows)

    def complete(self, prompt_ids: list[list[int]]) -> list[list[int]]:
        """The given completions."""
        seen: dict[tuple, int] = defaultdict(int)
        completions = []
        for prompt in map(tuple, prompt_ids):
            completions.append(self.given[prompt][seen[prompt]])
            seen[prompt] += 1
        return completions

    def sample_all(self, model: Any) -> None:
        """So that no completion ends before it has its length."""
        model.generate = partial(model.generate, suppress_tokens=self.endings)


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Another one for each completion: each is learned from."""
    return [sum(ids) / len(ids) / 1000 for ids in completion_ids]


def options(job: Job, folder: str) -> dict[str, Any]:
    """The options that both sides are given; all others are their defaults."""
    clip = {"max_grad_norm": 0.0} if job.gradient else {}
    return {
        "output_dir": folder,
        "bf16": job.bf16,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "save_strategy": "no",
        **clip,
    }


def init_kwargs(job: Job, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return {"dtype": dtype} | ({"attn_implementation": job.attention} if job.attention else {})


def grpo_options(job: Job, folder: str) -> dict[str, Any]:
    return options(job, folder) | {
        "max_steps": 1000,
        "model_init_kwargs": init_kwargs(job),
        "per_device_train_batch_size": job.sizes["completions"],
        "num_generations": job.sizes["group"],
        "max_completion_length": job.sizes["length"],
        "shuffle_dataset": False,
    }


def grpo_trl(job: Job, watch: Stopwatch, batch: Batch, folder: str) -> None:
    from trl import GRPOConfig, GRPOTrainer

    watch.imported()
    args = GRPOConfig(**grpo_options(job, folder))
    trainer = GRPOTrainer(job.model, reward, args, batch.dataset(), processing_class=batch.tokenizer, callbacks=[watch])
    if job.gradient:
        trainer._generate_single_turn = lambda prompt_ids, *_, **__: (batch.complete(prompt_ids), None)
    batch.sample_all(trainer.model)
    watch.time(trainer, "_generate_single_turn", "generation")
    watch.time(trainer, "_calculate_rewards", "reward")
    watch.start(trainer, trainer.model)


def given_rollouts(batch: Batch) -> Callable[..., list]:
    from rlkernels.trainers import Rollout

    def engine(prompts: list[str], _: Any) -> list[Rollout]:
        prompt_ids = batch.tokenizer(prompts).input_ids
        completions = batch.complete(prompt_ids)
        return [Rollout(*pair, ended=False) for pair in zip(prompt_ids, completions, strict=True)]

    return engine


def grpo_trainer(job: Job, watch: Stopwatch, batch: Batch, folder: str, **options: Any) -> Any:
    from rlkernels.trainers import GRPOConfig, GRPOTrainer

    watch.imported()
    return GRPOTrainer(
        job.model,
        reward,
        GRPOConfig(**grpo_options(job, folder), **options),
        batch.dataset(),
        processing_class=batch.tokenizer,
        callbacks=[watch],
        rollout=given_rollouts(batch) if job.given or job.gradient else None,
    )


def grpo_ours(job: Job, watch: Stopwatch, batch: Batch, folder: str) -> None:
    share = "false" if job.side == UNSHARED else "auto"
    trainer = grpo_trainer(job, watch, batch, folder, share_prefixes=share)
    batch.sample_all(trainer.model)
    watch.time(trainer.collector, "engine", "generation")
    watch.time(type(trainer.collector.rewards), "__call__", "reward")
    watch.start(trainer, trainer.model)


def grpo_passes(job: Job, watch: Stopwatch, batch: Batch, folder: str) -> None:
    """Times forward and backward passes alone, both sides in this process: an answer is one of each."""
    # A token keeps 2 MB of activations: the default budget would take 16 GB.
    options = {"activation_checkpointing": False, "token_budget": 4096}
    trainers = {
        side: grpo_trainer(job, watch, batch, folder, share_prefixes=share, **options)
        for side, share in (("rlkernels", "true"), (UNSHARED, "false"))
    }
    rows = {side: next(iter(trainer.get_train_dataloader())) for side, trainer in trainers.items()}
    while watch.wait():
        watch.answer({side: one_pass(trainer, rows[side]) for side, trainer in trainers.items()})


def one_pass(trainer: Any, rows: list[dict[str, Any]]) -> dict[str, float]:
    tokens = 0
    begin = time.perf_counter()
    for batch in trainer.micro_batches(rows):
        tokens += batch.num_run
        trainer.compute_loss(trainer.model, batch).backward()
    seconds = time.perf_counter() - begin
    trainer.model.zero_grad()
    return {"seconds": seconds, "tokens": tokens}


def dpo_options(job: Job, folder: str) -> dict[str, Any]:
    return options(job, folder) | {
        "max_steps": 1000,
        "model_init_kwargs": init_kwargs(job),
        "per_device_train_batch_size": len(job.sizes["pairs"]),
    }


def dpo_trl(job: Job, watch: Stopwatch, batch: Batch, folder: str) -> None:
    from trl import DPOConfig, DPOTrainer

    watch.imported()
    args, rows = DPOConfig(**dpo_options(job, folder)), batch.dataset()
    trainer = DPOTrainer(job.model, args=args, train_dataset=rows, processing_class=batch.tokenizer, callbacks=[watch])
    watch.start(trainer, trainer.model, trainer.ref_model)


def dpo_ours(job: Job, watch: Stopwatch, batch: Batch, folder: str) -> None:
    from rlkernels.trainers import DPOConfig, DPOTrainer

    watch.imported()
    args, rows = DPOConfig(**dpo_options(job, folder)), batch.dataset()
    trainer = DPOTrainer(job.model, args=args, train_dataset=rows, processing_class=batch.tokenizer, callbacks=[watch])
    watch.time(trainer.reference_model, "forward", "reference")
    watch.start(trainer, trainer.model, trainer.reference_model)


def ppo_options(job: Job, folder: str) -> dict[str, Any]:
    return options(job, folder) | {
        "per_device_train_batch_size": job.sizes["completions"],
        "response_length": job.sizes["length"],
        "num_ppo_epochs": 1,
        "total_episodes": 1000 * job.sizes["completions"],
        "max_grad_norm": 0.0,  # TRL's does not clip
        "activation_checkpointing": False,  # TRL's recomputes nothing, whatever it is told
    }


def ppo_models(job: Job) -> dict[str, Any]:
    """Policy, value and reward model. TRL's runs its models in the precision of their weights, whatever bf16 says."""
    kwargs = init_kwargs(job, torch.bfloat16 if job.bf16 else torch.float32)
    torch.manual_seed(0)  # of the score heads
    classifiers = (AutoModelForSequenceClassification.from_pretrained(job.model, num_labels=1, **kwargs) for _ in "12")
    policy = AutoModelForCausalLM.from_pretrained(job.model, **kwargs)
    return {"model": policy, **dict(zip(("value_model", "reward_model"), classifiers, strict=True))}


def ppo_trl(job: Job, watch: Stopwatch, batch: Batch, folder: str) -> None:
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    watch.imported()
    prompts = [{"input_ids": batch.tokenizer(row["prompt"]).input_ids} for row in batch.rows]
    trainer = PPOTrainer(
        args=PPOConfig(**ppo_options(job, folder), num_sample_generations=0),
        processing_class=batch.tokenizer,
        train_dataset=Dataset.from_list(prompts),
        ref_model=None,
        callbacks=[watch],
        **ppo_models(job),
    )
    policy, reward_model = trainer.policy_model, trainer.reward_model
    temperature = trainer.args.temperature

    def given(input_ids: Tensor, **_: Any) -> SimpleNamespace:
        completions = torch.tensor(batch.complete(input_ids.tolist()))
        sequences = torch.cat([input_ids, completions], 1)
        scores = policy(sequences).logits[:, -completions.shape[1] - 1 : -1] / temperature
        return SimpleNamespace(sequences=sequences, scores=scores.unbind(1))

    if job.gradient:
        policy.generate = given
    else:
        batch.sample_all(policy)
    watch.time(ppo_trainer, "batch_generation", "generation")
    watch.time(ppo_trainer, "get_reward", "reward", lambda model, *_: model is reward_model)
    watch.start(trainer, policy, trainer.value_model, trainer.ref_model, reward_model)


def ppo_ours(job: Job, watch: Stopwatch, batch: Batch, folder: str) -> None:
    from rlkernels.trainers import PPOConfig, PPOTrainer

    watch.imported()
    models = ppo_models(job)
    trainer = PPOTrainer(
        models["model"],
        models["reward_model"],
        PPOConfig(**ppo_options(job, folder)),
        batch.dataset(),
        value_model=models["value_model"],
        processing_class=batch.tokenizer,
        callbacks=[watch],
        rollout=given_rollouts(batch) if job.gradient else None,
    )
    batch.sample_all(models["model"])
    watch.time(trainer.reference_model, "forward", "reference")
    # Passes of policy and value function without gradients: those before the loss.
    watch.time(trainer.model, "forward", "scoring", lambda *_, **__: not torch.is_grad_enabled())
    watch.time(trainer.collector, "engine", "generation")
    watch.time(type(trainer.collector.rewards), "__call__", "reward")
    watch.start(trainer, models["model"], models["value_model"], trainer.reference_model, models["reward_model"])


def patched(side: Callable[..., None]) -> Callable[..., None]:
    def run_patched(*args: Any) -> None:
        from rlkernels.integrations import trl

        trl.patch()
        side(*args)

    return run_patched


SIDES = {
    ("grpo", "TRL"): grpo_trl,
    ("grpo", "TRL, patched"): patched(grpo_trl),
    ("grpo", "rlkernels"): grpo_ours,
    ("grpo", UNSHARED): grpo_ours,
    ("passes", "rlkernels"): grpo_passes,
    ("dpo", "TRL"): dpo_trl,
    ("dpo", "TRL, patched"): patched(dpo_trl),
    ("dpo", "rlkernels"): dpo_ours,
    ("ppo", "TRL"): ppo_trl,
    ("ppo", "rlkernels"): ppo_ours,
}


def run(job: Job, tokenizer: Any, wait: Callable[[], bool], answer: Callable[[dict[str, Any]], None]) -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        SIDES[job.method, job.side](job, Stopwatch(job, wait, answer), Batch(job, tokenizer), folder)


def main() -> None:
    job = Job(**json.loads(sys.argv[1]))
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    tokenizer = AutoTokenizer.from_pretrained(job.model, padding_side="left")
    run(job, tokenizer, lambda: bool(sys.stdin.readline()), lambda step: print(json.dumps(step), file=answers))


if __name__ == "__main__":
    main()
