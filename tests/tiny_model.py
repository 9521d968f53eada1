"""A tiny random model and its tokenizer, made in the process: nothing is downloaded."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

# More than the 50 tokens that transformers keeps of a distribution by default.
WORDS = ["<eos>", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .:?"]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character. The padding token is the end-of-sequence token, as in SmolLM2."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>", unk_token="?")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


SIZES = {
    "vocab_size": len(WORDS),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "bos_token_id": None,
}


def build_model(seed: int = 0) -> LlamaForCausalLM:
    """The same random weights at each call of the same seed."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def build_mixture(seed: int = 0) -> MixtralForCausalLM:
    """The same as a mixture of four experts; each token goes to two."""
    torch.manual_seed(seed)
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2))
