"""An engine that samples on a vLLM server over HTTP. PPOTrainer and GRPOTrainer make it where `use_vllm` is set.

The server has its own copy of the weights; `update_weights` sends it the trained ones as a folder of safetensors. It
reports an `instance_id`, which is new after each start. A restarted server has its initial weights again, so no answer
is accepted from it before it has loaded the current ones.

`Answer` reads a reply; VLLMEngine's `_answers`, `_answer` and `_until_answered` repeat requests that were not answered;
`_connect` and `_load` give a restarted server its weights; `_send` is one HTTP request.
"""

import asyncio
import contextlib
import json
import math
import random
import shutil
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx2
import torch.distributed as dist
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .engine import Rollout, RolloutError, SamplingOptions, encode, end_tokens
from .sampling import row_seed

logger = logging.get_logger(__name__)
T = TypeVar("T")

# Seconds before the second attempt of a request. They double with each further attempt, up to the longest.
FIRST_DELAY, LONGEST_DELAY = 0.25, 8.0
# Seconds for a server to accept a connection, since a host that is gone does not refuse it.
CONNECT_TIMEOUT = 10.0
# Restarts after which we give up, since the same request may crash the server each time.
MOST_STARTS = 5
# The most bytes of a reply; the reply to a completion may have BYTES_PER_TOKEN more for each of its tokens.
MOST_BYTES, BYTES_PER_TOKEN = 1 << 20, 1 << 10
# vLLM's JSON writes -inf as this.
NO_LOGPROB = -9999.0
# vLLM raises a lower temperature to this.
LOWEST_TEMPERATURE = 0.01


class ServerLost(RolloutError):
    """An inference server did not answer within `vllm_server_timeout`, or crashed too often."""


class Unanswered(Exception):
    """A request got no answer, or one that does not depend on the request. It may be sent again."""


@dataclass(frozen=True)
class Answer:
    """The fields that we read of a reply to /v1/completions."""

    prompt_ids: list[int]
    completion_ids: list[int]
    logprobs: list[float] | None  # NaN where the server has none
    finish_reason: str | None
    stop_reason: Any

    @classmethod
    def of(cls, reply: Any, with_logprobs: bool) -> "Answer":
        """Reads a reply. Raises ValueError that names what is wrong with it."""
        choices = _field(reply, "", "choices", list)
        if len(choices) != 1:
            raise ValueError(f"choices must be a list of one; got {len(choices)}")
        choice, place = choices[0], "choices[0]"
        logprobs = None
        if with_logprobs:
            values = _field(_field(choice, place, "logprobs", dict), f"{place}.logprobs", "token_logprobs", list)
            logprobs = [_logprob(value) for value in values]
        return cls(
            _token_ids(choice, place, "prompt_token_ids"),
            _token_ids(choice, place, "token_ids"),
            logprobs,
            _field(choice, place, "finish_reason", str, optional=True),
            choice.get("stop_reason"),
        )


def _url(base_url: str) -> httpx2.URL:
    try:
        url = httpx2.URL(base_url)
        reason = "" if url.scheme in ("http", "https") and url.host else "it has no host"
        reason = reason or ("" if (url.port or 0) < 1 << 16 else f"there is no port {url.port}")
        reason = reason or ("" if not (url.query or url.fragment) else "it has more than a path")
    except (httpx2.InvalidURL, TypeError) as error:
        reason = str(error)
    if reason:
        raise ValueError(f"base_url must be the address of a server, such as http://127.0.0.1:8000: {reason}")
    return url


def _field(parent: Any, place: str, name: str, kind: type, optional: bool = False) -> Any:
    if not isinstance(parent, dict):
        raise ValueError(f"{place or 'it'} must be an object; got {parent!r:.60}")
    value = parent.get(name)
    if not isinstance(value, kind) and not (optional and value is None):
        wanted = {"list": "a list", "dict": "an object", "str": "a string"}[kind.__name__]
        raise ValueError(f"{f'{place}.{name}'.lstrip('.')} must be {wanted}; got {value!r:.60}")
    return value


