"""One process of `test_distributed` in `test_lm_head.py`: puts half of the batch through a wrapped model under DDP and
FSDP2, and leaves the gradients in `<folder>/<rank>.pt`."""

import sys
from pathlib import Path

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


def sharded(model, unit=lambda model: None):
    """With a further unit, if it has one, that holds the head."""
    wrap_lm_head(model)
    for layer in model.model.layers:
        fully_shard(layer)
    if unit(model) is not None:
        fully_shard(unit(model))
    return fully_shard(model)


def tied(model):
    """The unit that Accelerate makes of tied embeddings."""
    model.lm_head.weight = model.model.embed_tokens.weight
    return sharded(model, lambda model: [model.model.norm, model.model.embed_tokens, model.lm_head])


CASES = {
    "DDP": replicated,
    "DDP, gradient checkpointing, unused parameters looked for": checkpointed,
    "DDP, static graph": lambda model: replicated(model, static_graph=True),
    "FSDP2": sharded,
    "FSDP2, the head alone": lambda model: sharded(model, lambda model: model.lm_head),
    "FSDP2, the head with the norm": lambda model: sharded(model, lambda model: [model.model.norm, model.lm_head]),
    "FSDP2, tied": tied,
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
            name: parameter.grad.full_tensor() if case.startswith("FSDP2") else parameter.grad
            for name, parameter in model.named_parameters()
        }
    torch.save(results, Path(sys.argv[1]) / f"{rank}.pt")
    dist.destroy_process_group()
