"""The contract of reward functions, and what each breach of it ends in."""

import asyncio
import contextlib
import copy
import functools
import io
import math
import os
import signal
import sys
from decimal import Decimal
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import GPTNeoConfig, GPTNeoForSequenceClassification, LlamaForSequenceClassification

from rlkernels.trainers import GRPOConfig
from rlkernels.trainers.batch.batch import Batch
from rlkernels.trainers.rewards import process_settings as settings
from rlkernels.trainers.rewards.functions import RewardError, RewardFunctions
from rlkernels.trainers.rewards.model import RewardModel

ROWS = {
    "prompts": ["1+1=", "2+2=", "3+3="],
    "completions": ["2", "5", "six"],
    "completion_ids": [[2], [5], [7, 8]],
    "answer": ["2", "4", "6"],
}


def call(*functions, **shared):
    return RewardFunctions(functions)(ROWS, **shared)


class Silent(ValueError):
    def __str__(self):
        raise RuntimeError("no text")

    __repr__ = __str__


class Longer(list):
    def __len__(self):
        return 3

    def __iter__(self):
        return iter([0.0] * 6)


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
        [torch.tensor(1.0), torch.tensor(0), torch.tensor([-2.0])],
        [Decimal(1), Fraction(0), Decimal("-2")],
    ],
    ids=["int", "tuple", "bool", "array", "numpy_scalars", "tensor", "torch_scalars", "decimals"],
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
        (dict.fromkeys(range(3)), "'judge' must return a list of numbers; got dict"),
        ({1.0, 2.0, 3.0}, "'judge' must return a list of numbers; got set"),
        (range(3), "'judge' must return a list of numbers; got range"),
        (b"abc", "'judge' must return a list of numbers; got bytes"),
        (memoryview(b"abc"), "'judge' must return a list of numbers; got memoryview"),
        ((value for value in range(3)), "'judge' must return a list of numbers; got generator"),
        ([1.0, 1e300, -1e39], r"got 1e\+300, at row 1: .*; .* got -1e\+39, at row 2"),
        (np.array([1.0, 1e300, 3.0]), r"got 1e\+300, at row 1"),
        ([1.0, 10**400, 3.0], "got 10{20}.*, at row 1"),
        ([1.0, 10**5000, 3.0], r"got \(int without a text\), at row 1"),
        ([Decimal("NaN"), 2.0, 3.0], r"got Decimal\('NaN'\), at row 0"),
        ([1.0, 2j, 3.0], "got 2j, at row 1"),
        ([1.0, Silent(), 3.0], r"got \(Silent without a text\), at row 1"),
        (Longer([1.0, 2.0, 3.0]), "must return one reward for each of the 3 completions; got 6"),
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


def raised(error):
    def fails(**kwargs):
        raise error

    return fails


@pytest.mark.parametrize(
    "error, told",
    [
        (Silent(), r"Silent: \(Silent without a text\)"),
        (StopIteration(3), "StopIteration: 3"),
        (GeneratorExit("end"), "GeneratorExit: end"),
        (RecursionError("deep"), "RecursionError: deep"),
        (SystemExit(0), "SystemExit: 0"),
        (BaseExceptionGroup("both", [Silent(), SystemExit(0)]), r"BaseExceptionGroup: both \(2 sub-exceptions\)"),
        (ValueError("\ud800"), r"ValueError: \\ud800"),
    ],
    ids=lambda each: type(each).__name__,
)
@pytest.mark.parametrize("asynchronous", [False, True], ids=["plain", "async"])
def test_whatever_is_raised(error, told, asynchronous):
    async def fails(**kwargs):
        raised(error)()

    if asynchronous and isinstance(error, StopIteration):
        told = "RuntimeError: coroutine raised StopIteration"  # says Python
    with pytest.raises(RewardError, match=f"^reward function 'fails' raised {told}, at row 0") as caught:
        call(fails if asynchronous else raised(error))
    assert str(caught.value).encode()


# What they are given, and what they leave behind


def edits(prompts, completions, completion_ids, trainer_state, **columns):
    for values in (prompts, completions):
        values[0][0]["content"] = "edited"
        values.append("edited")
    for ids in completion_ids:
        ids.clear()
    columns["facts"][1]["steps"][0] = "edited"
    trainer_state.global_step = 10**6
    return [0.0, 0.0]


