"""Configs: `transformers.TrainingArguments` and the fields of each method. Names and defaults are TRL 1.16's."""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from transformers import TrainingArguments


def _computes_bf16(use_cpu: bool) -> bool:
    """Whether the device has bfloat16 instructions; elsewhere bfloat16 is emulated, and slower than float32."""
    if torch.cuda.is_available() and not use_cpu:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


@dataclass
class BaseConfig(TrainingArguments):
    """What every trainer here adds to, or defaults differently from, `transformers.TrainingArguments`."""

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]

    learning_rate: float = field(default=1e-6, metadata={"help": "The initial learning rate of AdamW."})
    logging_steps: float = field(
        default=10, metadata={"help": "Log every so many optimizer steps; below 1, a fraction of all steps."}
    )
    activation_checkpointing: bool | None = field(
        default=None,
        metadata={"help": "Recompute activations in the backward pass: less memory, about 20%% slower. On if unset."},
    )
    bf16: bool | None = field(
        default=None,
        metadata={
            "help": "Compute in bfloat16 over float32 weights. Unset: where the device has bfloat16 instructions, "
            "unless fp16 is set."
        },
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Keyword arguments of `from_pretrained`, as JSON, when the model is given as a path."},
    )
    remove_unused_columns: bool = field(
        default=False,
        metadata={"help": "Keep only the columns that the trainer itself reads: reward functions then see no other."},
    )
    token_budget: int = field(
        default=8192,
        metadata={
            "help": "Most tokens in a micro-batch: an optimizer step of per_device_train_batch_size x "
            "gradient_accumulation_steps rows runs in as many as it takes. A longer sequence runs alone."
        },
    )
    padding_free: bool = field(
        default=True,
        metadata={
            "help": "Lay the sequences of a micro-batch end to end. Without it, and for models that do not keep them "
            "apart then, they are padded to the longest."
        },
    )

    def __post_init__(self) -> None:
        if self.activation_checkpointing is None and self.gradient_checkpointing is None:
            self.activation_checkpointing = True
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.bf16 is None:
            self.bf16 = not self.fp16 and _computes_bf16(self.use_cpu)
        super().__post_init__()
        if self.token_budget < 1:
            raise ValueError(f"token_budget must be at least 1; got {self.token_budget}")
        if self.per_device_train_batch_size < 1:
            raise ValueError(f"per_device_train_batch_size must be at least 1; got {self.per_device_train_batch_size}")
        if not 0 <= self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be a finite number, at least 0; got {self.learning_rate}")
        for name in self._VALID_DICT_FIELDS:
            if name.endswith("_kwargs") and not isinstance(getattr(self, name), dict | None):
                raise ValueError(f"{name} must be a mapping (JSON on the command line); got {getattr(self, name)!r}")
        if self.deepspeed is not None:
            raise ValueError("deepspeed is not supported yet: its engine would step once per micro-batch")
        if self.auto_find_batch_size:
            raise ValueError("auto_find_batch_size is not supported: micro-batches are filled by token_budget")


@dataclass
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
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "One weight per reward function; 1 each if unset."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_completion_length < 1:
            raise ValueError(f"max_completion_length must be at least 1; got {self.max_completion_length}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be a finite number above 0; got {self.temperature}")
        if not all(math.isfinite(weight) for weight in self.reward_weights or []):
            raise ValueError(f"reward_weights must be finite numbers; got {self.reward_weights}")
        if self.load_best_model_at_end and self.metric_for_best_model in (None, "loss"):
            # There is no evaluation loss.
            self.metric_for_best_model, self.greater_is_better = "reward", True


@dataclass
class SFTConfig(BaseConfig):
    """Options of `SFTTrainer`."""

    learning_rate: float = field(default=2e-5, metadata={"help": "The initial learning rate of AdamW."})
    dataset_text_field: str = field(default="text", metadata={"help": "The column that holds text, for rows of text."})
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenize the dataset."})
    max_length: int | None = field(
        default=1024, metadata={"help": "Longest sequence, in tokens; longer ones are truncated. Unset: no limit."}
    )
    truncation_mode: str = field(
        default="keep_start",
        metadata={"help": "Which end of a sequence truncation keeps.", "choices": ["keep_start", "keep_end"]},
    )
    packing: bool = field(
        default=False,
        metadata={
            "help": "Fill each of the per_device_train_batch_size places of a batch with sequences of together at most "
            "max_length tokens, so that an optimizer step learns from about as many tokens as any other. They do not "
            "see each other. (Micro-batches are without padding in any case.)"
        },
    )
    completion_only_loss: bool | None = field(
        default=None,
        metadata={
            "help": "Learn from completions only. Unset: where rows have a prompt and a completion. False: from the "
            "prompts too."
        },
    )
    assistant_only_loss: bool = field(
        default=False,
        metadata={
            "help": "Learn only from what the assistant says in messages. The chat template must mark it with "
            "{% generation %}."
        },
    )
    loss_type: str = field(
        default="nll",
        metadata={
            "help": "nll (negative log-likelihood) or dft (each token's weighted with its probability; Dynamic "
            "Fine-Tuning).",
            "choices": ["nll", "dft"],
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("truncation_mode", "loss_type"):
            choices = self.__dataclass_fields__[name].metadata["choices"]
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}; got {getattr(self, name)!r}")
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"max_length must be at least 2, to have a token to predict; got {self.max_length}")
        if self.packing and self.max_length is None:
            raise ValueError("packing needs max_length; got None")
        if self.label_smoothing_factor:
            raise ValueError(f"label_smoothing_factor is not supported; got {self.label_smoothing_factor}")


