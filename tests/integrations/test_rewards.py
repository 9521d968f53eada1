"""Reward functions of verl, OpenRLHF in our trainers, and ours as they call theirs."""

import asyncio
import functools
import inspect
import math
import pickle
import threading

import numpy as np
import pytest
import torch

import peer_rewards as peers
from peer_rewards import BATCH, TEXTS, call
from rlkernels.integrations import rewards
from rlkernels.integrations.rewards import (
    from_openrlhf,
    from_verl,
    to_openrlhf,
    to_reasoning_gym,
    to_verl,
)
from rlkernels.trainers import RewardError
from rlkernels.trainers.rewards.functions import RewardFunctions

# verl


def test_verl_score_of_each_completion():
    found, logs = call(from_verl(peers.compute_score, column="letter"))
    assert found == [3.0, 0.0, 0.0, 0.0]
    assert logs.columns == logs.metrics == {}


def test_verl_is_told_what_its_reward_manager_tells():
    told = []

    def compute_score(**arguments):
        told.append(arguments)
        return 0.5

    info = [{"split": "train", "num_turns": 3}, None, {}, {"index": 7}]
    found, _ = call(
        from_verl(compute_score, reward_kwargs={"weight": 2}),
        data_source=["s0", "s1", "s2", "s3"],
        reward_model=[{"style": "rule", "ground_truth": str(row)} for row in range(4)],
        extra_info=info,
    )
    assert found == [0.5] * 4
    more = {"num_turns": None, "rollout_reward_scores": {}}
    assert told == [
        {
            "data_source": f"s{row}",
            "solution_str": TEXTS[row],
            "ground_truth": str(row),
            "extra_info": {**(info[row] or {}), **more},
            "weight": 2,
        }
        for row in range(4)
    ]
    assert info[0] == {"split": "train", "num_turns": 3}
    call(from_verl(compute_score, column="letter", data_source="letters"))
    assert told[-1]["data_source"] == "letters" and told[-1]["ground_truth"] == "b"


def test_verl_takes_messages_as_text():
    messages = [[{"role": "assistant", "content": text}] for text in TEXTS]
    found, _ = call(from_verl(peers.compute_score, column="letter"), completions=messages)
    assert found == [3.0, 0.0, 0.0, 0.0]
    turns = [{"role": "assistant", "content": "a"}, {"role": "tool", "content": "b"}]
    found, _ = call(from_verl(lambda solution_str, **_: len(solution_str), column="letter"), completions=[turns] * 4)
    assert found == [len("a\nb")] * 4
    blocks = [{"type": "text", "text": "c"}, {"type": "image", "image": None}, {"type": "text", "text": "d"}]
    turns = [{"role": "assistant", "tool_calls": []}, {"role": "assistant", "content": None}, *turns]
    seen = from_verl(lambda solution_str, **_: {"score": 0.0, "seen": solution_str}, column="letter", name="n")
    _, logs = call(seen, completions=[[*turns, {"role": "assistant", "content": blocks}]] * 4)
    assert logs.columns == {"n/seen": ["\n\na\nb\ncd"] * 4}


@pytest.mark.parametrize("function", [peers.detailed_score, peers.async_score])
def test_prompts_completions_and_ids_by_position(function):
    reward = from_verl(function, column="letter")
    result = reward(["p"], ["a bad"], [[1]], letter=["a"], extra_info=[{"split": "train"}])
    assert (asyncio.run(result) if inspect.isawaitable(result) else result) == [2.0]


@pytest.mark.parametrize("function", [peers.detailed_score, peers.async_score])
def test_verl_entries_are_logged(function):
    reward = from_verl(function, column="letter", data_source="s")
    found, logs = call(reward, extra_info=[{"split": part} for part in "wxyz"])
    assert found == [3.0, 0.0, 0.0, 0.0]
    name = function.__name__
    assert logs.columns == {f"{name}/acc": [True, False, False, False], f"{name}/seen": ["s:w", "s:x", "s:y", "s:z"]}
    assert logs.metrics == {f"{name}/acc": 0.25}


