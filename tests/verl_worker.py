"""One process of a group in `peers/test_verl_functional.py`: verl's fused head on its share of the vocabulary, by ours.
Leaves logprobs, entropy and both gradients in `<folder>/<rank>.pt`."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from rlkernels.integrations._verl_functional import linear_cross_entropy

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    hidden, weight, labels = torch.load(folder / "inputs.pt")
    hidden.requires_grad_()
    share = weight.chunk(dist.get_world_size())[dist.get_rank()].clone().requires_grad_()
    logprobs, entropy = linear_cross_entropy(hidden, share, labels, 0.8, "none", dist.group.WORLD)
    (logprobs.sum() + 0.5 * entropy.sum()).backward()
    results = logprobs.detach(), entropy.detach(), hidden.grad, share.grad
    torch.save(results, folder / f"{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()
