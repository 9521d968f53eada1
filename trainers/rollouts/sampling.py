"""Sampling from a causal language model, token by token. `generate.TransformersEngine` runs the `Decoder`.

The random number of a token depends only on its row's seed and its position. So the number of processes, the order of
rows and other users of random numbers do not change what is sampled.
"""

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import rlkernels

# Every this many tokens the host asks the device whether all rows have ended, and waits for the answer.
TOKENS_PER_CHECK = {"cpu": 1}
ELSEWHERE = 16


def row_seed(seed: int, step: int, row: int) -> int:
    """A 63-bit seed for one row, by hashing the three numbers."""
    digest = hashlib.blake2b(f"{seed} {step} {row}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """float32 in [0, 1): for each seed the number at each position of its SplitMix64 stream (Steele et al. 2014).
    `seeds` and `positions` are int64 and broadcast."""

    def shifted(x: Tensor, by: int) -> Tensor:  # a logical, not an arithmetic shift
        return (x >> by) & ((1 << (64 - by)) - 1)

    x = seeds + (positions + 1) * (0x9E3779B97F4A7C15 - (1 << 64))
    x = (x ^ shifted(x, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    x = (x ^ shifted(x, 27)) * (0x94D049BB133111EB - (1 << 64))
    return shifted(x ^ shifted(x, 31), 40).float() * 2.0**-24


def choose(scores: Tensor, numbers: Tensor, temperature: float) -> Tensor:
    """Samples tokens [B] from softmax(scores [B, V] / temperature), by inverting the cumulative distribution at the
    random numbers [B].

    torch.multinomial draws a random number for each token of the vocabulary, sequentially on a CPU. For 16 rows of
    SmolLM2's 49,152 tokens that takes 40 ms; this takes 1 ms."""
    probabilities = (scores / temperature).softmax(-1)
    cumulative = probabilities.cumsum(-1)
    tokens = torch.searchsorted(cumulative, numbers.unsqueeze(1) * cumulative[:, -1:], right=True)
    tokens = tokens.clamp(max=scores.shape[1] - 1)
    # Rounding may select a token of probability 0.
    return torch.where(probabilities.gather(1, tokens) > 0, tokens, probabilities.argmax(-1, keepdim=True)).squeeze(1)


def is_sharded(model: nn.Module) -> bool:
    """Whether the weights are sharded over processes, so that all processes must run the model together."""
    parts = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    return parts or is_fsdp_managed_module(model) or is_deepspeed_zero3_enabled()


def reduced(value: Tensor, op: Any, together: bool) -> int:
    """The value as a number, reduced over all processes if `together`."""
    if together:
        dist.all_reduce(value, op=op)
    return int(value)


@contextlib.contextmanager
def unread_masks(model: Any) -> Iterator[None]:
    """With sdpa attention, transformers reads the padding mask in each forward pass, to skip it where possible, and so
    waits for the device at each token. During the with block it always passes the mask on unread."""
    own = model.config._attn_implementation
    if ALL_MASK_ATTENTION_FUNCTIONS.get(own) is not sdpa_mask:
        yield
        return
    name = f"{own}_with_mask"
    # Parts of the model may use other implementations, which are restored.
    configs = {id(part.config): part.config for part in model.modules() if isinstance(part, PreTrainedModel)}
    before = [(config, config._attn_implementation) for config in configs.values()]
    AttentionInterface.register(name, ALL_ATTENTION_FUNCTIONS[own])
    AttentionMaskInterface.register(name, lambda **options: sdpa_mask(**options | {"allow_is_causal_skip": False}))
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation


class Decoder:
    """The loop of `generate(custom_generate=)`: samples tokens until every row has ended.

    Args:
        numbers: float32 [T, B], the random number of each new token. T is the most tokens per row.
        end_token_ids: tokens that end a row.
        pad_token_id: the token that fills a row after its end.
        temperature: logits are divided by it.
        logprobs: whether to collect the sampler's log-probabilities in `self.logprobs`, a tensor [B] per new token.
        together: whether the model is sharded. Every process then goes on until the rows of all processes have ended.
    """

    def __init__(
        self,
        numbers: Tensor,
        end_token_ids: list[int],
        pad_token_id: int,
        temperature: float,
        logprobs: bool = False,
        together: bool = False,
    ) -> None:
        self.numbers, self.temperature, self.pad_token_id = numbers, temperature, pad_token_id
        self.end_token_ids = torch.tensor(end_token_ids, dtype=torch.long, device=numbers.device)
        self.wants_logprobs, self.together = logprobs, together
        self.logprobs: list[Tensor] = []

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Tensor:
        """Returns input_ids [B, W] followed by the new tokens."""
        outputs = model._prefill(input_ids, generation_config, model_kwargs)
        with unread_masks(model):
            return self._decode(model, input_ids, outputs, logits_processor, model_kwargs)

    def _decode(
        self, model: Any, input_ids: Tensor, outputs: Any, logits_processor: Any, model_kwargs: dict[str, Any]
    ) -> Tensor:
        ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        tokens_per_check = TOKENS_PER_CHECK.get(input_ids.device.type, ELSEWHERE)
        for index, numbers in enumerate(self.numbers, 1):
            model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
            # Copied, since a view would keep the logits of the whole prompt in memory.
            scores = outputs.logits[:, -1].to(copy=True, dtype=torch.float32)
            scores = logits_processor(input_ids, scores)
            tokens = choose(scores, numbers, self.temperature)
            if self.wants_logprobs:
                logprobs = rlkernels.token_logprobs(scores, tokens, temperature=self.temperature)
                self.logprobs.append(cast(Tensor, logprobs))  # a pair only with return_entropy
            tokens = tokens.masked_fill(ended, self.pad_token_id)
            input_ids = torch.cat([input_ids, tokens.unsqueeze(1)], 1)
            ended |= torch.isin(tokens, self.end_token_ids)
            if index == len(self.numbers) or (index % tokens_per_check == 0 and self._all_ended(ended)):
                break
            inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **model_kwargs)
            outputs = model(**inputs, return_dict=True)
        return input_ids

    def _all_ended(self, ended: Tensor) -> bool:
        return not reduced((~ended).any().long(), dist.ReduceOp.MAX, self.together)
