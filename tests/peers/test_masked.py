"""masked_mean and masked_whiten beside the functions of verl and OpenRLHF, and OpenRLHF's whitening of advantages."""

import pytest
import torch

from rlkernels import masked_mean, masked_whiten


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    return 3.0 + 2.0 * torch.randn(6, 500), torch.rand(6, 500) < 0.7


@pytest.mark.parametrize("dim", [None, 0, 1, -1])
def test_verl_mean(verl_functional, backend, inputs, dim):
    x, mask = inputs
    torch.testing.assert_close(masked_mean(x, mask, dim=dim), verl_functional.masked_mean(x, mask, axis=dim))


def test_verl_mean_of_nothing(verl_functional, backend, inputs):
    x, mask = inputs
    mask = mask.clone()
    mask[2] = False
    got = masked_mean(x, mask, dim=1)
    assert got[2] == verl_functional.masked_mean(x, mask, axis=1)[2] == 0.0


@pytest.mark.parametrize("dim", [None, 0, -1])
def test_openrlhf_mean(openrlhf, backend, inputs, dim):
    x, mask = inputs
    torch.testing.assert_close(masked_mean(x, mask, dim=dim), openrlhf("models.utils").masked_mean(x, mask, dim))


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_verl_whiten(verl_functional, backend, inputs, shift_mean, scale):
    """Also where the variance is near eps."""
    x, mask = inputs
    x = scale * x
    want = verl_functional.masked_whiten(x, mask, shift_mean)
    torch.testing.assert_close(
        masked_whiten(x, mask, shift_mean=shift_mean), want.masked_fill(~mask, 0.0), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e-5])
def test_openrlhf_normalize(openrlhf, backend, inputs, scale):
    """Theirs goes row by row; one row of everything is what its trainer does to advantages. The variance is above eps,
    near it, and below."""
    x, mask = inputs
    x = scale * x
    theirs = openrlhf("models.utils").masked_normalize
    got = masked_whiten(x, mask, unbiased=False, eps_floor=True)
    want = theirs(x.view(1, -1), mask.view(1, -1)).view_as(x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    rows = [masked_whiten(row, row_mask, unbiased=False, eps_floor=True) for row, row_mask in zip(x, mask, strict=True)]
    torch.testing.assert_close(torch.stack(rows), theirs(x, mask), rtol=1e-5, atol=1e-5)
