"""What a model can read: which tokens, and how many. What is beyond ends in an IndexError of PyTorch, on GPUs in an
assertion after which the process can do nothing more."""

from dataclasses import dataclass
from typing import Any

from torch import nn

# Models whose attention knows a number of positions without a table of them, and the option that says how many.
OTHERS = {"mpt": "max_seq_len"}


@dataclass(frozen=True)
class Limits:
    """The limits of one model, or of several that read the same."""

    vocab_size: int  # rows of the embedding
    positions: int | None  # None: as many as there are, as with rotary embeddings

    @classmethod
    def of(cls, *models: Any) -> "Limits":
        sizes = [learned_positions(model) for model in models]
        return cls(min(map(embedded, models)), min((size for size in sizes if size is not None), default=None))

    def check(self, ids: list[int], completion: int = 0) -> None:
        """Refuses, by a ValueError, tokens beyond the model, and more of them than it has room for; `completion` more
        are to follow."""
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
        """Whether nothing that the tokenizer can give is beyond the model."""
        return self.positions is None and len(tokenizer) <= self.vocab_size


def embedded(model: Any) -> int:
    """How many tokens the model has a vector for."""
    embedding = model.get_input_embeddings()
    # The weight of a sharded model may be empty.
    return getattr(embedding, "num_embeddings", None) or len(embedding.weight)


def learned_positions(model: Any) -> int | None:
    """How many positions the model has a vector for; None if it computes them."""
    config = model.config.get_text_config()
    tokens = set(model.get_input_embeddings().modules())  # with what PEFT has around them
    size = getattr(config, "max_position_embeddings", None)
    found = [getattr(config, OTHERS[config.model_type])] if config.model_type in OTHERS else []
    for module in model.modules():
        is_other = isinstance(module, nn.Embedding) and module not in tokens
        # The first rows of some are no position's: OPT's, and those up to the padding token's of RoBERTa.
        if is_other and module.num_embeddings - getattr(module, "offset", 0) == size:
            found.append(size if module.padding_idx is None else size - module.padding_idx - 1)
        # A table of sines, one row a position: CTRL, GPT-J, CodeGen.
        found += [size for buffer in module.buffers(recurse=False) if buffer.dim() == 2 and len(buffer) == size]
    return min(found, default=None)
