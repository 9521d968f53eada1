"""Times the LM head, forward and backward, over its tile sizes, next to one, three and four of its bare products.

python tests/gpu/head_tiles.py cuda    # or cpu: a tiny head, which tries the script
"""

import sys
from functools import partial

import calls
import torch
from timings import seconds

import rlkernels
from rlkernels.ops.lm_head.tiles import default_tile, tile_size

ROUNDS = 5


def main(device: str) -> int:
    torch.set_default_device(device)
    torch.manual_seed(0)
    rows, hidden_size, vocabulary = (8192, 4096, calls.VOCABULARY) if device == "cuda" else (24, 8, 640)
    dtype = torch.bfloat16
    hidden = torch.randn(rows, hidden_size, dtype=dtype)
    weight = torch.randn(vocabulary, hidden_size, dtype=dtype).mul_(3 * hidden_size**-0.5)
    ids = torch.randint(vocabulary, (rows,))
    upstream = torch.randn(rows)
    print(f"[{rows}, {hidden_size}] x {vocabulary}, {dtype}; medians of {ROUNDS}", flush=True)

    logits = torch.empty(rows, vocabulary, dtype=dtype)
    of_hidden, of_weight = torch.empty_like(hidden), torch.empty_like(weight)
    forward = partial(torch.mm, hidden, weight.t(), out=logits)
    backward = [
        partial(torch.mm, logits, weight, out=of_hidden),
        partial(torch.mm, logits.t(), hidden, out=of_weight),
    ]
    for count, products in ((1, [forward]), (3, [forward, *backward]), (4, [forward, forward, *backward])):

        def run(products=products) -> None:
            for product in products:
                product()

        taken = seconds(run, device, ROUNDS)
        operations = 2 * rows * hidden_size * vocabulary * count
        print(f"{count} bare products {1000 * taken:42.2f} ms {operations / taken / 1e12:6.0f} TFLOP/s", flush=True)
    del logits, forward, backward, products, run

    hidden.requires_grad_()
    weight.requires_grad_()

    def head(budget: float, gradient: bool) -> None:
        with torch.set_grad_enabled(gradient):
            logprobs = rlkernels.linear_token_logprobs(hidden, weight, ids, num_scored=rows, logits_budget_mb=budget)
        if gradient:
            torch.autograd.grad(logprobs, (hidden, weight), upstream)

    block_rows, tokens = default_tile(torch.device(device), dtype)
    failed = 0
    for size in dict.fromkeys(
        (min(r, rows), min(t, -(-vocabulary // 256) * 256))
        for r in (block_rows, 2 * block_rows, 4 * block_rows, 8 * block_rows)
        for t in (tokens, tokens // 2, 2 * tokens)
        if t >= 256
    ):
        for name, budget, gradient in (("forward", 0, False), ("recompute", 0, True), ("keep", 1e6, True)):
            label = f"head, tile {size[0]} x {size[1]}, {name}"
            try:
                with tile_size(size):
                    taken = seconds(partial(head, budget, gradient), device, ROUNDS)
            except Exception as error:
                failed += 1
                print(f"{label:55} FAILED: {' '.join(repr(error).split())[:300]}", flush=True)
            else:
                print(f"{label:45} {1000 * taken:12.2f} ms", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
