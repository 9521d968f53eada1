"""The same five optimizer steps of each trainer in one process, and in two under DDP and FSDP2: the same rows, and the
same completions of the engine here, or of the transformers engine, whose noise is keyed by the row."""

import math
import os
import random
import sys
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaForSequenceClassification, TrainerCallback

from rlkernels.trainers import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    NonFiniteLoss,
    PPOConfig,
    PPOTrainer,
    RewardConfig,
    RewardTrainer,
    Rollout,
    SFTConfig,
    SFTTrainer,
)
from tiny_model import build_model, build_tokenizer

TEXTS = [{"prompt": "ab" * (i % 4) + ":", "completion": "cdefgh"[: i % 6]} for i in range(48)]
PAIRS = [{"prompt": "a" * (i % 3), "chosen": "bc" * (1 + i % 4), "rejected": "dcb"[: 1 + i % 3]} for i in range(48)]
PROMPTS = [{"prompt": "ab" + "c" * (i % 5), "index": i} for i in range(24)]


def classifier() -> LlamaForSequenceClassification:
    config = build_model().config
    config.num_labels = 1
    torch.manual_seed(1)
    return LlamaForSequenceClassification(config)


def engine(prompts: list, options: Any) -> list[Rollout]:
    """What it answers depends on the prompt, its number among all, and the step."""
    rollouts = []
    for prompt, row in zip(prompts, options.rows, strict=True):
        drawn = random.Random(f"{prompt} {options.step} {row}")
        completion = [drawn.randrange(1, 60) for _ in range(drawn.randrange(1, 7))]
        ended = drawn.random() < 0.7
        rollouts.append(Rollout([1, 2, *[3] * (len(prompt) - 2)], completion + [0] * ended, ended))
    return rollouts


def halves(completion_ids, index, **columns):
    """Every other prompt's completions are all as good."""
    return [float(sum(ids) % 7) if i % 2 else 1.0 for ids, i in zip(completion_ids, index, strict=True)]


def trainer_of(name: str, args: dict[str, Any], sampled: bool) -> Any:
    tokenizer = build_tokenizer()
    if name == "sft":
        return SFTTrainer(build_model(), SFTConfig(**args), TEXTS, TEXTS[:7], tokenizer)
    if name == "dpo":
        return DPOTrainer(build_model(), DPOConfig(**args), PAIRS, PAIRS[:7], tokenizer)
    if name == "reward":
        return RewardTrainer(classifier(), RewardConfig(**args), PAIRS, PAIRS[:7], tokenizer)
    of_model = {"grpo": (GRPOTrainer, GRPOConfig), "ppo": (PPOTrainer, PPOConfig)}
    trainer_class, config = of_model[name]
    args["log_completions"] = False
    rollout = None if sampled else engine
    return trainer_class(build_model(), halves, config(**args), PROMPTS, PROMPTS[:3], tokenizer, rollout=rollout)


