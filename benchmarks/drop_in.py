"""Other projects as they are and on our kernels: TRL's optimizer steps, and functions of verl and OpenRLHF.

    make bench-drop-in
    python benchmarks/drop_in.py --rounds 3 --only openrlhf

A function is called through its project, with and without the patch in turn, on the same inputs, float32 where nothing
is said; results and gradients of the two are compared first. A step is taken as in benchmarks/steps.py, where both
sides are TRL's trainer, in processes of their own, and loss and gradients of the first step are compared. Times are
medians. Ends with 1 if a result differs.
"""

import argparse
import importlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    sys.path.append(str(Path(__file__).parents[1] / "examples"))

import numpy as np
import torch
from torch import Tensor

import peer_modules
import reporting
import steps
from suite import response_mask

PROJECTS = ("trl", "verl", "openrlhf")
LONGEST = 20.0
"""Seconds that a function is timed for, or for three rounds."""


@dataclass(frozen=True)
class Case:
    """A function of a project: its name, the size, and what gives a call of it.

    The call looks the function up each time, and returns results and gradients.
    """

    project: str
    name: str
    size: str
    build: Callable[[], Callable[[], tuple[Tensor, ...]]]


def verl_gae(batch: int, length: int) -> Callable[[], tuple[Tensor, ...]]:
    module = peer_modules.verl()
    rewards, values, mask = torch.randn(batch, length), torch.randn(batch, length), response_mask((batch, length))
    return lambda: module.compute_gae_advantage_return(rewards, values, mask.float(), 0.999, 0.95)


def verl_grpo(samples: int, length: int) -> Callable[[], tuple[Tensor, ...]]:
    module = peer_modules.verl()
    mask = response_mask((samples, length)).float()
    rewards = torch.zeros(samples, length)
    rewards[:, 0] = torch.rand(samples)
    index = np.array([f"prompt-{number // 8}" for number in range(samples)], dtype=object)
    return lambda: module.compute_grpo_outcome_advantage(rewards * mask, mask, index)


def verl_logprobs(rows: int, vocabulary: int, dtype: torch.dtype) -> Callable[[], tuple[Tensor, ...]]:
    module = peer_modules.verl("utils.torch_functional")
    logits = torch.randn(rows, vocabulary).to(dtype).requires_grad_()
    labels, gradient = torch.randint(vocabulary, (rows,)), torch.randn(rows)

    def call() -> tuple[Tensor, ...]:
        # The logits are no leaf, as those of a model are not: their memory may become the gradient's.
        logprobs = module.logprobs_from_logits(logits * 1, labels)
        return logprobs.detach(), *torch.autograd.grad(logprobs, logits, gradient.to(logprobs.dtype))

    return call


def openrlhf_policy_loss(batch: int, length: int) -> Callable[[], tuple[Tensor, ...]]:
    loss = peer_modules.openrlhf("models.loss").PolicyLoss(clip_eps_low=0.2, clip_eps_high=0.28)
    old = -torch.rand(batch, length) * 3
    logprobs = (old + 0.1 * torch.randn(batch, length)).requires_grad_()
    advantages, mask = torch.randn(batch, 1).expand(-1, length).contiguous(), response_mask((batch, length)).float()

    def call() -> tuple[Tensor, ...]:
        value = loss(logprobs, old, advantages, mask)[0]
        return value.detach(), *torch.autograd.grad(value, logprobs)

    return call


BACKWARD = "forward+backward"
CASES = (
    Case("verl", "compute_gae_advantage_return", "[64, 1024]", lambda: verl_gae(64, 1024)),
    Case("verl", "compute_gae_advantage_return", "[64, 8192]", lambda: verl_gae(64, 8192)),
    Case("verl", "compute_grpo_outcome_advantage", "[1024, 1024] groups of 8", lambda: verl_grpo(1024, 1024)),
    Case("verl", "logprobs_from_logits", f"[1024, 49152] {BACKWARD}", lambda: verl_logprobs(1024, 49152, torch.float)),
    Case(
        "verl",
        "logprobs_from_logits",
        f"[1024, 49152] {BACKWARD}, bfloat16",
        lambda: verl_logprobs(1024, 49152, torch.bfloat16),
    ),
    Case("openrlhf", "PolicyLoss", f"[64, 1024] {BACKWARD}", lambda: openrlhf_policy_loss(64, 1024)),
    Case("openrlhf", "PolicyLoss", f"[128, 8192] {BACKWARD}", lambda: openrlhf_policy_loss(128, 8192)),
)


