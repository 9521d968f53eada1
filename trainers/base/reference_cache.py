"""Keeps log-probabilities under a reference model on disk, for DPOTrainer's precompute_ref_log_probs.

They lie in the cache folder of `datasets`, in one file per dataset and reference, named by a hash of everything that
they depend on.
"""

import hashlib
import json
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from .loading import model_folder
from .reporting import warned_of

logger = logging.get_logger(__name__)


def hash_model(model: str | PreTrainedModel, settings: Any) -> str:
    """A hash of everything that decides what the model computes: weights, config and `settings`. For a folder its files
    are hashed, without loading the model."""
    content = hashlib.sha256(repr(settings).encode())
    if isinstance(model, str):
        for file in sorted(model_folder(model).iterdir()):
            if file.name == "config.json" or file.suffix == ".safetensors" or file.name.startswith("pytorch_model"):
                content.update(file.name.encode())
                with file.open("rb") as stream:
                    content.update(hashlib.file_digest(stream, "sha256").digest())
        return content.hexdigest()
    irrelevant = dict.fromkeys(("_name_or_path", "transformers_version", "use_cache"))
    config = {**model.config.to_diff_dict(), **irrelevant}
    adapters = {name: each.to_dict() for name, each in getattr(model, "peft_config", {}).items()}
    config |= {"adapters": adapters, "active_adapters": getattr(model, "active_adapters", None) if adapters else None}
    content.update(json.dumps(config, sort_keys=True, default=_plain).encode())
    for name, value in sorted(model.state_dict().items()):
        content.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        content.update(value.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy())
    return content.hexdigest()


def _plain(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, set) else str(value)


def cache_file(rows: datasets.Dataset, reference: str) -> Path:
    """The file for the log-probabilities of `rows`, as `data.prepare` made them, under the reference with this hash."""
    content = hashlib.sha256(reference.encode())
    for row in rows:
        for sequence in row["sequences"]:
            tokens = np.array([sequence["input_ids"], sequence["labels"]], np.int64)
            content.update(f"{tokens.shape}".encode())
            content.update(tokens.tobytes())
    return Path(datasets.config.HF_DATASETS_CACHE) / "rlkernels" / f"reference_logps_{content.hexdigest()}.npz"


def read(file: Path) -> np.ndarray | None:
    """The log-probabilities [2, rows], or None if there is no file or it is damaged."""
    if not file.is_file():
        return None
    try:
        with np.load(file) as content:  # a zip file: each part has a checksum
            values = content["logps"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        logger.warning(f"{file} is damaged and will be written again: {error}")
        return None
    return values


def write(file: Path, values: np.ndarray) -> None:
    """Writes the complete file, or warns and writes nothing."""
    with warned_of(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            aside = Path(folder) / file.name
            np.savez(aside, logps=values)
            aside.replace(file)
