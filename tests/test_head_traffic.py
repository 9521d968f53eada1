"""How many matrix products the LM head does, and what is counted as moved by them."""

import pytest
import torch

import head_traffic


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_the_head(dtype):
    """No implementation needs fewer. The rows are scored, in whole blocks."""
    lines = {line.name: line for line in head_traffic.lines((256, 32, 640), dtype)}
    products = {name.removeprefix("linear_"): line.products for name, line in lines.items()}
    assert products == {
        "policy_loss": 3,
        "token_logprobs, logits kept": 3,
        "token_logprobs, recomputing": 4,
        "token_logprobs, frozen weight": 2,
    }


def test_what_is_counted():
    """A product counts every tensor once; one that adds to its result counts that twice."""
    hidden, weight, tile = torch.ones(6, 3), torch.ones(8, 3), torch.empty(6, 8)
    with head_traffic.Traffic(3) as traffic:
        torch.mm(hidden, weight.t(), out=tile)
        torch.addmm(hidden, tile, weight, out=hidden)
        torch.addmm(hidden, tile, weight, beta=0, out=hidden)
        tile.exp()
    assert traffic.factors == 4 * (18 + 24) + 4 * (18 + 24 + 18) + 4 * (18 + 24)
    assert traffic.tiles_of_products == 3 * tile.nbytes and traffic.tiles_of_rows == 0
