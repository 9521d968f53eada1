"""VLLMEngine against a server that fails in every way: what is sent, what is sent again, and by which weights it
answers."""

import asyncio
import base64
import json
import math
import random
import re
import shutil
import time
import traceback
from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlkernels.trainers import (
    GRPOConfig,
    GRPOTrainer,
    PPOConfig,
    PPOTrainer,
    RolloutError,
    SamplingOptions,
    ServerLost,
    VLLMEngine,
)
from rlkernels.trainers.rollouts import vllm
from rlkernels.trainers.rollouts.engine import check_rollouts
from vllm_server import FakeServer

PROMPTS = [f"ab{'c' * i}" for i in range(12)]
OPTIONS = SamplingOptions(temperature=0.8, max_completion_length=5, logprobs=True)


@pytest.fixture
def server(make_model):
    server = FakeServer(make_model(seed=0).eval())
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(vllm, "FIRST_DELAY", 0.02)
    monkeypatch.setattr(vllm, "LONGEST_DELAY", 0.1)


@pytest.fixture
def make_engine(server, make_model, tokenizer, tmp_path):
    def make(**options):
        options = {"timeout": 5.0, "max_concurrency": 4} | options
        return VLLMEngine(make_model(), tokenizer, server.url, tmp_path / "weights", **options)

    return make


def texts(engine, options=OPTIONS, prompts=PROMPTS):
    rollouts = check_rollouts(engine(prompts, options), prompts, options, 68)
    return [rollout.completion_ids for rollout in rollouts]


def logprobs_of(model, rollout, temperature):
    with torch.no_grad():
        scores = model(torch.tensor([rollout.prompt_ids + rollout.completion_ids])).logits[0] / temperature
    start = len(rollout.prompt_ids) - 1
    return scores.log_softmax(-1)[range(start, start + len(rollout.completion_ids)), rollout.completion_ids].tolist()


def test_rollouts(server, make_engine, make_model, tokenizer):
    engine = make_engine()
    engine.end_token_ids = ends = [0, *range(50, 68)]
    rollouts = engine(PROMPTS, OPTIONS)
    assert [rollout.prompt_ids for rollout in rollouts] == tokenizer(PROMPTS)["input_ids"]
    for rollout in rollouts:
        assert rollout.logprobs == pytest.approx(logprobs_of(make_model().eval(), rollout, 0.8), abs=1e-5)
        assert rollout.ended is (rollout.completion_ids[-1] in ends)
        assert rollout.ended or len(rollout.completion_ids) == 5
    assert {rollout.ended for rollout in rollouts} == {True, False}
    sent = server.of("/v1/completions")
    # Nothing that the server would fill in with what the model's folder says.
    cuts = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0}
    assert all(body | cuts == body for body in sent)
    assert all(body["stop_token_ids"] == ends and body["ignore_eos"] for body in sent)
    assert len({body["seed"] for body in sent}) == len(PROMPTS)


def test_what_is_sampled_depends_on_seed_step_row_and_position_alone(make_engine):
    engine = make_engine()
    first = texts(engine)
    assert texts(make_engine(max_concurrency=1)) == first
    assert texts(engine, OPTIONS.of([7, 3]), [PROMPTS[7], PROMPTS[3]]) == [first[7], first[3]]
    again = ["abcde"] * 8
    assert len({tuple(ids) for ids in texts(engine, OPTIONS, again)}) > 1
    same = {tuple(engine._request([1] * length, 5, OPTIONS)["seed"] for length in (3, 4)) for _ in range(3)}
    (seeds,) = same
    assert seeds[0] != seeds[1]


def test_concurrency_is_bounded_and_used(server, make_engine):
    server.delay = 0.02
    texts(make_engine(max_concurrency=3))
    assert server.most_running == 3


