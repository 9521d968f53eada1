"""The default engine of PPOTrainer and GRPOTrainer: the trained model samples by transformers `generate`.

`sampling.Decoder` is the loop over tokens inside it.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..base.limits import Limits
from .engine import Rollout, RolloutError, SamplingOptions, encode, end_tokens
from .sampling import Decoder, is_sharded, reduced, uniform


def pad_left(rows: list[list[int]], value: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids [B, T], padded with `value` on the left, and bool [B, T], False at the padding."""
    width = max(len(row) for row in rows)
    filled = torch.tensor([[value] * (width - len(row)) + row for row in rows], dtype=torch.long)
    real = torch.arange(width) >= width - torch.tensor([len(row) for row in rows]).unsqueeze(1)
    return filled.to(device), real.to(device)


@contextlib.contextmanager
def generating_by(model: nn.Module, config: GenerationConfig) -> Iterator[None]:
    """Makes generate() follow `config` during the with block. Wrappers such as PEFT's pass it on to the inner model and
    leave it there, so every module's config is restored afterwards."""
    before = [(module, vars(module).get("generation_config")) for module in model.modules()]
    model.generation_config = config
    try:
        yield
    finally:
        for module, own in before:
            if own is not None:
                module.generation_config = own
            else:
                vars(module).pop("generation_config", None)


class TransformersEngine:
    """An engine that completes prompts with transformers `generate`, padded on the left, until every row has ended.

    An engine of several turns calls it once, then calls `complete` with all tokens of the rows that go on, and with
    `options.of` these rows. If the model is sharded, every process must call it equally often.

    Args:
        model: a causal language model, the one that is trained, so that completions come from its current weights.
        tokenizer: its tokenizer.
        chat_template_kwargs: keyword arguments of `apply_chat_template`, for prompts of messages.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: Any = None
    ) -> None:
        self.model, self.tokenizer, self.chat_template_kwargs = model, tokenizer, chat_template_kwargs
        self.end_token_ids = end_tokens(model, tokenizer)
        padding = [token for token in (tokenizer.pad_token_id, *self.end_token_ids, 0) if token is not None]
        self.limits = Limits.of(model)
        # The model goes on reading rows that have ended, so the padding must be a token that it has.
        self.pad_token_id = next(token for token in padding if token < self.limits.vocab_size)

    def __call__(self, prompts: list, options: SamplingOptions) -> list[Rollout]:
        return self.complete(encode(self.tokenizer, prompts, self.chat_template_kwargs), options)

    @torch.no_grad()
    def complete(self, prompt_ids: list[list[int]], options: SamplingOptions) -> list[Rollout]:
        """Continues each row of token ids up to and including its first end token, by at most
        `options.max_completion_length` tokens."""
        model, longest = self.model, max(prompt_ids, key=len, default=[])
        try:
            self.limits.check(longest, options.max_completion_length)
        except ValueError as error:
            raise RolloutError(f"a row {error}") from None
        together = is_sharded(model)
        input_ids, real = pad_left(prompt_ids, self.pad_token_id, model.device)
        seeds = torch.tensor(options.row_seeds(len(prompt_ids)), device=model.device)
        positions = real.sum(1) + torch.arange(options.max_completion_length, device=model.device).unsqueeze(1)
        decoder = Decoder(
            uniform(seeds, positions),
            self.end_token_ids,
            self.pad_token_id,
            options.temperature,
            options.logprobs,
            together,
        )
        # With a config of our own, generate() does not read the model's. A top_k or repetition penalty there would make
        # the sampled distribution differ from the one whose log-probabilities are trained.
        config = GenerationConfig(
            max_new_tokens=options.max_completion_length, pad_token_id=self.pad_token_id, disable_compile=True
        )
        training = model.training
        model.eval()
        try:
            with generating_by(model, config):
                sequences = model.generate(
                    input_ids=input_ids,
                    attention_mask=real.long(),
                    past_key_values=self._read_prompts(model, prompt_ids, together),
                    custom_generate=decoder,
                )
        finally:
            model.train(training)
        rollouts = []
        for prompt, row in zip(prompt_ids, sequences[:, input_ids.shape[1] :].tolist(), strict=True):
            completion = self._until_end(row)
            rollouts.append(Rollout(prompt, completion, ended=completion[-1] in self.end_token_ids))
        if options.logprobs:
            for rollout, logprobs in zip(rollouts, torch.stack(decoder.logprobs, 1).tolist(), strict=True):
                rollout.logprobs = logprobs[: len(rollout.completion_ids)]
        return rollouts

    def _read_prompts(self, model: Any, prompt_ids: list[list[int]], together: bool) -> DynamicCache | None:
        """The key-value cache of all but the last token of each prompt. A prompt that several rows share is read once.
        None if nothing is shared, or if the model's cache cannot be repeated."""
        unique = list(dict.fromkeys(map(tuple, prompt_ids)))
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        # Other layers keep a state besides keys and values, which batch_select_indices does not repeat.
        repeatable = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
        input_ids, real = pad_left([list(prompt) for prompt in unique], self.pad_token_id, model.device)
        worth = repeatable and len(unique) < len(prompt_ids) and input_ids.shape[1] > 1
        if not reduced(torch.tensor(int(worth), device=model.device), dist.ReduceOp.MIN, together):
            return None
        model(
            input_ids=input_ids[:, :-1],
            attention_mask=real[:, :-1].long(),
            position_ids=(real.cumsum(1) - 1).clamp(min=0)[:, :-1],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        place = {prompt: row for row, prompt in enumerate(unique)}
        rows = torch.tensor([place[tuple(ids)] for ids in prompt_ids], device=model.device)
        cache.batch_select_indices(rows)
        return cache

    def _until_end(self, row: list[int]) -> list[int]:
        end = next((i for i, token in enumerate(row) if token in self.end_token_ids), len(row) - 1)
        return row[: end + 1]
