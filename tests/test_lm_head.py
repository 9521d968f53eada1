"""wrap_lm_head against the model's own logits: tiny random models, made in the process."""

import copy
import functools
import inspect
import pickle
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from cases import thorough
from rlkernels import linear_policy_loss, linear_token_logprobs, policy_loss, unwrap_lm_head, wrap_lm_head

VOCAB, BATCH, TIME = 101, 3, 9
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=32,
    initializer_range=0.3,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
GPT2 = dict(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=32, initializer_range=0.3)
MODELS = {
    "llama": ("Llama", {}),
    "llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True}),
    "gemma3": ("Gemma3", {"sliding_window": 4}),
    "gemma3, softcap": ("Gemma3", {"final_logit_softcapping": 2.5}),
    "gemma2": ("Gemma2", {"final_logit_softcapping": 3.0, "sliding_window": 4}),
    "mistral": ("Mistral", {}),
    "phi": ("Phi", {}),
    "gpt2": ("GPT2", None),
    "olmo": ("Olmo", {}),
    "olmo2": ("Olmo2", {}),
    "granite": ("Granite", {"logits_scaling": 3.0}),
    "cohere": ("Cohere", {"logit_scale": 0.3}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),  # experts multiply in float32 at most
}


def build(name="llama", dtype=torch.float64, seed=0, **options):
    family, own = MODELS[name]
    config_class = getattr(transformers, "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config")
    taken = inspect.signature(config_class).parameters
    sizes = GPT2 if own is None else {key: value for key, value in SIZES.items() if key in taken}
    config = config_class(**{**sizes, **(own or {}), **options})
    torch.manual_seed(seed)
    suffix = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    model = getattr(transformers, family + suffix)(config).to(dtype).eval()
    for name, parameter in model.named_parameters():  # biases, the LM head's too, begin as zeros
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