def test_verl_async_scores_are_made_at_once():
    barrier = asyncio.Barrier(len(TEXTS))

    async def meet(data_source, solution_str, ground_truth, extra_info=None):
        await asyncio.wait_for(barrier.wait(), 10)
        return 1.0

    reward = from_verl(meet, column="letter")
    assert inspect.iscoroutinefunction(type(reward).__call__)
    assert call(reward)[0] == [1.0] * 4


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.float32(0.5), 0.5),
        (torch.tensor(0.5), 0.5),
        (torch.tensor([0.5]), 0.5),
        (True, True),
        (None, None),
        ({"score": np.float64(0.25)}, 0.25),
        ({"score": None, "pred": np.array([1.0])}, None),
    ],
)
def test_verl_kinds_of_score(value, expected):
    found, logs = call(from_verl(lambda **_: value, column="letter", name="n"))
    assert found == [expected] * 4 and all(isinstance(each, type(expected)) for each in found)
    assert logs.columns == ({"n/pred": [1.0] * 4} if isinstance(value, dict) and "pred" in value else {})


def test_entries_that_only_some_scores_have():
    scores = iter([{"score": 1.0}, {"score": 1.0, "time": 2.0}, 3.0, {"score": 1.0, "time": 4.0}])
    found, logs = call(from_verl(lambda **_: next(scores), column="letter", name="n"))
    assert found == [1.0, 1.0, 3.0, 1.0]
    assert logs.columns == {"n/time": [None, 2.0, None, 4.0]} and logs.metrics == {"n/time": 3.0}


def test_an_entry_that_is_none_throughout_is_a_column_and_no_metric():
    _, logs = call(from_verl(lambda **_: {"score": 1.0, "pred": None}, column="letter", name="n"))
    assert logs.columns == {"n/pred": [None] * 4} and logs.metrics == {}


def test_verl_errors_name_the_argument():
    with pytest.raises(TypeError, match=r"compute_score must be a function; got 'rewards\.py'"):
        from_verl("rewards.py")
    with pytest.raises(ValueError, match=r"column must be one of the rows', \['letter'\]; got 'reward_model'"):
        call(from_verl(peers.compute_score))
    with pytest.raises(ValueError, match=r"compute_score must give .* 'score'; got \['acc', 'reward'\]"):
        call(from_verl(lambda **_: {"reward": 1.0, "acc": 1.0}, column="letter"))
    with pytest.raises(TypeError, match="reward must be a function"):
        to_verl(None)


@pytest.mark.parametrize(
    "compute_score", [peers.hits_for_verl, pickle.loads(pickle.dumps(peers.hits_for_verl))], ids=["itself", "pickled"]
)
def test_ours_as_verls(compute_score):
    assert not inspect.iscoroutinefunction(compute_score)
    expected = {"text": "a bad", "twice": 4.0, "tenth": 0.2, "score": 2.0}
    assert (
        compute_score(data_source="s", solution_str="a bad", ground_truth="a", extra_info={"letter": "no"}) == expected
    )
    assert compute_score("s", "a bad", "a") == expected
    assert compute_score("s", "a bad", "a", None) == expected


def test_our_async_as_verls():
    assert inspect.iscoroutinefunction(peers.async_hits_for_verl)
    assert asyncio.run(peers.async_hits_for_verl("s", "a bad", "a", {}))["score"] == 2.0


def test_ours_is_told_what_verl_tells():
    told = []

    def reward(**arguments):
        told.append(arguments)
        return np.array([1])

    score = to_verl(reward, chat=True)("s", "text", "42", {"split": "train", "prompts": 5}, weight=3)
    assert score == 1.0 and type(score) is float
    (arguments,) = told
    assert callable(arguments.pop("log_extra")) and callable(arguments.pop("log_metric"))
    assert arguments == {
        "prompts": [None],
        "completions": [[{"role": "assistant", "content": "text"}]],
        "completion_ids": [None],
        "trainer_state": None,
        "data_source": ["s"],
        "ground_truth": ["42"],
        "split": ["train"],
        "weight": 3,
    }


def test_ours_changes_nothing_of_theirs():
    def edits(prompts, completions, facts, **columns):
        facts[0]["steps"].append("edited")
        prompts.append("edited")
        return [1.0]

    lock = threading.Lock()
    extra_info = {"facts": {"steps": ["one"]}, "lock": lock}
    assert to_verl(edits)("s", "text", "42", extra_info) == 1.0
    assert extra_info == {"facts": {"steps": ["one"]}, "lock": lock}
    prompts, labels = ["p"], [{"steps": ["one"]}]
    assert to_openrlhf(edits, column="facts")(["pq"], prompts, labels)["rewards"].tolist() == [1.0]
    assert (prompts, labels) == (["p"], [{"steps": ["one"]}])
    entry = {"question": "p", "answer": "a", "facts": {"steps": ["one"]}}
    assert to_reasoning_gym(edits)("a", entry) == 1.0 and entry["facts"] == {"steps": ["one"]}


