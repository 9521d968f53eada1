"""Times the shapes that matter on each backend, next to a copy and plain PyTorch; small ones in a CUDA graph.

python tests/gpu/timings.py cuda    # or cpu: tiny shapes, which try the script
"""

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import calls
import torch

import rlkernels
import suite
from rlkernels import _backends

ROUNDS, REPLAYS, PER_GRAPH = 15, 100, 10
BUDGET = 1.5
"""Seconds of one line, about: plain PyTorch takes a step for each token of a recurrence."""


def large(device: str) -> dict[str, Callable[[], calls.Call]]:
    v = calls.VOCABULARY if device == "cuda" else 97
    many = 8192 if device == "cuda" else 16
    made: dict[str, Callable[[], calls.Call]] = {}
    for rows in (many, many // 16, many // 128 or 1):
        for temperature in (1.0, 0.7):
            made[f"token_logprobs [{rows}, {v}] T={temperature}"] = partial(calls.token_logprobs, rows, v, temperature)
    for temperature in (1.0, 0.7):
        made[f"token_logprobs, entropy [{many}, {v}] T={temperature}"] = partial(
            calls.token_logprobs, many, v, temperature, True
        )
        made[f"token_logprobs backward [{many}, {v}] T={temperature}"] = partial(
            calls.token_logprobs_backward, many, v, temperature
        )
    for shape in ((8, 32768), (8192, 2048), (64, 8192)) if device == "cuda" else ((2, 33),):
        made[f"gae {list(shape)}"] = partial(calls.gae, *shape)
    shape = (512, 16384) if device == "cuda" else (3, 17)
    for op in ("policy_loss", "value_loss", "kl_penalty"):
        made[f"{op} {list(shape)}"] = partial(getattr(calls, op), *shape)
    return made


def small() -> dict[str, Callable[[], calls.Call]]:
    return {
        "token_logprobs [8, 32000]": partial(calls.token_logprobs, 8, 32000),
        "gae [64, 1024]": partial(calls.gae, 64, 1024),
        "policy_loss [16, 512]": partial(calls.policy_loss, 16, 512),
        "value_loss [16, 512]": partial(calls.value_loss, 16, 512),
        "kl_penalty [16, 512]": partial(calls.kl_penalty, 16, 512),
        "group_advantages [64]": partial(calls.group_advantages, 64),
    }


def seconds(run: Callable[[], object], device: str, rounds: int = ROUNDS) -> float:
    """The median of a call, by the GPU's clock."""
    run()
    suite.synchronize(device)
    before = time.perf_counter()
    run()
    suite.synchronize(device)
    fitting = int(BUDGET / (time.perf_counter() - before))
    taken = []
    for _ in range(min(max(fitting, 1), rounds)):
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            taken.append(begin.elapsed_time(end) / 1000)
        else:
            before = time.perf_counter()
            run()
            taken.append(time.perf_counter() - before)
    return statistics.median(taken)


def replayed(run: Callable[[], object]) -> float:
    """Seconds of a call in a graph that holds several, so that what each replay costs is shared."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(PER_GRAPH):
            run()
    return seconds(graph.replay, "cuda", REPLAYS) / PER_GRAPH


def backends(device: str) -> list[str]:
    kernels = [name for name in _backends.KERNEL_BACKENDS if _backends.status(name, device) is None]
    return [*kernels, "reference"]


def report(name: str, backend: str, make: Callable[[], calls.Call], measure: Callable[[calls.Call], str]) -> bool:
    """Print one line. Says whether it worked: a shape that fails must not cost the others."""
    op = name.split()[0].rstrip(",")
    if backend != "reference" and backend not in _backends.BACKENDS_OF[op]:
        return True
    try:
        with rlkernels.use_backend(backend):
            said = measure(make())
    except Exception as error:
        print(f"{name:48} {backend:10} FAILED: {' '.join(repr(error).split())[:300]}", flush=True)
        return False
    print(f"{name:48} {backend:10} {said}", flush=True)
    return True


def main(device: str) -> int:
    torch.set_default_device(device)
    torch.manual_seed(0)
    copy = suite.copy_bandwidth(device) if device == "cuda" else 1e9
    print(f"a copy moves {copy / 1e9:.0f} GB/s; reference is plain PyTorch; medians of {ROUNDS}", flush=True)

    def timed(call: calls.Call) -> str:
        median = seconds(call.run, device)
        speed = call.moved / median
        return f"{1000 * median:9.4f} ms {speed / 1e9:7.0f} GB/s {100 * speed / copy:4.0f} % of a copy"

    def in_graph(call: calls.Call) -> str:
        if device == "cpu":
            return f"{1e6 * seconds(call.run, device):8.1f} us, not in a graph: no GPU"
        alone = f"{1e6 * seconds(call.run, device, REPLAYS):8.1f} us alone"
        if _backends._forced == "reference":
            return alone
        return f"{1e6 * replayed(call.run):8.1f} us in a graph, {alone}"

    worked = [
        report(name, backend, make, measure)
        for shapes, measure in ((large(device), timed), (small(), in_graph))
        for name, make in shapes.items()
        for backend in backends(device)
    ]
    print(f"{sum(worked)} of {len(worked)} lines")
    return 0 if all(worked) else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