def batch(seed=1, rows=BATCH):
    """Tokens, a mask with padding, and labels, some of them scored."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, VOCAB, (rows, TIME), generator=generator)
    mask = torch.ones_like(tokens)
    mask[0, -2:] = 0
    labels = tokens.masked_fill(mask == 0, -100)
    labels[:, 2:4] = -100
    return {"input_ids": tokens, "attention_mask": mask}, labels


def from_logits(model, inputs, labels, temperature=1.0):
    logits = model(**inputs).logits
    log_p = (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).log_softmax(-1)
    before = nn.functional.pad(log_p, (0, 0, 1, -1))
    scored = labels != -100
    scored[:, 0] = False
    logprobs = before.gather(-1, labels.clamp(min=0)[..., None])[..., 0].where(scored, 0)
    entropy = -(before.exp() * before).sum(-1).where(scored, 0)
    return logprobs, entropy


def from_head(model, inputs, labels, **options):
    output = model(**inputs, labels=labels, return_token_logprobs=True, **options)
    assert output.logits is None
    return output.token_logprobs, output.entropy


def upstream(labels):
    return torch.linspace(-1, 1, labels.numel()).view(labels.shape)


def gradients(model, logprobs, entropy):
    model.zero_grad()
    (upstream(logprobs) * logprobs + 0.3 * entropy).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


CLOSE = {torch.float64: dict(rtol=1e-5, atol=1e-6), torch.float32: dict(rtol=1e-3, atol=2e-4)}


def assert_same_as_logits(wrapped, inputs, labels, close=CLOSE[torch.float64], seed=None, **options):
    """Values and the gradients of all parameters; with a seed, dropout too."""
    results = []
    for function in (from_logits, from_head):
        if seed is not None:
            torch.manual_seed(seed)
        values = function(wrapped, inputs, labels, **options)
        results.append((values, gradients(wrapped, *values)))
    (values, grads), (values_head, grads_head) = results
    for got, wanted in zip(values_head, values, strict=True):
        torch.testing.assert_close(got, wanted, **close)
        assert wanted.any()
    assert grads_head.keys() == grads.keys() != set()
    for name, wanted in grads.items():
        torch.testing.assert_close(grads_head[name], wanted, **close, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", [name for name in MODELS if name != "mixtral"])
def test_values_and_gradients_are_those_of_the_models_logits(name):
    model = build(name)
    wrap_lm_head(model)
    assert_same_as_logits(model, *batch())


def test_measured_scale_and_softcap():
    def found(name, **options):
        return wrap_lm_head(build(name, torch.bfloat16, **options)).forward.wrap_lm_head[2]

    assert found("llama")["scale"] == 1.0
    assert found("llama")["softcap"] is None
    assert found("granite")["scale"] == pytest.approx(1 / 3, rel=1e-12)
    assert found("cohere")["scale"] == pytest.approx(0.3, rel=1e-12)
    assert found("gemma2")["softcap"] == pytest.approx(3.0, rel=1e-12)
    assert found("gemma2", final_logit_softcapping=None)["softcap"] is None


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi", "granite", "mixtral"])
def test_float32(name):
    model = wrap_lm_head(build(name, torch.float32))
    assert_same_as_logits(model, *batch(), close=CLOSE[torch.float32])


def test_alignment_and_shapes():
    model = wrap_lm_head(build())
    inputs, labels = batch()
    output = model(**inputs, labels=labels, return_token_logprobs=True)
    assert output.token_logprobs.shape == output.entropy.shape == labels.shape
    assert not output.token_logprobs[:, 0].any()
    assert not output.token_logprobs[labels == -100].any()
    assert (output.token_logprobs[:, 1:][labels[:, 1:] != -100] < 0).all()
    row = model(input_ids=inputs["input_ids"][1:2, :5]).logits[0, -1].log_softmax(-1)
    assert output.token_logprobs[1, 5].item() == pytest.approx(row[labels[1, 5]].item(), rel=1e-6)


def test_shifted_labels():
    model = wrap_lm_head(build())
    inputs, labels = batch()
    wanted, _ = from_head(model, inputs, labels)
    shifted = labels.roll(-1, 1)
    shifted[:, -1] = 5
    inputs = {name: values[:, :-1] for name, values in inputs.items()}
    output = model(**inputs, shift_labels=shifted[:, :-1], return_token_logprobs=True)
    torch.testing.assert_close(output.token_logprobs, wanted[:, 1:])


@pytest.mark.parametrize("family", ["gemma2", "phi"])
def test_a_function_of_the_head(family):
    """linear_policy_loss in the forward pass of a model with an adapter on the head."""
    model = wrap_lm_head(lora(build(family), target_modules=["lm_head"]), temperature=0.5)
    inputs, labels = batch()
    advantages = torch.tensor([1.0, -1.0, 0.5])
    logprobs, _ = from_logits(model, inputs, labels)
    loss, _ = policy_loss(logprobs[:, 1:].float(), None, advantages, labels[:, 1:] != -100)
    mask = torch.nn.functional.pad(labels[:, 1:] != -100, (0, 1))
    function = functools.partial(linear_policy_loss, old_logprobs=None, advantages=advantages, mask=mask)
    output = model(**inputs, labels=labels, head_function=function)
    assert output.logits is None and "token_logprobs" not in output
    torch.testing.assert_close(output.head_output[0].float(), loss, rtol=1e-5, atol=1e-6)
    wanted = gradients(model, loss, 0 * loss)
    for name, gradient in gradients(model, output.head_output[0], 0 * loss.detach()).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-5)


def test_a_call_in_another_thread_has_its_own_labels():
    model = wrap_lm_head(build())
    inputs, labels = batch()
    wanted = [model(**inputs).logits, model(**inputs, labels=labels, return_token_logprobs=True).token_logprobs]
    found = []

    def others():
        found.append(model(**inputs).logits)
        found.append(model(**inputs, labels=labels, return_token_logprobs=True).token_logprobs)

    def in_the_middle(hidden, *args, **options):
        thread = threading.Thread(target=others)
        thread.start()
        thread.join()
        return hidden.shape

    output = model(**inputs, labels=labels, head_function=in_the_middle)
    assert output.head_output == (BATCH, TIME, 32)
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


@pytest.fixture
def hasty():
    """Threads take turns all the time."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def test_calls_from_several_threads_are_those_of_one(hasty):
    """Values and gradients, also of calls that want logits."""
    model = wrap_lm_head(build("gemma2"))
    batches = [batch(seed) for seed in range(8)]

    def call(inputs, labels, plain=False):
        values = (from_logits if plain else from_head)(model, inputs, labels)
        loss = (upstream(values[0]) * values[0] + 0.3 * values[1]).sum()
        return *values, *torch.autograd.grad(loss, list(model.parameters()))

    wanted = [call(*each, plain) for each in batches for plain in (False, True)]
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(call, *each, plain) for _ in range(3) for each in batches for plain in (False, True)]
        for future, values in zip(futures, 3 * wanted, strict=True):
            torch.testing.assert_close(future.result(), values, rtol=1e-12, atol=1e-14)
    assert not model.lm_head._forward_pre_hooks


