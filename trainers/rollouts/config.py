"""What `PPOConfig` and `GRPOConfig` share."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..base.config import BaseConfig, router_field, split_userinfo


@dataclass(repr=False)
class OnlineConfig(BaseConfig):
    """What `PPOTrainer` and `GRPOTrainer` share: sampling and rewards."""

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*BaseConfig._VALID_DICT_FIELDS, "chat_template_kwargs"]

    shuffle_dataset: bool = field(default=True, metadata={"help": "Shuffle the prompts, anew in each epoch."})
    max_completion_length: int = field(default=512, metadata={"help": "Longest completion, in tokens."})
    temperature: float = field(
        default=1.0, metadata={"help": "Temperature of sampling, and of the log-probabilities in the loss."}
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments of `apply_chat_template`, as JSON, for chat prompts."}
    )
    router_aux_loss_coef: float | None = router_field()
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "One weight per reward function; 1 each if unset."}
    )
    reward_timeout: float | None = field(
        default=300.0,
        metadata={
            "help": "Seconds that one call of a reward function may take; inf: no limit. In the training process it "
            "cannot interrupt C code, nor anything if training runs in another thread than the main one; with "
            "reward_workers it always can."
        },
    )
    reward_workers: int = field(
        default=0,
        metadata={
            "help": "Processes in which plain reward functions are called, each on whole groups of the batch, so that "
            "neither a crash nor a hang of theirs can end the run. 0: in the training process."
        },
    )
    on_reward_error: str = field(
        default="raise",
        metadata={
            "help": "What follows if a reward function raises, crashes, takes too long or returns what are no rewards: "
            "raise ends the run, none gives the rows that it fails on no reward from it, with a warning.",
            "choices": ["raise", "none"],
        },
    )
    staleness: int = field(
        default=0,
        metadata={
            "help": "1: while the trainer learns from one batch of completions the engine samples the next, by weights "
            "that are one batch older; needs an engine with weights of its own, such as vLLM, and "
            "importance_sampling_correction.",
        },
    )
    importance_sampling_correction: bool = field(
        default=False,
        metadata={
            "help": "Weight the policy loss by how much likelier a completion is to the trained model than to the "
            "engine that sampled it, whose log-probabilities the rollouts then hold."
        },
    )
    importance_sampling_mode: str = field(
        default="sequence_mask",
        metadata={
            "help": "Whether that weight is one per token or one per sequence, and whether one above "
            "importance_sampling_cap is cut to it (truncate) or becomes 0 (mask).",
            "choices": ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"],
        },
    )
    importance_sampling_cap: float = field(
        default=3.0, metadata={"help": "The largest weight of importance_sampling_correction."}
    )

    use_vllm: bool = field(
        default=False, metadata={"help": "Sample on a vLLM server; set where vllm_server_base_url is."}
    )
    vllm_server_base_url: str | None = field(
        default=None, metadata={"help": "The vLLM server; http://localhost:8000 if unset, with use_vllm."}
    )
    vllm_server_timeout: float = field(
        default=240.0, metadata={"help": "Seconds that a server which does not answer is waited for."}
    )
    vllm_request_timeout: float = field(
        default=600.0,
        metadata={"help": "Seconds that one completion may take before it is asked for again."},
    )
    vllm_max_concurrency: int = field(
        default=256, metadata={"help": "Most completions that a process asks for at a time."}
    )
    vllm_weights_folder: str | None = field(
        default=None,
        metadata={
            "help": "Where weights are written for the server, which must see it under the same path; vllm_weights in "
            "the output folder if unset. Of this run alone."
        },
    )
    log_completions: bool = field(
        default=True,
        metadata={
            "help": "At each log write the latest completions, their rewards and advantages to completions/ in the "
            "output folder, as parquet, and print some of them. TRL's default is false."
        },
    )
    num_completions_to_print: int | None = field(
        default=4, metadata={"help": "Completions in the printed table; 0 prints none, and null, TRL's default, all."}
    )
    log_unique_prompts: bool = field(
        default=False, metadata={"help": "Print no more than one completion of each prompt."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train_sampling_strategy != "random":
            raise ValueError(
                f"train_sampling_strategy must be random; got {self.train_sampling_strategy}. shuffle_dataset false "
                "keeps the prompts in their order"
            )
        if self.neftune_noise_alpha is not None:
            raise ValueError(
                "neftune_noise_alpha is not supported: with noise the model is another than the one that was sampled"
            )
        if self.staleness not in (0, 1):
            raise ValueError(f"staleness must be 0 or 1; got {self.staleness}")
        if self.staleness and not self.importance_sampling_correction:
            raise ValueError("staleness 1 needs importance_sampling_correction, which corrects for the older weights")
        self._set_vllm()
        if self.load_best_model_at_end and self.metric_for_best_model in (None, "loss"):
            # There is no evaluation loss.
            self.metric_for_best_model, self.greater_is_better = "reward", True

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
