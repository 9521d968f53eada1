"""Models whose weights are spread over the processes, by FSDP2 or by DeepSpeed."""

import contextlib
from collections.abc import Iterator
from typing import Any

from accelerate import Accelerator
from accelerate.utils import fsdp2_prepare_model
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, StateDictType
from transformers.integrations import is_deepspeed_zero3_enabled


def head_unit(model: Any) -> FSDPModule:
    """The module whose parameters are gathered together with the LM head, under FSDP2."""
    head = model.get_output_embeddings()
    return head if isinstance(head, FSDPModule) else model


@contextlib.contextmanager
def accumulating(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """Inside, a backward pass adds to the gradients of this process alone. The first one after it reduces them over all
    processes, and lets a DeepSpeed engine step. Until then the weight of the LM head stays gathered."""
    unit = head_unit(model) if isinstance(model, FSDPModule) else None
    accelerator.gradient_state._set_sync_gradients(False)
    if unit is not None:
        unit.set_reshard_after_backward(False, recurse=False)
    try:
        reduces = accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
        with contextlib.nullcontext() if reduces else accelerator.no_sync(model):
            yield
    finally:
        if unit is not None:
            unit.set_reshard_after_backward(True, recurse=False)
        accelerator.gradient_state._set_sync_gradients(True)


@contextlib.contextmanager
def gathered_once(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """Inside, the first forward pass gathers the weights, and the others find them whole: a process may make more
    passes than another."""
    if not isinstance(model, FSDPModule):
        yield
        return
    model.set_reshard_after_forward(False)
    try:
        yield
    finally:
        model.set_reshard_after_forward(accelerator.state.fsdp_plugin.reshard_after_forward)
        for unit in (model, head_unit(model)):
            unit.set_reshard_after_forward(False, recurse=False)
        reshard(model)


def reshard(model: nn.Module) -> None:
    """Shards the parameters again, if a forward pass without gradients left them gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def prepare_frozen(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """Puts a model that is not trained on its device; under FSDP2 it is sharded as the trained one is."""
    if not accelerator.is_fsdp2:
        return accelerator.prepare_model(model, evaluation_mode=True)
    return fsdp2_prepare_model(accelerator, model)


def refuse_zero3(name: str) -> None:
    if is_deepspeed_zero3_enabled():
        raise ValueError(f"{name} is not supported under DeepSpeed ZeRO-3: use FSDP2, or ZeRO-2")


def keeps_shards(accelerator: Accelerator) -> bool:
    """Whether each process saves its own shard of the model, and none the whole."""
    return accelerator.is_fsdp2 and accelerator.state.fsdp_plugin.state_dict_type == StateDictType.SHARDED_STATE_DICT


def load_whole_state_dict(model: nn.Module, state_dict: dict[str, Any], *, strict: bool = True) -> None:
    reshard(model)
    set_model_state_dict(model, state_dict, options=StateDictOptions(full_state_dict=True, strict=strict))