def test_a_call_within_a_call():
    """A call of the model itself, and one of a copy that is made meanwhile."""
    model = wrap_lm_head(build())
    inputs, labels = batch()
    others, other_labels = batch(seed=2, rows=2)
    wanted, wanted_others = from_head(model, inputs, labels), from_head(model, others, other_labels)
    logits = model(**others).logits
    found, copies = [], []

    def within(*args, **options):
        copies.append(copy.deepcopy(model))
        for each in (model, copies[-1]):
            found.extend([from_head(each, others, other_labels), model(**others).logits])
        return linear_token_logprobs(*args, **options, return_entropy=True)

    output = model(**inputs, labels=labels, head_function=within)
    torch.testing.assert_close(found, [wanted_others, logits] * 2)
    torch.testing.assert_close(output.head_output[0][:, :-1], wanted[0][:, 1:])
    torch.testing.assert_close(from_head(copies[0], inputs, labels), wanted)


def test_a_call_that_fails_leaves_nothing():
    model = wrap_lm_head(build())
    wanted = from_head(model, *batch())
    inputs, labels = batch()
    for what in (model.model, model.lm_head):
        handle = what.register_forward_pre_hook(lambda *_: 1 / 0)
        for options in ({}, {"return_token_logprobs": True}):
            with pytest.raises(ZeroDivisionError):
                model(**inputs, labels=labels, **options)
        handle.remove()
        assert not model.lm_head._forward_pre_hooks
    torch.testing.assert_close(from_head(model, *batch()), wanted)


def test_a_pickle_can_be_wrapped_again():
    model = wrap_lm_head(build())
    again = pickle.loads(pickle.dumps(model))
    assert_same_as_logits(wrap_lm_head(again), *batch())
    torch.testing.assert_close(from_head(again, *batch()), from_head(model, *batch()))


def test_one_token_is_predicted_by_none():
    model = wrap_lm_head(build())
    tokens = torch.full((2, 1), 5)
    logprobs, entropy = from_head(model, {"input_ids": tokens}, tokens)
    assert logprobs.tolist() == entropy.tolist() == [[0.0], [0.0]]


def test_nothing_scored_gives_gradients_of_zero():
    model = wrap_lm_head(build())
    inputs, labels = batch()
    found = gradients(model, *from_head(model, inputs, torch.full_like(labels, -100)))
    assert found.keys() == dict(model.named_parameters()).keys()
    assert not any(gradient.any() for gradient in found.values())


def test_options_at_wrapping_and_at_the_call():
    inputs, labels = batch()
    model = build("gemma2")
    wanted = from_logits(model, inputs, labels, temperature=0.7)
    plain, _ = from_logits(model, inputs, labels)
    wrap_lm_head(model, temperature=0.7, return_entropy=False, outputs=("is_top1", "mean_logit"))
    output = model(**inputs, labels=labels, return_token_logprobs=True)
    torch.testing.assert_close(output.token_logprobs, wanted[0])
    assert "entropy" not in output
    likeliest = nn.functional.pad(model(**inputs).logits.argmax(-1), (1, -1))
    assert output.is_top1.dtype == torch.bool
    assert torch.equal(output.is_top1, (likeliest == labels) & (torch.arange(TIME) > 0))
    options = {"temperature": 1.0, "return_entropy": True, "outputs": ()}
    output = model(**inputs, labels=labels, return_token_logprobs=True, logprob_options=options)
    torch.testing.assert_close(output.token_logprobs, plain)
    assert "is_top1" not in output and "entropy" in output


