"""Attention to shared prefixes: by sequence on CPUs, by flash attention's function or a mask elsewhere.

There is no GPU here: flash attention is a stand-in that computes what its documentation says."""

import itertools

import pytest
import torch
import transformers
from torch.nn.attention import flex_attention
from transformers import masking_utils, modeling_flash_attention_utils
from transformers.integrations import flex_attention as transformers_flex
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from labelled_models import SIZES
from rlkernels.trainers.batch import attention, implementations, masks, probe, scoring
from rlkernels.trainers.batch.batch import Batch, Sequence

CPU, GPU = torch.device("cpu"), torch.device("cuda")
WINDOW = 6
LAYERS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
FAMILIES = {
    "Llama": {},
    "Mistral": {"sliding_window": WINDOW},
    "Gemma2": {**LAYERS, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "Gemma3": LAYERS,
    "GptOss": {**LAYERS, "num_local_experts": 4, "num_experts_per_tok": 2},
}
# (length of the prefix, lengths of the branches): neighbours of equal and of other lengths; longer and shorter than the
# window; one token; a prefix that one sequence has alone; none.
GROUPS = [(9, (8, 4, 4, 1)), (0, (7,)), (3, (2, 12, 5)), (5, (4,)), (1, (3, 3))]


def build(family: str) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    name = {"Gemma3": "Gemma3Text"}.get(family, family)
    own = "eager" if family == "Gemma2" else None  # older transformers would take sdpa, and leave out the softcap
    config = getattr(transformers, f"{name}Config")(**SIZES | FAMILIES[family], attn_implementation=own)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for key, parameter in model.named_parameters():
        if key.endswith("sinks"):  # so that they take as much of the softmax as the tokens do
            torch.nn.init.uniform_(parameter, 0, 3)
    return model


def sequences(groups=GROUPS, shared: bool = True) -> list[Sequence]:
    generator = torch.Generator().manual_seed(1)
    rows = []
    for prefix, branches in groups:
        beginning = torch.randint(3, 97, (prefix,), generator=generator).tolist()
        for length in branches:
            tokens = beginning + torch.randint(3, 97, (length,), generator=generator).tolist()
            labels = [-100] * (prefix + 1) + tokens[prefix + 1 :]
            rows.append(Sequence(tokens, labels, prefix if shared else 0))
    return rows


def results(model, rows: list[Sequence]) -> tuple[torch.Tensor, torch.Tensor]:
    """The log-probabilities of the tokens in the loss, and the gradient of a weighted sum of them."""
    model.zero_grad()
    batch = Batch.lay_out(rows, CPU)
    logprobs = scoring.token_logprobs(model, batch, fused=False)[batch.mask]
    (logprobs * torch.linspace(1, 2, len(logprobs))).sum().backward()
    return logprobs.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def alone(model) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, of each sequence without any other, padding or prefix, by the model's own attention."""
    model.zero_grad()
    logprobs = []
    for row in sequences(shared=False):
        logits = model(torch.tensor([row.input_ids]), use_cache=False).logits[0, :-1].log_softmax(-1)
        labels = torch.tensor(row.labels[1:])
        logprobs.append(logits.gather(1, labels.clamp(min=0)[:, None])[:, 0][labels >= 0])
    logprobs = torch.cat(logprobs)
    (logprobs * torch.linspace(1, 2, len(logprobs))).sum().backward()
    return logprobs.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def assert_same(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)
    assert (found[1] - expected[1]).norm() <= 1e-5 * expected[1].norm()


def assert_branches_do_not_see_each_other(model):
    """Once a branch's tokens are others, all other branches' results keep their bits."""
    model.eval()
    rows = sequences()
    with torch.no_grad():
        before = Batch.lay_out(rows, CPU)
        values = before.split(scoring.token_logprobs(model, before, fused=False))
        for changed in (1, 5, 6):
            row = rows[changed]
            tokens = row.input_ids[: row.prefix] + [90 - place for place in range(row.branch_length)]
            others = [*rows[:changed], Sequence(tokens, row.labels, row.prefix), *rows[changed + 1 :]]
            after = Batch.lay_out(others, CPU)
            for place, part in enumerate(after.split(scoring.token_logprobs(model, after, fused=False))):
                assert part.equal(values[place]) == (place != changed or len(part) == 1)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointing"])
@pytest.mark.parametrize("family", FAMILIES)
def test_by_sequence(family, checkpointing, monkeypatch):
    """Short blocks store their scores, long ones do not; softcap and sinks need them."""
    expected = alone(build(family).train())
    for stored in (512, 0):
        for name in ("STORED_SCORES", "STORED_KEYS", "STORED_QUERIES"):
            monkeypatch.setattr(attention, name, stored)
        model = build(family)
        own = model.config._attn_implementation
        assert probe.prepare_packing(model, CPU) and probe.prepare_sharing(model, CPU)
        assert model.config._attn_implementation == f"rlkernels_by_sequence_{own}"
        if checkpointing:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model.train()
        assert_same(results(model, sequences(shared=False)), expected)
        assert_same(results(model, sequences()), expected)
    assert_branches_do_not_see_each_other(model)


def test_a_model_of_eager_attention_generates_by_its_own():
    model = build("GptOss")
    expected = model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=5, do_sample=False)
    assert probe.prepare_packing(model, CPU)
    assert model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=5, do_sample=False).equal(expected)