@dataclass
class GRPOConfig(OnlineConfig):
    """Options of `GRPOTrainer`. An optimizer step is `gradient_accumulation_steps` micro-batches of
    `per_device_train_batch_size` completions; `steps_per_generation` micro-batches are generated at a time."""

    num_generations: int = field(default=8, metadata={"help": "Completions sampled per prompt: the size of a group."})
    num_generations_eval: int | None = field(
        default=None, metadata={"help": "Completions per prompt in evaluation; num_generations if unset."}
    )
    generation_batch_size: int | None = field(
        default=None,
        metadata={"help": "Completions generated at a time, over all processes; excludes steps_per_generation."},
    )
    steps_per_generation: int | None = field(
        default=None,
        metadata={
            "help": "Micro-batches generated at a time, a multiple of gradient_accumulation_steps, which is the "
            "default."
        },
    )

    beta: float = field(
        default=0.0,
        metadata={"help": "Coefficient of the KL penalty to the model at start; 0 keeps no reference model."},
    )
    use_bias_correction_kl: bool = field(
        default=True,
        metadata={
            "help": "Multiply the KL penalty by the importance ratio, which makes its gradient that of the reverse KL."
        },
    )
    num_iterations: int = field(default=1, metadata={"help": "Passes over each batch of completions."})
    epsilon: float = field(default=0.2, metadata={"help": "The importance ratio is clipped from below at 1 - epsilon."})
    epsilon_high: float | None = field(
        default=None, metadata={"help": "The ratio is clipped from above at 1 + epsilon_high; epsilon if unset."}
    )
    loss_type: str = field(
        default="dapo",
        metadata={
            "help": "How token losses are aggregated: grpo (mean over each completion, then over completions), bnpo "
            "(mean over the tokens of a micro-batch), dr_grpo (sum over completions x max_completion_length), dapo "
            "(mean over the tokens of an optimizer step).",
            "choices": ["grpo", "bnpo", "dr_grpo", "dapo"],
        },
    )
    mask_truncated_completions: bool = field(
        default=False, metadata={"help": "Leave completions that did not end by themselves out of the loss."}
    )

    scale_rewards: str = field(
        default="group",
        metadata={
            "help": "Divide advantages by the standard deviation of the rewards of the group, of the batch, or not at "
            "all (none).",
            "choices": ["group", "batch", "none"],
        },
    )
    multi_objective_aggregation: str = field(
        default="sum_then_normalize",
        metadata={
            "help": "Several rewards: sum them, then normalise in each group (sum_then_normalize), or normalise each "
            "in its group, sum, and normalise over the batch (normalize_then_sum).",
            "choices": ["sum_then_normalize", "normalize_then_sum"],
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.scale_rewards, bool):
            self.scale_rewards = "group" if self.scale_rewards else "none"
        for name in ("loss_type", "scale_rewards", "multi_objective_aggregation"):
            choices = self.__dataclass_fields__[name].metadata["choices"]
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}; got {getattr(self, name)!r}")
        if self.num_iterations < 1:
            raise ValueError(f"num_iterations must be at least 1; got {self.num_iterations}")
        if self.num_generations < 2:
            raise ValueError(f"num_generations must be at least 2, to have a group; got {self.num_generations}")
        for name in ("beta", "epsilon", "epsilon_high"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a finite number, at least 0; got {value}")
        if self.num_generations_eval is not None and self.num_generations_eval < 1:
            raise ValueError(f"num_generations_eval must be at least 1; got {self.num_generations_eval}")
        self._set_generation_batch()

    def _set_generation_batch(self) -> None:
        step = self.per_device_train_batch_size * self.world_size
        if self.generation_batch_size is not None:
            # Both are set, and agree, where an already processed config is read back.
            if self.steps_per_generation not in (None, self.generation_batch_size / step):
                raise ValueError("generation_batch_size and steps_per_generation exclude each other; set one")
            if self.generation_batch_size % step:
                raise ValueError(
                    f"generation_batch_size ({self.generation_batch_size}) must be a multiple of "
                    f"per_device_train_batch_size x processes ({step})"
                )
            self.steps_per_generation = self.generation_batch_size // step
        elif self.steps_per_generation is None:
            self.steps_per_generation = self.gradient_accumulation_steps
        if self.steps_per_generation < 1 or self.steps_per_generation % self.gradient_accumulation_steps:
            raise ValueError(
                f"steps_per_generation ({self.steps_per_generation}) must be a multiple of gradient_accumulation_steps "
                f"({self.gradient_accumulation_steps}), so that an optimizer step sees one batch of completions"
            )
        self.generation_batch_size = step * self.steps_per_generation
        if self.generation_batch_size % self.num_generations:
            raise ValueError(
                f"the batch of {self.generation_batch_size} completions (per_device_train_batch_size "
                f"{self.per_device_train_batch_size} x processes {self.world_size} x steps_per_generation "
                f"{self.steps_per_generation}) must be divisible by num_generations ({self.num_generations})"
            )
