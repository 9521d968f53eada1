"""Trainers on `transformers.Trainer`: thin clients of the public functions of `rlkernels`.

    sft, reward, dpo, ppo, grpo   a method's trainer and config together; value: PPO's policy with its value model
    data      rows of a dataset become sequences of tokens
    base      the optimizer step, configs, loading, logs and checkpoints
    batch     a micro-batch: sequences laid out, kept apart by attention, and scored by the model
    losses    advantages from rewards, and losses from advantages
    rollouts  sampling completions: engines, vLLM, weights, completions ahead of time
    rewards   reward functions, reward models, time limits and worker processes

The docstring of each folder lists its modules.
"""


def _require_transformers() -> None:
    import importlib.metadata

    from packaging.version import Version

    found = importlib.metadata.version("transformers")
    if Version(found).release < (5, 17):
        told = f"rlkernels.trainers needs transformers 5.17 or later; got {found}"
        raise ImportError(f"{told}; pip install rlkernels[trainers]", name="transformers")


try:
    _require_transformers()
    from .base.checkpoints import CheckpointError
    from .base.interrupts import Terminated
    from .base.trainer import NonFiniteLoss
    from .dpo import DPOConfig, DPOTrainer
    from .grpo import GRPOConfig, GRPOTrainer
    from .ppo import PPOConfig, PPOTrainer
    from .reward import RewardConfig, RewardTrainer
    from .rewards.functions import RewardError
    from .rollouts.engine import Rollout, RolloutError, SamplingOptions
    from .rollouts.generate import TransformersEngine
    from .rollouts.vllm import ServerLost, VLLMEngine
    from .sft import SFTConfig, SFTTrainer
except ModuleNotFoundError as error:
    if error.name and error.name.partition(".")[0] == "rlkernels":
        raise
    missing = f"{error.name} is not installed" if error.name else str(error)
    raise ModuleNotFoundError(f"{missing}; pip install rlkernels[trainers]", name=error.name) from error

__all__ = [
    "CheckpointError",
    "DPOConfig",
    "DPOTrainer",
    "GRPOConfig",
    "GRPOTrainer",
    "NonFiniteLoss",
    "PPOConfig",
    "PPOTrainer",
    "RewardConfig",
    "RewardError",
    "RewardTrainer",
    "Rollout",
    "RolloutError",
    "SFTConfig",
    "SFTTrainer",
    "SamplingOptions",
    "ServerLost",
    "Terminated",
    "TransformersEngine",
    "VLLMEngine",
]