def test_branches_of_about_the_same_length_are_computed_together():
    blocks = [(5, 5), (5, 5), (6, 6), (9, 9), (3, 12), (32, 41), (33, 42), (2, 11), (9, 9), (1, 10)]
    assert list(attention.runs(blocks)) == [
        (slice(0, 0), (5, 5)),
        (slice(0, 0), (6,)),
        (slice(0, 0), (9,)),
        (slice(16, 25), (3, 32)),
        (slice(16, 25), (33,)),
        (slice(16, 25), (2,)),
        (slice(0, 0), (9,)),
        (slice(95, 104), (1,)),
    ]
    padded, real = attention.padding((2, 1, 3))
    assert padded.tolist() == [0, 1, 1, 2, 2, 2, 3, 4, 5] and real.tolist() == [0, 1, 3, 6, 7, 8]


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    deterministic=False,
    s_aux=None,
):
    """[tokens, heads, D]. Causal attention and windows are aligned at the ends of queries and keys."""
    assert causal and k.shape[0] == v.shape[0] == cu_seqlens_k[-1] and q.shape[0] == cu_seqlens_q[-1]
    assert cu_seqlens_q.diff().max() == max_seqlen_q and cu_seqlens_k.diff().max() == max_seqlen_k
    groups, outputs = q.shape[1] // k.shape[1], []
    for one, keys, values in zip(
        q.split(cu_seqlens_q.diff().tolist()),
        *(part.split(cu_seqlens_k.diff().tolist()) for part in (k, v)),
        strict=True,
    ):
        keys, values = (part.repeat_interleave(groups, 1) for part in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", one, keys) * softmax_scale
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        behind = torch.arange(len(one))[:, None] + len(keys) - len(one) - torch.arange(len(keys))
        seen = (behind >= 0) & ((behind <= window_size[0]) | (window_size[0] < 0))
        scores = scores.masked_fill(~seen, -torch.inf)
        if s_aux is not None:
            scores = torch.cat([scores, s_aux[:, None, None].expand(-1, len(one), 1)], -1)
        weights = scores.softmax(-1)[..., : len(keys)].to(values.dtype)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, values))
    return torch.cat(outputs)


def flash_attn_func(q, k, v, **options):
    """[rows, T, heads, D]"""
    ends = torch.arange(len(q) + 1, dtype=torch.int32) * q.shape[1]
    flat = (part.flatten(0, 1) for part in (q, k, v))
    return flash_attn_varlen_func(*flat, ends, ends, q.shape[1], q.shape[1], **options).view_as(q)


@pytest.fixture
def flash(monkeypatch):
    """Puts the stand-in in the place of flash attention; transformers' own function calls it."""
    functions = (flash_attn_func, flash_attn_varlen_func, None, None, None)
    monkeypatch.setattr(modeling_flash_attention_utils, "_lazy_imports", lambda *args, **kwargs: functions)
    for name in ("_loaded_implementation", "_flash_fn", "_flash_varlen_fn", "_process_flash_kwargs_fn"):
        monkeypatch.setattr(modeling_flash_attention_utils, name, None)
    own = ALL_ATTENTION_FUNCTIONS["flash_attention_2"]
    yield "flash_attention_2"
    transformers.AttentionInterface.register("flash_attention_2", own)


@pytest.mark.parametrize("family", FAMILIES)
def test_flash_attention_gets_the_keys_of_each_branch(family, flash):
    expected = alone(build(family).train())
    model = build(family)
    model.config._attn_implementation = flash  # as set_attn_implementation would, were there a GPU
    assert probe.prepare_packing(model, CPU) and probe.prepare_sharing(model, CPU)
    assert model.config._attn_implementation == flash
    model.train()
    assert_same(results(model, sequences(shared=False)), expected)
    assert_same(results(model, sequences()), expected)
    assert_branches_do_not_see_each_other(model)
    wrapped = ALL_ATTENTION_FUNCTIONS[flash]
    implementations.gather_keys(flash)
    assert ALL_ATTENTION_FUNCTIONS[flash] is wrapped  # once for all models


@pytest.mark.parametrize("family", ["Llama", "GptOss"])
def test_flash_attention_is_not_run_before_the_model_is_placed(family, flash, monkeypatch):
    monkeypatch.setattr(modeling_flash_attention_utils, "_lazy_imports", None)
    model = build(family)
    model.config._attn_implementation = flash
    assert probe.prepare_packing(model, GPU) and probe.prepare_sharing(model, GPU)
    assert model.config._attn_implementation == flash