@pytest.mark.parametrize("wrong", [500, 503, "gone", "cut", {"finish_reason": "abort"}], ids=str)
def test_only_what_failed_is_sent_again(wrong, server, make_engine):
    expected = texts(make_engine())
    before = len(server.of("/v1/completions"))
    server.fail = lambda count: wrong if count in (before + 2, before + 5) else None
    assert texts(make_engine()) == expected
    assert len(server.of("/v1/completions")) == before + len(PROMPTS) + 2


def test_what_takes_too_long_is_sent_again(server, make_engine):
    server.fail = lambda count: (lambda: time.sleep(1.0)) if count == 3 else None
    texts(make_engine(request_timeout=0.3))
    assert len(server.of("/v1/completions")) == len(PROMPTS) + 1


@pytest.mark.parametrize("status", [400, 404, 422])
def test_what_the_server_refuses_is_one_error(status, server, make_engine):
    server.fail = lambda count: status if count == 2 else None
    with pytest.raises(
        RolloutError, match=rf"^vLLM at http\S+: /v1/completions was refused \({status}\): no luck with 2$"
    ):
        texts(make_engine(max_concurrency=1))
    assert len(server.of("/v1/completions")) < len(PROMPTS)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"token_ids": [5] * 6, "logprobs": {"token_logprobs": [-1.0] * 6}}, "got 6 tokens and 6 log-prob.*at most 5"),
        ({"token_ids": [5] * 5, "logprobs": {"token_logprobs": [-1.0] * 4}}, "got 5 tokens and 4 log-probabilities"),
        (
            {"token_ids": [5, 6], "logprobs": {"token_logprobs": [-1.0] * 2}},
            "stopped after 2 tokens.*generation-config",
        ),
        ({"token_ids": [], "logprobs": {"token_logprobs": []}}, "stopped after 0 tokens"),
        ({"prompt_token_ids": [3, 3]}, r"it read 2 other tokens than the \d+ of the prompt"),
    ],
)
def test_a_wrong_answer_is_one_error(wrong, message, server, make_engine):
    server.fail = lambda count: wrong if count == 0 else None
    with pytest.raises(RolloutError, match=message):
        texts(make_engine(max_concurrency=1))


def whole(**changes):
    """A sound reply but for these changes of its choice."""
    choice = {"prompt_token_ids": [1], "token_ids": [5] * 5, "finish_reason": "length", "stop_reason": None}
    return {"choices": [choice | {"logprobs": {"token_logprobs": [-1.0] * 5}} | changes]}


ODD = [None, [], {}, 3, "no", True, [None], [[]], [{}], ["5"], [True], {"a": 1}]