def test_the_rest_of_the_output_is_the_models():
    model = build("mixtral", torch.float32)
    inputs, labels = batch()
    asked = {"output_hidden_states": True, "output_router_logits": True, "use_cache": True}
    own = model(**inputs, **asked)
    output = wrap_lm_head(model)(**inputs, **asked, labels=labels, return_token_logprobs=True, return_dict=False)
    assert isinstance(output, type(own))
    assert output.logits is None and output.loss is None
    assert output.past_key_values.get_seq_length() == TIME
    torch.testing.assert_close(output.hidden_states, own.hidden_states, rtol=0, atol=0)
    torch.testing.assert_close(output.aux_loss, own.aux_loss, rtol=0, atol=0)


def test_logits_never_exist():
    model = wrap_lm_head(build())
    sizes = []
    model.lm_head.register_forward_hook(lambda head, inputs, output: sizes.append(output.numel()))
    inputs, labels = batch()
    model(**inputs, labels=labels, return_token_logprobs=True)
    assert sizes == [0]


def test_without_the_argument_the_model_is_as_before(tmp_path):
    model = build()
    inputs, labels = batch()
    plain, wrapped = model, wrap_lm_head(copy.deepcopy(model))
    assert list(wrapped.state_dict()) == list(plain.state_dict())
    assert inspect.signature(wrapped.forward) == inspect.signature(plain.forward)
    assert torch.equal(wrapped(**inputs, labels=labels).loss, plain(**inputs, labels=labels).loss)
    assert torch.equal(wrapped(**inputs)[0], plain(**inputs)[0])
    sampled = [each.generate(**inputs, max_new_tokens=4, do_sample=False) for each in (plain, wrapped)]
    assert torch.equal(*sampled)
    wrapped.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), plain.parameters(), strict=True))


def test_unwrapping_leaves_no_trace():
    model = build().train()
    before, modules, random = dict(vars(model)), [dict(vars(each)) for each in model.modules()], torch.get_rng_state()
    wrap_lm_head(model)
    assert torch.equal(torch.get_rng_state(), random)
    inputs, labels = batch()
    from_head(model, inputs, labels)
    assert unwrap_lm_head(model) is model
    assert vars(model) == before
    assert [dict(vars(each)) for each in model.modules()] == modules
    assert not any(each._forward_pre_hooks or each._forward_hooks for each in model.modules())
    with pytest.raises(ValueError, match="not the one that wrap_lm_head gave it"):
        unwrap_lm_head(model)


def over(forward, calls=None):
    @functools.wraps(forward)
    def function(*args, **kwargs):
        if calls is not None:
            calls.append(1)
        return forward(*args, **kwargs)

    return function


def test_other_forwards_of_the_instance_go_on_serving():
    """As accelerate's, under ours for device hooks, and over it for mixed precision."""
    calls = []
    model = build()
    model.forward = under = over(model.forward, calls)
    wrap_lm_head(model)
    calls.clear()
    assert_same_as_logits(model, *batch())
    assert len(calls) == 2
    wrapped = model.forward
    model.forward = types.MethodType(over(wrapped.__func__, calls), model)
    with pytest.raises(ValueError, match="not the one"):
        unwrap_lm_head(model)
    wrap_lm_head(model)  # over what is over the first
    calls.clear()
    assert_same_as_logits(model, *batch())
    assert len(calls) == 4
    unwrap_lm_head(model)
    model.forward = wrapped
    assert unwrap_lm_head(model).forward is under


def test_a_deep_copy_under_others_forwards_is_independent():
    model = wrap_lm_head(build())
    for again in range(2):
        model.forward = types.MethodType(over(model.forward.__func__), model)
        if again:
            wrap_lm_head(model)
        twin = copy.deepcopy(model)
        with torch.no_grad():
            twin.lm_head.weight.mul_(2)
        assert_same_as_logits(model, *batch())
        assert_same_as_logits(twin, *batch())
        assert not torch.equal(from_head(model, *batch())[0], from_head(twin, *batch())[0])


def test_wrapping_again_replaces_the_options():
    model = wrap_lm_head(build(), temperature=0.3)
    wrap_lm_head(model)
    assert_same_as_logits(model, *batch())
    unwrap_lm_head(model)
    assert "forward" not in vars(model)


