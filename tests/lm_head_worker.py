"""One process of a group in `test_linear_logprobs.py`. It computes results from its share of the vocabulary, and the
same from the whole vocabulary, and saves both in `<folder>/<rank>.pt`."""

import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

import rlkernels
from head_problems import IGNORE
from rlkernels import linear_policy_loss, linear_token_logprobs

OPTIONS = dict(temperature=0.7, softcap=5.0, scale=1.5, tile=(8, 16))


FROZEN = ("weight", "bias", "adapter_weight")


def share_of(problem, rank, processes, empty=False):
    """Its rows of the weight; with `empty` the last process has none."""
    number = processes - empty
    parts = {name: [*getattr(problem, name).tensor_split(number), getattr(problem, name)[:0]] for name in FROZEN}
    return replace(problem, **{name: part[rank] for name, part in parts.items()})


def logprobs(problem, token_ids, frozen=(), **options):
    leaves = problem.leaves(frozen)
    values = leaves.call(
        linear_token_logprobs,
        token_ids,
        return_entropy=not frozen,
        outputs=("log_sum_sq_probs", "mean_logit", "is_top1"),
        **OPTIONS,
        **options,
    )
    weights = torch.arange(len(token_ids), dtype=values[0].dtype)
    loss = (values[0] * weights).sum() + (0 if frozen else values[1].sum())
    named = leaves.differentiated()
    results = {str(number): value.detach() for number, value in enumerate(values)}
    return results | dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def policy(problem, token_ids, **options):
    leaves = problem.leaves()
    leaves.hidden.data = leaves.hidden.data.view(3, 7, -1)
    leaves.adapter.data = leaves.adapter.data.view(3, 7, -1)
    loss, metrics = leaves.call(
        linear_policy_loss,
        token_ids.view(3, 7),
        torch.full((3, 7), -4.0),
        torch.tensor([1.0, -1.0, 0.5]),
        entropy_coef=0.1,
        **OPTIONS,
        **options,
    )
    named = leaves.differentiated()
    gradients = torch.autograd.grad(loss, list(named.values()))
    return {"loss": loss.detach(), "metrics": metrics} | dict(zip(named, gradients, strict=True))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    inputs = torch.load(folder / "inputs.pt", weights_only=False)
    rank, processes = dist.get_rank(), dist.get_world_size()
    results = {}
    with rlkernels.use_backend(inputs["backend"]):
        for dtype in (torch.float64, torch.float32):
            problem, token_ids = inputs["problem"].to(dtype), inputs["token_ids"]
            assert (token_ids == IGNORE).any()
            share = share_of(problem, rank, processes)
            cases = {
                "again": (logprobs, dict(logits_budget_mb=0)),
                "kept": (logprobs, {}),
                "frozen": (logprobs, dict(frozen=FROZEN)),
            }
            # Rows in groups, as many as fit the largest share: of 34 tokens 24 rows do, of 33 they would be 25.
            row = problem.weight.element_size() * len(share_of(problem, 0, processes).weight)
            cases["in groups"] = (logprobs, dict(frozen=FROZEN, logits_budget_mb=8 * row / 2**20))
            if dtype == torch.float32:
                cases["policy"] = (policy, {})
                cases["policy in groups"] = (policy, dict(logits_budget_mb=8 * row / 2**20))
            for name, (function, options) in cases.items():
                for kind, own in (("", share), (", one without", share_of(problem, rank, processes, empty=True))):
                    results[name + kind, str(dtype)] = {
                        "dtype": dtype,
                        "whole": function(problem, token_ids, **options),
                        "shared": function(own, token_ids, group=dist.group.WORLD, **options),
                    }
            try:
                logprobs(share, token_ids.masked_fill(token_ids == token_ids[1], 101), group=dist.group.WORLD)
            except ValueError as error:
                assert "[0, 101)" in str(error)
            else:
                raise AssertionError("an id outside the whole vocabulary was accepted")
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()