@pytest.mark.parametrize(
    "place, replies",
    [
        ("it", [None, [], 3, "no", True, [{}]]),
        ("choices", [{"choices": odd} for odd in [*ODD[:6], {"0": {}}, [{}, {}]]]),
        (r"choices\[0\]", [{"choices": odd} for odd in ODD if isinstance(odd, list) and odd not in ([], [{}])]),
        (r"choices\[0\]\.prompt_token_ids", [whole(prompt_token_ids=odd) for odd in ODD if odd != []]),
        (r"choices\[0\]\.token_ids", [whole(token_ids=odd) for odd in [*ODD, [1.0] * 5] if odd != []]),
        (r"choices\[0\]\.logprobs", [whole(logprobs=odd) for odd in ODD if odd != {} and odd != {"a": 1}]),
        (
            r"choices\[0\]\.logprobs\.token_logprobs",
            [whole(logprobs={"token_logprobs": odd}) for odd in ODD if odd not in ([], [None])] + [whole(logprobs={})],
        ),
        (r"choices\[0\]\.finish_reason", [whole(finish_reason=odd) for odd in ODD if odd not in (None, "no")]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_malformed_reply_is_one_line_that_names_the_place(place, replies, server, make_engine):
    """None of them may end in an error of Python's own, nor be taken."""
    engine = make_engine()
    for reply in replies:
        server.fail = lambda count: json.dumps(reply).encode()  # noqa: B023
        with pytest.raises(RolloutError) as error:
            engine(["a"], OPTIONS)
        message = str(error.value)
        assert re.match(rf"vLLM at http://\S+: a bad reply to /v1/completions: {place} must be .*; got .", message), (
            reply
        )
        assert "\n" not in message and len(message) < 300


def test_a_reply_that_is_no_json_is_sent_again(server, make_engine):
    expected = texts(make_engine(), prompts=PROMPTS[:3])
    before = len(server.calls)
    broken = [b"<html>", b"{", b"\xff\xfe\x00", b'{"choices": [' + b"9" * 5_000 + b"]}"]
    server.fail = lambda count: broken.pop() if broken else None
    assert texts(make_engine(), prompts=PROMPTS[:3]) == expected
    assert not broken and len([call for call in server.calls[before:] if call[1] == "/v1/completions"]) == 3 + 4


def test_a_reply_nested_too_deep_is_one_error(server, make_engine):
    server.fail = lambda count: b"[" * 100_000
    with pytest.raises(RolloutError, match=r"a bad reply to /v1/completions: it is nested too deep$"):
        texts(make_engine())


@pytest.mark.parametrize(
    "info, message",
    [
        (None, "it must be an object; got None"),
        ([], r"it must be an object; got \[\]"),
        ({"vllm_config": 3}, "vllm_config must be an object; got 3"),
        ({"vllm_config": {"model_config": []}}, r"vllm_config.model_config must be an object; got \[\]"),
        ({"vllm_config": {"model_config": {}}}, "vllm_config.model_config.logprobs_mode must be a string; got None"),
        (
            {"vllm_config": {"model_config": {"logprobs_mode": "processed_logprobs"}, "instance_id": None}},
            "vllm_config.instance_id must be a string; got None",
        ),
    ],
)
def test_a_server_that_says_nothing_of_itself(info, message, server, make_engine):
    sound = server.answer
    server.answer = lambda path, *rest: (200, info) if path == "/server_info" else sound(path, *rest)
    with pytest.raises(RolloutError, match=f"a bad reply to /server_info: {message}; this version of vLLM is not"):
        texts(make_engine())


def test_a_reply_that_drips_has_the_time_of_one_request(server, make_engine):
    """Each byte comes in time, the last one never."""
    expected = texts(make_engine(), prompts=PROMPTS[:2])
    before = len(server.of("/v1/completions"))
    server.fail = lambda count: "drip" if count == before else None
    began = time.monotonic()
    assert texts(make_engine(request_timeout=0.3), prompts=PROMPTS[:2]) == expected
    assert time.monotonic() - began < 5
    server.fail = lambda count: "drip"
    with pytest.raises(ServerLost, match=r"/v1/completions: no complete reply within 0.3 s$"):
        texts(make_engine(request_timeout=0.3, timeout=0.5), prompts=PROMPTS[:2])


def test_a_reply_that_does_not_end_is_not_kept(server, make_engine):
    server.fail = lambda count: "flood"
    with pytest.raises(RolloutError, match=r"its reply to /v1/completions has more than 1,\d+,\d+ bytes$"):
        make_engine()(["a"], OPTIONS)
    assert server.sent < 50_000_000  # what lies in the buffers of the connection besides


def test_servers_that_answer_by_turns_are_told(server, make_engine, update):
    """As behind a balancer: no one of them has the weights for long."""
    engine = make_engine()
    update(engine, 1, step=1)
    turns = iter(range(10**6))
    sound = server.answer

    def answer(path, body, count, handler):
        status, said = sound(path, body, count, handler)
        if path == "/server_info":
            said["vllm_config"]["instance_id"] = "ab"[next(turns) % 2]
        return status, said

    server.answer = answer
    for ask in (lambda: texts(engine), lambda: update(engine, 2, step=2)):
        with pytest.raises(
            RolloutError, match=r"several servers answer in turn \(. again after .\).*give the address of one"
        ):
            ask()
    assert len(server.loads) <= 3


def test_a_server_with_a_new_name_each_time_is_given_up(server, make_engine):
    names = iter(range(10**6))
    sound = server.answer

    def answer(path, body, count, handler):
        status, said = sound(path, body, count, handler)
        if path == "/server_info":
            said["vllm_config"]["instance_id"] = str(next(names))
        return status, said

    server.answer = answer
    with pytest.raises(ServerLost, match="was restarted 5 times during a request for 2 completions"):
        texts(make_engine(), prompts=PROMPTS[:2])


@pytest.mark.parametrize(
    "url, reason",
    [
        ("ftp://h", "it has no host"),
        ("localhost:8000", "it has no host"),
        ("http://", "it has no host"),
        ("", "it has no host"),
        (None, "Invalid type for url"),
        ("http://[::1", "Invalid port"),
        ("http://h:99999", "there is no port 99999"),
        ("http://h?key=1", "it has more than a path"),
        ("http://h\n", "Invalid non-printable ASCII"),
    ],
)
def test_an_address_that_is_none(url, reason, make_model, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=f"^base_url must be the address of a server, such as .*: {reason}"):
        VLLMEngine(make_model(), tokenizer, url, tmp_path)


def test_what_a_server_says_stays_one_printable_line(server, make_engine):
    server.fail = lambda count: lambda: 400
    sound = server.complete
    server.complete = lambda body, count: (400, {"error": {"message": "a\x1b[2Jb\r\n\u202ec"}})
    with pytest.raises(RolloutError, match=r"was refused \(400\): a \[2Jb c$"):
        texts(make_engine())
    server.complete = sound


def test_tokens_without_a_logprob_have_nan(server, make_engine):
    odd = [None, -9999.0, math.nan, -math.inf, -0.5]
    server.fail = lambda count: {"token_ids": [5] * 5, "logprobs": {"token_logprobs": odd}}
    (rollout,) = make_engine()(["a"], OPTIONS)
    assert [math.isnan(value) for value in rollout.logprobs] == [True] * 4 + [False]


def test_a_server_of_another_kind_is_told_apart(server, make_engine, make_model, tokenizer, tmp_path):
    server.logprobs_mode = "raw_logprobs"
    with pytest.raises(RolloutError, match=r"are raw_logprobs, .* start it with --logprobs-mode processed_logprobs"):
        texts(make_engine())
    texts(make_engine(), SamplingOptions(temperature=0.8, max_completion_length=5))
    server.dev_mode = False
    with pytest.raises(RolloutError, match="it has no /server_info; start it with VLLM_SERVER_DEV_MODE=1"):
        texts(make_engine())
    with pytest.raises(RolloutError, match=r"temperature must be at least 0\.01"):
        texts(make_engine(), SamplingOptions(temperature=0.001, max_completion_length=5))


def test_a_server_that_is_not_there(server, make_engine):
    server.stop()
    began = time.monotonic()
    with pytest.raises(ServerLost, match=r"^vLLM at \S+ did not answer for 0.5 s \(vllm_server_timeout\): .*Connect"):
        texts(make_engine(timeout=0.5))
    assert time.monotonic() - began < 3
    server.start()
    # One that always fails says why.
    server.fail = lambda count: 500
    with pytest.raises(ServerLost, match=r"/v1/completions failed \(500\): no luck with \d+$"):
        texts(make_engine(timeout=0.5))


def test_a_server_that_hangs_is_given_up_once_for_all_requests(make_engine, monkeypatch):
    """Each attempt to connect takes long to fail, as with a host that is gone."""
    attempts = []

    async def hangs(self, logprobs):
        attempts.append(logprobs)
        await asyncio.sleep(0.3)
        raise vllm.Unanswered("no answer")

    monkeypatch.setattr(VLLMEngine, "_instance_id", hangs)
    with pytest.raises(ServerLost, match=r"did not answer for 0.5 s \(vllm_server_timeout\): no answer$"):
        texts(make_engine(timeout=0.5, max_concurrency=12))
    assert len(attempts) <= 4


# Weights


@pytest.fixture
def update(make_model):
    def send(engine, seed, step):
        engine.update_weights(lambda folder: make_model(seed=seed).save_pretrained(folder), step)

    return send


@pytest.fixture
def expected(make_model, make_engine, server):
    """What each weights say, by a server that never had others."""

    def of(seed):
        model, server.model = server.served, make_model(seed=seed).eval()
        server.served = server.model
        said = texts(make_engine())
        server.model = server.served = model
        return said

    return of


def test_weights_are_sent_once_per_update(server, make_engine, update, expected, tmp_path):
    engine, first, second = make_engine(), expected(1), expected(2)
    assert first != second
    for seed, said in ((1, first), (2, second)):
        update(engine, seed, step=seed)
        assert texts(engine) == texts(engine) == said
        assert server.loads[-1] == str(tmp_path / "weights" / f"weights-{seed}")
        assert [path.name for path in (tmp_path / "weights").iterdir()] == [f"weights-{seed}"]
    assert len(server.loads) == len(server.of("/reset_prefix_cache")) == 2
    salts = [body["cache_salt"] for body in server.of("/v1/completions")][-48:]
    assert len(set(salts[:24])) == len(set(salts[24:])) == 1 and salts[0] != salts[24]


def test_a_server_started_anew_gets_the_weights_again(server, make_engine, update, expected):
    engine, said = make_engine(), expected(1)
    update(engine, 1, step=1)
    server.stop()
    server.start()
    assert texts(engine) == said
    assert len(server.loads) == 2


def test_killed_amid_requests_nothing_is_lost(server, make_engine, update, expected):
    """The one that takes its place has other weights until it gets the current ones."""
    engine, said = make_engine(max_concurrency=3), expected(1)
    update(engine, 1, step=1)
    before = len(server.of("/v1/completions"))

    die = partial(server.restart, 0.3)
    server.fail = lambda count: die if count == before + 5 else None
    server.delay = 0.01
    assert texts(engine) == said
    first = [body["prompt"] for start, path, body in server.calls if path == "/v1/completions" and start == 1][before:]
    second = [body["prompt"] for start, path, body in server.calls if path == "/v1/completions" and start == 2]
    # What was answered before is kept: at most the three that were under way are asked for twice.
    assert 0 < len(first) + len(second) - len(PROMPTS) <= 3
    assert server.starts == 2 and len(server.loads) == 2


def test_a_request_that_kills_each_start_of_the_server_is_given_up(server, make_engine, update):
    """Though each has all the time again: else the run would wait for ever."""
    engine = make_engine(max_concurrency=1)
    update(engine, 1, step=1)

    die = partial(server.restart, 0.05)
    server.fail = lambda count: die
    with pytest.raises(ServerLost, match="was restarted 5 times, and never answered this request"):
        engine.complete([[3, 4]], replace(OPTIONS, step=1))
    assert len(server.of("/v1/completions")) == 6


@pytest.mark.thorough
def test_answers_of_other_weights_are_not_taken(server, make_engine, update, expected):
    """A restart that no request has noticed: connections are made anew, and all goes well."""
    engine, said = make_engine(max_concurrency=1), expected(1)
    update(engine, 1, step=1)
    before = len(server.of("/v1/completions"))

    def swap():
        server.starts += 1
        server.served = server.model
        server.httpd.RequestHandlerClass.start = server.starts

    server.fail = lambda count: swap if count == before + 4 else None
    assert texts(engine) == said
    assert len(server.loads) == 2


def test_an_answer_that_came_after_the_break_is_not_taken(server, make_engine, update, expected):
    """Two are asked for; one finds the server gone, and the other is answered by the one in its place, before that has
    the weights."""
    engine, said = make_engine(max_concurrency=2), expected(1)
    update(engine, 1, step=1)
    before = len(server.of("/v1/completions"))

    def swap():
        server.starts += 1
        server.served = server.model
        server.httpd.RequestHandlerClass.start = server.starts
        return "gone"

    def late():
        time.sleep(0.3)
        return {"token_ids": [5] * 5, "logprobs": {"token_logprobs": [-1.0] * 5}}

    server.delay = 0.05
    server.fail = lambda count: {before + 4: swap, before + 5: late}.get(count)
    assert texts(engine) == said
    assert len(server.loads) == 2


def test_weights_that_cannot_be_loaded_are_one_error(server, make_engine, make_model):
    engine = make_engine()
    with pytest.raises(
        RolloutError, match=r"the weights in \S+weights-1 were not loaded: .*collective_rpc method failed"
    ):
        engine.update_weights(lambda folder: folder.mkdir(parents=True), 1)
    assert len(server.loads) == 1

    def full(folder):
        folder.mkdir(parents=True)
        raise OSError(28, "No space left on device")

    with pytest.raises(RolloutError, match=r"weights_folder .*cannot be written to: .*No space left on device"):
        engine.update_weights(full, 2)
    assert not list(engine.weights_folder.glob("*-unfinished"))


def test_an_engine_around_it_must_pass_updates_on(make_engine):
    with pytest.raises(RolloutError, match="update_weights was never called"):
        texts(make_engine(), SamplingOptions(temperature=1.0, max_completion_length=5, step=1))


def test_a_password_is_sent_and_not_shown(server, make_model, tokenizer, tmp_path):
    """In no message, nor in an exception that led to one."""
    address = server.url.replace("://", "://me:se%40cret@")
    engine = VLLMEngine(make_model(), tokenizer, address, tmp_path / "weights")
    assert len(engine([PROMPTS[0]], OPTIONS)) == 1
    assert base64.b64decode(server.authorization.removeprefix("Basic ")) == b"me:se@cret"
    gone = VLLMEngine(make_model(), tokenizer, "http://me:se%40cret@127.0.0.1:1", tmp_path / "weights", timeout=0.1)
    with pytest.raises(ServerLost) as error:
        gone([PROMPTS[0]], OPTIONS)
    assert "vLLM at http://127.0.0.1:1 did not answer" in str(error.value)
    assert "cret" not in "".join(traceback.format_exception(error.value))


# Trainers


def vowels(completions, **kwargs):
    return [sum(letter in "aeiou" for letter in text) / (1 + len(text)) for text in completions]


@pytest.fixture
def make_trainer(server, make_model, tokenizer, run_options):
    def make(model=None, method="grpo", reward=vowels, eval_dataset=None, peft_config=None, **options):
        shared = {**run_options, "learning_rate": 1e-2, "max_steps": 4, "vllm_server_base_url": server.url}
        shared |= {"per_device_train_batch_size": 4, "importance_sampling_correction": True}
        own = {
            "grpo": {"num_generations": 2, "max_completion_length": 5},
            "ppo": {"response_length": 5, "num_ppo_epochs": 1},
        }
        trainer, config = {"grpo": (GRPOTrainer, GRPOConfig), "ppo": (PPOTrainer, PPOConfig)}[method]
        args = config(**shared | own[method] | options)
        rows = [{"prompt": prompt} for prompt in PROMPTS]
        model = make_model() if model is None else model
        return trainer(model, reward, args, rows, eval_dataset, tokenizer, peft_config=peft_config)

    return make


def served(server):
    return AutoModelForCausalLM.from_pretrained(server.loads[-1]).state_dict()


def same_weights(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("method", ["grpo", pytest.param("ppo", marks=pytest.mark.thorough)])
def test_a_run(method, server, make_trainer):
    trainer = make_trainer(method=method)
    trainer.train()
    assert [path.rpartition("-")[2] for path in server.loads] == ["0", "1", "2", "3"]
    # Float32 on both sides: the correction is of nothing but rounding.
    name = "sampling/importance_sampling_ratio/mean"
    ratios = [log[name] for log in trainer.state.log_history if name in log]
    assert len(ratios) >= 3 and ratios == pytest.approx([1.0] * len(ratios), abs=1e-4)
    trainer.evaluate([{"prompt": "ab"}])
    assert same_weights(served(server), trainer.collector.policy.state_dict())


@pytest.mark.thorough
def test_one_update_per_generation_batch_and_evaluation(server, make_trainer):
    trainer = make_trainer(
        steps_per_generation=2, eval_dataset=[{"prompt": "ab"}] * 2, eval_strategy="steps", eval_steps=2
    )
    trainer.train()
    assert [path.rpartition("-")[2] for path in server.loads] == ["0", "2", "4"]


def test_tied_weights_are_under_both_names(server, make_trainer, make_model):
    """A head that vLLM keeps apart, on a CPU, takes what a file calls lm_head."""
    from safetensors.torch import load_file

    model = make_model()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    make_trainer(model, max_steps=2).train()
    weights = load_file(f"{server.loads[-1]}/model.safetensors")
    assert torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])


def test_adapters_are_merged_into_a_copy(server, make_trainer):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "down_proj"])
    trainer = make_trainer(peft_config=config)
    trainer.train()
    trainer.evaluate([{"prompt": "ab"}])
    assert any("lora_" in name for name in trainer.model.state_dict())
    merged = served(server)
    ours = trainer.model.merge_and_unload().state_dict()
    assert ours.keys() == merged.keys()
    assert all(torch.allclose(ours[name], merged[name], atol=1e-6) for name in ours)
    base = trainer.model.state_dict()  # it differs from what it was by the adapters alone
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert logs[-1]["sampling/importance_sampling_ratio/mean"] == pytest.approx(1.0, abs=1e-4) and base