def test_a_deep_copy_is_wrapped_and_independent():
    model = wrap_lm_head(build())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_same_as_logits(twin, *batch())
    unwrap_lm_head(model)
    from_head(twin, *batch())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    inputs, labels = batch()
    model = build()
    wanted = gradients(model, *from_logits(model, inputs, labels))
    wrap_lm_head(model).train()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    found = gradients(model, *from_head(model, inputs, labels))
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], **CLOSE[torch.float64])


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi"])
def test_autocast(name):
    """Under autocast the head multiplies in bfloat16, ours as the model's own."""
    inputs, labels = batch()
    model = wrap_lm_head(build(name, torch.float32))
    exact = from_logits(model, inputs, labels)
    with torch.autocast("cpu", torch.bfloat16):
        wanted, found = from_logits(model, inputs, labels), from_head(model, inputs, labels)
    for got, own, truth in zip(found, wanted, exact, strict=True):
        assert (own - truth).abs().max() > 1e-3  # autocast makes a difference
        assert got.dtype == torch.float32
        # What is left is the rounding of logits of about 8 to bfloat16, 2^-6.
        torch.testing.assert_close(got, own, rtol=0, atol=2**-5)
    found_grads, wanted_grads = gradients(model, *found), gradients(model, *wanted)
    for name, gradient in wanted_grads.items():
        assert found_grads[name].dtype == gradient.dtype
        assert nn.functional.cosine_similarity(found_grads[name].flatten(), gradient.flatten(), 0) > 0.999


@pytest.mark.parametrize("compiler", ["eager", thorough("aot_eager")])
def test_torch_compile(compiler):
    """Backbone and head in one graph, which breaks where the hook on the head comes and goes; later calls compile
    nothing."""
    inputs, labels = batch()
    model = wrap_lm_head(build("gemma2", torch.float32, num_hidden_layers=1))
    wanted = from_head(model, inputs, labels)
    wanted_grads = gradients(model, *wanted)
    graphs = CompileCounterWithBackend(compiler)
    compiled = torch.compile(model, backend=graphs)
    for _ in range(3):
        found = from_head(compiled, inputs, labels)
        torch.testing.assert_close(found, wanted)
        for name, gradient in gradients(model, *found).items():
            torch.testing.assert_close(gradient, wanted_grads[name])
        assert graphs.frame_count == 3
    assert compiled(**inputs).logits.shape == (BATCH, TIME, VOCAB)


def test_distributed(tmp_path, forked):
    """The gradients of two processes are those of one on the batches of both."""
    code, printed = forked.run_together(2, str(Path(__file__).with_name("wrapped_model_worker.py")), str(tmp_path))
    assert code == 0, printed[-4000:]
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    inputs, labels = batch(rows=4)
    for case in found[0]:
        model = wrap_lm_head(build(dtype=torch.float32))
        if case.endswith("tied"):
            model.lm_head.weight = model.model.embed_tokens.weight
        if case.endswith("nothing scored on one"):
            labels[2:] = -100
        wanted = gradients(model, *from_head(model, inputs, labels))
        for rank in range(2):
            assert found[rank][case].keys() == wanted.keys()
            for name, gradient in found[rank][case].items():
                torch.testing.assert_close(gradient * 2, wanted[name], rtol=1e-4, atol=1e-5)  # both take the mean


# PEFT


def lora(model, *, seed=3, **options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj"], **options})
    torch.manual_seed(seed)
    return randomize(peft.get_peft_model(model, config, autocast_adapter_dtype=False)).double()


def randomize(model):
    """B begins as zeros, which would hide whatever is done with it."""
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


HEAD = ["q_proj", "lm_head"]


def test_lora_on_attention():
    model = wrap_lm_head(lora(build()))
    assert_same_as_logits(model, *batch())
    assert "lora" in next(iter(gradients(model, *from_head(model, *batch()))))


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi"])
def test_lora_on_the_head(name):
    model = wrap_lm_head(lora(build(name), target_modules=HEAD, use_rslora=True))
    assert_same_as_logits(model, *batch())


def test_lora_with_dropout():
    model = wrap_lm_head(lora(build(), target_modules=["lm_head"], lora_dropout=0.4)).train()
    assert_same_as_logits(model, *batch(), seed=5)


def test_adapters_that_come_and_go_after_wrapping():
    peft = pytest.importorskip("peft")
    base = wrap_lm_head(build())
    model = lora(base, target_modules=HEAD)
    assert_same_as_logits(model, *batch())
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["lm_head"]), autocast_adapter_dtype=False)
    randomize(model).double()
    model.base_model.set_adapter(["default", "second"])
    assert_same_as_logits(model, *batch())
    model.set_adapter("second")
    assert_same_as_logits(model, *batch())
    alone = from_head(model, *batch())
    with model.disable_adapter(), torch.no_grad():
        wanted = from_head(model, *batch())
        torch.testing.assert_close(wanted, from_logits(model, *batch()))
        assert not torch.allclose(wanted[0], alone[0])
    model.merge_adapter()
    with torch.no_grad():
        torch.testing.assert_close(from_head(model, *batch()), alone)
        with model.disable_adapter():  # unmerges
            torch.testing.assert_close(from_head(model, *batch()), wanted)
    assert_same_as_logits(model, *batch())
    model.unload()
    assert type(base.lm_head) is nn.Linear
    torch.testing.assert_close(from_head(base, *batch()), wanted)