async def edits_async(**kwargs):
    return edits(**kwargs)


@pytest.mark.parametrize("first", [edits, edits_async, functools.partial(edits)])
def test_functions_change_nothing_but_what_is_their_own(first):
    def messages(text):
        return [{"role": "user", "content": text}]

    rows = {
        "prompts": [messages("a"), messages("b")],
        "completions": [messages("c"), messages("d")],
        "completion_ids": [[1, 2], [3]],
        "facts": [{"steps": ["one"]}, {"steps": ["two"]}],
    }
    given, seen, state = copy.deepcopy(rows), {}, SimpleNamespace(global_step=7)

    async def notes(**kwargs):
        await asyncio.sleep(0.02)
        seen.update(kwargs)
        return [0.0, 0.0]

    RewardFunctions([first, notes])(rows, trainer_state=state)
    assert rows == given and state.global_step == 7
    assert {name: seen[name] for name in rows} == given and seen["trainer_state"].global_step == 7


def test_what_cannot_be_copied_is_given_as_it_is():
    column = [io.StringIO("a"), lambda: 0, os]
    seen = {}

    def notes(**kwargs):
        seen.update(kwargs)
        return [0.0] * 3

    RewardFunctions([notes])({**ROWS, "column": column})
    assert all(given is other for given, other in zip(seen["column"][1:], column[1:], strict=True))


class KEPT:
    contexts: list = []

    @classmethod
    def enter(cls, context):
        context.__enter__()
        cls.contexts.append(context)


def in_a_folder_that_is_gone(folder):
    os.chdir(folder)
    folder.rmdir()


LEFT_CHANGED = {
    "gradients": lambda _: torch.set_grad_enabled(False),
    "no_grad": lambda _: KEPT.enter(torch.no_grad()),
    "inference": lambda _: KEPT.enter(torch.inference_mode()),
    "autocast": lambda _: KEPT.enter(torch.autocast("cpu", torch.bfloat16)),
    "dtype": lambda _: torch.set_default_dtype(torch.float64),
    "device": lambda _: torch.set_default_device("meta"),
    "threads": lambda _: torch.set_num_threads(torch.get_num_threads() + 1),
    "determinism": lambda _: torch.use_deterministic_algorithms(True),
    "precision": lambda _: torch.set_float32_matmul_precision("medium"),
    "folder": os.chdir,
    "lost folder": in_a_folder_that_is_gone,
    "umask": lambda _: os.umask(0o777),
    "streams": lambda _: vars(sys).update(stdout=None, stderr=io.StringIO()),
    "Ctrl-C": lambda _: signal.signal(signal.SIGINT, signal.SIG_IGN),
    "blocked signals": lambda _: signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}),
    "SIGTERM": lambda _: signal.signal(signal.SIGTERM, signal.SIG_IGN),
}


@pytest.mark.parametrize("kind", LEFT_CHANGED)
def test_settings_of_the_process_are_put_back(kind, tmp_path):
    """Also where the function fails; and the next function does not see them."""

    def state():
        weight = torch.ones(2, 2, requires_grad=True)
        product = weight @ weight
        return [read() for read, _ in settings.SETTINGS], product.requires_grad, product.is_inference(), product.dtype

    seen = []

    def changes(**kwargs):
        LEFT_CHANGED[kind](tmp_path)
        raise ValueError("too late")

    def notes(**kwargs):
        seen.append(state())
        return [1.0] * 3

    before = state()
    RewardFunctions([changes, notes], on_error="none")({**ROWS, "completions": ["2", "5", "six"]})
    assert state() == before and seen == [before]
    assert torch._C._len_torch_function_stack() == 0  # as where a default device is set


def test_a_stream_that_was_closed_is_opened_anew(monkeypatch, capfd):
    monkeypatch.setattr(sys, "stdout", os.fdopen(1, "w", closefd=False))

    def closes(**kwargs):
        sys.stdout.close()
        return [0.0] * 3

    call(closes)
    print("still here")
    assert capfd.readouterr().out == "still here\n"


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("takes_its_place", [False, True])
def test_a_file_that_was_closed_is_there_again(number, takes_its_place, capfd, tmp_path):
    def closes(**kwargs):
        os.close(number)
        if takes_its_place:
            assert os.open(tmp_path / "model", os.O_CREAT | os.O_WRONLY) == number
        return [0.0] * 3

    call(closes)
    os.write(number, b"still here")
    assert capfd.readouterr()[number - 1] == "still here"


