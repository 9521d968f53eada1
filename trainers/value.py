"""A policy and its value function, which PPO trains as one module."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .base.config import BaseConfig
from .base.loading import disable_dropout, load_classifier, set_pad_token
from .base.sharding import refuse_zero3
from .batch import scoring
from .batch.batch import Batch
from .batch.probe import prepare_packing


def load_value_model(value_model: str | PreTrainedModel | None, args: BaseConfig) -> PreTrainedModel | None:
    """The sequence classifier that says the values; None: a head on the policy's hidden states does."""
    refuse_zero3("PPO")
    return None if value_model is None else load_classifier("value_model", value_model, args)


class ValueHead(nn.Linear):
    """A value for each hidden state, in float32; 0 until it has learned."""

    def __init__(self, policy: Any) -> None:
        weight = policy.get_output_embeddings().weight
        super().__init__(weight.shape[1], 1, device=weight.device)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return nn.functional.linear(hidden.float(), self.weight.float(), self.bias.float())


class PolicyAndValue(nn.Module):
    """The policy and its value function as one module. The value function is a sequence classifier with one label, or a
    head on the policy's own hidden states."""

    def __init__(self, policy: Any, value: nn.Module | None) -> None:
        super().__init__()
        self.policy: Any = policy
        self.value: Any = ValueHead(policy) if value is None else value
        self.config = policy.config
        self._keys_to_ignore_on_save = None  # the Trainer asks for it when it loads either
        # FSDP shards each of these layers by itself.
        parts = [getattr(model, "_no_split_modules", None) or [] for model in (self.policy, self.value)]
        self._no_split_modules = list(dict.fromkeys(name for names in parts for name in names))
        disable_dropout(self)  # with it, the policy would not be the one that sampled

    def forward(
        self, function: Callable[..., Any], batch: Batch, *args: Any, gives_values: bool = True, **options: Any
    ) -> tuple:
        """Returns function(policy, batch, ...), a function of `scoring`, and the values [N], float32, or None. Position
        p holds the value of the tokens up to and with p. A value head takes the hidden states of the same pass."""
        if not gives_values:
            return function(self.policy, batch, *args, **options), None
        if not isinstance(self.value, ValueHead):
            return function(self.policy, batch, *args, **options), scoring.token_scores(self.value, batch).float()
        seen: list[Tensor] = []
        handle = self.policy.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            result = function(self.policy, batch, *args, **options)
        finally:
            handle.remove()
        return result, self.value(batch.packed(seen[0])).squeeze(-1)

    def prepare(self, tokenizer: PreTrainedTokenizerBase, device: torch.device, packs: bool) -> bool:
        """Whether packed batches serve the value model too, where they serve the policy (`packs`)."""
        if isinstance(self.value, ValueHead):
            return packs
        set_pad_token(self.value, tokenizer)
        return packs and prepare_packing(self.value, device)

    def activation_checkpointing_enable(self, **options: Any) -> None:
        self._enable("activation_checkpointing_enable", options)

    def gradient_checkpointing_enable(self, **options: Any) -> None:  # what transformers below 5.23 calls
        self._enable("gradient_checkpointing_enable", options)

    def _enable(self, method: str, options: dict[str, Any]) -> None:
        for model in (self.policy, self.value):
            if not isinstance(model, ValueHead):
                getattr(model, method)(**options)

    def generate(self, engine: Callable[..., Any], *args: Any) -> Any:
        """Returns engine(*args), which runs the policy. Under the name `generate` FSDP2 takes it for a forward pass of
        the whole module, and FSDP2 knows of no other."""
        return engine(*args)

    def get_input_embeddings(self) -> nn.Module:
        return self.policy.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.policy.get_output_embeddings()

    def disable_adapter(self) -> Any:
        return self.policy.disable_adapter()
