"""Whole optimizer steps of SmolLM2 in this project's trainers and in TRL's: GRPO, DPO and PPO.

    make -s bench-steps > docs/steps.md
    python benchmarks/steps.py --only dpo --rounds 3

Each side trains on the CPU in a process of its own, with the same model, batch and options; all else is at its
defaults. By default both recompute activations, except in PPO: TRL's PPO never does, and ours is told not to. Both
compute in bfloat16 over float32 weights; TRL's PPO computes in the dtype of its weights, so there both have bfloat16
weights. Attention is eager: on a CPU TRL's steps are faster with it than with sdpa, and ours, sequence by sequence,
rounds as it does. A step lasts from the end of one optimizer step to the end of the next; what is not generation,
reward, backward or optimizer counts as forward. Completions never end before they have their full length, so that both
sides sample the same number of tokens. After a step to warm up, both take a step in turn, once a round; times are
medians. Memory is the most that the process held in any of these steps (Linux's VmHWM, reset before each), less what it
held once everything was imported, and less the bytes of all models' weights, of the gradients and of the optimizer's
state.

First, both get the same completions or pairs, and the losses and gradients of their first steps are compared: they must
be equal in float32, and in bfloat16 ours must be no further from float32 than TRL's. The command ends with 1 if they
are not, or if ours takes more of TRL's time or memory than it may.
"""

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    sys.path.append(str(Path(__file__).parents[1] / "examples"))

import torch
from torch import Tensor

import reporting
from step_worker import PARTS, Job

ROOT = Path(__file__).parents[1]
WORKER = ROOT / "benchmarks" / "step_worker.py"
TRL_PPO = ROOT / ".venv" / "trl-ppo"
"""The last TRL with a PPO trainer, which shadows the newest."""
TOLERANCE = 1e-3
"""For the loss and the gradient's norm. Two orders of summation differ by less in float32, and by more in bfloat16."""
FURTHER = 1.1
"""How many times as far from float32 as TRL's our gradient in bfloat16 may be."""

PATCHED = "TRL, patched"
"""TRL's trainer, whose arithmetic rlkernels.integrations.trl has replaced."""

Step = dict[str, float]


@dataclass(frozen=True)
class Method:
    """What is compared, and what ours may take of TRL's."""

    title: str
    sizes: dict[str, Any]
    time: float
    memory: float
    trl: Path | None = None
    """A folder with a TRL of its own."""

    def environment(self, side: str) -> dict[str, str]:
        paths = [str(self.trl)] if side != "rlkernels" and self.trl else []
        return os.environ | {"PYTHONPATH": os.pathsep.join([*paths, str(ROOT)])}

    def label(self, side: str) -> str:
        if side == "TRL":
            paths = [str(self.trl)] if self.trl else sys.path
            side = f"TRL {next(iter(importlib.metadata.distributions(name='trl', path=paths))).version}"
        return f"{self.title}: {side}"


METHODS = {
    "grpo": Method(
        "GRPO, 16 completions of 2 prompts, 38 + 64 tokens, beta 0",
        {"completions": 16, "group": 8, "prompt": 38, "length": 64},
        time=0.75,
        memory=0.6,
    ),
    "dpo": Method(
        "DPO, 4 pairs of 110 to 247 tokens",
        {"pairs": [(60, 187, 140), (50, 130, 197), (40, 110, 120), (30, 90, 80)]},
        time=0.6,
        memory=0.5,
    ),
    "ppo": Method(
        "PPO, 8 completions, 38 + 64 tokens, one epoch",
        {"completions": 8, "prompt": 38, "length": 64},
        time=0.7,
        memory=0.7,
        trl=TRL_PPO,
    ),
}


class Side:
    """A worker's process, in which a step is taken at each call."""

    def __init__(self, job: Job, environment: dict[str, str], errors: Any) -> None:
        command = [sys.executable, str(WORKER), json.dumps(asdict(job))]
        self.job, self.errors = job, errors
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        )

    def __call__(self) -> Step:
        line = self.say("\n")
        if not line:
            self.fail()
        return json.loads(line)

    def say(self, words: str) -> str:
        try:
            self.process.stdin.write(words)
            self.process.stdin.flush()
        except BrokenPipeError:
            self.fail()
        return self.process.stdout.readline()

    def fail(self) -> None:
        self.process.wait()
        self.errors.seek(0)
        last = self.errors.read().strip().splitlines()[-1:]
        raise SystemExit(f"error: {self.job.method} of {self.job.side} ended: {' '.join(last)}")


@contextmanager
def started(job: Job, method: Method) -> Iterator[Side]:
    with tempfile.TemporaryFile("w+") as errors:
        side = Side(job, method.environment(job.side), errors)
        try:
            yield side
        finally:
            side.process.stdin.close()
            side.process.wait()


