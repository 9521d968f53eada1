"""One process of `test_distributed` in `test_lm_head.py`: puts half of the batch through a wrapped model under DDP and
FSDP2, and leaves the gradients in `<folder>/<rank>.pt`."""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from rlkernels import wrap_lm_head
from test_lm_head import batch, build, from_head, upstream


def replicated(model, **options):
    return wrap_lm_head(DistributedDataParallel(model, **options))


def checkpointed(model):
    model.activation_checkpointing_enable({"use_reentrant": False})
    return replicated(model, find_unused_parameters=True)


def sharded(model, head_alone=False):
    wrap_lm_head(model)
    for layer in model.model.layers:
        fully_shard(layer)
    if head_alone:
        fully_shard(model.lm_head)
    return fully_shard(model)


CASES = {
    "DDP": replicated,
    "DDP, gradient checkpointing, unused parameters looked for": checkpointed,
    "DDP, static graph": lambda model: replicated(model, static_graph=True),
    "FSDP2": sharded,
    "DDP, nothing scored on one": replicated,
}

if __name__ == "__main__":
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    mine = slice(2 * rank, 2 * rank + 2)
    inputs, labels = batch(rows=4)
    weights = upstream(labels)[mine]
    inputs = {name: values[mine] for name, values in inputs.items()}
    results = {}
    for case, parallelize in CASES.items():
        if case.endswith("nothing scored on one"):
            labels[2:] = -100
        model = build(dtype=torch.float32).train()
        parallel = parallelize(model)
        logprobs, entropy = from_head(parallel, inputs, labels[mine])
        (weights * logprobs + 0.3 * entropy).sum().backward()
        results[case] = {
            name: parameter.grad.full_tensor() if case == "FSDP2" else parameter.grad
            for name, parameter in model.named_parameters()
        }
    with pytest.raises(ValueError, match="the weight of its LM head is a DTensor"):
        from_head(sharded(build(), head_alone=True), inputs, labels[mine])
    torch.save(results, Path(sys.argv[1]) / f"{rank}.pt")
    dist.destroy_process_group()
