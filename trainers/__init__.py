"""Trainers on `transformers.Trainer`: thin clients of the public functions of `rlkernels`."""

from .common import NonFiniteLoss
from .configs import GRPOConfig
from .grpo import GRPOTrainer
from .rewards import RewardError
from .rollout import Rollout, SamplingOptions, TransformersEngine

__all__ = [
    "GRPOConfig",
    "GRPOTrainer",
    "NonFiniteLoss",
    "RewardError",
    "Rollout",
    "SamplingOptions",
    "TransformersEngine",
]
