"""The contract of reward functions, and what each breach of it ends in."""

import asyncio
import functools
import math

import numpy as np
import pytest
import torch

from rlkernels.trainers.rewards import RewardError, RewardFunctions

ROWS = {
    "prompts": ["1+1=", "2+2=", "3+3="],
    "completions": ["2", "5", "six"],
    "completion_ids": [[2], [5], [7, 8]],
    "answer": ["2", "4", "6"],
}


def call(*functions, **shared):
    return RewardFunctions(functions)(ROWS, **shared)


def exact(completions, answer, **kwargs):
    return [float(text == wanted) for text, wanted in zip(completions, answer, strict=True)]


def test_arguments():
    seen = {}

    def note(**kwargs):
        seen.update(kwargs)
        return [0.0] * 3

    call(note, trainer_state="state")
    assert callable(seen.pop("log_extra")) and callable(seen.pop("log_metric"))
    assert seen == {**ROWS, "trainer_state": "state"}


@pytest.mark.parametrize(
    "result",
    [
        [1, 0, -2],
        (1.0, 0.0, -2.0),
        [True, False, -2],
        np.array([1.0, 0.0, -2.0]),
        [np.float32(1), np.int64(0), np.float64(-2)],
        torch.tensor([1.0, 0.0, -2.0]),
        [torch.tensor(1.0), torch.tensor(0), torch.tensor([-2.0]).squeeze()],
    ],
    ids=["int", "tuple", "bool", "array", "numpy_scalars", "tensor", "torch_scalars"],
)
def test_numbers(result):
    assert call(lambda **kwargs: result).tolist() == [[1.0], [0.0], [-2.0]]


def test_none_does_not_apply():
    rewards = call(lambda **kwargs: [None, 1.0, None], exact)
    assert math.isnan(rewards[0, 0]) and math.isnan(rewards[2, 0])
    assert rewards[1].tolist() == [1.0, 0.0]
    assert rewards[:, 1].tolist() == [1.0, 0.0, 0.0]


def test_async_functions_run_together_and_keep_their_columns():
    order = []

    def delayed(value, seconds):
        async def reward(completions, **kwargs):
            order.append(("start", value))
            await asyncio.sleep(seconds)
            order.append(("end", value))
            return [value] * len(completions)

        return reward

    class Judge:
        async def __call__(self, completions, **kwargs):
            return [3.0] * len(completions)

    rewards = call(delayed(1.0, 0.05), exact, delayed(2.0, 0.0), Judge(), functools.partial(delayed(4.0, 0.0)))
    assert rewards[0].tolist() == [1.0, 1.0, 2.0, 3.0, 4.0]
    assert order.index(("end", 2.0)) < order.index(("end", 1.0))


def test_async_clients_keep_their_loop():
    """An HTTP session belongs to the loop it was made in: all calls must see the same one."""
    loops = []

    async def note(completions, **kwargs):
        loops.append(asyncio.get_running_loop())
        return [0.0] * len(completions)

    functions = RewardFunctions([note])
    functions(ROWS)
    functions(ROWS)
    assert loops[0] is loops[1]


def test_inside_a_running_loop():
    async def reward(completions, **kwargs):
        return [1.0] * len(completions)

    async def notebook():
        return call(reward)

    assert asyncio.run(notebook()).tolist() == [[1.0]] * 3


@pytest.mark.parametrize(
    "result, message",
    [
        ([1.0, 2.0], "'judge' must return one reward for each of the 3 completions; got 2"),
        ([1.0, "2", 3.0], "'judge' must return finite numbers, .*; got '2', at row 1: prompt '2[+]2=', completion '5'"),
        ([1.0, 2.0, math.nan], "got nan, at row 2: prompt '3[+]3=', completion 'six'"),
        ([math.inf, 2.0, 3.0], "got inf, at row 0"),
        ([1.0, [2.0], 3.0], r"got \[2.0\], at row 1"),
        ([1.0, torch.ones(2), 3.0], r"got tensor\(\[1., 1.\]\), at row 1"),
        (torch.ones(3, 2), r"got \[1.0, 1.0\], at rows 0, 1, 2 \(row 0: prompt"),
        (2.0, "'judge' must return a list of numbers; got float"),
        (torch.tensor(2.0), "'judge' must return a list of numbers; got float"),
        (None, "'judge' must return a list of numbers; got NoneType"),
        ("abc", "'judge' must return a list of numbers; got str"),
    ],
)
@pytest.mark.parametrize("asynchronous", [False, True], ids=["plain", "async"])
def test_bad_results(result, message, asynchronous):
    def judge(**kwargs):
        return result

    async def judge_async(**kwargs):
        return result

    judge_async.__name__ = "judge"
    with pytest.raises(RewardError, match=message):
        call(judge_async if asynchronous else judge)


def parse(completions, **kwargs):
    return [float(int(text)) for text in completions]


async def parse_async(completions, **kwargs):
    return parse(completions)


@pytest.mark.parametrize("function", [parse, parse_async, functools.partial(parse)])
def test_a_function_that_raises(function):
    name = "parse_async" if function is parse_async else "parse"
    message = f"'{name}' raised ValueError: invalid literal .*, at row 2: prompt '3[+]3=', completion 'six'"
    with pytest.raises(RewardError, match=message) as caught:
        call(exact, function)
    assert isinstance(caught.value.__cause__, ValueError)
    assert "\n" not in str(caught.value)


def test_a_function_that_raises_on_the_batch_only():
    def batch(completions, **kwargs):
        if len(completions) > 1:
            raise MemoryError("too many")
        return [0.0]

    with pytest.raises(RewardError, match="'batch' raised MemoryError: too many, on the whole batch but on no row"):
        call(batch)


async def takes_completions_only(completions):
    return [0.0] * len(completions)


@pytest.mark.parametrize("function", [lambda completions: [0.0] * 3, takes_completions_only], ids=["plain", "async"])
def test_a_function_without_the_keyword_arguments_of_the_contract(function):
    with pytest.raises(RewardError, match=r"raised TypeError: .* unexpected keyword argument"):
        call(function)


def test_the_message_is_one_line():
    def fails(**kwargs):
        raise ValueError("first\n  second\nthird")

    with pytest.raises(RewardError, match="raised ValueError: first second third, at row 0"):
        call(fails)


def test_long_texts_are_cut():
    rows = {"prompts": ["x" * 10_000], "completions": ["y" * 10_000]}
    with pytest.raises(RewardError) as caught:
        RewardFunctions([lambda **kwargs: ["bad"]])(rows)
    assert len(str(caught.value)) < 700