def loss_and_gradient(job: Job, method: Method) -> tuple[float, Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "gradient"
        with started(Job(**asdict(job) | {"gradient": str(file)}), method) as side:
            if side.say("\n") or side.process.wait():
                side.fail()
        return torch.load(file)


def disagreement(
    exact: dict[str, tuple[float, Tensor]], rounded: dict[str, tuple[float, Tensor]] | None, side: str = "rlkernels"
) -> str | None:
    """How ours differs from TRL's by more than rounding, in float32 and in bfloat16."""
    (our_loss, ours), (their_loss, theirs) = exact[side], exact["TRL"]
    if not abs(our_loss - their_loss) <= TOLERANCE * abs(their_loss):
        return f"the losses are {our_loss:.7g} and {their_loss:.7g}"
    distance = (ours - theirs).norm() / theirs.norm()
    if not distance <= TOLERANCE:
        return f"the gradients differ by {distance:.3g} of their norm"
    if rounded is None:
        return None
    our_error, their_error = ((rounded[name][1] - theirs).norm() / theirs.norm() for name in (side, "TRL"))
    if not min(our_error, their_error) > TOLERANCE:
        return f"one of both is not in bfloat16: {our_error:.3g} and TRL's {their_error:.3g} from float32"
    if not our_error <= FURTHER * their_error:
        return f"in bfloat16 ours is {our_error:.3g} of the gradient's norm from float32, TRL's {their_error:.3g}"
    return None


def check(job: Job, method: Method, side: str = "rlkernels") -> None:
    """Raises SystemExit where that side and TRL do not compute the same."""
    exact, rounded = (
        {name: loss_and_gradient(Job(**asdict(job) | {"side": name, "bf16": bf16}), method) for name in (side, "TRL")}
        if job.bf16 or not bf16
        else None
        for bf16 in (False, True)
    )
    if difference := disagreement(exact, rounded, side):
        raise SystemExit(f"error: {job.method}: {difference}: nothing was timed")


def measure(job: Job, method: Method, rounds: int, side: str = "rlkernels") -> dict[str, Step]:
    """The medians of the seconds and the peaks in bytes, of that side and of TRL."""
    steps: dict[str, list[Step]] = {}
    with ExitStack() as stack:
        sides = {
            name: stack.enter_context(started(Job(**asdict(job) | {"side": name}), method)) for name in (side, "TRL")
        }
        for side in sides.values():
            side()
        for _ in range(rounds):
            for name, side in sides.items():
                steps.setdefault(name, []).append(side())
    return {
        name: {
            key: (max if key in ("peak", "whole") else statistics.median)(step[key] for step in taken)
            for key in taken[0]
        }
        for name, taken in steps.items()
    }


def rows(method: Method, measured: dict[str, Step]) -> tuple[list[str], bool]:
    """A line for each side in the table in Markdown; and whether both bars are met."""
    theirs, met, lines = measured["TRL"], True, []
    for name, step in measured.items():
        parts = [step[part] for part in PARTS]
        forward = step["seconds"] - sum(parts)
        cells = [method.label(name)]
        cells += [f"{seconds:.2f}" for seconds in (step["seconds"], *parts[:2], forward, *parts[2:])]
        cells += ["", "", f"{step['peak'] / 1e6:,.0f}", "", "", f"{step['whole'] / 1e6:,.0f}"]
        if name == "rlkernels":
            ratios = (step["seconds"] / theirs["seconds"], method.time), (step["peak"] / theirs["peak"], method.memory)
            for place, (ratio, most) in zip((7, 10), ratios, strict=True):
                cells[place : place + 2] = f"{ratio:.2f}x", f"{most} {'met' if ratio <= most else 'MISSED'}"
                met = met and ratio <= most
        lines.append(f"| {' | '.join(cells)} |")
    return lines, met


HEADER = (
    "| | s | generation | reward | forward | backward | optimizer | of TRL's | at most | peak MB | of TRL's | at most "
    "| whole process MB |\n"
    f"|{'---|' * 13}"
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--only", choices=METHODS, help="one method; default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--attention", default="eager", help="attn_implementation of both sides")
    chosen = parser.parse_args(arguments)
    if chosen.rounds < 1:
        parser.error(f"--rounds must be at least 1; got {chosen.rounds}")
    methods = {name: method for name, method in METHODS.items() if chosen.only in (None, name)}
    if "ppo" in methods and not TRL_PPO.is_dir():
        raise SystemExit(f"error: {TRL_PPO} is missing; `make bench-steps` installs it")
    from smollm2 import model_folder

    lines, all_met = [HEADER], True
    for name, method in methods.items():
        job = Job(name, "", str(model_folder()), method.sizes, attention=chosen.attention)
        check(job, method)
        of_method, met = rows(method, measure(job, method, chosen.rounds))
        lines += of_method
        all_met = all_met and met
    run = reporting.environment("cpu")
    versions = ", ".join(f"{name} {run['versions'][name]}" for name in ("rlkernels", "torch"))
    attention = f"{chosen.attention} attention"
    print("# Optimizer steps of SmolLM2-135M, ours and TRL's\n")
    print(f"Printed by `python benchmarks/steps.py` on {run['device']}; {versions}; {attention}.\n")
    print("\n\n".join(" ".join(part.split()) for part in __doc__.split("\n\n")[2:]))
    print("\n" + "\n".join(lines))
    return 0 if all_met else 1


if __name__ == "__main__":
    sys.exit(main())