def test_flash_attention_is_not_run_by_a_model_that_keeps_arguments_to_itself(flash, caplog):
    """It would read past the end of the keys."""
    model = build("Llama")
    model.config._attn_implementation = flash
    forward = model.model.layers[1].forward
    model.model.layers[1].forward = lambda *args, key_index=None, **kwargs: forward(*args, **kwargs)
    assert probe.prepare_packing(model, CPU) and not probe.prepare_sharing(model, CPU)
    assert "LlamaForCausalLM does not share prefixes: each sequence is run as a whole." in caplog.text
    assert model.config._attn_implementation == flash


def reference_mask(rows: list[Sequence], window: int | None) -> torch.Tensor:
    """Token by token, from the sequences alone."""
    places = []  # of all tokens that are run: (which sequences they belong to, position)
    inputs = Batch.lay_out(rows, CPU).model_inputs
    starts = inputs["cu_seq_lens_q"].tolist()
    lengths = inputs["cu_seq_lens_k"].diff().tolist()
    for block, (start, stop) in enumerate(itertools.pairwise(starts)):
        is_branch = lengths[block] > stop - start
        root = max(each for each in range(block + 1) if lengths[each] == starts[each + 1] - starts[each])
        places += [({block, root} if is_branch else {block}, position) for position in range(start, stop)]
    positions = inputs["position_ids"][0].tolist()
    mask = torch.zeros(len(places), len(places), dtype=torch.bool)
    for query, (blocks, _) in enumerate(places):
        for key, (own, _) in enumerate(places):
            distance = positions[query] - positions[key]
            block = max(own)
            mask[query, key] = block in blocks and distance >= 0 and (window is None or distance < window)
    return mask


@pytest.mark.parametrize("window", [None, 1, 4])
def test_masks(window):
    batch = Batch.lay_out(sequences(), CPU)
    starts = [batch.model_inputs[f"cu_seq_lens_{side}"] for side in "qk"]
    places = torch.arange(batch.num_run)
    found = masks.sees(*starts, batch.num_run, window)(0, 0, places[:, None], places[None])
    assert found.equal(reference_mask(sequences(), window))


@pytest.fixture
def uncompiled(monkeypatch):
    """FlexAttention as it is without a compiler; on CPUs it has no backward pass."""
    monkeypatch.setattr(
        transformers_flex,
        "compile_friendly_flex_attention",
        lambda *args, training, **kwargs: flex_attention.flex_attention(*args, **kwargs),
    )
    create = flex_attention.create_block_mask
    monkeypatch.setattr(masking_utils, "create_block_mask", lambda *args, _compile, **kwargs: create(*args, **kwargs))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dense_mask_serves_where_flex_attention_has_no_backward_pass(family, uncompiled, monkeypatch):
    expected = alone(build(family).train())
    model = build(family)
    own = model.config._attn_implementation
    packs = probe.prepare_packing(model, GPU)
    assert packs == (family != "GptOss")  # to whose own mask packed sequences are one
    assert model.config._attn_implementation == own
    assert probe.prepare_sharing(model, GPU)
    assert model.config._attn_implementation == f"rlkernels_by_mask_{own}_{own}"
    made, sees = [], masks.sees
    monkeypatch.setattr(masks, "sees", lambda *args: made.append(args[-1]) or sees(*args))
    model.train()
    if packs:
        assert_same(results(model, sequences(shared=False)), expected)
        assert not made
    found = results(model, sequences())
    assert len(made) == len(set(made)) >= 1  # for all layers of one window
    assert_same(found, expected)
    assert_branches_do_not_see_each_other(model)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "GptOss"])
def test_flex_attention_gets_a_block_mask(family, uncompiled):
    """Forward alone, as that is what there is on CPUs; sinks need more of it than that."""
    expected = alone(build(family).train())[0]
    model = build(family)
    model.set_attn_implementation(implementations.by_mask(model.config._attn_implementation, "flex_attention"))
    batch = Batch.lay_out(sequences(), CPU)
    with torch.no_grad():
        found = scoring.token_logprobs(model.eval(), batch, fused=False)[batch.mask]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


UNSHARED = {
    "Mamba": {"state_size": 4, "num_hidden_layers": 1},
    "Bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": "auto", "mamba_d_state": 8},
    "Bloom": {"n_head": 4, "n_layer": 2},
}


@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
@pytest.mark.parametrize("family", UNSHARED)
def test_other_models_are_not_shared_and_say_so(family, device, uncompiled, caplog):
    sizes = SIZES if family == "Bamba" else {"vocab_size": 97, "hidden_size": 32}
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**sizes, **UNSHARED[family]})
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    probe.prepare_packing(model, device)
    own = model.config._attn_implementation
    assert not probe.prepare_sharing(model, device)
    assert f"{family}ForCausalLM does not share prefixes: each sequence is run as a whole." in caplog.text
    assert model.config._attn_implementation == own


def test_torch_compile():
    """The model's attention is left out of it, since each layout would be compiled anew."""
    model = build("Mistral").train()
    del model.model.layers[1]
    expected = alone(model)
    assert probe.prepare_packing(model, CPU) and probe.prepare_sharing(model, CPU)
    compiled = torch.compile(model, backend="eager")
    assert_same(results(compiled, sequences()), expected)
    assert_same(results(compiled, sequences()[2:]), results(model, sequences()[2:]))
