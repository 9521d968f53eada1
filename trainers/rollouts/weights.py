"""Writes the trained weights as a complete model in a folder. A vLLM server loads them from there."""

import copy
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .sampling import is_sharded


def write_weights(folder: Path, policy: Any, wrapped: nn.Module, accelerator: Any) -> None:
    """Writes `policy`, which is `wrapped` or a part of it, as safetensors and config.json.

    Sharded weights are gathered, adapters are merged, and tied weights are written under each of their names. Every
    process must call it; the main process writes. The policy does not change."""
    if hasattr(policy, "merge_and_unload"):
        if is_sharded(policy):
            raise ValueError("a sharded model with adapters cannot be sent to a server")
        if accelerator.is_main_process:
            merged = copy.deepcopy(policy).merge_and_unload()
            merged.save_pretrained(folder, state_dict=_untied(merged.state_dict()))
        return
    model = accelerator.unwrap_model(wrapped, keep_torch_compile=False)
    prefix = next((f"{name}." for name, module in model.named_modules() if name and module is policy), "")
    weights = {}
    for name, weight in accelerator.get_state_dict(wrapped).items():
        whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
        if accelerator.is_main_process and name.startswith(prefix):
            weights[name.removeprefix(prefix)] = whole
    if accelerator.is_main_process:
        policy.save_pretrained(folder, state_dict=_untied(weights))


def _untied(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    # vLLM on a CPU keeps the LM head in its own layout, and rebuilds it only if the file names the head.
    seen: set[int] = set()
    untied = {}
    for name, weight in weights.items():
        place = weight.untyped_storage().data_ptr()
        untied[name] = weight.clone() if place in seen else weight
        seen.add(place)
    return untied
