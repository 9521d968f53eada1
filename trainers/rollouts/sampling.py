"""Sampling from a causal language model: which token comes next, and when all rows have ended.

The random number of a token is keyed by its row and its position, so that neither the number of processes, nor the
order of rows, nor anything else that draws random numbers changes what is sampled.
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

# Once in so many tokens the host looks whether all rows have ended, and waits for the device to tell.
TOKENS_PER_CHECK = {"cpu": 1}
ELSEWHERE = 16


def row_seed(seed: int, step: int, row: int) -> int:
    """63 bits."""
    digest = hashlib.blake2b(f"{seed} {step} {row}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """float32 in [0, 1): the number at each position of the SplitMix64 stream (Steele et al. 2014) of each seed. Both
    are int64, and broadcast."""

    def shifted(x: Tensor, by: int) -> Tensor:  # as an unsigned number
        return (x >> by) & ((1 << (64 - by)) - 1)

    x = seeds + (positions + 1) * (0x9E3779B97F4A7C15 - (1 << 64))
    x = (x ^ shifted(x, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    x = (x ^ shifted(x, 27)) * (0x94D049BB133111EB - (1 << 64))
    return shifted(x ^ shifted(x, 31), 40).float() * 2.0**-24


def choose(scores: Tensor, numbers: Tensor, temperature: float) -> Tensor:
    """The token [B] that a random number [B] stands for in the distribution softmax(scores [B, V] / temperature).

    The number is looked up among the cumulative probabilities. torch.multinomial draws one for each token of the
    vocabulary, on a CPU one after the other: of 16 rows of SmolLM2's 49,152 that takes 40 ms; this takes 1."""
    probabilities = (scores / temperature).softmax(-1)
    cumulative = probabilities.cumsum(-1)
    tokens = torch.searchsorted(cumulative, numbers.unsqueeze(1) * cumulative[:, -1:], right=True)
    tokens = tokens.clamp(max=scores.shape[1] - 1)
    # Rounding may lead to a token that has no probability.
    return torch.where(probabilities.gather(1, tokens) > 0, tokens, probabilities.argmax(-1, keepdim=True)).squeeze(1)


def is_sharded(model: nn.Module) -> bool:
    """Whether the weights lie on several processes, all of which must run the model for any to."""
    parts = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    return parts or is_fsdp_managed_module(model) or is_deepspeed_zero3_enabled()


def reduced(value: Tensor, op: Any, together: bool) -> int:
    if together:
        dist.all_reduce(value, op=op)
    return int(value)


@contextlib.contextmanager
def unread_masks(model: Any) -> Iterator[None]:
    """For sdpa, transformers looks at the padding mask in each forward pass, to see whether it can do without, and so
    waits for the device at each token. Inside, it does not look."""
    own = model.config._attn_implementation
    if ALL_MASK_ATTENTION_FUNCTIONS.get(own) is not sdpa_mask:
        yield
        return
    name = f"{own}_with_mask"
    # A part of the model may have another implementation.
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
        numbers: float32 [T, B], the random number of each new token; there are T at most.
        end_token_ids: those that end a row.
        pad_token_id: what follows them.
        temperature: logits are divided by it.
        logprobs: whether the sampler's log-probabilities are noted in `self.logprobs`, a [B] for each new token.
        together: whether the model is sharded: every process then goes on until the rows of all have ended.
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
        """input_ids [B, W] and the new tokens."""
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
            # A copy: a view would keep the logits of the whole prompt.
            scores = outputs.logits[:, -1].to(copy=True, dtype=torch.float32)
            scores = logits_processor(input_ids, scores)
            tokens = choose(scores, numbers, self.temperature)
            if self.wants_logprobs:
                logprobs = rlkernels.token_logprobs(scores, tokens, temperature=self.temperature)
                self.logprobs.append(cast(Tensor, logprobs))  # with return_entropy it would be a pair
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
