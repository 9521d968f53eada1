"""The router loss of mixtures of experts where there is no peer to hold it against; TRL's is in the parity tests."""

import logging

import pytest
import torch
import transformers
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, JetMoeConfig, JetMoeForCausalLM, LlamaForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import rlkernels
from rlkernels.trainers import PPOConfig, PPOTrainer, SFTConfig, SFTTrainer
from rlkernels.trainers.losses.router import find_router_loss
from tiny_model import build_mixture, build_model

CPU = torch.device("cpu")
ROWS = [{"prompt": f"{word}: ", "completion": word[::-1]} for word in ("a", "bcd", "efghijk", "lm nop")]


class OwnLoss(LlamaForCausalLM):
    """Adds to its loss something by another name."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        if output.loss is not None:
            output.loss = output.loss + 1e-3 * output.logits.logsumexp(-1).square().mean()
        return output


def without_own_loss() -> DeepseekV3ForCausalLM:
    """Gives router logits, but no loss of them."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": None, "kv_lora_rank": 8}
    heads |= {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    config = DeepseekV3Config(vocab_size=70, first_k_dense_replace=1, **sizes, **heads, **experts)
    return DeepseekV3ForCausalLM(config)


def test_weight():
    """The one that the model declares, unless another is given."""
    model = build_mixture()
    assert find_router_loss(model, None, CPU).coef == 0.001
    assert find_router_loss(model, 3.0, CPU).coef == 3.0
    assert find_router_loss(model, 0.0, CPU) is None
    model.config.router_aux_loss_coef = 0.0
    assert find_router_loss(model, None, CPU) is None
    assert find_router_loss(build_model(), None, CPU) is None


def test_weight_by_another_name():
    """JetMoE's has another name."""
    sizes = {"vocab_size": 70, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "kv_channels": 8}
    model = JetMoeForCausalLM(JetMoeConfig(**sizes, num_key_value_heads=2, num_local_experts=4, aux_loss_coef=0.25))
    assert find_router_loss(model, None, CPU).coef == 0.25


@pytest.mark.parametrize("wrapped", [False, True], ids=["logits", "no_logits"])
def test_of_router_logits(wrapped):
    model = without_own_loss()
    if not hasattr(model.config, "output_router_logits"):
        pytest.skip(f"DeepseekV3 of transformers {transformers.__version__} gives no router logits")
    if wrapped:
        rlkernels.wrap_lm_head(model)
    tokens = torch.randint(70, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[1, 6:] = 0
    options = {"shift_labels": tokens, "head_function": lambda hidden, *args, **head: hidden} if wrapped else {}
    found = find_router_loss(model, 1.0, CPU)
    with found.watching() as seen:
        model(input_ids=tokens, attention_mask=mask, **options)
    logits = model(input_ids=tokens, attention_mask=mask, output_router_logits=True).router_logits
    expected = load_balancing_loss_func(tuple(each.view(-1, 4) for each in logits), 4, 2, mask)
    torch.testing.assert_close(seen[0], expected)
    assert model(input_ids=tokens).router_logits is None  # the other passes are as they were


def test_refused_without_routers():
    with pytest.raises(ValueError, match=r"router_aux_loss_coef must be 0 or unset for LlamaForCausalLM, .*; got 0.5"):
        find_router_loss(build_model(), 0.5, CPU)


def test_refused_where_it_has_no_gradient(tokenizer, run_options):
    kwargs = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(ValueError, match="use_reentrant must be false with a router loss"):
        SFTTrainer(build_mixture(), SFTConfig(**run_options | kwargs), ROWS, processing_class=tokenizer)


def test_other_losses_are_told(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    find_router_loss(build_mixture(), None, CPU)
    find_router_loss(build_mixture(), 0.0, CPU)
    assert not caplog.messages
    assert find_router_loss(OwnLoss(build_model().config), None, CPU) is None
    message = caplog.messages[-1]
    assert message.startswith("OwnLoss: its own loss of a few tokens is ")


@pytest.mark.parametrize("peft", [False, True], ids=["whole", "adapters"])
def test_ppo(tokenizer, run_options, peft):
    """Its routers learn by it alone where no completion has a reward."""
    peft_config = None
    if peft:
        from peft import LoraConfig

        peft_config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    trainer = PPOTrainer(
        build_mixture(),
        lambda completions, **kwargs: [None] * len(completions),
        PPOConfig(**run_options, response_length=4, per_device_train_batch_size=2, gradient_accumulation_steps=2),
        [{"prompt": row["prompt"]} for row in ROWS],
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    trainer.router.coef = 7.0
    inputs = [{"prompt": row["prompt"]} for row in ROWS]
    loss = trainer.training_step(trainer.model, inputs)
    experience = trainer.collector.buffer.experience
    sequences, order = [sequence.input_ids for sequence in experience.sequences], experience.order[0]
    expected = []
    trainer.model.eval()
    for rows in (order[:2], order[2:]):
        ids = [torch.tensor(sequences[row]) for row in rows]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(each) for each in ids], batch_first=True)
        with torch.no_grad():
            output = trainer.model.policy(input_ids=padded, attention_mask=mask, output_router_logits=True)
        expected.append(output.aux_loss.item())
    mean = sum(expected) / 2
    assert trainer.metrics.flush(trainer.accelerator)["aux_loss"] == pytest.approx(mean, rel=1e-5)
    assert loss.item() == pytest.approx(7.0 * mean, rel=1e-5)
    gradients = [parameter.grad for parameter in trainer.model.policy.parameters() if parameter.grad is not None]
    assert sum(gradient.abs().sum() for gradient in gradients) > 0
