"""masked_mean and masked_whiten over the tokens of a batch."""

import torch

import peer_modules
import rlkernels
from suite import Case, Peer, response_mask

SHAPE = (64, 8192)
SIZE = 4 * SHAPE[0] * SHAPE[1]


def inputs():
    return 2 + torch.randn(SHAPE), response_mask(SHAPE)


def float_mask(x, mask):
    return x, mask.float()


def eager_mean(x, mask):
    return (x * mask).sum() / mask.sum()


def eager_whiten(x, mask):
    count = mask.sum()
    mean = (x * mask).sum() / count
    variance = ((x - mean).square() * mask).sum() / (count - 1)
    return (x - mean) * torch.rsqrt(variance + 1e-8) * mask


def verl(name):
    return lambda: getattr(peer_modules.verl("utils.torch_functional"), name)


CASES = [
    Case(
        "masked_mean",
        SHAPE,
        inputs,
        ours=rlkernels.masked_mean,
        eager=eager_mean,
        peers={"verl": Peer(verl("masked_mean"), float_mask)},
        moved=SIZE + SIZE // 4,
    ),
    Case(
        "masked_whiten",
        SHAPE,
        inputs,
        ours=rlkernels.masked_whiten,
        eager=eager_whiten,
        peers={"verl": Peer(verl("masked_whiten"), float_mask)},
        # Read once more when the statistics are known.
        moved=3 * SIZE + SIZE // 2,
        mask=1,
        wanted={"verl": 3},
    ),
]


def test_masked(case, implementation, measure):
    measure(case, implementation)