def losses(trainer):
    return [(log["step"], log["loss"], log["reward"]) for log in trainer.state.log_history if "loss" in log]


@pytest.mark.thorough
def test_a_server_that_stays_away_ends_the_run_and_it_goes_on(server, make_trainer, make_model, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "vllm_server_timeout": 0.5}
    whole = make_trainer(output_dir=str(tmp_path / "whole"), **options)
    whole.train()
    before = len(server.of("/v1/completions"))
    server.fail = lambda count: server.stop if count == before + 10 else None
    trainer = make_trainer(**options)
    with pytest.raises(ServerLost, match=r"did not answer for 0.5 s .* --resume_from_checkpoint \S+ goes on$") as lost:
        trainer.train()
    assert "\n" not in str(lost.value)
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert str(checkpoint) in str(lost.value)
    assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == 2
    server.fail = lambda count: None
    server.start()
    resumed = make_trainer(**options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert losses(resumed) == losses(whole)


@pytest.mark.thorough
def test_a_server_lost_in_a_further_round_of_dynamic_sampling(server, make_trainer):
    """What is saved is the state before the first round."""

    def drawn(completions, **columns):
        return [random.randrange(2)] * len(completions)

    options = {"reward": drawn, "dynamic_sampling_max_rounds": 1, "max_steps": 3, "logging_steps": 3}
    options |= {"vllm_server_timeout": 0.3}
    whole = make_trainer(**options)
    whole.train()
    server.fail = lambda count: server.stop if count == 24 + 8 + 6 else None
    lost = make_trainer(**options)
    with pytest.raises(ServerLost, match=r"--resume_from_checkpoint \S+checkpoint-1 goes on") as error:
        lost.train()
    server.fail = lambda count: None
    server.start()
    resumed = make_trainer(**options)
    resumed.train(resume_from_checkpoint=re.search(r"\S+checkpoint-1", str(error.value))[0])
    assert resumed.state.log_history[0] == whole.state.log_history[0]


@pytest.mark.thorough
def test_without_checkpoints_it_saves_where_it_stops(server, make_trainer, tmp_path):
    server.fail = lambda count: server.stop if count == 10 else None
    trainer = make_trainer(vllm_server_timeout=0.3)
    with pytest.raises(ServerLost, match="checkpoint-2 goes on"):
        trainer.train()
    assert (tmp_path / "run" / "checkpoint-2" / "model.safetensors").is_file()
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(ServerLost, match="There is no checkpoint yet"):
        make_trainer(vllm_server_timeout=0.3).train()
    assert not list((tmp_path / "run").glob("checkpoint-*"))
