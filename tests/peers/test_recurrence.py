"""gae beside verl's, which goes token by token over the responses and carries value and advantage over what is not
scored."""

import pytest
import torch

from rlkernels import gae

core_algos = pytest.importorskip("verl.trainer.ppo.core_algos", reason="verl is not installed: make test-peers")


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.99, 0.95), (1.0, 0.9), (0.5, 0.0)])
@pytest.mark.parametrize("scored", [1.0, 0.7, 0.05])
def test_verl_gae(backend, scored, gamma, lam):
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 5, 120, generator=generator)
    mask = torch.rand(5, 120, generator=generator) < scored
    mask[0, 60:] = False
    mask[1, :60] = False
    want_advantages, want_returns = core_algos.compute_gae_advantage_return(rewards, values, mask.float(), gamma, lam)
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam, whiten=True)
    torch.testing.assert_close(advantages[mask], want_advantages[mask], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(returns[mask], want_returns[mask], rtol=1e-5, atol=1e-5)
    assert not advantages[~mask].any()
    assert not returns[~mask].any()