def check(case: Case, ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    """Raises SystemExit where the two differ by more than rounding."""
    for one, other in zip(ours, theirs, strict=True):
        tolerance = 2e-2 if other.dtype == torch.bfloat16 else 1e-4
        error = (one.double() - other.double()).norm() / other.double().norm()
        if one.shape != other.shape or one.dtype != other.dtype or not error <= tolerance:
            raise SystemExit(
                f"error: {case.project} {case.name}: patched, a result differs by {error:.3g} of its norm "
                f"({one.dtype} {list(one.shape)}, {other.dtype} {list(other.shape)}); nothing more was timed"
            )


def measure(case: Case, rounds: int) -> tuple[float, float]:
    """Median seconds of ours and theirs."""
    torch.manual_seed(0)
    patched = importlib.import_module(f"rlkernels.integrations.{case.project}").patched
    call = case.build()
    seconds: tuple[list[float], list[float]] = ([], [])

    def timed(into: list[float]) -> tuple[Tensor, ...]:
        begin = time.perf_counter()
        results = call()
        into.append(time.perf_counter() - begin)
        return results

    theirs = timed([])
    with patched():
        ours = timed([])
    check(case, ours, theirs)
    end = time.perf_counter() + LONGEST
    while len(seconds[0]) < rounds and (len(seconds[0]) < 3 or time.perf_counter() < end):
        timed(seconds[1])
        with patched():
            timed(seconds[0])
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def line(title: str, ours: float, theirs: float, more: str = "") -> str:
    unit, factor = ("s", 1.0) if theirs > 1 else ("ms", 1e3)
    return f"| {title} | {theirs * factor:.3g} {unit} | {ours * factor:.3g} {unit} | {theirs / ours:.3g}x |{more}"


def step_lines(rounds: int, bf16: bool) -> Iterator[str]:
    from smollm2 import model_folder

    for name in ("grpo", "dpo"):
        method = steps.METHODS[name]
        job = method.job(str(model_folder()), bf16, "eager")
        steps.check(job, method, steps.PATCHED)
        measured = steps.measure(job, method, rounds, steps.PATCHED)
        ours, theirs = measured[steps.PATCHED], measured["TRL"]
        memory = f" {theirs['peak'] / 1e6:,.0f} MB | {ours['peak'] / 1e6:,.0f} MB |"
        precision = "bfloat16" if bf16 else "float32"
        yield line(f"TRL, step of {method.title}, {precision}", ours["seconds"], theirs["seconds"], memory)
        if name == "grpo":
            ours, theirs = (side["seconds"] - side["generation"] for side in (ours, theirs))
            yield line("the same without generation", ours, theirs, "  |  |")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--only", choices=PROJECTS, help="one project; default: all")
    parser.add_argument("--rounds", type=int, default=31, help="of functions, at most; default: %(default)s")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps of each side; default: %(default)s")
    parser.add_argument("--float32", action="store_true", help="steps; default: bfloat16, which some CPUs are slow at")
    chosen = parser.parse_args(arguments)
    for name in ("rounds", "steps"):
        if getattr(chosen, name) < 1:
            parser.error(f"--{name} must be at least 1; got {getattr(chosen, name)}")

    run = reporting.environment("cpu")
    versions = ", ".join(f"{name} {run['versions'][name]}" for name in ("rlkernels", "torch", *PROJECTS))
    print(f"On {run['device']}; {versions}.\n")
    print("| | as it is | patched | | memory as it is | patched |\n|---|---|---|---|---|---|")
    for case in CASES:
        if chosen.only in (None, case.project):
            print(
                line(f"{case.project}, `{case.name}` {case.size}", *measure(case, chosen.rounds), "  |  |"), flush=True
            )
    if chosen.only in (None, "trl"):
        for row in step_lines(chosen.steps, not chosen.float32):
            print(row, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
