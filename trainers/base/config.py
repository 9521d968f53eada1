"""The options that all configs share. Each trainer's own config stands in the trainer's file. Names and defaults are
those of TRL 1.16."""

import copy
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Self

import torch
from accelerate.utils import disable_fsdp_ram_efficient_loading
from transformers import TrainingArguments

from .field_values import check_fields

# Options of transformers' Trainer that our step, evaluation and data do not support: those that must be off, then those
# that must be on.
OFF = (
    *("label_smoothing_factor", "torch_empty_cache_steps", "bf16_full_eval", "fp16_full_eval", "use_liger_kernel"),
    *("eval_accumulation_steps", "eval_use_gather_object", "include_for_metrics", "batch_eval_metrics", "label_names"),
    *("do_predict", "debug", "enable_jit_checkpoint"),  # SIGTERM always saves a checkpoint
)
ON = ("average_tokens_across_devices", "eval_do_concat_batches", "dataloader_in_order")
# The same for `accelerator_config`.
OFF_IN_ACCELERATE = ("split_batches", "dispatch_batches")
ON_IN_ACCELERATE = ("even_batches", "use_seedable_sampler")


def _computes_bf16(use_cpu: bool) -> bool:
    """Whether the device has bfloat16 instructions. Without them bfloat16 is emulated and slower than float32."""
    if torch.cuda.is_available() and not use_cpu:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def _refuse_others(place: str, options: Any, off: tuple[str, ...], on: tuple[str, ...]) -> None:
    for name in (*off, *on):
        value = getattr(options, name, name in on)  # older versions of transformers lack some
        if bool(value) != (name in on):
            raise ValueError(f"{place}{name} is not supported; got {value}")


def router_field() -> Any:
    """The field router_aux_loss_coef, for configs of trainers that support the router loss."""
    return field(
        default=None,
        metadata={
            "help": "Weight of the router's load-balancing loss in a mixture of experts. The loss is a mean over parts "
            "of per_device_train_batch_size rows. If unset, the model's config gives the weight; 0 turns the loss off."
        },
    )


def share_prefixes_field() -> Any:
    """The field share_prefixes, for configs of trainers whose sequences begin alike."""
    return field(
        default="auto",
        metadata={
            "help": "Run the tokens that several sequences of a micro-batch begin with, such as the prompt of several "
            "completions, once for all of them. auto: where the model can, and has no router loss. true: refuse to "
            "train otherwise. false: run each sequence as a whole.",
            "choices": ["auto", "true", "false"],
        },
    )


def split_userinfo(url: str) -> tuple[str, str]:
    """(user and password, or "" if there are none; the address without them)."""
    scheme, slashes, rest = url.partition("://") if "://" in url else ("", "", url)
    userinfo, _, host = rest.rpartition("@")
    return userinfo, f"{scheme}{slashes}{host}"


def without_secrets(values: dict[str, Any]) -> dict[str, Any]:
    """A copy without hub tokens, also in arguments for `from_pretrained`, and without passwords in addresses."""
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
    """Options of every trainer: those that are new or have another default than in `transformers.TrainingArguments`.

    `repr`, `to_dict` and pickles, such as training_args.bin, hold no hub tokens and no passwords in addresses."""

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]

    learning_rate: float = field(default=1e-6, metadata={"help": "The initial learning rate of AdamW."})
    logging_steps: float = field(
        default=10, metadata={"help": "Log every N optimizer steps; below 1, N is a fraction of all steps."}
    )
    activation_checkpointing: bool | None = field(
        default=None,
        metadata={
            "help": "Recompute activations in the backward pass, which takes less memory and about 20%% more time. On "
            "if unset."
        },
    )
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "The older name of activation_checkpointing, used if that is unset."}
    )
    bf16: bool | None = field(
        default=None,
        metadata={
            "help": "Compute in bfloat16 with float32 weights. If unset, on when the device has bfloat16 instructions "
            "and fp16 is not set."
        },
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Keyword arguments of `from_pretrained`, as JSON, when the model is given as a path."},
    )
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Run Python code that comes with models and tokenizers. If off, those that need it fail."},
    )
    remove_unused_columns: bool = field(
        default=False,
        metadata={"help": "Keep only the columns that the trainer reads, so that reward functions see no others."},
    )
    token_budget: int = field(
        default=8192,
        metadata={
            "help": "Most tokens in a micro-batch. The per_device_train_batch_size x gradient_accumulation_steps rows "
            "of an optimizer step are split into as many micro-batches as needed. A longer sequence runs alone."
        },
    )
    padding_free: bool = field(
        default=True,
        metadata={
            "help": "Concatenate the sequences of a micro-batch without padding. If off, or if the model cannot keep "
            "concatenated sequences apart, they are padded to the longest."
        },
    )

    def __post_init__(self) -> None:
        if isinstance(getattr(self, "share_prefixes", None), bool):
            self.share_prefixes = str(self.share_prefixes).lower()
        check_fields(self)
        if self.deepspeed is not None:  # its engine would divide each micro-batch's loss by their number
            raise ValueError("set up deepspeed by accelerate launch only: see examples/accelerate/zero3.yaml")
        _refuse_others("", self, OFF, ON)
        if self.activation_checkpointing is None:
            self.activation_checkpointing = self.gradient_checkpointing is not False
        self.gradient_checkpointing = self.activation_checkpointing  # transformers below 5.23 reads this one
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.bf16 is None:
            self.bf16 = not self.fp16 and _computes_bf16(self.use_cpu)
        super().__post_init__()
        # With RAM-efficient loading, a reference model (a copy of the model) would have weights on one process only.
        disable_fsdp_ram_efficient_loading()
        if self.fsdp_plugin_args is not None:
            self.fsdp_plugin_args["cpu_ram_efficient_loading"] = False
        if self.optim_args and not all(pair.count("=") == 1 for pair in self.optim_args.split(",")):
            raise ValueError(f"optim_args must be name=value, separated by commas; got {self.optim_args!r}")
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
                "train_sampling_strategy batch_rebalance is not supported: token_budget decides on micro-batches"
            )
        if self.auto_find_batch_size:
            raise ValueError("auto_find_batch_size is not supported: token_budget decides on micro-batches")

    def __str__(self) -> str:
        shown = without_secrets(asdict(self))
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in shown.items())})"

    __repr__ = __str__

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()  # hides tokens, but no other secrets
        return without_secrets(values) | {name: values[name] for name in values if name.endswith("_token")}

    # Pickles, such as training_args.bin, have no secrets. Copies within this process keep them.

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
