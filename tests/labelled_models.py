"""Tiny random causal LMs, and a batch with labels."""

import torch
import transformers
from torch import nn

VOCAB = 97
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    initializer_range=0.2,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
MODELS = {
    "qwen3, tied": ("Qwen3", {"tie_word_embeddings": True}),
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "gemma2, softcap": ("Gemma2", {"final_logit_softcapping": 3.0}),
    "cohere, scale": ("Cohere", {"logit_scale": 0.3}),
    "granite, scale": ("Granite", {"logits_scaling": 3.0}),
    "phi, bias": ("Phi", {}),
    "mixtral, aux loss": (
        "Mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 0.5},
    ),
}


def build(name="qwen3, tied", dtype=torch.float32, **options):
    family, own = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES | own | options)
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(dtype).train()
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            nn.init.normal_(parameter)
    return model


def batch(rows=3, time=11):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, VOCAB, (rows, time), generator=generator)
    mask = torch.ones_like(tokens)
    mask[0, -3:] = 0
    labels = tokens.masked_fill(mask == 0, -100)
    labels[:, 2:4] = -100
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def lora(model, targets):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model
