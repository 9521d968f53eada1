"""Configs: `transformers.TrainingArguments` and the fields of each method. Names and defaults are TRL 1.16's."""

import copy
import math
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Self

import torch
from accelerate.utils import disable_fsdp_ram_efficient_loading
from transformers import TrainingArguments

import rlkernels

from .field_values import check_fields

# Losses of pairs that label_smoothing changes.
SMOOTHED = {"sigmoid", "exo_pair", "robust", "aot", "aot_unpaired", "simpo"}
# Losses of all pairs of a micro-batch, which are sorted or whose tokens are counted.
OVER_THE_BATCH = {"aot", "aot_unpaired", "sft", "orpo"}
# The objective and the aggregation of `rlkernels.policy_loss` that each loss_type of GRPO stands for.
OBJECTIVES = {
    "grpo": ("ppo", "seq_mean_token_mean"),
    "bnpo": ("ppo", "token_sum"),
    "dr_grpo": ("ppo", "token_sum"),
    "dapo": ("ppo", "token_sum"),
    "luspo": ("ppo", "seq_mean_token_sum"),
    "cispo": ("cispo", "token_sum"),
    "sapo": ("sapo", "seq_mean_token_mean"),
    "vespo": ("vespo", "token_sum"),
    "gmpo": ("gmpo", "seq_mean_token_mean"),
    "dppo_tv": ("dppo_tv", "token_sum"),
    "dppo_kl": ("dppo_kl", "token_sum"),
    "reinforce": ("reinforce", "token_sum"),
}
# Options of the Trainer's own steps, predictions and data, which are others here: what must be off, and what on.
OFF = (
    *("label_smoothing_factor", "torch_empty_cache_steps", "bf16_full_eval", "fp16_full_eval", "use_liger_kernel"),
    *("eval_accumulation_steps", "eval_use_gather_object", "include_for_metrics", "batch_eval_metrics", "label_names"),
    *("do_predict", "debug", "enable_jit_checkpoint"),  # SIGTERM saves a checkpoint in any case
)
ON = ("average_tokens_across_devices", "eval_do_concat_batches", "dataloader_in_order")
# The same of `accelerator_config`.
OFF_IN_ACCELERATE = ("split_batches", "dispatch_batches")
ON_IN_ACCELERATE = ("even_batches", "use_seedable_sampler")


def _computes_bf16(use_cpu: bool) -> bool:
    """Whether the device has bfloat16 instructions; elsewhere bfloat16 is emulated, and slower than float32."""
    if torch.cuda.is_available() and not use_cpu:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def _refuse_others(place: str, options: Any, off: tuple[str, ...], on: tuple[str, ...]) -> None:
    for name in (*off, *on):
        value = getattr(options, name, name in on)  # older versions of transformers have not all
        if bool(value) != (name in on):
            raise ValueError(f"{place}{name} is not supported; got {value}")


def _router_aux_loss_coef() -> Any:
    return field(
        default=None,
        metadata={
            "help": "Weight of the loss by which a mixture of experts uses all of its experts alike, the mean over "
            "parts of per_device_train_batch_size rows; what the model declares if unset. 0: without."
        },
    )


def split_userinfo(url: str) -> tuple[str, str]:
    """User and password of an address, or nothing; and the address without them."""
    scheme, slashes, rest = url.partition("://") if "://" in url else ("", "", url)
    userinfo, _, host = rest.rpartition("@")
    return userinfo, f"{scheme}{slashes}{host}"


def without_secrets(values: dict[str, Any]) -> dict[str, Any]:
    """A copy without tokens of the hub, also those in arguments for `from_pretrained`, and passwords in addresses."""
    shown = dict(values)
    for name, value in values.items():
        if isinstance(value, dict):
            shown[name] = without_secrets(value)
        elif name == "token" or str(name).endswith(("hub_token", "auth_token")):
            shown[name] = None
        elif str(name).endswith("url") and isinstance(value, str):
            shown[name] = split_userinfo(value)[1]
    return shown


