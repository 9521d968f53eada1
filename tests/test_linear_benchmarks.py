"""Each case of the LM head's benchmarks is right in every implementation, at shapes that take no time."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench
import suite

benchmarks = bench.load(bench.FOLDER / "test_linear_logprobs.py")

DTYPES = (torch.float32, torch.bfloat16)
SIZE = (32, 640)
TINY = [
    *(case for dtype in DTYPES for case in benchmarks.cases(dtype, completions=(3, 5), prompt=4, size=SIZE)),
    benchmarks.large(12, *SIZE),
]
PAIRS = [
    pytest.param(case, name, id=f"{case.name}-{name}") for case in TINY for name in suite.implementations(case, "cpu")
]


@pytest.mark.parametrize(("case", "name"), PAIRS)
def test_every_implementation_is_right(case, name):
    try:
        call = suite.prepare(case, name, "cpu")
    except LookupError as error:
        pytest.skip(str(error))
    call.run()


@pytest.mark.parametrize("layout", [(False, False), (False, True), (True, False), (True, True)])
def test_the_bare_products_are_those_of_the_head(layout):
    hidden, weight, gradient = torch.randn(6, 3), torch.randn(8, 3), torch.randn(6, 8)
    made = [product() for product in benchmarks.products(hidden, weight, gradient, [layout] * 3)]
    want = [hidden @ weight.T, gradient @ weight, gradient.T @ hidden]
    for got, exact in zip(made, want, strict=True):
        torch.testing.assert_close(got, exact)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_floor_is_of_scored_rows(recompute):
    token_ids = torch.tensor([[-100, 1, 2], [-100, -100, 3]])
    run = benchmarks.gemms(recompute=recompute)(torch.randn(2, 3, 4), torch.randn(8, 4), token_ids)
    with FlopCounterMode(display=False) as counter:
        run()
    assert counter.get_total_flops() == (4 if recompute else 3) * 2 * 3 * 4 * 8
