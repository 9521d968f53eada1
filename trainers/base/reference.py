"""The reference model in a checkpoint: a resumed run may be given the checkpoint as its model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers.utils import logging

from .checkpoints import BadCheckpoint
from .sharding import load_whole_state_dict

logger = logging.get_logger(__name__)

FOLDER, ADAPTERS = "reference", "reference_adapters.pth"


class KeptReference:
    """Keeps a reference model as `kept.Kept` keeps a file: in a folder of its own; or, if it has adapters, the weights
    that the model has trained since, in one file.

    auto_class, trust_remote_code: how the model in the folder is loaded.
    adapter_names: the weights that the trained model trains.
    """

    what = "its reference"

    def __init__(
        self,
        accelerator: Accelerator,
        model: Any,
        auto_class: Any,
        adapter_names: Sequence[str],
        trust_remote_code: bool,
    ) -> None:
        self.accelerator, self.auto_class, self.trust_remote_code = accelerator, auto_class, trust_remote_code
        self.model: Any = accelerator.unwrap_model(model)
        self.adapter_names = adapter_names
        self.has_adapters = hasattr(self.model, "get_base_model")

    def save(self, folder: Path, process: int, writes: bool) -> None:
        state_dict = self.accelerator.get_state_dict(self.model) if self.accelerator.is_fsdp2 else None
        if not writes:
            return
        if self.has_adapters:
            # PEFT would save a folder of adapters, which the Trainer takes for one more of the model's own.
            weights = self.model.state_dict() if state_dict is None else state_dict
            torch.save({name: weights[name] for name in self.adapter_names}, folder / ADAPTERS)
        else:
            self.model.save_pretrained(folder / FOLDER, state_dict=state_dict)

    def load(self, folder: Path, process: int) -> None:
        adapters, whole = folder / ADAPTERS, folder / FOLDER
        if self.has_adapters and adapters.is_file():
            saved = torch.load(adapters, map_location="cpu", weights_only=True)
            others = saved.keys() ^ set(self.adapter_names)
        elif whole.is_dir():
            model, report = self.auto_class.from_pretrained(
                whole,
                dtype=self.model.dtype,
                output_loading_info=True,
                local_files_only=True,
                trust_remote_code=self.trust_remote_code,
            )
            saved, others = model.state_dict(), set(report["missing_keys"])
        else:
            logger.warning(f"{folder} does not hold its run's reference: that of this run is the model it was given")
            return
        if others:
            raise BadCheckpoint(folder, f"a reference of another kind: {', '.join(sorted(others)[:5])} in one alone")
        load_whole_state_dict(self.model, saved, strict=whole.is_dir())