# What they log


def test_names_are_unique():
    def same(**kwargs):
        return [0.0] * 3

    functions = [same, functools.partial(functools.partial(same), x=1), exact, same]
    assert RewardFunctions(functions).names == ["same", "same_2", "exact", "same_3"]
    assert RewardFunctions(functions, taken=["exact", "same"]).names == ["same_2", "same_3", "exact_2", "same_4"]


def test_an_attribute_func_is_no_partial():
    class Grader:
        def __init__(self):
            self.func = lambda: 0

        def __call__(self, **kwargs):
            return [0.5] * 3

    made = RewardFunctions([Grader()])
    assert made.names == ["Grader"] and made(ROWS).tolist() == [[0.5]] * 3
    with pytest.raises(TypeError, match="reward_funcs must be functions; got <class"):
        RewardFunctions([Grader])


CIRCULAR: list = [1]
CIRCULAR.append(CIRCULAR)
DEEP = functools.reduce(lambda inner, _: [inner], range(10_000), 0)


@pytest.mark.parametrize(
    "value, kept",
    [
        (b"x", "b'x'"),
        ("\ud800", "\\ud800"),
        (10**30, "1" + "0" * 30),
        (10**5000, "(int without a text)"),
        (np.float32(0.5), 0.5),
        (torch.tensor([1, 2]), [1, 2]),
        ({1: Silent()}, {"1": "(Silent without a text)"}),
        (CIRCULAR, [1, "[1, [...]]"]),
        (True, True),
    ],
    ids=["bytes", "surrogate", "30 digits", "5000 digits", "numpy", "torch", "dict", "circular", "bool"],
)
def test_what_is_logged_can_be_kept(value, kept):
    logged = []

    def logs(log_extra, **kwargs):
        log_extra("value", [value, None, 3.0])
        return [0.0] * 3

    call(logs, log_extra=lambda *each: logged.append(each))
    assert logged == [("value", [kept, None, 3.0])]


def test_what_is_logged_is_as_it_was_then():
    logged, notes = [], ["first"]

    def logs(log_extra, **kwargs):
        log_extra("deep", [DEEP] * 3)
        log_extra("notes", [notes] * 3)
        notes.append("second")
        return [0.0] * 3

    call(logs, log_extra=lambda *each: logged.append(each))
    assert logged[1] == ("notes", [["first"]] * 3)
    depth, value = 0, logged[0][1][0]
    while isinstance(value, list):
        (value,), depth = value, depth + 1
    assert (value, depth) == ("(list without a text)", 32)


@pytest.mark.parametrize(
    "log, message",
    [
        (lambda extra, metric: extra(None, [1.0] * 3), "TypeError: log_extra: .* must be a name; got None"),
        (lambda extra, metric: extra("x", None), "TypeError: 'NoneType' object is not iterable"),
        (lambda extra, metric: metric(b"x", 1.0), "TypeError: log_metric: .* must be a name; got b'x'"),
        (lambda extra, metric: metric("x", None), "TypeError: float.. argument must be .* not 'NoneType'"),
        (lambda extra, metric: metric("x", 1e300), r"ValueError: log_metric: .* float32 can hold; got 1e\+300"),
        (lambda extra, metric: metric("x", 10**400), "OverflowError: int too large"),
    ],
)
def test_what_cannot_be_logged(log, message):
    def logs(log_extra, log_metric, **kwargs):
        log(log_extra, log_metric)
        return [0.0] * 3

    with pytest.raises(RewardError, match=f"^reward function 'logs' raised {message}"):
        call(logs)


# Reward models


