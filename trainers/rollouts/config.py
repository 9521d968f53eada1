"""The options that `PPOConfig` and `GRPOConfig` share."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

from torch import Tensor
from transformers import PreTrainedModel

from ..base.config import BaseConfig, router_field, share_prefixes_field, split_userinfo
from ..rewards.calls import RewardFunction

RewardSource: TypeAlias = RewardFunction | str | PreTrainedModel
"""A reward function, or a reward model: in memory, in a folder, or by its name in the local Hugging Face cache."""


@dataclass(repr=False)
class OnlineConfig(BaseConfig):
    """Options of sampling and rewards, for `PPOTrainer` and `GRPOTrainer`."""

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*BaseConfig._VALID_DICT_FIELDS, "chat_template_kwargs"]

    shuffle_dataset: bool = field(default=True, metadata={"help": "Shuffle the prompts before each epoch."})
    max_completion_length: int = field(default=512, metadata={"help": "Longest completion, in tokens."})
    temperature: float = field(
        default=1.0, metadata={"help": "Temperature of sampling, and of the log-probabilities in the loss."}
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments of `apply_chat_template`, as JSON, for chat prompts."}
    )
    router_aux_loss_coef: float | None = router_field()
    share_prefixes: str = share_prefixes_field()
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "One weight per reward function; 1 each if unset."}
    )
    reward_timeout: float | None = field(
        default=300.0,
        metadata={
            "help": "Seconds that one call of a reward function may take; inf means no limit. Without reward_workers, "
            "C code cannot be interrupted, and nothing can if training does not run in the main thread. With "
            "reward_workers, any call can."
        },
    )
    reward_workers: int = field(
        default=0,
        metadata={
            "help": "Number of processes that call plain reward functions, each on whole groups of the batch. A "
            "function that crashes or hangs there cannot end the run. 0 calls them in the training process."
        },
    )
    on_reward_error: str = field(
        default="raise",
        metadata={
            "help": "What happens if a reward function raises, crashes, takes too long or returns something other than "
            "rewards. raise: end the run. none: warn, and give the rows on which it fails no reward from it.",
            "choices": ["raise", "none"],
        },
    )
    staleness: int = field(
        default=0,
        metadata={
            "help": "1: the engine samples the next completions while the trainer learns from the current ones, so its "
            "weights are one batch of completions older. It needs an engine with its own weights, such as vLLM, and "
            "importance_sampling_correction. 0: the engine samples with the current weights.",
        },
    )
    importance_sampling_correction: bool = field(
        default=False,
        metadata={
            "help": "Weight the policy loss by the ratio of a completion's probability under the trained model to that "
            "under the engine that sampled it. The engine must then return log-probabilities."
        },
    )
    importance_sampling_mode: str = field(
        default="sequence_mask",
        metadata={
            "help": "Whether importance_sampling_correction has a weight per token or per sequence, and whether a "
            "weight above importance_sampling_cap is reduced to the cap (truncate) or becomes 0 (mask).",
            "choices": ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"],
        },
    )
    importance_sampling_cap: float = field(
        default=3.0, metadata={"help": "The largest weight of importance_sampling_correction."}
    )

    use_vllm: bool = field(
        default=False, metadata={"help": "Sample on a vLLM server. Implied by vllm_server_base_url."}
    )
    vllm_server_base_url: str | None = field(
        default=None, metadata={"help": "Address of the vLLM server; with use_vllm http://localhost:8000 if unset."}
    )
    vllm_server_timeout: float = field(
        default=240.0, metadata={"help": "Seconds to wait for a vLLM server that does not answer."}
    )
    vllm_request_timeout: float = field(
        default=600.0,
        metadata={"help": "Seconds that one completion may take before it is requested again."},
    )
    vllm_max_concurrency: int = field(
        default=256, metadata={"help": "Most completions that a process requests at a time."}
    )
    vllm_weights_folder: str | None = field(
        default=None,
        metadata={
            "help": "Folder where weights are written for the vLLM server, which must see it under the same path. No "
            "other run may use it. vllm_weights in the output folder if unset."
        },
    )
    log_completions: bool = field(
        default=True,
        metadata={
            "help": "At each log, write the latest completions with rewards and advantages to completions/ in the "
            "output folder, as parquet, and print some of them. TRL's default is false."
        },
    )
    num_completions_to_print: int | None = field(
        default=4,
        metadata={"help": "Completions in the printed table: 0 is none; null, TRL's default, is all."},
    )
    log_unique_prompts: bool = field(default=False, metadata={"help": "Print at most one completion of each prompt."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train_sampling_strategy != "random":
            raise ValueError(
                f"train_sampling_strategy must be random; got {self.train_sampling_strategy}. To keep the prompts in "
                "their order, set shuffle_dataset to false"
            )
        if self.neftune_noise_alpha is not None:
            raise ValueError(
                "neftune_noise_alpha is not supported: the noise changes the model after it has sampled completions"
            )
        if self.staleness not in (0, 1):
            raise ValueError(f"staleness must be 0 or 1; got {self.staleness}")
        if self.staleness and not self.importance_sampling_correction:
            raise ValueError("staleness 1 needs importance_sampling_correction, which corrects for the older weights")
        self._set_vllm()
        if self.load_best_model_at_end and self.metric_for_best_model in (None, "loss"):
            # The evaluation of these trainers has no loss.
            self.metric_for_best_model, self.greater_is_better = "reward", True

    def sampler_correction(self, sampler_logprobs: Tensor | None) -> dict[str, Any]:
        """The options of `rlkernels.policy_loss` that weight tokens by how much the engine's policy differs from the
        trained one."""
        return {
            "sampler_logprobs": sampler_logprobs,
            "sampler_correction": self.importance_sampling_mode,
            "sampler_cap": self.importance_sampling_cap,
        }

    def _set_vllm(self) -> None:
        if self.vllm_server_base_url is not None:
            if not self.vllm_server_base_url.startswith(("http://", "https://")):
                raise ValueError(
                    "vllm_server_base_url must begin with http:// or https://, as in http://localhost:8000; got "
                    f"{split_userinfo(self.vllm_server_base_url)[1]!r}"
                )
            self.use_vllm = True
        elif self.use_vllm:
            self.vllm_server_base_url = "http://localhost:8000"