def _token_ids(choice: Any, place: str, name: str) -> list[int]:
    ids = _field(choice, place, name, list)
    for token in ids:
        if type(token) is not int:  # a bool is an instance of int
            raise ValueError(f"{place}.{name} must be a list of integers; got {token!r:.60} in it")
    return ids


def _logprob(value: Any) -> float:
    if value is not None and type(value) not in (int, float):
        raise ValueError(f"choices[0].logprobs.token_logprobs must be a list of numbers; got {value!r:.60} in it")
    return float(value) if value is not None and value > NO_LOGPROB else math.nan


class VLLMEngine:
    """An engine that completes prompts on a vLLM server, with one request per prompt.

    A request that was not answered is sent again. The engine waits for a server that does not answer; a server that was
    restarted first gets the current weights. Start it with VLLM_SERVER_DEV_MODE=1 and
    --logprobs-mode processed_logprobs; it must see `weights_folder` under the same path.

    An engine of several turns calls it once, then calls `complete` with all tokens of the rows that go on. It must
    offer `update_weights` too and pass it on.

    Args:
        model: the trained model. Its generation config says which tokens end a completion.
        tokenizer: its tokenizer. The server gets token ids.
        base_url: the server's address, such as http://127.0.0.1:8000.
        weights_folder: where weights are written for the server to read. No other run may use it.
        chat_template_kwargs: keyword arguments of `apply_chat_template`, for prompts of messages.
        timeout: seconds to wait for a server that does not answer.
        request_timeout: seconds that one completion may take until its reply is complete, including the time that the
            request waits in the server's queue.
        max_concurrency: the most requests that this process sends at a time.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        base_url: str,
        weights_folder: str | Path,
        *,
        chat_template_kwargs: Any = None,
        timeout: float = 240.0,
        request_timeout: float = 600.0,
        max_concurrency: int = 256,
    ) -> None:
        self.tokenizer, self.chat_template_kwargs = tokenizer, chat_template_kwargs
        self.end_token_ids = end_tokens(model, tokenizer)
        url = _url(base_url)
        # The password is sent in a header and kept out of the address, which messages and exceptions show.
        self._auth = (url.username, url.password) if url.userinfo else None
        self.base_url = str(url.copy_with(userinfo=b"")).rstrip("/")
        self.weights_folder = Path(weights_folder).absolute()
        self.timeout, self.request_timeout, self.max_concurrency = timeout, request_timeout, max_concurrency
        self._is_main = not (dist.is_initialized() and dist.get_rank())
        self._folder: Path | None = None  # holds the current weights
        self._loaded: str | None = None  # id of the server instance that has loaded them
        self._instance: str | None = None  # id of the instance to send requests to; None: not known yet
        self._starts: list[str] = []  # ids of all instances that have answered, in order
        self._is_lost = False
        self._failure: Unanswered | None = None  # why the latest attempt to connect failed
        # A new salt for each set of weights keeps the server's prefix cache from reusing what older ones computed.
        self._salt = uuid.uuid4().hex
        self._loop: asyncio.AbstractEventLoop | None = None
        self._client: httpx2.AsyncClient

    def __call__(self, prompts: list, options: SamplingOptions) -> list[Rollout]:
        return self.complete(encode(self.tokenizer, prompts, self.chat_template_kwargs), options)

    def complete(self, prompt_ids: list[list[int]], options: SamplingOptions) -> list[Rollout]:
        """Continues each row of token ids up to and including its first end token, by at most
        `options.max_completion_length` tokens."""
        if options.step > 0 and self._folder is None:
            raise RolloutError("update_weights was never called: an engine around VLLMEngine must pass it on")
        if options.temperature < LOWEST_TEMPERATURE:
            raise RolloutError(
                f"temperature must be at least {LOWEST_TEMPERATURE} with vLLM, which supports no lower one; got "
                f"{options.temperature}"
            )
        requests = [
            self._request(prompt, seed, options)
            for prompt, seed in zip(prompt_ids, options.row_seeds(len(prompt_ids)), strict=True)
        ]
        answers = self._run(self._answers(requests, options))
        return [self._rollout(prompt, answer, options) for prompt, answer in zip(prompt_ids, answers, strict=True)]

    def update_weights(self, save: Callable[[Path], None], step: int) -> None:
        """Sends the server the weights that `save` writes, then removes the folder of the previous weights. Every
        process must call it; the main process tells the server."""
        folder = self.weights_folder / f"weights-{step}"
        aside = folder.with_name(f"{folder.name}-unfinished")
        failure: Exception | None = None
        if self._is_main:
            shutil.rmtree(aside, ignore_errors=True)
        try:
            save(aside)
            if self._is_main:
                shutil.rmtree(folder, ignore_errors=True)
                aside.rename(folder)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(aside, ignore_errors=True)
            failure = RolloutError(f"weights_folder {self.weights_folder}: cannot be written to: {error}")
        self._folder, self._loaded, self._instance, self._salt = folder, None, None, uuid.uuid4().hex
        if self._is_main and failure is None:
            try:
                self._run(self._until_answered(self._connected))
            except RolloutError as error:
                failure = error
        if dist.is_initialized() and dist.get_world_size() > 1:
            told = [(self._loaded, failure)]
            dist.broadcast_object_list(told, src=0)
            self._loaded, failure = told[0]
        if failure is not None:
            raise failure
        if self._is_main:
            for other in self.weights_folder.glob("weights-*"):
                if other != folder:
                    shutil.rmtree(other, ignore_errors=True)

    # One request and its answer

    def _request(self, prompt: list[int], seed: int, options: SamplingOptions) -> dict[str, Any]:
        return {
            "prompt": prompt,
            "max_tokens": options.max_completion_length,
            "temperature": options.temperature,
            # Another turn of the same row must not get the same random numbers, so the length is part of the seed.
            "seed": row_seed(seed, options.step, len(prompt)),
            "stop_token_ids": self.end_token_ids,
            "ignore_eos": True,  # only stop_token_ids end a completion; the server's end token may differ
            # Given in full, since the server's defaults may come from the model's generation_config.json.
            **{"top_p": 1.0, "top_k": 0, "min_p": 0.0},
            **{"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0},
            "return_token_ids": True,
            **({"logprobs": 0} if options.logprobs else {}),
        }

    def _rollout(self, prompt: list[int], answer: Answer, options: SamplingOptions) -> Rollout:
        tokens, logprobs = answer.completion_ids, answer.logprobs
        counts = len(tokens), len(tokens if logprobs is None else logprobs)
        if answer.prompt_ids != prompt:
            raise self._error(f"it read {len(answer.prompt_ids)} other tokens than the {len(prompt)} of the prompt")
        ended = bool(tokens) and tokens[-1] in self.end_token_ids
        if counts[0] != counts[1] or counts[0] > options.max_completion_length:
            raise self._error(
                f"got {counts[0]} tokens and {counts[1]} log-probabilities; wanted one for each token, and at most "
                f"{options.max_completion_length} tokens"
            )
        if not ended and counts[0] < options.max_completion_length:
            raise self._error(
                f"a completion stopped after {counts[0]} tokens without an end token ({answer.stop_reason!s:.60}); "
                "start the server with --generation-config vllm"
            )
        return Rollout(prompt, tokens, ended=ended, logprobs=logprobs)

    def _error(self, message: str) -> RolloutError:
        return RolloutError(f"vLLM at {self.base_url}: {message}")

    # Requests run in an event loop with its own thread, so that any thread may call, even one that runs a loop.

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            limits = httpx2.Limits(max_connections=None, max_keepalive_connections=self.max_concurrency)
            # trust_env is off, since a proxy in the environment is not meant for this server.
            self._client = httpx2.AsyncClient(
                base_url=self.base_url,
                auth=self._auth,
                limits=limits,
                trust_env=False,
                headers={"accept-encoding": "identity"},
            )
            self._slots, self._connecting = asyncio.Semaphore(self.max_concurrency), asyncio.Lock()
            threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True).start()
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:  # on Ctrl-C, closing the connections makes the server stop too
            future.cancel()
            raise

    async def _answers(self, requests: list[dict[str, Any]], options: SamplingOptions) -> list[Answer]:
        answers: list[Any] = [None] * len(requests)
        missing = list(range(len(requests)))
        starts = 0
        while missing:
            if starts == MOST_STARTS:
                raise ServerLost(
                    f"vLLM at {self.base_url} was restarted {starts} times during a request for {len(requests)} "
                    "completions"
                )
            try:
                async with asyncio.TaskGroup() as group:
                    tasks = {row: group.create_task(self._answer(requests[row], options)) for row in missing}
            except BaseExceptionGroup as error:
                raise error.exceptions[0] from error.exceptions[0].__cause__
            served = {row: task.result()[0] for row, task in tasks.items()}
            answers = [tasks[row].result()[1] if row in tasks else answer for row, answer in enumerate(answers)]
            # A restart while no request was running has gone unnoticed so far.
            last = self._instance
            try:
                restarted = last is not None and await self._instance_id(options.logprobs) != last
            except Unanswered:  # the server is gone now, so it had not been restarted before
                restarted, self._instance = False, None
            missing = [row for row in missing if restarted and served[row] == last]
            if restarted:
                self._instance = None
                starts += 1
        return answers

    async def _answer(self, request: dict[str, Any], options: SamplingOptions) -> tuple[str, Answer]:
        """The server instance that answered, with the current weights, and its answer."""
        most_bytes = MOST_BYTES + BYTES_PER_TOKEN * (len(request["prompt"]) + options.max_completion_length)

        async def ask() -> tuple[str, Answer]:
            async with self._slots:
                instance = await self._connected(logprobs=options.logprobs)
                body = {**request, "cache_salt": self._salt}
                reply = await self._send("POST", "/v1/completions", self.request_timeout, most_bytes, json=body)
                try:
                    answer = Answer.of(reply, options.logprobs)
                except ValueError as error:
                    raise self._error(f"a bad reply to /v1/completions: {error}") from None
                if answer.finish_reason not in ("stop", "length"):
                    raise Unanswered(f"it aborted a completion ({answer.finish_reason!s:.60})")
                # If another request found the server gone meanwhile, this answer may come from another instance.
                if self._instance != instance and await self._connected() != instance:
                    raise Unanswered("it was restarted")
                return instance, answer

        return await self._until_answered(ask)

    async def _until_answered(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Repeats `ask` until it is answered. Raises ServerLost after `timeout` seconds or MOST_STARTS restarts."""
        since, attempts, starts, instance = time.monotonic(), 0, 0, self._loaded
        while True:
            try:
                return await ask()
            except Unanswered as error:
                self._instance = None
                now = time.monotonic()
                # A server that was restarted gets the whole timeout again.
                if attempts == 0 or self._loaded != instance:
                    starts += attempts > 0
                    since, attempts, instance = now, 0, self._loaded
                if starts == MOST_STARTS:
                    raise ServerLost(
                        f"vLLM at {self.base_url} was restarted {starts} times, and never answered this request: "
                        f"{error}"
                    ) from error
                if now - since >= self.timeout:
                    raise ServerLost(
                        f"vLLM at {self.base_url} did not answer for {self.timeout:g} s (vllm_server_timeout): {error}"
                    ) from error
                if not self._is_lost:
                    self._is_lost = True
                    logger.warning(f"vLLM at {self.base_url}: {error}; waiting for it up to {self.timeout:g} s")
                delay = min(FIRST_DELAY * 2**attempts, LONGEST_DELAY) * random.uniform(0.5, 1.0)
                attempts += 1
                await asyncio.sleep(min(delay, since + self.timeout - now))

    async def _connected(self, logprobs: bool = False) -> str:
        """The id of the server instance that answers, once it has the current weights."""
        earlier = self._failure
        async with self._connecting:
            # If an attempt failed while this one waited for the lock, fail at once: each attempt can take long.
            if self._failure is not earlier and self._instance is None:
                raise Unanswered(str(self._failure)) from self._failure
            try:
                if self._instance is None:
                    self._instance = await self._connect(logprobs)
                    self._is_lost = False
                return self._instance
            except Unanswered as error:
                self._failure = error
                raise

    async def _connect(self, logprobs: bool) -> str:
        instance = await self._instance_id(logprobs)
        if self._folder is not None and self._loaded != instance:
            await self._load(self._folder)
            if await self._instance_id(logprobs) != instance:
                raise Unanswered("it was restarted")
            self._loaded = instance
        return instance

    async def _load(self, folder: Path) -> None:
        call = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        try:
            await self._send("POST", "/collective_rpc", json=call, timeout=self.request_timeout)
        except Unanswered as error:
            with contextlib.suppress(Unanswered):
                await self._send("GET", "/health")
                if isinstance(error.__cause__, httpx2.HTTPStatusError):  # the server is up and would refuse again
                    raise self._error(f"the weights in {folder} were not loaded: {error}") from error
            raise
        await self._send("POST", "/reset_prefix_cache")

    async def _instance_id(self, logprobs: bool) -> str:
        info = await self._send("GET", "/server_info", params={"config_format": "json"}, timeout=60.0)
        try:
            config = _field(info, "", "vllm_config", dict)
            model_config = _field(config, "vllm_config", "model_config", dict)
            mode = _field(model_config, "vllm_config.model_config", "logprobs_mode", str)
            instance = _field(config, "vllm_config", "instance_id", str)
        except ValueError as error:
            raise self._error(f"a bad reply to /server_info: {error}; this version of vLLM is not supported") from None
        if logprobs and mode != "processed_logprobs":
            raise self._error(
                f"its log-probabilities are {mode:.60}, not those of the sampling distribution; start it with "
                "--logprobs-mode processed_logprobs"
            )
        if instance not in self._starts[-1:]:
            # Each start of a server has a new id, so an earlier id again means that there are several servers.
            if instance in self._starts:
                raise self._error(
                    f"several servers answer in turn ({instance:.60} again after {self._starts[-1]:.60}), each with "
                    "its own weights; give the address of one"
                )
            self._starts.append(instance)
        return instance

    async def _send(
        self, method: str, path: str, timeout: float = 30.0, most_bytes: int = MOST_BYTES, **options: Any
    ) -> Any:
        limits, body = httpx2.Timeout(timeout, connect=CONNECT_TIMEOUT), bytearray()
        try:
            # httpx's limits hold for each read; the timeout here bounds the whole reply of a server that trickles it.
            async with (
                asyncio.timeout(timeout),
                self._client.stream(method, path, timeout=limits, **options) as response,
            ):
                async for part in response.aiter_raw():
                    body += part
                    if len(body) > most_bytes:
                        break
            response.raise_for_status()
        except TimeoutError:
            raise Unanswered(f"{path}: no complete reply within {timeout:g} s") from None
        except httpx2.HTTPStatusError as error:
            said = _message(body)
            if error.response.status_code == 404 and path in ("/server_info", "/collective_rpc", "/reset_prefix_cache"):
                raise self._error(f"it has no {path}; start it with VLLM_SERVER_DEV_MODE=1") from error
            if error.response.status_code < 500:
                raise self._error(f"{path} was refused ({error.response.status_code}): {said}") from error
            raise Unanswered(f"{path} failed ({error.response.status_code}): {said}") from error
        except (httpx2.RequestError, ValueError) as error:  # no reply, or an incomplete one
            raise Unanswered(f"{path}: {type(error).__name__} {error}".rstrip()) from error
        if len(body) > most_bytes:
            raise self._error(f"its reply to {path} has more than {most_bytes:,} bytes")
        try:
            return json.loads(body) if body else None
        except RecursionError:
            raise self._error(f"a bad reply to {path}: it is nested too deep") from None
        except ValueError as error:
            raise Unanswered(f"{path}: {type(error).__name__} {error}".rstrip()) from error


def _message(body: bytes | bytearray) -> str:
    """The server's error message, in one line."""
    text = body.decode(errors="replace")
    with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
        text = str(json.loads(text)["error"]["message"])
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text[:2000]).split())[:500]
