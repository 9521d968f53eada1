"""Sequences laid end to end: what the model is shown, and that it keeps them apart."""

import re

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM, MistralConfig, MistralForCausalLM

from labelled_models import SIZES
from rlkernels.trainers.batch import probe, scoring
from rlkernels.trainers.batch.batch import Batch, Sequence, shift
from rlkernels.trainers.batch.packing import fill

CPU = torch.device("cpu")
# Two of one length are attended to together; token 0 is the padding token.
ROWS = [Sequence([*range(1, n), 0], [-100, -100, *range(3, n), 0]) for n in (8, 8, 5, 12, 3)]


def test_fill():
    assert fill([3, 3, 3, 9, 1, 1], 6) == [[0, 1], [2], [3], [4, 5]]
    assert fill([], 6) == []
    assert fill([7, 7], 1) == [[0], [1]]
    assert fill([2, 2, 2], 6) == [[0, 1, 2]]


def test_lay_out_packed():
    batch = Batch.lay_out([Sequence([5, 6, 0], [-100, 6, 0]), Sequence([7, 8], [-100, -100])], CPU)
    inputs = batch.model_inputs
    assert inputs["input_ids"].tolist() == [[5, 6, 0, 7, 8]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert "attention_mask" not in inputs and inputs["use_cache"] is False and batch.index is None
    assert batch.token_ids.tolist() == [6, 0, -100, -100, -100]
    assert batch.mask.tolist() == [True, True, False, False, False]
    assert batch.cu_seqlens.tolist() == [0, 3, 5] and batch.num_scored == 2


def test_lay_out_padded():
    """Token 0 at the end of a sequence is real, where the same token as padding is not."""
    batch = Batch.lay_out([Sequence([5, 0], [-100, 0]), Sequence([7, 8, 9], [-100, 8, 9])], CPU, padding_free=False)
    inputs = batch.model_inputs
    assert inputs["input_ids"].tolist() == [[5, 0, 0], [7, 8, 9]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch.shift_labels.tolist() == [[0, -100, -100], [8, 9, -100]]
    assert batch.index.tolist() == [0, 1, 3, 4, 5]
    assert batch.token_ids.tolist() == [0, -100, 8, 9, -100]


def test_shift_and_split():
    values = shift([[9.0, 1.0, 2.0], [9.0, 3.0]], CPU)
    assert values.tolist() == [1.0, 2.0, 0.0, 3.0, 0.0]
    batch = Batch.lay_out([Sequence([1, 2, 3], [-100, 2, 3]), Sequence([4, 5], [-100, 5])], CPU)
    parts = batch.split(values)
    assert [part.tolist() for part in parts] == [[1.0, 2.0, 0.0], [3.0, 0.0]]


@pytest.mark.parametrize("padding_free", [True, False])
def test_values_of_tokens_and_of_sequences(padding_free):
    rows = [Sequence([5, 6, 7], [-100, 6, 7]), Sequence([8], [8]), Sequence([9, 10], [-100, 10])]
    batch = Batch.lay_out(rows, CPU, padding_free=padding_free)
    values = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    assert batch.packed(batch.model_inputs["input_ids"]).tolist() == [5, 6, 7, 8, 9, 10]
    assert batch.packed(batch.shift_labels).equal(batch.token_ids)
    assert batch.sequence_sums(values).tolist() == [7.0, 8.0, 48.0]
    assert batch.sequence_means(values).tolist() == [1.5, 0.0, 16.0]
    assert batch.last(values).tolist() == [4.0, 8.0, 32.0]
    assert batch.spread(torch.tensor([3, 1, 2])).tolist() == [3, 3, 3, 1, 2, 2]
    with pytest.raises(AttributeError):
        batch.normalizer = 2.0


def mistral(**options) -> MistralForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "initializer_range": 0.3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    return MistralForCausalLM(MistralConfig(vocab_size=64, **sizes, **heads, **options))


def results(model, padding_free: bool, fused: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient of a weighted sum of the log-probabilities of ROWS."""
    model.zero_grad()
    batch = Batch.lay_out(ROWS, CPU, padding_free=padding_free)
    logprobs = scoring.token_logprobs(model, batch, fused=fused)
    loss = (logprobs * torch.linspace(1, 2, len(logprobs))).sum()
    loss.backward()
    return logprobs.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def checkpoint_activations(model):
    """By the name that it has since transformers 5.23, or the one before."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointing"])
@pytest.mark.parametrize("fused", [True, False], ids=["no logits", "logits"])
@pytest.mark.parametrize("window", [None, 4])
def test_packed_is_padded_is_alone(attention, checkpointing, fused, window, monkeypatch):
    """Log-probabilities and gradients. A long sequence's attention is computed otherwise than a short one's."""
    expected = None
    for stored in (512, 0):
        for name in ("STORED_SCORES", "STORED_KEYS", "STORED_QUERIES"):
            monkeypatch.setattr(f"rlkernels.trainers.batch.attention.{name}", stored)
        for padding_free in (False, True):
            model = mistral(sliding_window=window, attn_implementation=attention)
            assert probe.prepare_packing(model, CPU) and model.config._attn_implementation.startswith("rlkernels")
            if checkpointing:
                checkpoint_activations(model)
            model.train()
            if fused:
                assert scoring.needs_no_logits(model)
            found = results(model, padding_free, fused)
            expected = expected or found
            torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)
            assert (found[1] - expected[1]).norm() <= 1e-5 * expected[1].norm()
    assert expected is not None
    parts = Batch.lay_out(ROWS, CPU).split(expected[0])
    for row, part in zip(ROWS, parts, strict=True):
        alone = scoring.token_logprobs(mistral(sliding_window=window), Batch.lay_out([row], CPU), fused=False)
        torch.testing.assert_close(part, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointing"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_sequences_do_not_leak_under_the_mask_of_transformers(make_model, attention, checkpointing):
    """What GPUs without flash attention use."""
    model = make_model()
    model.set_attn_implementation(attention)
    if checkpointing:
        checkpoint_activations(model)
    model.train()
    together, gradient = results(model, True, fused=False)
    padded, padded_gradient = results(model, False, fused=False)
    torch.testing.assert_close(together, padded, rtol=1e-4, atol=1e-5)
    assert (gradient - padded_gradient).norm() <= 1e-5 * padded_gradient.norm()
    changed = [Sequence([17] * 7 + [0], ROWS[0].labels), *ROWS[1:]]
    for free in (True, False):
        others = scoring.token_logprobs(model, Batch.lay_out(changed, CPU, padding_free=free), fused=False)[8:]
        torch.testing.assert_close(others, together[8:], rtol=1e-4, atol=1e-5)


def test_models_that_do_not_keep_sequences_apart_are_padded(caplog):
    model = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4))
    assert not probe.prepare_packing(model, CPU)
    assert "MambaForCausalLM does not keep packed sequences apart" in caplog.text


