"""What all configs share. Each stands with its trainer; names and defaults are TRL 1.16's."""

import copy
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Self

import torch
from accelerate.utils import disable_fsdp_ram_efficient_loading
from transformers import TrainingArguments

from .field_values import check_fields

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


def router_field() -> Any:
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