def test_lora_kept_in_float32():
    """PEFT's default under a bfloat16 model: the head's adapter is rounded to the dtype of what it is added to."""
    model = wrap_lm_head(lora(build(), target_modules=["lm_head"])).bfloat16()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    for got, own in zip(from_head(model, *batch()), from_logits(model, *batch()), strict=True):
        torch.testing.assert_close(got, own, rtol=0, atol=2**-3)


@pytest.mark.parametrize("tied", [False, True])
def test_modules_to_save(tied):
    model = wrap_lm_head(build("llama, tied" if tied else "llama"))
    model = lora(model, modules_to_save=["lm_head"], ensure_weight_tying=tied)
    assert_same_as_logits(model, *batch())
    with model.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(from_head(model, *batch()), from_logits(model, *batch()))


def test_prompt_tuning_counts_its_virtual_tokens():
    peft = pytest.importorskip("peft")
    model = wrap_lm_head(build(dtype=torch.float32))
    model = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    inputs, labels = batch()
    logprobs, _ = from_head(model, inputs, labels)
    wanted, _ = from_logits(model, inputs, nn.functional.pad(labels, (2, 0), value=-100))
    torch.testing.assert_close(logprobs, wanted)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"target_modules": ["lm_head"], "use_dora": True}, "'default' of its LM head is DoraLinearVariant, not plain"),
        ({"target_modules": ["lm_head"], "lora_bias": True}, "'default' of its LM head is LoRA with a bias, not plain"),
        ({"trainable_token_indices": {"lm_head": [5]}}, "its LM head is peft.*TrainableTokens"),
    ],
)
def test_other_adapters_on_the_head_are_refused(options, reason):
    with pytest.raises(ValueError, match=reason):
        wrap_lm_head(lora(build(), **options))
    model = lora(wrap_lm_head(build()), **options)
    with pytest.raises(ValueError, match=reason):
        from_head(model, *batch())


def test_adapters_on_attention_that_hold_the_models_forward():
    """A LLaMA-Adapter calls the forward that the model had: wrapping it later would change nothing."""
    peft = pytest.importorskip("peft")
    config = peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=1, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="AdaptionPromptModel around it holds its present forward"):
        wrap_lm_head(peft.get_peft_model(build(dtype=torch.float32), config))
    model = peft.get_peft_model(wrap_lm_head(build(dtype=torch.float32)), config)
    torch.testing.assert_close(from_head(model, *batch()), from_logits(model, *batch()))


# What is refused


class Odd(transformers.LlamaForCausalLM):
    """Does something that no config tells of."""

    def __init__(self, config):
        super().__init__(config)
        self.temper = nn.Parameter(torch.full((), 1.5))
        self.bias = nn.Parameter(torch.ones(config.vocab_size), requires_grad=False)

    def forward(self, input_ids=None, attention_mask=None, return_dict=True, **kwargs):
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs).last_hidden_state
        return transformers.modeling_outputs.CausalLMOutputWithPast(logits=self.odd(hidden))


def odd(function):
    config = build().config
    torch.manual_seed(0)
    return type("Odd", (Odd,), {"odd": function})(config).double()


def leave_out(logits):
    """As Chameleon does with its images."""
    logits[:, :, [7, 9]] = torch.finfo(torch.float32).min
    return logits