def test_models_of_learned_positions_are_packed():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32))
    assert probe.prepare_packing(model, CPU)
    torch.testing.assert_close(*(results(model.eval(), free, fused=False)[0] for free in (True, False)))


WINDOW = 16
#: Than the pinned transformers; fewer models keep sequences apart by their own mask.
IS_OLDER = Version(transformers.__version__) < Version("5.23")
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
INDEX = {"index_n_heads": 16, "index_head_dim": 8, "num_key_value_heads": 4}
BLOCKS = {"index_block_size": 8, "index_topk_blocks": 1}
FAMILIES = {
    # Each with the way in which its sequences are kept apart.
    "Mistral": ("by sequence", {"sliding_window": WINDOW}),
    "Gemma3": ("by sequence", {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}),
    # The window is in the mask alone; chunks; some tokens of those before; a name of the attention that is looked at.
    "Phimoe": ("its own", {"sliding_window": WINDOW, **EXPERTS}),
    "Llama4": ("its own", {"attention_chunk_size": WINDOW, "intermediate_size_mlp": 48, **EXPERTS}),
    "Doge": ("its own", {"keep_window_size": WINDOW}),
    "DeepseekV32": ("its own", {"index_topk": WINDOW, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}),
    "MiniMaxM3VL": (
        "padded",
        {"index_block_size": 8, "index_topk_blocks": 1, "layer_types": ["minimax_m3_sparse"] * 2},
    ),
    # A mask is stored for max_position_embeddings tokens.
    "GPTNeo": ("padded", {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "window_size": WINDOW}),
}


