"""A model's limits: which token ids it has, and how many positions. Data and engines are checked against them.

Beyond them PyTorch raises an IndexError on a CPU. On a GPU an assertion fails, and the process can no longer use it.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

# Model types whose positions are limited without a table of position vectors, and the config's option for the limit.
OTHERS = {"mpt": "max_seq_len"}


@dataclass(frozen=True)
class Limits:
    """The limits of one model, or the common limits of several models that read the same tokens."""

    vocab_size: int  # rows of the embedding
    positions: int | None  # None: unlimited, as with rotary embeddings

    @classmethod
    def of(cls, *models: Any) -> "Limits":
        sizes = [learned_positions(model) for model in models]
        return cls(min(map(embedded, models)), min((size for size in sizes if size is not None), default=None))

    def check(self, ids: list[int], completion: int = 0) -> None:
        """Raises ValueError if a token is beyond the vocabulary, or if the tokens and `completion` further ones exceed
        the positions."""
        highest = max(ids, default=0)
        if highest >= self.vocab_size:
            raise ValueError(
                f"holds token {highest}, beyond the {self.vocab_size} rows of the model's embedding; for tokens that "
                "were added to the tokenizer, resize_token_embeddings makes room"
            )
        if self.positions is not None and len(ids) + completion > self.positions:
            more = f" and a completion of {completion}" if completion else ""
            raise ValueError(f"has {len(ids)} tokens{more}, more than the {self.positions} positions of the model")

    def fit(self, tokenizer: Any) -> bool:
        """Whether the model can read everything that the tokenizer can give."""
        return self.positions is None and len(tokenizer) <= self.vocab_size


def embedded(model: Any) -> int:
    """The number of tokens that the model has an embedding vector for."""
    embedding = model.get_input_embeddings()
    # num_embeddings first, since the weight of a sharded model may be empty.
    return getattr(embedding, "num_embeddings", None) or len(embedding.weight)


def learned_positions(model: Any) -> int | None:
    """The number of positions that the model has a vector for, or None if it computes positions."""
    config = model.config.get_text_config()
    tokens = set(model.get_input_embeddings().modules())  # with the modules that PEFT wraps around them
    size = getattr(config, "max_position_embeddings", None)
    found = [getattr(config, OTHERS[config.model_type])] if config.model_type in OTHERS else []
    for module in model.modules():
        is_other = isinstance(module, nn.Embedding) and module not in tokens
        # In some models the first rows belong to no position: OPT's offset, RoBERTa's rows up to its padding token.
        if is_other and module.num_embeddings - getattr(module, "offset", 0) == size:
            found.append(size if module.padding_idx is None else size - module.padding_idx - 1)
        # A table of sines has one row per position in CTRL, GPT-J and CodeGen.
        found += [size for buffer in module.buffers(recurse=False) if buffer.dim() == 2 and len(buffer) == size]
    return min(found, default=None)
