"""Checks the fields of a config or of a command's arguments: their declared types, and one table of ranges.

Every config calls `check_fields` when it is made, and so does the command line.
"""

import math
import os
import types
import typing
from dataclasses import fields
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch

# (what a message says is wanted, the test, the fields). Whether a field may be None or a float is its type's matter.
RANGES = [
    (
        "at least 1",
        lambda value: value >= 1,
        "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps eval_accumulation_steps "
        "token_budget dataset_num_proc dataloader_prefetch_factor ddp_timeout ddp_bucket_cap_mb "
        "max_completion_length response_length num_ppo_epochs num_mini_batches total_episodes num_iterations "
        "num_generations_eval generation_batch_size ref_model_sync_steps vllm_max_concurrency lora_r lora_alpha",
    ),
    (
        "at least 0",
        lambda value: value >= 0,
        "dataloader_num_workers num_completions_to_print reward_workers dynamic_sampling_max_rounds max_grad_norm",
    ),
    ("at least 1, or -1", lambda value: value >= 1 or value == -1, "max_steps"),
    ("from 0 to 2^32 - 1", lambda value: 0 <= value < 2**32, "seed data_seed"),
    (
        "a finite number above 0",
        lambda value: 0 < value < math.inf,
        "num_train_epochs temperature importance_sampling_cap vllm_server_timeout vllm_request_timeout target_kl "
        "horizon delta sapo_temperature_neg sapo_temperature_pos vespo_k_pos vespo_lambda_pos vespo_k_neg "
        "vespo_lambda_neg",
    ),
    (
        "a finite number, at least 0",
        lambda value: 0 <= value < math.inf,
        "learning_rate weight_decay adam_epsilon warmup_steps eval_delay neftune_noise_alpha beta "
        "epsilon epsilon_high overlong_penalty center_rewards_coefficient missing_eos_penalty kl_coef cliprange "
        "vf_coef cliprange_value router_aux_loss_coef",
    ),
    ("a number of seconds above 0, or None", lambda value: value > 0, "reward_timeout"),
    ("between 0 and 1", lambda value: 0 <= value <= 1, "gamma lam top_entropy_quantile"),
    ("at least 0 and below 1", lambda value: 0 <= value < 1, "adam_beta1 adam_beta2 lora_dropout"),
]
RANGE_OF = {name: (wanted, test) for wanted, test, names in RANGES for name in names.split()}
# Fields that may be infinite, which means no limit.
UNLIMITED = {"reward_timeout", "max_grad_norm"}
# Fields whose values in transformers do not match their declared types, in use or after a config is copied.
OF_ANY_TYPE = {"fsdp", "debug", "accelerator_config"}
OPTIONAL = {"max_grad_norm"}
# Fields that must not be empty text, which would stand for the current folder.
FOLDERS = {"output_dir", "vllm_weights_folder", "model", "ref_model", "reward_model", "value_model"}
NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "text",
    type(None): "None",
    dict: "a mapping",
    list: "a list",
}


def check_fields(config: Any) -> None:
    """Raises TypeError or ValueError for the first field with a wrong value. The message says which field, what is
    wanted and what came."""
    declared = typing.get_type_hints(type(config))
    for field in fields(config):
        name, value = field.name, getattr(config, field.name, None)
        if name in OF_ANY_TYPE or (value is None and name in OPTIONAL) or not field.init:
            continue
        if not _fits(value, declared[name]):
            raise TypeError(f"{name} must be {_told(declared[name])}; got {_shown(value)}")
        for each in value if isinstance(value, list | tuple) else [value]:
            if isinstance(each, str):
                _check_text(name, each, field.metadata.get("choices"))
            elif isinstance(each, Real) and not isinstance(each, bool):
                _check_number(name, each)


def _check_text(name: str, value: str, choices: Any) -> None:
    if choices is not None and value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")
    if "\0" in value:
        raise ValueError(f"{name} must not hold a NUL; got {value!r}")
    if name in FOLDERS and not value:
        raise ValueError(f"{name} must name a folder; got ''")


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, Integral) and not -(2**63) <= int(value) < 2**63:
        raise ValueError(f"{name} must be a number that fits in 64 bits; got one of {int(value).bit_length()} bits")
    wanted, test = RANGE_OF.get(name, (None, None))
    if test is not None and not test(value):
        raise ValueError(f"{name} must be {wanted}; got {value}")
    limits = torch.finfo(torch.float32)
    if not (value == 0 or limits.tiny <= abs(value) <= limits.max or (value == math.inf and name in UNLIMITED)):
        raise ValueError(f"{name} must be finite, and 0 or from 1.2e-38 to 3.4e38, as float32; got {value}")


def _fits(value: Any, kind: Any) -> bool:
    parts = typing.get_args(kind)
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return any(_fits(value, part) for part in parts)
    if typing.get_origin(kind) is typing.Literal:
        return value in parts
    if typing.get_origin(kind) is list:
        return isinstance(value, list | tuple) and all(_fits(each, parts[0]) for each in value)
    if isinstance(value, bool | np.bool_) and kind in (int, float):
        return False
    kinds = {int: Integral, float: Real, bool: bool | np.bool_, str: str | os.PathLike}
    return kind is Any or isinstance(value, kinds.get(kind, typing.get_origin(kind) or kind))


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except Exception:  # an int of too many digits, or an object's own repr, may raise
        return f"a {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:100]}..."


def _told(kind: Any) -> str:
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return " or ".join(_told(part) for part in typing.get_args(kind))
    origin = typing.get_origin(kind) or kind
    return NAMES.get(origin, getattr(origin, "__name__", str(origin)))