def tiny(family, options):
    name = {"Gemma3": "Gemma3Text", "Llama4": "Llama4Text", "MiniMaxM3VL": "MiniMaxM3VLText"}.get(family, family)
    if not hasattr(transformers, f"{name}Config"):
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    sizes = dict(SIZES)
    if family == "DeepseekV32":
        sizes = {**sizes, "head_dim": 4, **LATENT, **INDEX, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
    if family == "MiniMaxM3VL":
        sizes = {**sizes, **INDEX, **EXPERTS, "index_n_heads": 4, "rotary_dim": 4}
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**sizes, **options})
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for key, parameter in model.named_parameters():
        if key.endswith(".A"):  # zeros, with which the tokens that Doge keeps are not determined
            torch.nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_sequences_longer_than_windows_and_chunks_are_kept_apart(family):
    if family == "Doge" and IS_OLDER:
        pytest.skip("the tokens that Doge keeps depend on the padding there")
    way, options = FAMILIES[family]
    model = tiny(family, options).train()
    own, config, random = model.config._attn_implementation, str(model.config.to_dict()), torch.get_rng_state()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    padding_free = probe.prepare_packing(model, CPU)
    by_sequence = model.config._attn_implementation.startswith("rlkernels")
    found = "by sequence" if by_sequence else "its own" if padding_free else "padded"
    assert found == way or (IS_OLDER and (way, found) == ("its own", "padded"))
    assert all(module.training for module in model.modules()) and random.equal(torch.get_rng_state())
    assert str(model.config.to_dict()) == config
    assert all(buffer.equal(buffers[name]) for name, buffer in model.named_buffers())
    generator = torch.Generator().manual_seed(1)
    # No token twice, as models that keep the best of those before then choose among equals.
    rows = [(3 + torch.randperm(94, generator=generator)[:n]).tolist() for n in (45, 33, 33, 60)]
    sequences = [Sequence(row, row) for row in rows]
    model.eval()
    with torch.no_grad():
        together = scoring.token_logprobs(model, Batch.lay_out(sequences, CPU, padding_free=padding_free), fused=False)
        if by_sequence:
            model.set_attn_implementation(own)
        for sequence, part in zip(sequences, together.split([len(row) for row in rows]), strict=True):
            logits = model(input_ids=torch.tensor([sequence.input_ids])).logits[0, :-1].log_softmax(-1)
            alone = logits.gather(1, torch.tensor(sequence.input_ids)[1:, None])[:, 0]
            torch.testing.assert_close(part[:-1], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "name"), [("Phimoe", "sliding_window"), ("Llama4", "attention_chunk_size"), ("Doge", "keep_window_size")]
)
def test_masks_of_another_kind_are_not_done_by_sequence_whatever_they_are_called(family, name, monkeypatch):
    """And however far they reach: they are not narrowed here, and longer than what the model is tried on."""
    monkeypatch.setattr(probe, "WIDTH", re.compile("(?!)"))
    model = tiny(family, FAMILIES[family][1] | {name: 5000})
    assert probe.prepare_packing(model, CPU) or IS_OLDER
    assert not model.config._attn_implementation.startswith("rlkernels")


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rope_that_depends_on_the_batch_is_told_and_as_it_was(kind, caplog):
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 6}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    model = mistral(rope_parameters=rope, max_position_embeddings=24)
    probe.warn_of_batch_dependence(model)
    assert f"MistralForCausalLM: its RoPE is '{kind}', which changes for the whole batch" in caplog.text
    assert "longer than 6 tokens" in caplog.text
    rotary = model.model.rotary_emb
    with torch.no_grad():
        model(torch.arange(5, 20)[None])
    numbers, frequencies = (rotary.max_seq_len_cached, rotary.attention_scaling), rotary.inv_freq.clone()
    probe.prepare_packing(model, CPU)
    assert (rotary.max_seq_len_cached, rotary.attention_scaling) == numbers
    assert rotary.inv_freq.equal(frequencies)


@pytest.mark.parametrize("padding", [None, 0])
def test_classifiers_are_packed(make_model, padding):
    """Also without a padding token, without which they refuse several rows."""
    config = make_model().config
    config.pad_token_id, config.num_labels = padding, 1
    model = transformers.LlamaForSequenceClassification(config)
    assert probe.prepare_packing(model, CPU) and model.config._attn_implementation.startswith("rlkernels")


def test_adapters_that_begin_at_tokens_are_padded(make_model, caplog):
    """aLoRA looks for them once in each row."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[5], task_type="CAUSAL_LM")
    model = peft.get_peft_model(make_model(), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    padding_free = probe.prepare_packing(model, CPU)
    assert not padding_free and "aLoRA begins once in each row of tokens: its batches are padded" in caplog.text
    found = scoring.token_logprobs(model.eval(), Batch.lay_out(ROWS, CPU, padding_free=padding_free), fused=False)
    alone = [scoring.token_logprobs(model, Batch.lay_out([row], CPU, padding_free=False), fused=False) for row in ROWS]
    torch.testing.assert_close(found, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_attention_is_not_saved_and_serves_generation(make_model, tmp_path):
    model = make_model()
    expected = model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=5, do_sample=False)
    assert probe.prepare_packing(model, CPU)
    assert model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=5, do_sample=False).equal(expected)
    model.save_pretrained(tmp_path)
    assert "rlkernels" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_weights_of_16_bits(attention):
    model = mistral(attn_implementation=attention).bfloat16()
    assert probe.prepare_packing(model, CPU) and probe.prepare_sharing(model, CPU)
    assert model.config._attn_implementation.startswith("rlkernels_by_sequence")


def test_rounding_of_16_bits_is_told_from_a_leak():
    """By one position that is far off, and by many that are a little."""
    alone = torch.ones(10, 4, dtype=torch.bfloat16)
    one, many, other = alone.clone(), alone * 1.2, alone.clone()
    one[3] *= 1.4
    other[3] *= 2
    assert probe._same(one, alone) and not probe._same(many, alone) and not probe._same(other, alone)
    assert not probe._same(one.float(), alone.float())
