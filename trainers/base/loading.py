"""Loads models and tokenizers from folders for all trainers, and refuses those that are incomplete."""

import pickle
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from .config import BaseConfig


def model_folder(path: str) -> Path:
    """The folder `path`, or the folder of the model with this name in the local Hugging Face cache."""
    if not Path(path).is_dir():
        try:
            config = try_to_load_from_cache(path, "config.json")
        except HFValidationError:
            config = None
        if not isinstance(config, str):
            raise FileNotFoundError(
                f"model '{path}': there is no such folder, and no model of that name in {constants.HF_HUB_CACHE}"
            )
        return Path(config).parent
    if not (Path(path) / "config.json").is_file():
        raise FileNotFoundError(f"model '{path}': the folder has no config.json")
    return Path(path)


def load_model(
    path: str,
    args: BaseConfig,
    auto_class: Any = AutoModelForCausalLM,
    *,
    name: str = "model",
    new: str | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Loads a model from a folder, or by name from the local Hugging Face cache, in float32 unless options say else.

    Args:
        name: the trainer's argument that named the model, for messages.
        new: a part of the model that is initialised if the files lack it, such as a score head.
        **options: keyword arguments of `from_pretrained`; `args.model_init_kwargs` override them.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: the model cannot be loaded, needs code that `args.trust_remote_code` does not allow, or its files
            lack weights, hold unknown ones, or hold some in another shape, which would leave weights random or unused.
    """
    kwargs: Any = args.model_init_kwargs or {}
    folder, given = model_folder(path), {**flash_attention(args), **options, **kwargs}
    # Without ignore_mismatched_sizes, other shapes raise an error that does not name the weights.
    settings = {"dtype": torch.float32, "trust_remote_code": args.trust_remote_code, "ignore_mismatched_sizes": True}
    try:
        if auto_class is AutoModelForCausalLM and (folder / "generation_config.json").exists():
            _check_generation_config(folder)
        settings |= {**given, "local_files_only": True, "output_loading_info": True}
        model, report = auto_class.from_pretrained(path, **settings)
    except Exception as error:  # transformers, file formats and models raise exceptions of any type
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, pickle.UnpicklingError):
            reason = "its pickle holds more than tensors and could run code; use safetensors, which hold only tensors"
        raise ValueError(f"{name}: '{path}' cannot be loaded: {reason}") from error
    for key, value in model.config.to_dict().items():
        if "drop" in key and isinstance(value, int | float) and not 0 <= value <= 1:  # fails only in training
            raise ValueError(f"{name}: '{path}' cannot be loaded: {key} must be between 0 and 1; got {value}")
    lacks = {key for key in report["missing_keys"] if new is None or not key.startswith(f"{new}.")}
    others = set(report["unexpected_keys"])
    if auto_class is AutoModelForSequenceClassification:  # made from a language model, it does not use its LM head
        others = {key for key in others if key.startswith(f"{model.base_model_prefix}.")}
    shapes = {key for key, *_ in report["mismatched_keys"] if "ignore_mismatched_sizes" not in given}
    told = [
        f"it {verb} {', '.join(sorted(keys)[:3])}" + f" and {len(keys) - 3} more" * (len(keys) > 3)
        for verb, keys in (("lacks", lacks), ("has, unknown to its config,", others), ("has in another shape", shapes))
        if keys
    ]
    if told:
        kind = "language model" if auto_class is AutoModelForCausalLM else "classifier"
        raise ValueError(f"{name}: '{path}' is no trained {kind}; {'; '.join(told)}")
    return model


def _check_generation_config(folder: Path) -> None:
    """Raises for a generation config that cannot be read, which transformers would silently ignore."""
    config = GenerationConfig.from_pretrained(folder)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(config, name)
        if value is not None and not all(type(each) is int for each in (value if isinstance(value, list) else [value])):
            raise ValueError(f"generation_config.json: {name} must be a token id or a list of them; got {value!r}")


def flash_attention(args: BaseConfig) -> dict[str, str]:
    """Options of `from_pretrained` that choose flash attention, if it is installed and dtype and device allow it."""
    if args.use_cpu or not (args.bf16 or args.fp16):
        return {}
    for version, available in ((3, is_flash_attn_3_available), (2, is_flash_attn_2_available)):
        if available():
            return {"attn_implementation": f"flash_attention_{version}"}
    return {}


def load_classifier(
    name: str, model: str | PreTrainedModel, args: BaseConfig, *, trained: bool = False
) -> PreTrainedModel:
    """A sequence classifier with one label, loaded if `model` is a folder or a name. With `trained` the files must have
    its score head; otherwise a new one is made."""
    if isinstance(model, str):
        new = None if trained else "score"
        model = load_model(model, args, AutoModelForSequenceClassification, name=name, new=new, num_labels=1)
    refuse_prompt_learning(f"peft_config of {name}", model)
    num_labels = getattr(getattr(model, "config", None), "num_labels", None)
    if num_labels != 1 or not hasattr(model, "score"):
        raise ValueError(
            f"{name} must be a sequence classifier with num_labels=1 and a score head; got {type(model).__name__} with "
            f"num_labels={num_labels}"
        )
    return model


def set_pad_token(classifier: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Gives a classifier without a padding token the tokenizer's: without one transformers refuses padded batches."""
    if classifier.config.pad_token_id is None:
        classifier.config.pad_token_id = tokenizer.pad_token_id


def load_tokenizer(model: PreTrainedModel, args: BaseConfig, name: str = "processing_class") -> PreTrainedTokenizerBase:
    """The tokenizer in the folder that the model was loaded from. `name` is the argument that it stands for."""
    path = model.config._name_or_path
    if not path:
        raise ValueError(f"{name}: a model given in memory needs its tokenizer; got None")
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=args.trust_remote_code)
    except Exception as error:  # the tokenizers library raises exceptions of any type
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{name}: no tokenizer could be loaded from '{path}': {type(error).__name__}: {reason}"
        ) from error


def disable_dropout(model: nn.Module) -> None:
    module: Any
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


def refuse_prompt_learning(name: str, given: Any) -> None:
    """Raises ValueError for PEFT's prompt learning. `given` is a PEFT config, or a model that may have adapters."""
    configs = getattr(given, "peft_config", given)
    for config in configs.values() if isinstance(configs, dict) else [configs]:
        if getattr(config, "is_prompt_learning", False):
            raise ValueError(
                f"{name} must adapt weights, as LoraConfig does; got {type(config).__name__}, whose virtual tokens "
                "lengthen each sequence"
            )
