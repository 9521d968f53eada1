"""Trainers on `transformers.Trainer`: thin clients of the public functions of `rlkernels`."""

from .configs import GRPOConfig
from .grpo import GRPOTrainer
from .rewards import RewardError

__all__ = ["GRPOConfig", "GRPOTrainer", "RewardError"]
