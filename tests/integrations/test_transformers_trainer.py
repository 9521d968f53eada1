"""transformers.Trainer with the fused head in its loss, beside itself: what it logs, which kernels run, its memory."""

import copy
from collections import Counter

import pytest
import torch
import transformers
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from cases import thorough
from counting import counted
from labelled_models import SIZES, VOCAB, batch, build, lora
from peak_memory import peak_memory
from rlkernels import _registry
from rlkernels.integrations.transformers import apply, restore


def rows(count=40):
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(4, 12, (count,), generator=generator).tolist()
    sequences = [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths]
    return [{"input_ids": ids, "labels": [-100] * (len(ids) // 3) + ids[len(ids) // 3 :]} for ids in sequences]


def padded(examples):
    width = max(len(each["input_ids"]) for each in examples)
    columns = {"input_ids": 0, "labels": -100}
    inputs = {
        key: torch.tensor([each[key] + [fill] * (width - len(each[key])) for each in examples])
        for key, fill in columns.items()
    }
    lengths = torch.tensor([len(each["input_ids"]) for each in examples])
    return inputs | {"attention_mask": (torch.arange(width) < lengths[:, None]).long()}


def trainer(model, folder, collator=padded, compute_metrics=None, **options):
    arguments = dict(max_steps=5, logging_steps=1, per_device_train_batch_size=4, learning_rate=1e-2, max_grad_norm=1.0)
    arguments |= dict(use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", seed=0)
    arguments = TrainingArguments(str(folder), **arguments | options)
    return Trainer(
        model,
        arguments,
        data_collator=collator,
        train_dataset=rows(),
        eval_dataset=rows(8),
        compute_metrics=compute_metrics,
    )


def history(each):
    each.train()
    evaluated = each.evaluate()
    logs = [(log["loss"], log["grad_norm"]) for log in each.state.log_history if "grad_norm" in log]
    assert len(logs) == 5
    return torch.tensor([*sum(logs, ()), evaluated["eval_loss"]], dtype=torch.float64), evaluated


def accuracy(prediction):
    hits = prediction.predictions.argmax(-1)[:, :-1] == prediction.label_ids[:, 1:]
    return {"accuracy": hits[prediction.label_ids[:, 1:] != -100].mean()}


RUNS = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "packed": {"collator": DataCollatorWithFlattening()},
    "accumulated batches of packed rows": {
        "collator": DataCollatorWithFlattening(),
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
    },
    "metrics": {"compute_metrics": accuracy},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "checkpointing": {"gradient_checkpointing": True},
}


@pytest.fixture
def kernels(monkeypatch):
    """How often each of our kernels ran."""
    calls, op, call = Counter(), _registry.op, _registry.call

    def counted_call(name, backend, *inputs):
        calls[name] += 1
        return call(name, backend, *inputs)

    monkeypatch.setattr(_registry, "op", lambda name, backend: counted(calls, name, op(name, backend)))
    monkeypatch.setattr(_registry, "call", counted_call)
    return calls


@pytest.mark.parametrize(
    ("name", "run"),
    [
        *(("qwen3, tied", run) for run in RUNS if run != "packed"),
        ("gemma2, softcap", "plain"),
        thorough("qwen3, tied", "packed"),
        thorough("llama", "plain"),
        thorough("cohere, scale", "plain"),
    ],
)
def test_trainer_logs_the_same(name, run, tmp_path, kernels):
    plain = build(name, attn_implementation="eager")
    fused = apply(copy.deepcopy(plain))
    kernels.clear()
    wanted, theirs = history(trainer(plain, tmp_path, **RUNS[run]))
    assert not kernels
    found, ours = history(trainer(fused, tmp_path, **RUNS[run]))
    assert ("policy_loss_forward" in kernels) == (run != "label smoothing")
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
    assert theirs.keys() == ours.keys() and theirs.get("eval_accuracy") == ours.get("eval_accuracy")


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "lm_head"]], ids=["attention", "head"])
def test_trainer_of_an_adapter_logs_the_same(targets, tmp_path):
    runs = [lora(build("llama"), targets), apply(lora(build("llama"), targets))]
    wanted, found = (history(trainer(model, tmp_path))[0] for model in runs)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)


def test_trainer_in_mixed_precision(tmp_path):
    """bfloat16 products differ by their rounding; that loss and gradient are no worse stands above."""
    wanted, found = (
        history(trainer(model, tmp_path, bf16=True, learning_rate=1e-3))[0] for model in (build(), apply(build()))
    )
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0)


def test_trainer_in_mixed_precision_is_undone(tmp_path):
    model = apply(build())
    each = trainer(model, tmp_path, bf16=True)
    each.train()
    with pytest.raises(ValueError, match="was replaced since"):
        restore(model)
    assert apply(model) is model
    each.accelerator.unwrap_model(each.model, keep_fp32_wrapper=False)
    assert restore(model)(**batch()).logits is not None
    assert apply(model)(**batch()).logits is None


def test_evaluation_of_the_loss_alone(tmp_path, kernels):
    model = build()
    wanted = trainer(model, tmp_path).evaluate()["eval_loss"]
    apply(model, skip_logits=True)
    kernels.clear()
    assert trainer(model, tmp_path).evaluate()["eval_loss"] == pytest.approx(wanted, rel=1e-5)
    assert kernels


def test_peak_memory_is_lower():
    """The logits of this step, which would take many times all else, never exist, nor does their gradient."""
    vocab, rows, time = 8192, 8, 128
    torch.manual_seed(0)
    config = transformers.Qwen3Config(**SIZES | {"vocab_size": vocab, "max_position_embeddings": time})
    model = transformers.Qwen3ForCausalLM(config).train()
    tokens = torch.randint(3, vocab, (rows, time))

    def step():
        model.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()

    peaks = []
    for _ in range(2):
        step()
        peaks.append(peak_memory(step))
        apply(model)
    logits = 4 * vocab * rows * time
    assert peaks[0] >= 2 * logits
    # 64 MiB of logits and their gradients may exist at once, and all of these are no more than 32.
    assert peaks[1] <= peaks[0] - logits
