import pytest
import torch

from cases import THOROUGH_EMULATED
from head_problems import IGNORE, eager, random_problem
from rlkernels import _backends, linear_preference_logps, linear_token_logprobs

# Triton's kernels serve NVIDIA GPUs too.
pytestmark = [pytest.mark.only("reference", *_backends.BACKENDS_OF["linear_preference_logps"]), THOROUGH_EMULATED]
TILE = (8, 64)


def test_sequence_sums(backend, device):
    problem, token_ids = random_problem((4, 6), 65, device)
    token_ids[1] = IGNORE
    mask = torch.rand(4, 6, device=device) < 0.7
    logprobs = problem.call(linear_token_logprobs, token_ids)
    padded = problem.call(linear_preference_logps, token_ids, mask, tile=TILE)
    torch.testing.assert_close(padded, (logprobs * mask).sum(-1))
    assert padded[1] == 0

    cu_seqlens = torch.tensor([0, 6, 6, 13, 24], dtype=torch.int32, device=device)
    packed = problem.to(device)
    packed.hidden = packed.hidden.flatten(0, 1)
    leaves = packed.leaves()
    sums = leaves.call(linear_preference_logps, token_ids.flatten(), mask.flatten(), cu_seqlens=cu_seqlens, tile=TILE)
    of_tokens = (logprobs * mask).flatten()
    wanted = torch.stack([of_tokens[a:b].sum() for a, b in ((0, 6), (6, 6), (6, 13), (13, 24))])
    torch.testing.assert_close(sums, wanted)
    upstream = torch.tensor([1.0, 2.0, 3.0, 4.0], device=device)
    (got,) = torch.autograd.grad(sums, leaves.hidden, upstream)
    per_token = upstream.repeat_interleave(cu_seqlens.diff()) * mask.flatten()
    other = packed.leaves()
    (naive,) = torch.autograd.grad(eager(other.hidden, other.weight, token_ids.flatten())[0], other.hidden, per_token)
    torch.testing.assert_close(got, naive, rtol=1e-4, atol=1e-6)


def test_sequence_sums_refuse(backend, device):
    problem, token_ids = random_problem((4,), 65, device)
    with pytest.raises(ValueError, match="cu_seqlens"):
        problem.call(linear_preference_logps, token_ids)
    with pytest.raises(TypeError, match="return_entropy"):
        problem.call(linear_preference_logps, token_ids[None], return_entropy=True)
    if device.type == "cpu":
        for wrong in ([0, 3], [1, 4], [0, 3, 2, 4]):
            cu_seqlens = torch.tensor(wrong, dtype=torch.int32)
            with pytest.raises(ValueError, match="cu_seqlens must"):
                problem.call(linear_preference_logps, token_ids, cu_seqlens=cu_seqlens)
