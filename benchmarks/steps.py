"""Optimizer steps of SmolLM2: in this project's trainers, in TRL's, and in ours with prompts not shared.

    make -s bench-steps > docs/steps.md
    python benchmarks/steps.py --only dpo --rounds 3

The first table times forward and backward passes of GRPO's loss, LM head included. A batch is one group of 8
completions. Passes are in float32, nothing is recomputed, and a micro-batch has at most 4,096 tokens. Both sides are
our trainer, in one process. One shares prompts: it computes a prompt once for its group. The other has share_prefixes
false. Tokens are those that the model runs.

The second table times whole steps. Each side trains on the CPU in a process of its own, with the same model, batch and
options; all other options have their defaults. By default both recompute activations, except in PPO: TRL's PPO never
does, and ours is told not to. Both compute in bfloat16 over float32 weights if the processor has instructions for it,
else, or with `--float32`, in float32. TRL's PPO computes in the dtype of its weights, so there both have weights of
that dtype. Attention is eager: on a CPU TRL's steps are faster with it than with sdpa, and ours, sequence by sequence,
rounds as it does. Completions are sampled, and never end before they have their full length, so that both sides sample
the same number of tokens. Given completions are of that length too.

A step lasts from the end of one optimizer step to the end of the next. The optimizer's part includes the clipping of
the gradient. Reference is the reference model's pass. Scoring is the pass of policy and value function before the loss,
where the loss has another one. In TRL's trainers both count as forward, as does all that is in no other column.

After a step to warm up, both sides take a step in turn, once a round; times are medians, and a ratio is that of our
median to the one in the row below. Memory is the most that the process held in any of these steps (Linux's VmHWM, reset
before each), less what it held once everything was imported, and less the bytes of all models' weights, of the
gradients and of the optimizer's state.

First, both get the same completions or pairs, and the losses and gradients of their first steps are compared: they must
be equal in float32, and in bfloat16 ours must be no further from float32 than the other's. The command ends with 1 if
they are not, or if ours takes more of the other's time or memory than it may.
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
from step_worker import PARTS, UNSHARED, Job

ROOT = Path(__file__).parents[1]
WORKER = ROOT / "benchmarks" / "step_worker.py"
TRL_PPO = ROOT / ".venv" / "trl-ppo"
"""The last TRL with a PPO trainer, which shadows the newest."""
TOLERANCE = 1e-3
"""For the loss and the gradient's norm. Two orders of summation differ by less in float32, and by more in bfloat16."""
FURTHER = 1.1
"""How many times as far from float32 as the other's our gradient in bfloat16 may be."""

PATCHED = "TRL, patched"
"""TRL's trainer, whose arithmetic rlkernels.integrations.trl has replaced."""

Step = dict[str, float]


@dataclass(frozen=True)
class Method:
    """What is compared, and how much of the other side's time and memory ours may take."""

    title: str
    trainer: str
    sizes: dict[str, Any]
    time: float
    memory: float | None = None
    float32_time: float | None = None
    """Instead of `time`, where both compute in float32."""
    other: str = "TRL"
    given: bool = False
    """Whether completions are given, not sampled."""
    trl: Path | None = None
    """A folder with a TRL of its own."""

    def job(self, model: str, bf16: bool, attention: str) -> Job:
        return Job(self.trainer, "", model, self.sizes, bf16, attention, self.given)

    def environment(self, side: str) -> dict[str, str]:
        paths = [str(self.trl)] if side != "rlkernels" and self.trl else []
        return os.environ | {"PYTHONPATH": os.pathsep.join([*paths, str(ROOT)])}

    def label(self, side: str) -> str:
        if side == "TRL":
            paths = [str(self.trl)] if self.trl else sys.path
            side = f"TRL {next(iter(importlib.metadata.distributions(name='trl', path=paths))).version}"
        return f"{self.title}: {side}"