@pytest.fixture
def make_reward_model(make_model, tokenizer, run_options, tmp_path):
    """One that reads the policy's tokens or, with `own`, tokens of its own."""

    def make(own=False, model=None, **options):
        config = make_model().config
        config.num_labels = 1
        other = copy.deepcopy(tokenizer)
        if own:
            other.add_tokens(["cd"])
            config.vocab_size = len(other)
        if model is None:
            torch.manual_seed(1)
            model = LlamaForSequenceClassification(config)
        if own:
            model.save_pretrained(tmp_path / "scorer")
            other.save_pretrained(tmp_path / "scorer")
            model.config._name_or_path = str(tmp_path / "scorer")
        reward = RewardModel(model, GRPOConfig(**run_options, **options))
        reward.prepare(SimpleNamespace(device=torch.device("cpu"), autocast=contextlib.nullcontext), tokenizer)
        return reward

    return make


def completed(tokenizer, chat=False, last="y<eos>") -> dict[str, list]:
    """Two prompts, by turns; a completion may end, and may be what another begins with."""
    pairs = [("abcd", "e<eos>"), ("abx", "y"), ("abcd", "fg<eos>"), ("abcd", "h"), ("abx", last)]
    ids = [tokenizer(completion)["input_ids"] for _, completion in pairs]
    texts = [completion.removesuffix("<eos>") for _, completion in pairs]
    prompts = [prompt for prompt, _ in pairs]
    if chat:
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
        texts = [[{"role": "assistant", "content": text}] for text in texts]
    return {"prompts": prompts, "completions": texts, "completion_ids": ids}


@pytest.mark.parametrize("budget", [8192, 12], ids=["whole", "split"])
@pytest.mark.parametrize(("own", "chat"), [(False, False), (False, True), (True, False), (True, True)])
def test_completions_of_a_prompt_share_it(make_reward_model, tokenizer, monkeypatch, own, chat, budget):
    """Their scores are those of each alone, to rounding."""
    rows, laid_out = completed(tokenizer, chat), []

    def lay_out(sequences, *args, **options):
        laid_out.append(original(sequences, *args, **options))
        return laid_out[-1]

    original = Batch.lay_out
    monkeypatch.setattr(Batch, "lay_out", lay_out)
    scores, runs = [], []
    for share in ("auto", "false"):
        reward = make_reward_model(own, share_prefixes=share, token_budget=budget)
        assert reward.shares_prefixes == (share == "auto") and (reward.own_tokenizer is not None) == own
        laid_out.clear()
        scores.append(reward(**rows))
        runs.append((sum(batch.num_run for batch in laid_out), sum(batch.num_tokens for batch in laid_out)))
        assert budget == 8192 or all(batch.num_run <= 12 for batch in laid_out if len(batch.cu_seqlens) > 2)
    (run, tokens), plain = runs
    assert plain == (tokens, tokens) and run < tokens
    if not own and not chat and budget == 8192:
        assert runs[0] == (4 + 2 + 3 + 1 + 3 + 1 + 2, 6 + 7 + 5 + 4 + 5)
    ids = reward._token_ids(**rows)
    hidden = [reward.model.model(torch.tensor([each])).last_hidden_state for each in ids]
    alone = [reward.model.score(each)[0, -1].item() for each in hidden]
    assert scores[0] == pytest.approx(alone, rel=1e-5, abs=1e-5) == scores[1]


def test_no_completion_sees_another(make_reward_model, tokenizer):
    """One is changed: the scores of the others keep their bits."""
    reward = make_reward_model(share_prefixes="true")
    one, other = (reward(**completed(tokenizer, last=last)) for last in ("yz", "yw"))
    assert [a == b for a, b in zip(one, other, strict=True)] == [True] * 4 + [False]


def test_a_reward_model_that_cannot_share(make_reward_model, tokenizer):
    """It reads whole sequences; with share_prefixes true it is refused."""

    def cannot():
        options = {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "window_size": 3, "num_labels": 1}
        return GPTNeoForSequenceClassification(GPTNeoConfig(vocab_size=66, hidden_size=32, num_heads=4, **options))

    reward = make_reward_model(model=cannot())
    assert not reward.shares_prefixes and len(reward(**completed(tokenizer))) == 5
    with pytest.raises(ValueError, match="share_prefixes must be auto or false where the reward model GPTNeoFor"):
        make_reward_model(model=cannot(), share_prefixes="true")
    assert not make_reward_model(share_prefixes="false").shares_prefixes
