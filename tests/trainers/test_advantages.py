"""Advantages of GRPOTrainer against their equations in plain code."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from rlkernels.trainers.batch.batch import Batch, Sequence
from rlkernels.trainers.losses import advantages

NAN = math.nan


def test_overlong_punishment():
    """Nothing up to 6 of 10 tokens, then down in four steps, and no further for an engine that went on."""
    rewards = torch.zeros(8, 2)
    rewards[6] = NAN
    rewards[7, 0] = NAN
    lengths = torch.tensor([1.0, 6.0, 7.0, 9.0, 10.0, 15.0, 10.0, 10.0])
    args = SimpleNamespace(max_completion_length=10, overlong_buffer_length=4, overlong_penalty=0.5)
    got, weights = advantages.with_overlong(rewards, torch.tensor([1.0, 2.0]), lengths, args)
    expected = torch.tensor([0.0, 0.0, -0.25, -0.75, -1.0, -1.0, NAN, -1.0])
    torch.testing.assert_close(got[:, 2], expected, equal_nan=True)
    torch.testing.assert_close(got[:, :2], rewards, equal_nan=True)
    assert weights.tolist() == [1.0, 2.0, 0.5]


def test_scores():
    rewards = torch.tensor([[1.0, 2.0], [NAN, 2.0], [NAN, NAN]])
    got = advantages.scores(rewards, torch.tensor([1.0, 0.5]))
    torch.testing.assert_close(got, torch.tensor([2.0, 1.0, NAN]), equal_nan=True)


def test_rloo():
    scores = torch.tensor([1.0, 0.0, 2.0, NAN, 5.0, 5.0, NAN, NAN])
    kl = torch.tensor([0.0, 1.0, 2.0, 3.0, 0.5, 0.5, 0.5, 0.5])
    got = advantages.rloo(scores, kl, beta=0.1, group_size=4)
    rest = [1.0 - (1.8 - 0.1) / 2, -0.1 - (1.0 + 1.8) / 2, 1.8 - (1.0 - 0.1) / 2, 0.0, 0.0, 0.0, 0.0, 0.0]
    torch.testing.assert_close(got, torch.tensor(rest))


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_reinforce_plus_plus(beta):
    """Three completions of 4, 2 and 3 positions; one without a reward has no token in the mask, nor has a tool's."""
    generator = torch.Generator().manual_seed(0)
    starts = [0, 4, 6, 9]
    logprobs, ref = (-torch.rand(9, generator=generator) for _ in range(2))
    mask = torch.tensor([1, 0, 1, 0, 0, 0, 1, 1, 0]).bool()
    scores = torch.tensor([2.0, NAN, -1.0])
    sequences = [Sequence([1] * length, [1] * length) for length in (4, 2, 3)]
    batch = replace(Batch.lay_out(sequences, torch.device("cpu")), mask=mask)
    got = advantages.reinforce_plus_plus(scores, logprobs, ref, batch, beta)

    returns = {}
    for row in (0, 2):
        for position in range(starts[row], starts[row + 1]):
            if mask[position]:
                rest = [s for s in range(position, starts[row + 1]) if mask[s]]
                penalty = sum(logprobs[s].item() - ref[s].item() for s in rest)
                returns[position] = scores[row].item() - beta * penalty
    values = torch.tensor(list(returns.values()), dtype=torch.float64)
    expected = torch.zeros(9, dtype=torch.float64)
    expected[list(returns)] = (values - values.mean()) / values.std(correction=0)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