ODD = {
    "a power": (lambda self, h: self.lm_head(h) ** 3, "neither scaled nor soft-capped"),
    "another cap": (lambda self, h: self.lm_head(h).clamp(-5, 5), "changed in another way: 1.00024 from the LM head"),
    "a bias": (lambda self, h: self.lm_head(h) + self.bias, "changed in another way: .* from the LM head becomes"),
    "a mask": (lambda self, h: self.lm_head(h).index_fill(-1, torch.tensor([7]), -1e9), "becomes -1e\\+09"),
    "a mask in place": (lambda self, h: self.lm_head(h).index_fill_(-1, torch.tensor([7]), -1e9), "becomes -1e\\+09"),
    "tokens left out in place": (lambda self, h: leave_out(self.lm_head(h)), "changed in another way: .* becomes -3"),
    "another cap in place": (lambda self, h: self.lm_head(h).clamp_(-5, 5), "1.00024 from the LM head becomes"),
    "negative": (lambda self, h: -self.lm_head(h), "changed in another way"),
    "normalised": (lambda self, h: self.lm_head(h).log_softmax(-1), "changed in another way"),
    "rounded": (lambda self, h: (self.lm_head(h) * 0.3).bfloat16(), "changed in another way"),
    "a parameter": (lambda self, h: self.lm_head(h) * self.temper, "depend on more than the LM head's output"),
    "hidden states": (lambda self, h: self.lm_head(h) + h.mean(-1, keepdim=True), "depend on more"),
    "cut": (lambda self, h: self.lm_head(h)[..., :90], r"the LM head's \[2, 4, 101\] become logits \[2, 4, 90\]"),
    "the last alone": (lambda self, h: self.lm_head(h[:, -1:]), r"gets hidden states \[2, 1, 32\] of tokens \[2, 4\]"),
    "again": (lambda self, h: self.lm_head(h.repeat(1, 2, 1)), r"gets hidden states \[2, 8, 32\] of tokens \[2, 4\]"),
    "twice": (lambda self, h: self.lm_head(h) + self.lm_head(h.flip(1)), "was called 2 times, not once"),
    "by its weight": (lambda self, h: nn.functional.linear(h, self.lm_head.weight), "was called 0 times, not once"),
    "flattened": (lambda self, h: self.lm_head(h.flatten(0, 1)), r"gets \[\[8, 32\]\] and \[\], not just"),
    "future": (lambda self, h: self.lm_head(h + h.mean(1, keepdim=True)), "positions see the tokens after them"),
    "fails": (lambda self, h: self.lm_head(h) + torch.ones(7), "could not be run on four tokens, RuntimeError"),
}


@pytest.mark.parametrize("what", ODD)
def test_logits_of_another_kind_are_refused(what):
    function, reason = ODD[what]
    model = odd(function)
    with pytest.raises(ValueError, match=f"^Odd cannot give log-probabilities without logits: .*(?:{reason})"):
        wrap_lm_head(model)
    assert "forward" not in vars(model)
    assert not model.lm_head._forward_hooks and not model.lm_head._forward_pre_hooks


def test_what_is_done_before_the_head_is_served():
    model = wrap_lm_head(odd(lambda self, h: self.lm_head(h.tanh() * self.temper)))
    assert_same_as_logits(model, *batch())


@pytest.mark.parametrize(
    "function",
    [
        lambda self, h: 4 * torch.tanh(self.lm_head(h) * 0.7 / 4),
        lambda self, h: self.lm_head(h).mul_(0.7 / 4).tanh_() * 4,
        lambda self, h: self.lm_head(h).mul_(0.3),
    ],
    ids=["cap", "cap in place", "scale in place"],
)
def test_a_cap_or_scale_that_no_config_tells_of_is_served(function):
    model = wrap_lm_head(odd(function))
    assert_same_as_logits(model, *batch())


@pytest.mark.parametrize("kind", ["orthogonal", "weight_norm", "old weight_norm"])
def test_a_head_whose_weight_is_computed(kind):
    model = build()
    if kind == "old weight_norm":
        with pytest.warns(FutureWarning):
            nn.utils.weight_norm(model.lm_head)
    else:
        getattr(nn.utils.parametrizations, kind)(model.lm_head)
    assert_same_as_logits(wrap_lm_head(model), *batch())