def named(value):
    def short(**_):
        return value

    return short


@pytest.mark.parametrize("make", [to_verl, to_openrlhf, to_reasoning_gym])
def test_none_needs_a_default(make):
    def once(reward, **options):
        function = make(reward, **options)
        if make is to_openrlhf:
            return function(["pq"], ["p"], ["l"])["rewards"].item()
        if make is to_verl:
            return function("s", "q", "l")
        return function("q", {"question": "p", "answer": "l", "metadata": {}})

    assert once(named([None]), default=-1.0) == -1.0
    assert once(named([None]), default=0) == 0.0
    assert once(named([0.0]), default=-1.0) == 0.0
    with pytest.raises(ValueError, match="default must say what reward 'short' is worth"):
        once(named([None]))
    for wrong in (math.nan, math.inf, 1e300, -(10**400), "good"):
        with pytest.raises(ValueError, match="reward 'short' must give finite numbers or None; got"):
            once(named([wrong]))
    for wrong in ([], [1.0, 2.0], 1.0, None):
        with pytest.raises(ValueError, match="reward 'short' must give a list of 1 numbers; got"):
            once(named(wrong))


@pytest.mark.parametrize("function", [peers.hits, peers.async_hits])
def test_there_and_back(function):
    reward = from_verl(to_verl(function, column="letter"), column="letter")
    assert reward.__name__ == pickle.loads(pickle.dumps(reward)).__name__ == function.__name__
    found, logs = call(reward)
    assert found == call(functools.partial(function))[0]
    assert logs.columns[f"{function.__name__}/twice"] == [6.0, 0.0, 0.0, 0.0]


# OpenRLHF


def test_openrlhf_is_called_for_each_completion():
    told = []

    def reward_func(queries, prompts, labels):
        told.append((queries, prompts, labels))
        return peers.reward_func(queries, prompts, labels)

    found, logs = call(from_openrlhf(reward_func, column="letter"))
    assert told == [
        ([prompt + text], [prompt], [letter])
        for prompt, text, letter in zip(BATCH["prompts"], TEXTS, BATCH["letter"], strict=True)
    ]
    assert found == [3.0, 0.0, 0.0, 0.0]
    lengths = [2 + len(text) for text in TEXTS]
    assert logs.columns == {"reward_func/scores": [1.5, 0.0, 0.0, 0.0], "reward_func/length": lengths}
    assert logs.metrics == {"reward_func/scores": 0.375, "reward_func/length": sum(lengths) / 4}


@pytest.mark.parametrize(
    "value", [0.5, torch.tensor([0.5]), [0.5], {"rewards": 0.5}, {"rewards": [0.5], "scores": None, "extra_logs": None}]
)
def test_openrlhf_kinds_of_result(value):
    found, logs = call(from_openrlhf(lambda queries, prompts, labels: value, column=None))
    assert found == [0.5] * 4 and logs.columns == {}


def test_openrlhf_with_a_tokenizer():
    class Tokenizer:
        def apply_chat_template(self, messages, tokenize, add_generation_prompt):
            assert not tokenize and add_generation_prompt
            return "".join(f"<{each['role']}>{each['content']}" for each in messages) + "<assistant>"

        def decode(self, ids):
            return "".join(f"[{each}]" for each in ids)

    told = []

    def reward_func(queries, prompts, labels):
        told.append((*queries, *prompts, *labels))
        return {"rewards": 1.0}

    prompts = [[{"role": "user", "content": text}] for text in BATCH["prompts"]]
    with pytest.raises(ValueError, match="tokenizer must be given to from_openrlhf"):
        call(from_openrlhf(reward_func, column=None), prompts=prompts)
    call(from_openrlhf(reward_func, column=None, tokenizer=Tokenizer()), prompts=prompts)
    assert told[0] == ("<user>p0<assistant>[1]", "<user>p0<assistant>", "")


def test_openrlhf_errors_name_the_argument():
    with pytest.raises(TypeError, match="reward_func must be a function"):
        from_openrlhf([])
    with pytest.raises(ValueError, match=r"column must be one of the rows', \['letter'\]; got 'label'"):
        call(from_openrlhf(peers.reward_func))
    with pytest.raises(ValueError, match=r"reward_func must give .* 'rewards'; got \['scores'\]"):
        call(from_openrlhf(lambda *_: {"scores": 1.0}, column=None))