class Observer(TrainerCallback):
    """Notes of each step whether the weights were spread over the processes, how many micro-batches there were, how
    often gradients were added up, and how often the head and the first layer of the trained model were gathered."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.steps = trainer, []
        self.micro_batches = self.reductions = self.gathers = 0
        trainer.micro_batches = self.counting(trainer.micro_batches)
        trainer.add_callback(self)

    def counting(self, micro_batches: Any) -> Any:
        def counted(inputs: list) -> list:
            batches = micro_batches(inputs)
            self.micro_batches = len(batches)
            return batches

        return counted

    def on_train_begin(self, args, state, control, **kwargs):
        if isinstance(self.trainer.model_wrapped, DistributedDataParallel):
            self.trainer.model_wrapped.register_comm_hook(None, self.reduce)
        GATHERED.clear()

    def reduce(self, state, bucket):
        self.reductions += bucket.is_last()
        return allreduce_hook(None, bucket)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        head = getattr(model, "policy", model).get_output_embeddings()
        weight = None if head is None else head.weight
        layer = next(parameter for name, parameter in model.named_parameters() if ".layers.0." in name)
        self.steps.append(
            {
                "sharded": all(isinstance(parameter, DTensor) for parameter in model.parameters()),
                "micro_batches": self.micro_batches,
                "reductions": self.reductions,
                "gathers": sum(each is weight for each in GATHERED),
                "layer_gathers": sum(each is layer for each in GATHERED),
            }
        )
        self.reductions = 0
        GATHERED.clear()


GATHERED: list[torch.Tensor] = []


def record_gathers() -> None:
    """The parameters that FSDP2 gathers, into GATHERED."""
    gather = _fsdp_param_group.foreach_all_gather

    def recording(parameters, *args):
        GATHERED.extend(parameter.sharded_param for parameter in parameters)
        return gather(parameters, *args)

    _fsdp_param_group.foreach_all_gather = recording


def whole(tensor: torch.Tensor) -> torch.Tensor:
    if hasattr(tensor, "ds_id"):  # of DeepSpeed
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().flatten().clone()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().flatten().clone()


def arguments(folder: str, options: dict[str, Any], processes: int) -> dict[str, Any]:
    """Options of a config: the rows of a step are the same, whatever the number of processes."""
    args = {
        "output_dir": folder,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 6,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "max_steps": 5,
        "logging_steps": 1,
        "bf16": False,
        "use_cpu": True,
        "ddp_backend": "gloo" if processes > 1 else None,
        "report_to": "none",
        "save_strategy": "no",
        "token_budget": 24,
        "disable_tqdm": True,
        "activation_checkpointing": False,
        **options,
    }
    for batch_size in ("per_device_train_batch_size", "per_device_eval_batch_size"):
        args[batch_size] //= processes
    return args


def run(folder: str, case: str, processes: int = 1, resumes: bool = False, checkpoint: str | None = None) -> Any:
    """What a run, and with `resumes` one that goes on from its checkpoint, ends with."""
    name, options = CASES[case]
    if not resumes:
        options = {key: value for key, value in options.items() if key not in SAVED}
    trainer = trainer_of(name, arguments(folder, options, processes), sampled="sampled" in case)
    observer = Observer(trainer)
    trainer.train(resume_from_checkpoint=checkpoint)
    found = {
        "weights": torch.cat([whole(parameter) for parameter in trainer.model.parameters()]),
        "logs": [metrics_of(log) for log in trainer.state.log_history if "train_runtime" not in log],
        "steps": observer.steps,
    }
    if resumes and "save_steps" in options and checkpoint is None:
        checkpoint = f"{folder}/checkpoint-{options['save_steps']}"
        found["resumed"] = run(folder, case, processes, resumes, checkpoint)
    return found


def metrics_of(log: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in log.items() if not name.endswith(("_runtime", "_per_second"))}


def shard_on_cpu(shards: bool, **options: Any) -> None:
    """Accelerate shards no model on a CPU, and says nothing: here it does, from now on."""
    init = getattr(AcceleratorState, "init_of_accelerate", AcceleratorState.__init__)
    AcceleratorState.init_of_accelerate = init

    def sharding(self, *args, **kwargs):
        init(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False, **options
            )

    AcceleratorState.__init__ = sharding if shards else init


GROUPS_OF_4 = {"num_generations": 4, "max_completion_length": 8}
PPO = {"response_length": 8, "num_ppo_epochs": 2, "num_mini_batches": 2, "token_budget": 12}
SAVED = {"save_strategy": "steps", "save_steps": 2}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 2}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": ("sft", {**SAVED, **EVALUATED}),
    "dpo": ("dpo", {**SAVED, **EVALUATED, "sync_ref_model": True, "ref_model_sync_steps": 2}),
    "reward": ("reward", {"center_rewards_coefficient": 0.1, **EVALUATED}),
    # A group on each, in every other of which nothing is to be learned; the reference is a model of its own.
    "grpo": ("grpo", {**GROUPS_OF_4, "beta": 0.1, "num_iterations": 2}),
    "grpo, groups on both": ("grpo", {**GROUPS_OF_4, "per_device_train_batch_size": 2, "token_budget": 8}),
    "grpo, sampled": ("grpo", {**GROUPS_OF_4, **EVALUATED}),
    "ppo": ("ppo", {**PPO, "whiten_rewards": True}),
    "ppo, scored with a graph": ("ppo", {"response_length": 8, "num_ppo_epochs": 2, "token_budget": 1000}),
    "ppo, sampled": ("ppo", {**PPO, **SAVED, **EVALUATED, "adap_kl_ctrl": True, "horizon": 80}),
}
OF_DDP = ("sft", "dpo", "reward", "grpo", "grpo, groups on both", "ppo", "ppo, scored with a graph")


def stop(folder: str) -> str:
    """The error of a run in which the second process alone meets a loss that is not finite, in its third step."""
    name, options = CASES["sft"]
    trainer = trainer_of(name, arguments(folder, options, processes=2), sampled=False)
    compute_loss = trainer.compute_loss

    def spoiled(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss = compute_loss(*args, **kwargs)
        return loss * math.nan if trainer.state.global_step == 2 and os.environ["RANK"] == "1" else loss

    trainer.compute_loss = spoiled
    try:
        trainer.train()
    except NonFiniteLoss as error:
        return str(error)
    return "no error"


if __name__ == "__main__":
    folder, kind, case = sys.argv[1:]
    torch.set_num_threads(1)
    record_gathers()
    shard_on_cpu(kind == "fsdp2")
    result = stop(folder) if case == "stop" else run(folder, case, processes=2, resumes=kind == "fsdp2")
    torch.save(result, f"{folder}/{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()
