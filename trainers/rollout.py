"""Sampling completions with transformers `generate`, and laying sequences out for the model.

Where a sequence starts and ends is known from its length, never from token ids: the padding token may be the
end-of-sequence token, and either may be sampled.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

IGNORE = -100  # the token id that token_logprobs skips


def is_chat(prompt: Any) -> bool:
    """Whether a prompt is a list of messages, each with a role and a content."""
    return isinstance(prompt, list) and all(isinstance(turn, dict) and "role" in turn for turn in prompt)


def encode(tokenizer: PreTrainedTokenizerBase, prompts: list, chat_template_kwargs: Any) -> list[list[int]]:
    if is_chat(prompts[0]):
        encoded = tokenizer.apply_chat_template(
            prompts, add_generation_prompt=True, tokenize=True, return_dict=True, **(chat_template_kwargs or {})
        )
    else:
        encoded = tokenizer(prompts)
    for prompt, ids in zip(prompts, encoded["input_ids"], strict=True):
        if not ids:
            raise ValueError(f"prompt {prompt!r} has no tokens")
    return encoded["input_ids"]


def decode(tokenizer: PreTrainedTokenizerBase, completion_ids: list[list[int]], chat: bool) -> list:
    """Completions as reward functions see them: text, or for chat prompts a list of one assistant message."""
    texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
    return [[{"role": "assistant", "content": text}] for text in texts] if chat else texts


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids that end a completion: the tokenizer's, and those that the model's own generation config lists."""
    listed = model.generation_config.eos_token_id
    listed = [] if listed is None else [listed] if isinstance(listed, int) else listed
    return sorted({*listed, tokenizer.eos_token_id} - {None})


def pad(rows: list[list[int]], side: str, value: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids [B, T] padded with `value` on the given side, and which of them are real, bool [B, T]."""
    width = max(len(row) for row in rows)
    filled = [
        ([value] * (width - len(row)) + row) if side == "left" else (row + [value] * (width - len(row))) for row in rows
    ]
    lengths = torch.tensor([len(row) for row in rows]).unsqueeze(1)
    columns = torch.arange(width)
    real = columns >= width - lengths if side == "left" else columns < lengths
    return torch.tensor(filled, dtype=torch.long).to(device), real.to(device)


def lay_out(
    prompt_ids: list[list[int]], completion_ids: list[list[int]], pad_token_id: int, device: torch.device
) -> dict[str, Any]:
    """Model inputs: prompts padded on the left, completions on the right, so that completions align."""
    prompts, in_prompt = pad(prompt_ids, "left", pad_token_id, device)
    completions, mask = pad(completion_ids, "right", pad_token_id, device)
    attended = torch.cat([in_prompt, mask], 1)
    return {
        # The last token predicts nothing.
        "input_ids": torch.cat([prompts, completions], 1)[:, :-1],
        "attention_mask": attended[:, :-1].long(),
        "position_ids": (attended.cumsum(1) - 1).clamp(min=0)[:, :-1],
        "completion_ids": completions.masked_fill(~mask, IGNORE),
        "mask": mask,
        "num_scored": sum(map(len, completion_ids)),
    }


@dataclass
class CompletionSampler:
    """Samples one completion of each prompt from the model's distribution at `temperature`, nothing cut off."""

    end_token_ids: list[int]
    pad_token_id: int
    max_new_tokens: int
    temperature: float

    @torch.no_grad()
    def __call__(self, model: PreTrainedModel, prompt_ids: list[list[int]]) -> list[list[int]]:
        """Completions, each up to and including the first token that ends it."""
        input_ids, real = pad(prompt_ids, "left", self.pad_token_id, model.device)
        # generate() fills what a config leaves open from the model's own, where a top_k or a repetition penalty would
        # make the sampler another policy than the one whose log-probabilities are trained.
        own_config, training = model.generation_config, model.training
        model.generation_config = self._config()
        model.eval()
        try:
            cache = self._read_prompts(model, prompt_ids)
            sequences = model.generate(input_ids=input_ids, attention_mask=real.long(), past_key_values=cache)
        finally:
            model.generation_config = own_config
            model.train(training)
        return [self._until_end(row) for row in sequences[:, input_ids.shape[1] :].tolist()]

    def _read_prompts(self, model: PreTrainedModel, prompt_ids: list[list[int]]) -> DynamicCache | None:
        """The cache of all but the last token of each prompt. A prompt that is sampled many times is read once."""
        unique = list(dict.fromkeys(map(tuple, prompt_ids)))
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        # Other layers keep a state besides keys and values, which is not theirs to repeat.
        repeatable = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
        input_ids, real = pad([list(prompt) for prompt in unique], "left", self.pad_token_id, model.device)
        if len(unique) == len(prompt_ids) or not repeatable or input_ids.shape[1] == 1:
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

    def _config(self) -> GenerationConfig:
        return GenerationConfig(
            do_sample=True,
            temperature=self.temperature,
            top_k=0,
            max_new_tokens=self.max_new_tokens,
            eos_token_id=self.end_token_ids,
            pad_token_id=self.pad_token_id,
            disable_compile=True,
        )

    def _until_end(self, row: list[int]) -> list[int]:
        end = next((i for i, token in enumerate(row) if token in self.end_token_ids), len(row) - 1)
        return row[: end + 1]
