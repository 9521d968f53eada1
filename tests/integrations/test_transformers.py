"""The fused head in the loss of transformers' own models and Trainer, beside these as they are."""

import copy
import pickle
import types

import pytest
import torch
import transformers
from torch import nn

from labelled_models import MODELS, SIZES, VOCAB, batch, build, lora
from rlkernels.integrations.transformers import apply, restore


def packed():
    inputs = batch(1, 12)
    inputs["attention_mask"] = None
    inputs["position_ids"] = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])
    inputs["labels"][0, 5] = -100
    return inputs


def shifted():
    inputs = batch()
    inputs["shift_labels"] = nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:].roll(1, 0)
    return inputs


BATCHES = {
    "mean": batch,
    "num_items": lambda: batch() | {"num_items_in_batch": 40},
    "num_items, tensor": lambda: batch() | {"num_items_in_batch": torch.tensor(40)},
    "packed": packed,
    "shift_labels": shifted,
    "logits_to_keep": lambda: batch() | {"labels": batch()["labels"][:, -4:], "logits_to_keep": 4},
    "none scored": lambda: (
        batch() | {"labels": torch.full_like(batch()["labels"], -100), "num_items_in_batch": torch.tensor(3)}
    ),
    "hidden_states": lambda: batch() | {"output_hidden_states": True},
}


def loss_and_gradients(model, inputs, **options):
    model.zero_grad()
    output = model(**inputs, **options)
    output.loss.backward()
    named = model.named_parameters()
    return output, {name: parameter.grad.clone() for name, parameter in named if parameter.grad is not None}


def assert_same(model, inputs, rtol=1e-5):
    """Applied beside itself with logits: loss and gradients, relative to the largest of each parameter."""
    theirs, wanted = loss_and_gradients(model, inputs, skip_logits=False)
    ours, found = loss_and_gradients(model, inputs)
    assert theirs.logits is not None and ours.logits is None
    assert ours.loss.dtype == theirs.loss.dtype and ours.loss.shape == theirs.loss.shape
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=rtol, atol=0)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        atol = rtol * gradient.abs().max().item()
        torch.testing.assert_close(found[name], gradient, rtol=rtol, atol=atol, msg=lambda text, name=name: name + text)
    assert list(ours) == [key for key in theirs if key != "logits"]
    assert isinstance(ours, type(theirs)) and torch.equal(ours[0], ours.loss)
    return ours


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("case", BATCHES)
def test_loss_and_gradients(name, case):
    assert_same(apply(build(name)), BATCHES[case]())


def test_loss_is_float32_in_float64_too():
    model = apply(build(dtype=torch.float64))
    theirs, ours = (model(**batch(), skip_logits=skip).loss for skip in (False, True))
    assert ours.dtype == theirs.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


def test_labels_that_are_all_ignored_give_nan_without_a_number_of_items():
    inputs = batch()
    inputs["labels"].fill_(-100)
    model = apply(build())
    assert model(**inputs).loss.isnan() and model(**inputs, skip_logits=False).loss.isnan()


@pytest.mark.parametrize("name", ["qwen3, tied", "gemma2, softcap"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True], ids=["parameters", "autocast"])
def test_half_precision_is_no_farther_from_the_truth_than_logits_are(name, dtype, autocast):
    model = build(name, torch.float32 if autocast else dtype)
    truth = copy.deepcopy(model).double()
    apply(model)
    _, wanted = loss_and_gradients(truth, batch())
    logits = truth(**batch()).logits[:, :-1]
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch()["labels"][:, 1:].flatten())
    errors = []
    for skip in (False, True):
        with torch.autocast("cpu", dtype, enabled=autocast):
            output, gradients = loss_and_gradients(model, batch(), skip_logits=skip)
        head = model.get_output_embeddings().weight
        key = next(key for key, parameter in model.named_parameters() if parameter is head)
        errors.append(((output.loss - loss).abs().item(), (gradients[key] - wanted[key]).norm().item()))
    (loss_theirs, head_theirs), (loss_ours, head_ours) = errors
    ulp = torch.finfo(dtype).eps
    assert loss_ours <= loss_theirs + ulp * loss.item()
    assert head_ours <= head_theirs * 1.05 + ulp * wanted[key].norm().item()


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]], ids=["attention", "head"])
@pytest.mark.parametrize("first", [True, False], ids=["applied first", "applied after"])
def test_lora(targets, first):
    model = lora(apply(build("llama")), targets) if first else apply(lora(build("llama"), targets))
    assert_same(model, batch())
    assert "forward" not in vars(restore(model).get_base_model())


