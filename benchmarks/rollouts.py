"""Sampling of completions: transformers, with the trained model itself, and by a vLLM server on the same machine.

    make bench-rollouts
    python benchmarks/rollouts.py --rounds 3 --tokens 32

Both engines sample, in bfloat16 and with all cores, the same number of tokens from SmolLM2 for the same prompts, each a
different one; no completion ends before. After a round to warm up they take turns; medians over the rounds. Ends with 1
if an engine gives another number of tokens, or log-probabilities that are not the model's.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    sys.path.append(str(Path(__file__).parents[1] / "examples"))

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import smollm2
from rlkernels.trainers import Rollout, SamplingOptions, TransformersEngine, VLLMEngine
from vllm_process import Server

TOLERANCE = 0.1
"""Mean difference of log-probabilities from the model's: two ways to compute in bfloat16."""


def prompts(count: int) -> list[str]:
    return [f"Write a short story about {number} friends who find a map." for number in range(2, count + 2)]


@contextmanager
def engines() -> Iterator[dict[str, Any]]:
    folder, cores = smollm2.model_folder(), len(os.sched_getaffinity(0))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with tempfile.TemporaryDirectory() as scratch:
        server = Server(folder, Path(scratch) / "log", "--dtype", "bfloat16", "--max-model-len", "512", threads=cores)
        try:
            server.start()
            found = {
                "transformers": TransformersEngine(model, tokenizer),
                "vLLM": VLLMEngine(model, tokenizer, server.url, Path(scratch) / "weights"),
            }
            for engine in found.values():
                # No completion ends before it has its length.
                engine.end_token_ids = []
            yield found
        finally:
            server.kill()


@torch.no_grad()
def check(model: Any, rollouts: list[Rollout], tokens: int) -> str | None:
    """What is wrong with the rollouts."""
    lengths = {len(rollout.completion_ids) for rollout in rollouts}
    if lengths != {tokens}:
        return f"{lengths} tokens; wanted {tokens}"
    differences = []
    for rollout in rollouts[:4]:
        logits = model(torch.tensor([rollout.prompt_ids + rollout.completion_ids])).logits[0].float()
        start = len(rollout.prompt_ids) - 1
        logprobs = logits.log_softmax(-1)[range(start, start + tokens), rollout.completion_ids]
        differences.append((logprobs - torch.tensor(rollout.logprobs)).abs())
    mean = torch.cat(differences).mean().item()
    return None if mean < TOLERANCE else f"log-probabilities are {mean:.3f} from the model's"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog="Tokens per second over all prompts of a batch."
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each engine")
    parser.add_argument("--tokens", type=int, default=64, help="length of each completion")
    parser.add_argument("--prompts", type=int, nargs="+", default=[16, 32], help="sizes of a batch")
    options = parser.parse_args(arguments)
    failed = False
    with engines() as found:
        print(f"SmolLM2-135M-Instruct in bfloat16, {torch.get_num_threads()} threads, {options.tokens} tokens a prompt")
        print("\n| prompts | engine | tokens/s | slowest | fastest |\n|---|---|---|---|---|")
        for count in options.prompts:
            speeds: dict[str, list[float]] = {name: [] for name in found}
            for turn in range(options.rounds + 1):
                sampling = SamplingOptions(1.0, options.tokens, logprobs=True, seed=turn)
                for name, engine in found.items():
                    start = time.perf_counter()
                    rollouts = engine(prompts(count), sampling)
                    seconds = time.perf_counter() - start
                    if turn:
                        speeds[name].append(count * options.tokens / seconds)
                    elif wrong := check(found["transformers"].model, rollouts, options.tokens):
                        print(f"{name}: {wrong}", file=sys.stderr)
                        failed = True
            for name, measured in speeds.items():
                middle, least, most = statistics.median(measured), min(measured), max(measured)
                print(f"| {count} | {name} | {middle:.0f} | {least:.0f} | {most:.0f} |", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
