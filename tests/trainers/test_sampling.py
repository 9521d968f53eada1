"""Random numbers by row and position, the tokens that they stand for, and the loop that samples them."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rlkernels.trainers import SamplingOptions, TransformersEngine
from rlkernels.trainers.rollouts import sampling

PROMPTS = [[3, 4, 5, 6], [7], [3, 4, 5, 6], [8, 9], [7], [10, 11, 12]]


def options(length: int = 12, **others) -> SamplingOptions:
    return SamplingOptions(temperature=1.0, max_completion_length=length, seed=5, step=3, **others)


@pytest.fixture
def complete(make_model, tokenizer):
    """The completions of prompts, as token ids; they rarely end by themselves."""
    engine = TransformersEngine(make_model(), tokenizer)
    return lambda prompts, options: [each.completion_ids for each in engine.complete(prompts, options)]


def test_numbers_are_splitmix64():
    """The first five of seed 1234567, as they are published with the generator."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    published.append(16408922859458223821)
    numbers = sampling.uniform(torch.tensor([1234567]), torch.arange(5))
    assert numbers.tolist() == [(number >> 40) / 2**24 for number in published]


def test_numbers_are_uniform_and_differ():
    seeds = torch.tensor([sampling.row_seed(0, step, row) for step in range(20) for row in range(50)])
    numbers = sampling.uniform(seeds.unsqueeze(1), torch.arange(100))
    assert numbers.min() >= 0 and numbers.max() < 1
    # 100,000 numbers: 5 standard deviations of their mean and of the share below a tenth.
    assert abs(numbers.mean().item() - 0.5) < 5 * (1 / 12 / 1e5) ** 0.5
    assert abs((numbers < 0.1).double().mean().item() - 0.1) < 5 * (0.09 / 1e5) ** 0.5
    between = torch.corrcoef(torch.stack([numbers[:-1].flatten(), numbers[1:].flatten()]))[0, 1]
    along = torch.corrcoef(torch.stack([numbers[:, :-1].flatten(), numbers[:, 1:].flatten()]))[0, 1]
    assert max(between.abs(), along.abs()) < 5e5**-0.5 * 5
    assert len(numbers.unique()) > 99_000


@pytest.mark.parametrize("number", [0.0, 0.5, 1 - 2**-24, 1.0])
def test_what_cannot_be_is_not_sampled(number):
    """Whatever the random number: at its ends, and where the probabilities add up to less than 1."""
    scores = torch.randn(50, 999, generator=torch.Generator().manual_seed(0))
    scores[:, [0, 1, 500, 997, 998]] = -torch.inf
    scores[0, 5:] = -torch.inf
    tokens = sampling.choose(scores, torch.full((50,), number), 0.7)
    assert scores.gather(1, tokens.unsqueeze(1)).isfinite().all()


def test_neither_order_nor_number_of_processes_changes_what_is_sampled(complete):
    whole = complete(PROMPTS, options())
    assert whole[0] != whole[2] and whole[1] != whole[4]
    order = [4, 2, 0, 5, 1, 3]
    shuffled = complete([PROMPTS[row] for row in order], options(rows=tuple(order)))
    assert shuffled == [whole[row] for row in order]
    first, second = complete(PROMPTS[:3], options()), complete(PROMPTS[3:], options(rows=(3, 4, 5)))
    assert first + second == whole
    torch.manual_seed(7)
    assert complete(PROMPTS, options()) == whole


def test_seed_step_and_row_change_what_is_sampled(complete):
    own = options()
    others = [SamplingOptions(1.0, 12, seed=6, step=3), SamplingOptions(1.0, 12, seed=5, step=4)]
    others.append(own.of([1, 2, 3, 4, 5, 6]))
    for other in others:
        assert complete(PROMPTS, other) != complete(PROMPTS, own)


def test_a_further_turn_goes_on_where_the_last_ended(complete):
    """The second half of each completion is what its first half, as a prompt, is completed with."""
    whole = complete(PROMPTS, options(12))
    going_on = [row for row, completion in enumerate(whole) if len(completion) == 12]
    assert len(going_on) > 2
    so_far = [PROMPTS[row] + whole[row][:5] for row in going_on]
    assert complete(so_far, options(7).of(going_on)) == [whole[row][5:] for row in going_on]


def test_one_number_for_each_prompt():
    with pytest.raises(ValueError, match=r"options\.rows must have one number for each of the 2 prompts; got 3"):
        options(rows=(0, 1, 2)).row_seeds(2)


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for an accelerator."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique", "equal")

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        is_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in self.NAMES or is_mask:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("logprobs", [False, True])
def test_the_host_does_not_wait_for_each_token(make_model, tokenizer, monkeypatch, logprobs):
    engine = TransformersEngine(make_model(), tokenizer)
    engine.end_token_ids = []
    monkeypatch.setattr(sampling, "TOKENS_PER_CHECK", {})
    counts = []
    for length in (17, 17 + 2 * sampling.ELSEWHERE):
        with Waits() as waits:
            (first, *_) = engine.complete(PROMPTS, options(length, logprobs=logprobs))
        assert len(first.completion_ids) == length
        counts.append(sum(waits.counts.values()))
    assert counts[1] - counts[0] == 2 and counts[0] < 17