METHODS = {
    "grpo-given": Method(
        "GRPO without sampling, 16 completions of 2 prompts, 38 + 64 tokens",
        "grpo",
        {"completions": 16, "group": 8, "prompt": 38, "length": 64},
        time=0.65,
        other=UNSHARED,
        given=True,
    ),
    "grpo": Method(
        "GRPO, 16 completions of 2 prompts, 38 + 64 tokens",
        "grpo",
        {"completions": 16, "group": 8, "prompt": 38, "length": 64},
        time=0.33,
        float32_time=0.6,
        memory=0.6,
    ),
    "grpo-long": Method(
        "GRPO, 16 completions of 2 prompts, 512 + 64 tokens",
        "grpo",
        {"completions": 16, "group": 8, "prompt": 512, "length": 64},
        time=0.25,
        memory=0.25,
    ),
    "dpo": Method(
        "DPO, 4 pairs, prompts of 200, answers of 50 tokens",
        "dpo",
        {"pairs": [(200, 50, 50)] * 4},
        time=0.35,
        memory=0.5,
    ),
    "ppo": Method(
        "PPO, 8 completions, 38 + 64 tokens, one epoch",
        "ppo",
        {"completions": 8, "prompt": 38, "length": 64},
        time=0.65,
        memory=0.7,
        trl=TRL_PPO,
    ),
}

PASSES = [
    Method(
        f"GRPO, forward and backward, 8 x ({prompt} + {length}) tokens",
        "grpo",
        {"completions": 8, "group": 8, "prompt": prompt, "length": length},
        time=time,
        other=UNSHARED,
        given=True,
    )
    for prompt, length, time in ((38, 12, 0.48), (256, 64, 0.4), (1024, 128, 0.3))
]


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
    exact: dict[str, tuple[float, Tensor]],
    rounded: dict[str, tuple[float, Tensor]] | None,
    side: str = "rlkernels",
    other: str = "TRL",
) -> str | None:
    """How that side differs from the other by more than rounding, in float32 and in bfloat16."""
    (our_loss, ours), (their_loss, theirs) = exact[side], exact[other]
    if not abs(our_loss - their_loss) <= TOLERANCE * abs(their_loss):
        return f"the losses are {our_loss:.7g} and {their_loss:.7g}"
    distance = (ours - theirs).norm() / theirs.norm()
    if not distance <= TOLERANCE:
        return f"the gradients differ by {distance:.3g} of their norm"
    if rounded is None:
        return None
    our_error, their_error = ((rounded[name][1] - theirs).norm() / theirs.norm() for name in (side, other))
    if not min(our_error, their_error) > TOLERANCE:
        return f"one of both is not in bfloat16: {our_error:.3g} and {other}'s {their_error:.3g} from float32"
    if not our_error <= FURTHER * their_error:
        return f"in bfloat16 ours is {our_error:.3g} of the gradient's norm from float32, {other}'s {their_error:.3g}"
    return None


def check(job: Job, method: Method, side: str = "rlkernels") -> None:
    """Raises SystemExit where that side and the method's other one do not compute the same."""
    exact, rounded = (
        {
            name: loss_and_gradient(Job(**asdict(job) | {"side": name, "bf16": bf16}), method)
            for name in (side, method.other)
        }
        if job.bf16 or not bf16
        else None
        for bf16 in (False, True)
    )
    if difference := disagreement(exact, rounded, side, method.other):
        raise SystemExit(f"error: {method.title}: {difference}: nothing was timed")