@dataclass(repr=False)
class BaseConfig(TrainingArguments):
    """What every trainer here adds to, or defaults differently from, `transformers.TrainingArguments`.

    Tokens of the hub and passwords in addresses are in none of `repr`, `to_dict` and what is pickled, such as the
    training_args.bin of a saved model."""

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]

    learning_rate: float = field(default=1e-6, metadata={"help": "The initial learning rate of AdamW."})
    logging_steps: float = field(
        default=10, metadata={"help": "Log every so many optimizer steps; below 1, a fraction of all steps."}
    )
    activation_checkpointing: bool | None = field(
        default=None,
        metadata={"help": "Recompute activations in the backward pass: less memory, about 20%% slower. On if unset."},
    )
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "The older name of activation_checkpointing, heeded where that is unset."}
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
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Run the Python code that models and tokenizers bring along; they are refused without."},
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
        check_fields(self)
        if self.deepspeed is not None:  # its engine would divide each micro-batch's loss by the number of them
            raise ValueError("deepspeed is set up by accelerate launch alone: see examples/accelerate/zero3.yaml")
        _refuse_others("", self, OFF, ON)
        if self.activation_checkpointing is None:
            self.activation_checkpointing = self.gradient_checkpointing is not False
        self.gradient_checkpointing = self.activation_checkpointing  # all that transformers below 5.23 knows
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.bf16 is None:
            self.bf16 = not self.fp16 and _computes_bf16(self.use_cpu)
        super().__post_init__()
        # It would leave a reference model, a copy of the model, without weights on all processes but the first.
        disable_fsdp_ram_efficient_loading()
        if self.fsdp_plugin_args is not None:
            self.fsdp_plugin_args["cpu_ram_efficient_loading"] = False
        if self.optim_args and not all(pair.count("=") == 1 for pair in self.optim_args.split(",")):
            raise ValueError(f"optim_args must be name=value, parted by commas; got {self.optim_args!r}")
        for kind in ("logging", "eval", "save"):
            strategy, steps = getattr(self, f"{kind}_strategy"), getattr(self, f"{kind}_steps")
            if strategy == "steps" and not steps > 0:
                raise ValueError(f"{kind}_steps must be above 0 with {kind}_strategy steps; got {steps}")
        for name in self._VALID_DICT_FIELDS:
            if name.endswith("_kwargs") and not isinstance(getattr(self, name), dict | None):
                raise ValueError(f"{name} must be a mapping (JSON on the command line); got {getattr(self, name)!r}")
        _refuse_others("accelerator_config: ", self.accelerator_config, OFF_IN_ACCELERATE, ON_IN_ACCELERATE)
        for kind in ("tp", "cp", "sp"):
            if getattr(self.parallelism_config, f"{kind}_size", 1) > 1:
                raise ValueError(f"parallelism_config: {kind}_size above 1 is not supported")
        if self.train_sampling_strategy == "batch_rebalance":
            raise ValueError(
                "train_sampling_strategy batch_rebalance is not supported: micro-batches are filled by token_budget"
            )
        if self.auto_find_batch_size:
            raise ValueError("auto_find_batch_size is not supported: micro-batches are filled by token_budget")

    def __str__(self) -> str:
        shown = without_secrets(asdict(self))
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in shown.items())})"

    __repr__ = __str__

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()  # in which tokens, but no other secrets, are hidden
        return without_secrets(values) | {name: values[name] for name in values if name.endswith("_token")}

    # Pickled as training_args.bin. A copy in this process is as it was.

    def __getstate__(self) -> dict[str, Any]:
        return without_secrets(self.__dict__)

    def __copy__(self) -> Self:
        copied = object.__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied = object.__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied


@dataclass(repr=False)
class RewardConfig(BaseConfig):
    """Options of `RewardTrainer`."""

    learning_rate: float = field(default=1e-4, metadata={"help": "The initial learning rate of AdamW."})
    disable_dropout: bool = field(default=True, metadata={"help": "Train without dropout."})
    dataset_num_proc: int | None = field(
        default=None, metadata={"help": "Processes that tokenize the dataset; this one alone if unset."}
    )
    max_length: int | None = field(
        default=1024, metadata={"help": "Longest sequence, in tokens; pairs with a longer one are left out."}
    )
    center_rewards_coefficient: float | None = field(
        default=None,
        metadata={
            "help": "Weight of (chosen + rejected)^2 in the loss, which keeps scores around 0; 0.01 serves well."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length must be at least 1; got {self.max_length}")


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
    router_aux_loss_coef: float | None = _router_aux_loss_coef()
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


@dataclass(repr=False)
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
            "see each other. Without it a place is one row's; micro-batches are free of padding in either case."
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
            "{%% generation %%}."
        },
    )
    router_aux_loss_coef: float | None = _router_aux_loss_coef()
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
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"max_length must be at least 2, to have a token to predict; got {self.max_length}")
        if self.packing and self.train_sampling_strategy == "group_by_length":
            raise ValueError("packing and train_sampling_strategy group_by_length exclude each other; got both")
        if self.packing and self.max_length is None:
            raise ValueError("packing needs max_length; got None")