@pytest.mark.parametrize("keyword", [True, False])
def test_labels_by_position(keyword):
    model = apply(build())
    inputs = batch()
    wanted = model(**inputs).loss
    order = ["input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "labels"]
    assert torch.equal(model(*(inputs.get(name) for name in order)).loss, wanted)
    with pytest.raises(TypeError, match="input_ids"):
        model(inputs["input_ids"], **inputs)


def test_model_does_what_it_did_where_logits_are_wanted():
    model = build()
    plain = copy.deepcopy(model)
    apply(model)
    inputs = batch()
    unlabelled = {key: value for key, value in inputs.items() if key != "labels"}
    for options in (
        unlabelled,
        inputs | {"return_dict": False},
        inputs | {"ignore_index": 5},
        inputs | {"labels": None},
    ):
        if "ignore_index" in options:
            options = options | {"labels": options["labels"].clamp(min=0)}
        theirs, ours = (each(**options) for each in (plain, model))
        assert type(ours) is type(theirs) and len(ours) == len(theirs)
        theirs, ours = (each if isinstance(each, tuple) else each.to_tuple() for each in (theirs, ours))
        assert torch.equal(ours[0], theirs[0])
    model.eval(), plain.eval()
    assert torch.equal(model(**inputs).logits, plain(**inputs).logits)
    generated = [each.generate(inputs["input_ids"][1:], max_new_tokens=5, do_sample=False) for each in (plain, model)]
    assert torch.equal(*generated)


def test_skip_logits_decides():
    model = build()
    for skip in (None, True, False):
        apply(model, skip_logits=skip)
        for training in (True, False):
            model.train(training)
            assert (model(**batch()).logits is None) == (training if skip is None else skip)
            for said in (True, False):
                assert (model(**batch(), skip_logits=said).logits is None) == said


def test_a_sequence_of_one_token_has_nothing_to_predict():
    model = apply(build())
    inputs = {key: value[:1, :1] for key, value in batch().items()} | {"num_items_in_batch": torch.tensor(1)}
    assert [model(**inputs, skip_logits=skip).loss.item() for skip in (False, True)] == [0, 0]


def test_compiled():
    model = apply(build(num_hidden_layers=1))
    wanted = loss_and_gradients(model, batch())
    torch._dynamo.reset()
    found = loss_and_gradients(torch.compile(model, backend="eager"), batch())
    torch.testing.assert_close(found[0].loss, wanted[0].loss, rtol=1e-5, atol=0)
    assert found[0].logits is None
    for gradient, other in zip(found[1].values(), wanted[1].values(), strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-6)


# Undone, twice, saved


def test_restore_and_twice():
    model = build()
    attributes, before = set(vars(model)), model(**batch()).loss
    assert restore(model) is model
    assert apply(apply(model)) is model
    fused = model(**batch())
    assert fused.logits is None
    assert restore(restore(model)) is model
    assert set(vars(model)) == attributes
    output = model(**batch())
    assert output.logits is not None and torch.equal(output.loss, before)
    assert apply(model)(**batch()).logits is None


def test_copies_pickles_and_checkpoints(tmp_path):
    model = build("llama")
    names = list(model.state_dict())
    apply(model)
    assert list(model.state_dict()) == names
    wanted = model(**batch()).loss
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.mul_(2)
    assert model(**batch()).loss == wanted != twin(**batch()).loss
    assert twin(**batch()).logits is None
    loaded = pickle.loads(pickle.dumps(model))
    model.save_pretrained(tmp_path)
    for other in (loaded, transformers.AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert type(other) is type(model) and restore(other) is other
        output = other.train()(**batch())
        assert output.logits is not None
        torch.testing.assert_close(output.loss, wanted, rtol=1e-5, atol=0)
        assert apply(other)(**batch()).logits is None


def test_restore_under_another_forward():
    model = apply(build())
    ours = model.forward
    for theirs in (torch.no_grad()(ours), types.MethodType(torch.no_grad()(ours.__func__), model)):
        model.forward = theirs
        with pytest.raises(ValueError, match="forward of Qwen3ForCausalLM was replaced since"):
            restore(model)
        assert model.forward is theirs and model(**batch()).logits is None


# What is refused


def test_replicas_of_data_parallel():
    model = apply(build())
    message = r"Qwen3ForCausalLM has the fused head in its loss, which torch\.nn\.DataParallel"
    for each in (model, copy.deepcopy(model)):
        with pytest.raises(RuntimeError, match=message):
            each._replicate_for_data_parallel()
    for each in (restore(model), pickle.loads(pickle.dumps(apply(build())))):
        assert type(each._replicate_for_data_parallel()) is type(each)


class ZLoss(transformers.Qwen3ForCausalLM):
    def forward(self, input_ids=None, labels=None, **kwargs):
        output = super().forward(input_ids, labels=labels, **kwargs)
        if output.loss is not None:
            output.loss = output.loss + 1e-3 * output.logits.logsumexp(-1).square().mean()
        return output


class OtherHead(transformers.Qwen3ForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.lm_head = nn.Sequential(nn.Linear(config.hidden_size, config.vocab_size))


class OtherAuxLoss(transformers.MixtralForCausalLM):
    def forward(self, input_ids=None, labels=None, **kwargs):
        output = super().forward(input_ids, labels=labels, **kwargs)
        if output.loss is not None and output.aux_loss is not None:
            output.loss = output.loss + output.aux_loss
        return output


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        # Its config asks for no auxiliary loss, and a caller may.
        (OtherAuxLoss, r"OtherAuxLoss cannot have the fused head in its loss: its loss is not the cross-entropy"),
        (ZLoss, r"ZLoss cannot have the fused head in its loss: its loss is not the cross-entropy"),
        (OtherHead, r"OtherHead cannot give log-probabilities without logits: its LM head is .*Sequential"),
    ],
)
def test_unknown_model_is_named(kind, message):
    model = kind(kind.config_class(**SIZES, tie_word_embeddings=False))
    with pytest.raises(ValueError, match=message):
        apply(model)
    assert "forward" not in vars(model)


def test_own_loss_function_is_refused():
    model = build()
    model.loss_function = lambda logits, labels, vocab_size, **_: logits.square().mean()
    with pytest.raises(ValueError, match="Qwen3ForCausalLM cannot have the fused head"):
        apply(model)
    assert model.training


def test_other_kinds_of_model():
    sizes = dict(vocab_size=VOCAB, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0))
    with pytest.raises(ValueError, match=r"T5ForConditionalGeneration .*encoder-decoder"):
        apply(t5)
    for other in (nn.Linear(2, 2), "a name"):
        with pytest.raises(TypeError, match="model must be a Hugging Face causal LM"):
            apply(other)