def measure(job: Job, method: Method, rounds: int, side: str = "rlkernels") -> dict[str, Step]:
    """The medians of the seconds and the peaks in bytes, of that side and of the method's other one."""
    steps: dict[str, list[Step]] = {}
    with ExitStack() as stack:
        sides = {
            name: stack.enter_context(started(Job(**asdict(job) | {"side": name}), method))
            for name in (side, method.other)
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


def measure_passes(job: Job, method: Method, rounds: int) -> dict[str, Step]:
    """The same of forward and backward passes alone, and their tokens."""
    with started(Job(**asdict(job) | {"method": "passes", "side": "rlkernels"}), method) as both:
        both()
        taken = [both() for _ in range(rounds)]
    return {
        name: {key: statistics.median(step[name][key] for step in taken) for key in taken[0][name]}
        for name in ("rlkernels", method.other)
    }


COLUMNS = (*PARTS[:-2], "forward", *PARTS[-2:])
HEADER = (
    f"| | s | {' | '.join(COLUMNS)} | ratio | at most | peak MB | ratio | at most | whole process MB |\n"
    f"|{'---|' * (len(COLUMNS) + 8)}"
)


def bar(ratio: float, most: float | None) -> tuple[list[str], bool]:
    """Two cells of the table: the ratio, and what it may be; and whether it is met."""
    met = most is None or ratio <= most
    return [f"{ratio:.2f}x", "" if most is None else f"{most} {'met' if met else 'MISSED'}"], met


def rows(method: Method, measured: dict[str, Step], bf16: bool) -> tuple[list[str], bool]:
    """A line for each side in the table in Markdown; and whether both bars are met."""
    theirs, met, lines = measured[method.other], True, []
    most = method.time if bf16 or method.float32_time is None else method.float32_time
    for name, step in measured.items():
        seconds = {part: step[part] for part in PARTS if part in step}
        seconds["forward"] = step["seconds"] - sum(seconds.values())
        cells = [method.label(name), f"{step['seconds']:.2f}"]
        cells += [f"{seconds[part]:.2f}" if part in seconds else "" for part in COLUMNS]
        cells += ["", "", f"{step['peak'] / 1e6:,.0f}", "", "", f"{step['whole'] / 1e6:,.0f}"]
        if name == "rlkernels":
            cells[-6:-4], in_time = bar(step["seconds"] / theirs["seconds"], most)
            cells[-3:-1], in_memory = bar(step["peak"] / theirs["peak"], method.memory)
            met = in_time and in_memory
        lines.append(f"| {' | '.join(cells)} |")
    return lines, met


def row_of_passes(method: Method, measured: dict[str, Step]) -> tuple[str, bool]:
    ours, unshared = measured.values()
    cells, met = bar(ours["seconds"] / unshared["seconds"], method.time)
    cells += [f"{ours['tokens']:,.0f}", f"{unshared['tokens']:,.0f}"]
    return f"| {method.title} | {ours['seconds']:.2f} | {unshared['seconds']:.2f} | {' | '.join(cells)} |", met


HEADER_OF_PASSES = f"| | s | unshared s | ratio | at most | tokens | unshared tokens |\n|{'---|' * 7}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--only", choices=("prefixes", *METHODS), help="one part; default: all")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each side; default: %(default)s")
    parser.add_argument("--attention", default="eager", help="attn_implementation of both sides")
    parser.add_argument("--float32", action="store_true", help="default: bfloat16 where the processor computes it")
    chosen = parser.parse_args(arguments)
    if chosen.rounds < 1:
        parser.error(f"--rounds must be at least 1; got {chosen.rounds}")
    methods = {name: method for name, method in METHODS.items() if chosen.only in (None, name)}
    if "ppo" in methods and not TRL_PPO.is_dir():
        raise SystemExit(f"error: {TRL_PPO} is missing; `make bench-steps` installs it")
    from rlkernels.trainers import GRPOConfig
    from smollm2 import model_folder

    model = str(model_folder())
    bf16 = bool(GRPOConfig(use_cpu=True).bf16) and not chosen.float32
    run = reporting.environment("cpu")
    versions = ", ".join(f"{name} {run['versions'][name]}" for name in ("rlkernels", "torch"))
    versions += f" ({torch.backends.cpu.get_cpu_capability()})"
    precision = "bfloat16" if bf16 else "float32"
    print("# Optimizer steps of SmolLM2-135M: ours, TRL's, and ours with prompts not shared\n")
    print(f"Printed by `python benchmarks/steps.py` on {run['device']}; {versions}; {precision}; ", end="")
    print(f"{chosen.attention} attention.\n")
    print("\n\n".join(" ".join(part.split()) for part in __doc__.split("\n\n")[2:]), flush=True)

    all_met = True
    if chosen.only in (None, "prefixes"):
        print(f"\n{HEADER_OF_PASSES}")
        for method in PASSES:
            job = method.job(model, False, chosen.attention)
            check(job, method)
            line, met = row_of_passes(method, measure_passes(job, method, chosen.rounds))
            print(line, flush=True)
            all_met = all_met and met
    if methods:
        print(f"\n{HEADER}")
    for method in methods.values():
        job = method.job(model, bf16, chosen.attention)
        check(job, method)
        lines, met = rows(method, measure(job, method, chosen.rounds), bf16)
        print("\n".join(lines), flush=True)
        all_met = all_met and met
    return 0 if all_met else 1


if __name__ == "__main__":
    sys.exit(main())