@dataclass(repr=False)
class PPOConfig(OnlineConfig):
    """Options of `PPOTrainer`. `per_device_train_batch_size` x `gradient_accumulation_steps` prompts per process are
    completed at a time, and serve `num_ppo_epochs` x `num_mini_batches` optimizer steps. Names and defaults are those
    of TRL 1.8.0, the last that had a PPO trainer."""

    learning_rate: float = field(default=3e-6, metadata={"help": "The initial learning rate of AdamW."})
    temperature: float = field(
        default=0.7, metadata={"help": "Temperature of sampling, and of the log-probabilities in the loss."}
    )
    max_completion_length: int = field(
        init=False, metadata={"help": "response_length, under the name that it has in GRPO."}
    )
    response_length: int = field(default=53, metadata={"help": "Longest completion, in tokens."})
    total_episodes: int | None = field(
        default=None,
        metadata={"help": "Completions to learn from, over all processes; instead of num_train_epochs and max_steps."},
    )
    num_ppo_epochs: int = field(default=4, metadata={"help": "Passes over each batch of completions."})
    num_mini_batches: int = field(
        default=1, metadata={"help": "Optimizer steps in a pass: parts into which the batch is split at random."}
    )

    missing_eos_penalty: float | None = field(
        default=None, metadata={"help": "Taken off the score of a completion that did not end by itself."}
    )
    score_at: str = field(
        default="last",
        metadata={
            "help": "Where a completion's score is given: at its last token (last), or, as in TRL, behind it, in a "
            "state with a value of its own (after_last; at the last token if it has response_length tokens).",
            "choices": ["last", "after_last"],
        },
    )
    whiten_rewards: bool = field(
        default=False, metadata={"help": "Divide token rewards by their standard deviation over the batch."}
    )
    kl_coef: float = field(
        default=0.05,
        metadata={"help": "Coefficient of the KL penalty to the model at start; 0 keeps no reference model."},
    )
    kl_estimator: str = field(
        default="k1",
        metadata={
            "help": "Estimator of the divergence at a token: k1, k2, k3 or abs, as in `kl_penalty`.",
            "choices": ["k1", "k2", "k3", "abs"],
        },
    )
    adap_kl_ctrl: bool = field(
        default=False,
        metadata={"help": "Adapt the KL coefficient, from kl_coef, so that objective/kl nears target_kl."},
    )
    target_kl: float = field(default=6.0, metadata={"help": "What adap_kl_ctrl aims at, per completion."})
    horizon: float = field(
        default=10000,
        metadata={"help": "In how many completions adap_kl_ctrl changes the coefficient by a fifth, at most."},
    )

    cliprange: float = field(default=0.2, metadata={"help": "The importance ratio is clipped at 1 +- cliprange."})
    vf_coef: float = field(default=0.1, metadata={"help": "Coefficient of the value loss."})
    cliprange_value: float = field(
        default=0.2, metadata={"help": "Values are clipped at those of the rollout +- cliprange_value."}
    )
    gamma: float = field(default=1.0, metadata={"help": "Discount per token."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of generalised advantage estimation."})

    def __post_init__(self) -> None:
        self.max_completion_length = self.response_length
        super().__post_init__()
        if self.adap_kl_ctrl and self.kl_coef == 0:
            raise ValueError("adap_kl_ctrl needs a kl_coef above 0 to start from; got 0")
        rows = self.per_device_train_batch_size * self.gradient_accumulation_steps
        if rows % self.num_mini_batches:
            raise ValueError(
                f"the {rows} completions of a process (per_device_train_batch_size {self.per_device_train_batch_size} "
                f"x gradient_accumulation_steps {self.gradient_accumulation_steps}) must be divisible by "
                f"num_mini_batches ({self.num_mini_batches})"
            )
        if self.total_episodes is not None:
            batches = math.ceil(self.total_episodes / self.rollout_batch_size)
            self.max_steps = batches * self.num_ppo_epochs * self.num_mini_batches

    @property
    def rollout_batch_size(self) -> int:
        """Prompts completed at a time, over all processes."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size


@dataclass(repr=False)
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
    epsilon: float = field(
        default=0.2,
        metadata={
            "help": "The importance ratio is clipped from below at 1 - epsilon; loss_type gmpo clips its logarithm, "
            "dppo_tv and dppo_kl drop tokens whose probability moved further."
        },
    )
    epsilon_high: float | None = field(
        default=None,
        metadata={
            "help": "The ratio is clipped from above at 1 + epsilon_high, epsilon if unset; with loss_type cispo at "
            "epsilon_high, such as 5.0."
        },
    )
    delta: float | None = field(
        default=None,
        metadata={
            "help": "The ratio is at most delta where the advantage is negative too; above 1 + epsilon_high. For "
            "loss_type grpo, bnpo, dr_grpo, dapo, luspo; dppo bounds its weights by it, by 20 if unset."
        },
    )
    importance_sampling_level: str = field(
        default="token",
        metadata={
            "help": "One importance ratio per token, or one per sequence, its tokens' geometric mean (GSPO). For "
            "loss_type grpo, bnpo, dr_grpo, dapo, luspo; the others have a level of their own.",
            "choices": ["token", "sequence"],
        },
    )
    loss_type: str = field(
        default="dapo",
        metadata={
            "help": "The objective, and how token losses are aggregated. The clipped ratio: grpo (mean over each "
            "completion, then over completions), bnpo (mean over the tokens of per_device_train_batch_size "
            "completions), dr_grpo (sum over completions x max_completion_length), dapo (mean over the tokens of an "
            "optimizer step), luspo (sum over each completion, mean over completions). Other objectives, aggregated "
            "as dapo: cispo, vespo, dppo_tv, dppo_kl, reinforce; as grpo: sapo, gmpo. Their equations are in "
            "`rlkernels.policy_loss`.",
            "choices": [*OBJECTIVES],
        },
    )
    sapo_temperature_neg: float = field(
        default=1.05, metadata={"help": "Temperature of loss_type sapo where the advantage is not positive."}
    )
    sapo_temperature_pos: float = field(
        default=1.0, metadata={"help": "Temperature of loss_type sapo where the advantage is positive."}
    )
    vespo_k_pos: float = field(
        default=2.0, metadata={"help": "Power of a sequence's weight below 1 in loss_type vespo, advantage positive."}
    )
    vespo_lambda_pos: float = field(
        default=3.0, metadata={"help": "Decay of a sequence's weight above 1 in loss_type vespo, advantage positive."}
    )
    vespo_k_neg: float = field(
        default=3.0, metadata={"help": "Power of a sequence's weight below 1 in loss_type vespo, advantage negative."}
    )
    vespo_lambda_neg: float = field(
        default=2.0, metadata={"help": "Decay of a sequence's weight above 1 in loss_type vespo, advantage negative."}
    )
    top_entropy_quantile: float = field(
        default=1.0,
        metadata={
            "help": "Keep in the policy loss only this fraction of an optimizer step's tokens, over all processes: "
            "those where the model's entropy is highest. 1 keeps all; less costs a forward pass."
        },
    )
    mask_truncated_completions: bool = field(
        default=False, metadata={"help": "Leave completions that did not end by themselves out of the loss."}
    )

    overlong_buffer_length: int | None = field(
        default=None,
        metadata={
            "help": "Punish length (DAPO): a further reward falls from 0 to -1 over the last so many tokens before "
            "max_completion_length, tools' tokens not counted. No such reward if unset."
        },
    )
    overlong_penalty: float = field(default=1.0, metadata={"help": "The weight of that reward among the others."})
    dynamic_sampling_max_rounds: int = field(
        default=0,
        metadata={
            "help": "Where the rewards of a group are all equal, and so teach nothing, sample another prompt in its "
            "place, at most so many times per generation batch (DAPO)."
        },
    )

    advantage: str = field(
        default="grpo",
        metadata={
            "help": "What a completion's reward is held against. grpo: the mean of its group. rloo: the mean of the "
            "others of its group; with loss_type luspo, a step is one of RLOO. reinforce_plus_plus: the mean over "
            "all tokens of the batch, divided by their standard deviation. With the last two, beta x KL is part of "
            "the reward, not of the loss.",
            "choices": ["grpo", "rloo", "reinforce_plus_plus"],
        },
    )
    scale_rewards: str = field(
        default="group",
        metadata={
            "help": "With advantage grpo, divide by the standard deviation of the rewards of the group, of the batch, "
            "or not at all (none).",
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
        if isinstance(self.scale_rewards, bool):
            self.scale_rewards = "group" if self.scale_rewards else "none"
        super().__post_init__()
        if self.num_generations < (1 if self.advantage == "reinforce_plus_plus" else 2):
            raise ValueError(f"num_generations must be at least 2, to have a group; got {self.num_generations}")
        buffer = self.overlong_buffer_length
        if buffer is not None and not 0 < buffer <= self.max_completion_length:
            raise ValueError(
                f"overlong_buffer_length must be between 1 and max_completion_length ({self.max_completion_length}); "
                f"got {buffer}"
            )
        self._check_combinations()
        self._set_generation_batch()

    @property
    def kl_in_reward(self) -> bool:
        return self.beta > 0 and self.advantage != "grpo"

    def _check_combinations(self) -> None:
        if self.loss_type == "cispo" and (self.epsilon_high or 0) < 1:
            raise ValueError(
                f"epsilon_high must be at least 1 with loss_type cispo, which clips the ratio there; got "
                f"{self.epsilon_high}"
            )
        if self.importance_sampling_level == "sequence" and OBJECTIVES[self.loss_type][0] != "ppo":
            by_level = ", ".join(name for name, (objective, _) in OBJECTIVES.items() if objective == "ppo")
            raise ValueError(
                f"importance_sampling_level 'sequence' goes with loss_type {by_level}; got {self.loss_type!r}"
            )
        if self.multi_objective_aggregation == "normalize_then_sum" and self.advantage != "grpo":
            raise ValueError(
                f"multi_objective_aggregation 'normalize_then_sum' goes with advantage 'grpo'; got {self.advantage!r}"
            )
        if self.dynamic_sampling_max_rounds and self.num_generations < 2:
            raise ValueError("dynamic_sampling_max_rounds needs groups: num_generations must be at least 2; got 1")

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


@dataclass(repr=False)
class DPOConfig(BaseConfig):
    """Options of `DPOTrainer`. An optimizer step is `gradient_accumulation_steps` x `per_device_train_batch_size` pairs
    on each device."""

    dataset_num_proc: int | None = field(
        default=None, metadata={"help": "Processes that tokenize the dataset; this one alone if unset."}
    )
    max_length: int | None = field(
        default=1024,
        metadata={
            "help": "Most tokens of a prompt and a completion: what is beyond is cut off, and pairs whose prompt is as "
            "long are left out."
        },
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Train without dropout."})
    precompute_ref_log_probs: bool = field(
        default=False,
        metadata={
            "help": "Compute the reference's log-probabilities of all pairs before training, so that no reference is "
            "kept in memory. They are kept on disk, in the cache of `datasets`, for other runs on the same pairs."
        },
    )

    router_aux_loss_coef: float | None = _router_aux_loss_coef()
    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid"],
        metadata={
            "help": "One or several losses of `rlkernels.preference_loss`, added up; sft, simpo and orpo need no "
            "reference.",
            "choices": [
                *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot"),
                *("aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm", "simpo", "orpo"),
            ],
        },
    )
    loss_weights: list[float] | None = field(
        default=None, metadata={"help": "One weight per loss, such as 0.8 0.2 1.0 for MPO; 1 each if unset."}
    )
    beta: float = field(
        default=0.1, metadata={"help": "The higher, the nearer to the reference the model is kept (tau of IPO)."}
    )
    label_smoothing: float = field(
        default=0.0,
        metadata={
            "help": "The share of pairs taken to be the wrong way round, in sigmoid (cDPO; TRL's sigmoid ignores it), "
            "exo_pair, robust, aot, aot_unpaired and simpo."
        },
    )
    f_divergence_type: str = field(
        default="reverse_kl",
        metadata={
            "help": "The divergence from the reference; others than reverse_kl go with sigmoid, sigmoid_norm, hinge, "
            "ipo, exo_pair, robust, discopop and sft.",
            "choices": ["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"],
        },
    )
    f_alpha_divergence_coef: float = field(
        default=0.5, metadata={"help": "Alpha of alpha_divergence, which at 1 is reverse_kl."}
    )
    discopop_tau: float = field(default=0.05, metadata={"help": "Temperature tau of discopop."})
    simpo_gamma: float = field(default=0.5, metadata={"help": "By how much simpo wants chosen above rejected."})
    ld_alpha: float | None = field(
        default=None,
        metadata={
            "help": "LD-DPO: the weight, from 0 to 1, of the tokens by which a completion is longer than the other of "
            "its pair; 1 if unset."
        },
    )
    use_weighting: bool = field(
        default=False,
        metadata={"help": "WPO: weigh each pair by how likely its completions are under the model as it is."},
    )
    sync_ref_model: bool = field(
        default=False,
        metadata={
            "help": "TR-DPO: every ref_model_sync_steps steps the reference becomes (1 - ref_model_mixup_alpha) x "
            "itself + ref_model_mixup_alpha x the model."
        },
    )
    ref_model_mixup_alpha: float = field(
        default=0.6, metadata={"help": "Share of the model in the reference when sync_ref_model renews it."}
    )
    ref_model_sync_steps: int = field(
        default=512,
        metadata={"help": "Optimizer steps from one renewal of the reference by sync_ref_model to the next."},
    )

    def __post_init__(self) -> None:
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        super().__post_init__()
        if not self.loss_type:
            raise ValueError("loss_type must name at least one loss; got none")
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            raise ValueError(
                f"loss_weights must have one entry per loss, {len(self.loss_type)}; got {len(self.loss_weights)}"
            )
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"max_length must be at least 2; got {self.max_length}")
        if self.ld_alpha is not None and not 0 <= self.ld_alpha <= 1:
            raise ValueError(f"ld_alpha must be from 0 to 1; got {self.ld_alpha}")
        if self.label_smoothing and SMOOTHED.isdisjoint(self.loss_type):
            raise ValueError(
                f"label_smoothing must be 0 with loss_type {', '.join(self.loss_type)}; got {self.label_smoothing}"
            )
        if self.use_weighting and not OVER_THE_BATCH.isdisjoint(self.loss_type):
            raise ValueError(
                f"use_weighting must be off with {', '.join(sorted(OVER_THE_BATCH))}, which are not sums over pairs; "
                f"got loss_type {', '.join(self.loss_type)}"
            )
        if not 0 < self.ref_model_mixup_alpha <= 1:
            raise ValueError(f"ref_model_mixup_alpha must be above 0 and at most 1; got {self.ref_model_mixup_alpha}")
        if self.sync_ref_model and self.precompute_ref_log_probs:
            raise ValueError("sync_ref_model and precompute_ref_log_probs exclude each other: the reference changes")
        nothing: Any = torch.zeros(0)
        for loss in self.loss_type:
            try:
                rlkernels.preference_loss(
                    *[nothing] * 4, chosen_lengths=nothing, rejected_lengths=nothing, **self.loss_options(loss)
                )
            except ValueError as error:
                raise ValueError(
                    f"loss_type {loss} with f_divergence_type {self.f_divergence_type}: {error}"
                ) from error

    def loss_options(self, loss: str) -> dict[str, Any]:
        """Those of `rlkernels.preference_loss` for one of the losses."""
        return {
            "loss": loss,
            "beta": self.beta,
            "label_smoothing": self.label_smoothing if loss in SMOOTHED else 0.0,
            "divergence": self.f_divergence_type,
            "alpha": self.f_alpha_divergence_coef,
            "discopop_tau": self.discopop_tau,
            "simpo_gamma": self.simpo_gamma,
        }
