"""The rule itself must reject what it is there to reject, and pass what is right."""

import pytest
import torch

from tolerance import assert_as_accurate_as_torch, ulp

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def softmax_gradient(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A gradient as the kernels make it: oracle in float64, eager PyTorch in `dtype`."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 129, generator=generator).to(dtype)
    upstream = torch.randn(64, 1, generator=generator)
    oracle = upstream.double() * logits.double().softmax(-1)
    return oracle, (upstream * logits.float().softmax(-1)).to(dtype)


def truncated(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Towards zero, as an unrounded cast by bit shifts does it."""
    rounded = value.to(dtype)
    towards_zero = torch.nextafter(rounded, torch.zeros_like(rounded))
    return torch.where(rounded.double().abs() > value.double().abs(), towards_zero, rounded)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accepts_correct_rounding(dtype):
    oracle, naive = softmax_gradient(dtype)
    assert_as_accurate_as_torch(naive, oracle, naive, gradient=True)
    assert_as_accurate_as_torch(oracle.to(dtype), oracle, naive, gradient=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rejects_a_biased_gradient(dtype):
    oracle, naive = softmax_gradient(dtype)
    # For bfloat16 and float16 half an ulp, less than any element alone could show.
    eps = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    biased = (oracle * (1 + eps)).to(dtype)
    with pytest.raises(AssertionError, match="signed bias"):
        assert_as_accurate_as_torch(biased, oracle, naive, gradient=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wrong", ["zeroed", "neighbour", "largest of another row"])
def test_rejects_one_wrong_element(dtype, wrong):
    oracle, naive = softmax_gradient(dtype)
    got = naive.clone()
    got[3, -1] = {"zeroed": 0.0, "neighbour": got[3, -2], "largest of another row": got[0].abs().max()}[wrong]
    with pytest.raises(AssertionError, match="maximum error"):
        assert_as_accurate_as_torch(got, oracle, naive, gradient=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rejects_a_value_that_is_not_finite(value):
    oracle, naive = softmax_gradient(torch.float32)
    got = naive.clone()
    got[5, 5] = value
    with pytest.raises(AssertionError, match="not finite"):
        assert_as_accurate_as_torch(got, oracle, naive)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_rejects_a_finite_value_where_none_belongs(value):
    oracle, naive = softmax_gradient(torch.float32)
    oracle[5, 5] = value
    with pytest.raises(AssertionError, match="not finite"):
        assert_as_accurate_as_torch(naive, oracle, naive)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rejects_truncation_instead_of_rounding(dtype):
    oracle, naive = softmax_gradient(dtype)
    with pytest.raises(AssertionError, match="signed bias"):
        assert_as_accurate_as_torch(truncated(oracle, dtype), oracle, naive, gradient=True)


def test_rejects_float16_subnormals_flushed_to_zero():
    oracle, naive = softmax_gradient(torch.float16)
    oracle, naive = oracle * 1e-4, (oracle * 1e-4).half()
    flushed = naive.masked_fill(naive.abs() < torch.finfo(torch.float16).smallest_normal, 0.0)
    with pytest.raises(AssertionError, match="maximum error"):
        assert_as_accurate_as_torch(flushed, oracle, naive)


def test_rejects_a_wrong_dtype_and_a_wrong_shape():
    oracle, naive = softmax_gradient(torch.float32)
    with pytest.raises(AssertionError, match="dtype"):
        assert_as_accurate_as_torch(naive.double(), oracle, naive)
    with pytest.raises(AssertionError, match="shape"):
        assert_as_accurate_as_torch(naive[:-1], oracle, naive)


def test_infinity_is_right_where_the_dtype_cannot_hold_the_value():
    oracle = torch.tensor([1e300, -1e300], dtype=torch.float64)
    assert_as_accurate_as_torch(oracle.float(), oracle, oracle.float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ulp_is_the_distance_to_the_next_number(dtype):
    value = torch.tensor([1.0, 1.5, 2.0, 3e-5, 1e-3, 6e4], dtype=torch.float64).to(dtype)
    following = torch.nextafter(value, torch.full_like(value, float("inf")))
    finite = following.isfinite()
    assert torch.equal(ulp(value.double(), dtype)[finite], (following.double() - value.double())[finite])