def test_a_hook_on_the_head_is_measured():
    model = build()
    model.lm_head.register_forward_hook(lambda head, inputs, output: 2 * output)
    wrap_lm_head(model)
    assert_same_as_logits(model, *batch())
    model.lm_head.register_forward_hook(lambda head, inputs, output: output.exp())
    with pytest.raises(ValueError, match="changed in another way"):
        wrap_lm_head(model)


class Head(nn.Linear):
    def forward(self, hidden):
        return super().forward(nn.functional.normalize(hidden, dim=-1))


def test_other_heads_are_refused():
    model = wrap_lm_head(build())
    inputs, labels = batch()

    def refused(reason):
        for attempt in (lambda: wrap_lm_head(model), lambda: from_head(model, inputs, labels)):
            with pytest.raises(ValueError, match=f"LlamaForCausalLM cannot give .*: {reason}"):
                attempt()
        wrap_lm_head(model, scale=1.0)  # unchecked until it is called

    linear = model.lm_head
    model.lm_head = Head(32, VOCAB).double()
    refused("its LM head is .*test_lm_head.Head, not torch.nn.Linear")
    model.lm_head = linear
    linear.forward = lambda hidden: hidden
    refused("the forward of its LM head was replaced")
    del linear.forward
    linear.weight = nn.Parameter(linear.weight.data.to(torch.int8), requires_grad=False)
    refused(r"the weight of its LM head is a Parameter, torch.int8 \[101, 32\] on cpu; wanted a floating-point")
    linear.weight = nn.Parameter(torch.empty(0))
    refused(r"the weight of its LM head is a Parameter, torch.float32 \[0\] on cpu")


def test_other_models_are_refused():
    sizes = dict(vocab_size=VOCAB, d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4)
    encoder_decoder = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))
    with pytest.raises(ValueError, match=r"T5ForConditionalGeneration cannot .* is an encoder-decoder model"):
        wrap_lm_head(encoder_decoder)
    masked = transformers.BertForMaskedLM(
        transformers.BertConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    )
    with pytest.raises(ValueError, match=r"BertForMaskedLM cannot .* positions see the tokens after them"):
        wrap_lm_head(masked)
    with pytest.raises(ValueError, match=r"LlamaModel cannot .* its LM head is builtins.NoneType"):
        wrap_lm_head(build().model)
    with pytest.raises(TypeError, match="model must be a Hugging Face causal LM; got Linear"):
        wrap_lm_head(nn.Linear(2, 3))


def test_a_model_that_cannot_run_yet():
    with torch.device("meta"):
        model = transformers.CohereForCausalLM(build("cohere").config)
    with pytest.raises(ValueError, match=r"wanted a floating-point .*in memory"):
        wrap_lm_head(model)
    wrap_lm_head(model, scale=0.3)
    model.to_empty(device="cpu").double().load_state_dict(build("cohere").state_dict())
    assert model.forward.wrap_lm_head[2] == wrap_lm_head(build("cohere")).forward.wrap_lm_head[2]


def test_bad_calls():
    inputs, labels = batch()
    model = wrap_lm_head(build())
    with pytest.raises(ValueError, match=r"labels must have the shape of the hidden states, \[3, 9\]; got \[3, 8\]"):
        from_head(model, inputs, labels[:, 1:])
    with pytest.raises(ValueError, match=r"labels must have the shape of the hidden states, \[3, 4\]; got \[3, 9\]"):
        from_head(model, inputs, labels, logits_to_keep=4)
    with pytest.raises(ValueError, match="log-probabilities need labels= or shift_labels="):
        model(**inputs, return_token_logprobs=True)
    with pytest.raises(TypeError, match=r"options must be among .*temperature.*; got top_k"):
        from_head(model, inputs, labels, logprob_options={"top_k": 5})
    with pytest.raises(TypeError, match="logprob_options cannot be given with head_function"):
        model(**inputs, labels=labels, head_function=len, logprob_options={"temperature": 0.5})
    with pytest.raises(TypeError, match=r"options must be among .*; got bias"):
        wrap_lm_head(model, bias=None)
    assert not model.lm_head._forward_pre_hooks
    assert_same_as_logits(model, inputs, labels)