@pytest.mark.parametrize(
    "function", [to_openrlhf(peers.hits, column="letter"), to_openrlhf(peers.async_hits, column="letter")]
)
def test_ours_as_openrlhfs(function):
    function = pickle.loads(pickle.dumps(function))
    result = function(["user: a? abba", "user: bbb"], ["user: a?", "user: b"], ["a", "b"])
    assert result.keys() == {"rewards", "scores", "extra_logs"}
    for key, expected in {"rewards": [2.0, 2.0], "scores": [2.0, 2.0]}.items():
        assert result[key].dtype == torch.float32 and result[key].tolist() == expected
    logs = {key: value.tolist() for key, value in result["extra_logs"].items()}
    assert logs == {"twice": [4.0, 4.0], "tenth": pytest.approx([0.2, 0.2])}  # and not the text


def test_logged_in_several_calls():
    """As our trainers and TRL's take it: the values of a column one after the other, and the mean of a metric."""

    def one_by_one(completions, log_extra, log_metric, **_):
        for text in completions:
            log_extra("length", [len(text)])
            log_metric("mean", len(text))
        return [0.0] * len(completions)

    logs = to_openrlhf(one_by_one)(["pa", "pabc"], ["p", "p"], [None, None])["extra_logs"]
    assert {key: value.tolist() for key, value in logs.items()} == {"length": [1, 3], "mean": [2, 2]}


def test_columns_of_another_length_are_named():
    def short(completions, log_extra, **_):
        log_extra("length", [1, 2, 3])
        return [0.0] * len(completions)

    message = "reward 'short' must log 1 values as 'length', one for each completion; got 3"
    with pytest.raises(ValueError, match=message):
        to_verl(short)("s", "q", "l")
    with pytest.raises(ValueError, match=message):
        to_openrlhf(short)(["pq"], ["p"], [None])


def test_completion_in_a_query():
    seen = []

    def reward(prompts, completions, **_):
        seen.extend(completions)
        return [0.0] * len(prompts)

    to_openrlhf(reward, special_tokens=["<s>", "<end>"])(["<s>aab<end>"], ["<s>a"], [None])
    to_openrlhf(reward)(["end of promptmore", "all of it"], ["long begin and end of prompt", ""], [None, None])
    to_openrlhf(reward, chat=True)(["pq"], ["p"], [None])
    assert seen == ["ab", "more", "all of it", [{"role": "assistant", "content": "q"}]]
    with pytest.raises(
        ValueError, match=r"queries must begin with their prompts; got 'other' for the prompt 'prompt!'"
    ):
        to_openrlhf(reward)(["other"], ["prompt!"], [None])


# In our trainers


def test_reward_functions_of_all_kinds():
    functions = [
        from_verl(peers.detailed_score, column="letter", data_source="s"),
        from_verl(peers.async_score, column="letter"),
        from_openrlhf(peers.reward_func, column="letter"),
        from_verl(peers.hits_for_verl, column="letter", name="back"),
    ]
    calls = RewardFunctions(functions)
    assert calls.names == ["detailed_score", "async_score", "reward_func", "back"]
    logs = {"columns": {}, "metrics": {}}

    def log_metric(name, value, weight):
        logs["metrics"][name] = logs["metrics"].get(name, 0.0) + value * weight

    found = calls(BATCH, log_extra=logs["columns"].__setitem__, log_metric=log_metric, trainer_state=None)
    assert found.tolist() == [[3.0] * 4, [0.0] * 4, [0.0] * 4, [0.0] * 4]
    assert logs["columns"]["detailed_score/acc"] == [True, False, False, False]
    assert logs["columns"]["back/text"] == TEXTS
    assert logs["metrics"]["detailed_score/acc"] == logs["metrics"]["async_score/acc"] == 0.25


def test_error_in_theirs_is_told_by_the_trainer():
    def compute_score(data_source, solution_str, ground_truth, extra_info=None):
        return math.nan if solution_str == "b" else 1 / len(solution_str)

    with pytest.raises(RewardError, match=r"'compute_score' raised ZeroDivisionError: .* at row 2"):
        RewardFunctions([from_verl(compute_score, column="letter")])(BATCH)
    calls = RewardFunctions([from_verl(compute_score, column="letter")], on_error="none")
    assert calls(BATCH)[:, 0].isnan().tolist() == [False, True, True, False]


def test_module_says_its_functions():
    made = {name for name in vars(rewards) if name.startswith(("from_", "to_"))}
    assert made == {f"{way}_{peer}" for way in ("from", "to") for peer in ("verl", "openrlhf", "reasoning_gym")}
    assert all(name in rewards.__doc__ for name in made)
