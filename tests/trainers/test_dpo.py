"""DPOTrainer end to end on a tiny model: learning, resuming, references, what is kept of them on disk, bad input."""

import dataclasses
import errno
import math
import os
from functools import partial
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from transformers import HfArgumentParser, MambaConfig, MambaForCausalLM, TrainingArguments

import rlkernels.ops.preference_loss as op
from cases import thorough
from rlkernels.trainers import DPOConfig, DPOTrainer, dpo
from rlkernels.trainers.base import reference_cache, reporting
from rlkernels.trainers.base import trainer as base_trainer
from rlkernels.trainers.base.reference_cache import hash_model
from rlkernels.trainers.batch import scoring
from rlkernels.trainers.batch.batch import Batch
from rlkernels.trainers.data import preference_pair, prepare, sequences_of

PAIRS = [
    {"prompt": "ab" + "c" * (i % 5) + "d", "chosen": "ae" + "i" * (i % 3), "rejected": "x" * (1 + i % 4) + "y"}
    for i in range(13)
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "rlkernels"


def logps(model, batch: Batch, *, fused: bool) -> torch.Tensor:
    """The log-probability of each completion."""
    return batch.sequence_sums(scoring.token_logprobs(model, batch, fused=fused))


def first_pairs(trainer, count=3) -> Batch:
    """The first rows of the dataset, each sequence as a whole, so that any model can run them."""
    pairs = [sequences_of(trainer.train_dataset[index]) for index in range(count)]
    return Batch.lay_out([sequence for side in zip(*pairs, strict=True) for sequence in side], torch.device("cpu"))


@pytest.fixture
def make_trainer(make_model, tokenizer, run_options):
    def make(model=None, train_dataset=PAIRS, eval_dataset=None, ref_model=None, peft_config=None, **options):
        options = {
            **run_options,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 3e-3,
            "max_steps": 4,
        } | options
        return DPOTrainer(
            make_model() if model is None else model,
            DPOConfig(**options),
            train_dataset,
            eval_dataset,
            tokenizer,
            ref_model=ref_model,
            peft_config=peft_config,
        )

    return make


def history(trainer) -> list[dict]:
    """What was logged, but for timings."""
    timings = ("runtime", "per_second", "total_flos", "train_loss")
    logs = [{k: v for k, v in log.items() if not k.endswith(timings)} for log in trainer.state.log_history]
    return [log for log in logs if "loss" in log or "eval_loss" in log]


def weights(trainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def lora():
    return pytest.importorskip("peft").LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def test_learns(make_trainer):
    options = {"max_steps": 30, "eval_strategy": "steps", "eval_steps": 10}
    trainer = make_trainer(train_dataset=PAIRS[3:], eval_dataset=PAIRS[:3], **options)
    before = trainer.evaluate()
    assert before["eval_loss"] == pytest.approx(0.6931, abs=1e-4)
    assert before["eval_rewards/accuracies"] == before["eval_rewards/margins"] == 0
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < 0.3 and after["eval_rewards/accuracies"] == 1 and after["eval_rewards/margins"] > 1
    assert {name.removeprefix("eval_") for name in after} >= {*dpo.METRICS, "entropy"}
    # All tokens of both sequences, each ended, in ten epochs.
    seen = sum(2 * len(row["prompt"]) + len(row["chosen"]) + len(row["rejected"]) + 2 for row in PAIRS[3:])
    assert [log for log in history(trainer) if "loss" in log][-1]["num_tokens"] == seen * 10


@pytest.mark.parametrize(
    "options",
    [
        thorough({"padding_free": False}),
        thorough({"activation_checkpointing": True}),
        {"padding_free": False, "activation_checkpointing": True},
        {"token_budget": 55},
        {"precompute_ref_log_probs": True, "remove_unused_columns": True},
    ],
    ids=lambda options: "_".join(options),
)
def test_what_makes_no_difference(make_trainer, options):
    plain = make_trainer()
    plain.train()
    other = make_trainer(**options)
    other.train()
    assert other.padding_free == options.get("padding_free", True)
    assert (other.reference_model is None) == ("precompute_ref_log_probs" in options)
    logs, expectations = history(other), history(plain)
    for log in (logs[0], expectations[0]):  # model and reference are equal, but for rounding
        del log["rewards/accuracies"]
    for log, expected in zip(logs, expectations, strict=True):
        # What is run depends on the micro-batches, and padding counts.
        assert 0 < expected.pop("tokens_run") < log["tokens"] and log.pop("tokens_run") > 0
        assert log == pytest.approx(expected, rel=1e-3, abs=1e-4)
    torch.testing.assert_close(weights(other), weights(plain), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        thorough({}, id="copy"),
        pytest.param({"precompute_ref_log_probs": True}, id="precomputed"),
        pytest.param({"sync_ref_model": True, "ref_model_sync_steps": 2}, id="synced"),
        thorough({"peft": True}, id="adapters"),
    ],
)
def test_resumes_exactly(make_trainer, make_model, options, tmp_path):
    """Step 5 lies in the second epoch: losses and weights go on bit for bit, and a reference that moves as well."""
    options = {"max_steps": 9, "save_strategy": "steps", "save_steps": 5, "eval_strategy": "steps"} | options
    options |= {"eval_steps": 3, "eval_dataset": PAIRS[:3]}
    if options.pop("peft", False):
        options["peft_config"] = lora()

    def make(name):
        ref_model = make_model(seed=1) if "sync_ref_model" in options else None
        return make_trainer(output_dir=str(tmp_path / name), ref_model=ref_model, **options)

    whole = make("whole")
    whole.train()
    resumed = make("resumed")
    torch.manual_seed(12345)  # whatever happened in this process before
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert history(resumed) == history(whole)
    assert len(history(whole)) == 9 + 3
    assert torch.equal(weights(resumed), weights(whole))


def test_a_checkpoint_given_as_the_model(make_trainer, tmp_path):
    """The reference stays the model of the start, or the run does not go on."""
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = make_trainer(output_dir=str(tmp_path / "whole"), **options)
    whole.train()
    checkpoint = str(tmp_path / "whole" / "checkpoint-3")
    resumed = make_trainer(checkpoint, output_dir=str(tmp_path / "resumed"), **options)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert history(resumed) == history(whole)

    make_trainer(output_dir=str(tmp_path / "other"), precompute_ref_log_probs=True, **options).train()
    checkpoint = str(tmp_path / "other" / "checkpoint-3")
    resumed = make_trainer(checkpoint, output_dir=str(tmp_path / "resumed"), precompute_ref_log_probs=True, **options)
    with pytest.raises(ValueError, match="checkpoint-3: its run precomputed the log-probabilities of another ref"):
        resumed.train(resume_from_checkpoint=checkpoint)


def test_adapters_that_it_was_given_are_the_reference(make_trainer, make_model, tmp_path):
    """Those of the start, also where a run that goes on is given those of the checkpoint."""
    peft = pytest.importorskip("peft")

    def adapted():
        torch.manual_seed(1)
        model = peft.get_peft_model(make_model(), lora())
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        return model

    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "learning_rate": 3e-2}
    whole = make_trainer(adapted(), output_dir=str(tmp_path / "whole"), **options)
    whole.train()
    losses = [log["loss"] for log in history(whole)]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6) and losses[-1] < 0.6
    checkpoint = str(tmp_path / "whole" / "checkpoint-3")
    model = peft.PeftModel.from_pretrained(make_model(), checkpoint, is_trainable=True)
    resumed = make_trainer(model, output_dir=str(tmp_path / "resumed"), **options)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert history(resumed) == history(whole)


def test_another_reference_than_the_first_run_had_is_told(make_trainer, make_model, tmp_path, monkeypatch):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    make_trainer(ref_model=make_model(seed=3), **options).train()
    warnings: list[str] = []
    monkeypatch.setattr(base_trainer.logger, "warning", warnings.append)
    checkpoint = str(tmp_path / "run" / "checkpoint-1")
    make_trainer(output_dir=str(tmp_path / "again"), **options).train(resume_from_checkpoint=checkpoint)
    assert f"{checkpoint} is of a run with another reference (was ref_model, is the model of the start)" in warnings


def test_adapters_of_another_scale_are_another_reference(make_model):
    """In the cache of what was precomputed: their weights are the same."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    model = peft.get_peft_model(make_model(), lora())
    hashes = {hash_model(model, ())}
    model.peft_config["default"].lora_alpha *= 2
    hashes.add(hash_model(model, ()))
    model.add_adapter("other", lora())
    hashes.add(hash_model(model, ()))
    model.set_adapter("other")
    hashes.add(hash_model(model, ()))
    assert len(hashes) == 4


def test_precomputed_values_that_cannot_be_kept_cost_a_warning(make_trainer, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(np, "savez", full)
    warnings: list[str] = []
    monkeypatch.setattr(reporting.logger, "warning", warnings.append)
    trainer = make_trainer(precompute_ref_log_probs=True)
    assert "ref_chosen_logps" in trainer.train_dataset.column_names
    assert len(warnings) == 1 and warnings[0].endswith("could not be written: No space left on device")


def test_losses_over_the_batch_keep_its_micro_batches(make_trainer):
    """A micro-batch has per_device_train_batch_size pairs, in evaluation per_device_eval_batch_size, at any budget."""
    rows = None
    for losses, sizes in ((["sigmoid"], [1] * 4), (["sigmoid", "aot"], [2, 2]), (["sft"], [2, 2])):
        trainer = make_trainer(loss_type=losses, token_budget=1, per_device_eval_batch_size=3)
        rows = [trainer.train_dataset[index] for index in range(4)]
        trainer.model.train()
        assert [len(batch.lengths) // 2 for batch in trainer.micro_batches(rows)] == sizes
        trainer.model.eval()
        assert len(trainer.micro_batches(rows[:3])) == (3 if losses == ["sigmoid"] else 1)


# References


def test_without_a_reference(make_trainer, make_model):
    """Losses that need none keep none, and run the model alone."""
    for losses in (["simpo"], ["orpo"], ["sft"], ["simpo", "sft"]):
        trainer = make_trainer(loss_type=losses, precompute_ref_log_probs=losses == ["simpo"])
        assert trainer.reference_model is None and trainer.reference_hash is None
        before = weights(trainer).clone()
        trainer.train()
        logs = history(trainer)
        assert logs[-1]["loss"] < logs[0]["loss"] and not torch.equal(weights(trainer), before)
    assert make_trainer(loss_type=["sft", "sigmoid"]).reference_model is not None
    assert make_trainer(loss_type=["sft"], ref_model=make_model(seed=1)).reference_model is not None


def test_simpo(make_trainer, make_model):
    trainer = make_trainer(loss_type=["simpo"], beta=2.0, simpo_gamma=1.5)
    (batch,) = trainer.micro_batches([trainer.train_dataset[index] for index in range(3)])
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, batch)
        chosen, rejected = (logps(make_model(), first_pairs(trainer), fused=False) / batch.lengths).view(2, 3)
    expected = -torch.nn.functional.logsigmoid(2.0 * (chosen - rejected) - 1.5).mean()
    torch.testing.assert_close(loss, expected)


# Shared prefixes


@pytest.mark.parametrize(
    "options",
    [
        {"ld_alpha": 0.4, "precompute_ref_log_probs": True},
        {"use_weighting": True, "token_budget": 40},
        {"loss_type": ["sigmoid", "aot"]},
        {"loss_type": ["orpo", "sft"]},
        thorough({"ld_alpha": 0.4, "token_budget": 1}),
        thorough({"activation_checkpointing": True}),
    ],
    ids=lambda options: "_".join(options) + "_".join(options.get("loss_type", [])),
)
def test_sharing_prefixes_changes_rounding_alone(make_trainer, make_model, options):
    """Losses, gradients and weights, what is logged, and evaluation."""
    gradients, logs, found = [], [], []
    for share in ("true", "false"):
        options |= {"max_steps": 2, "optim": "sgd", "learning_rate": 0.1, "eval_dataset": PAIRS[:3]}
        trainer = make_trainer(ref_model=make_model(seed=1), share_prefixes=share, **options)
        assert trainer.shares_prefixes == (share == "true")
        trainer.training_step(trainer.model, [trainer.train_dataset[index] for index in range(4)])
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters()]))
        trainer.metrics.flush(trainer.accelerator)
        evaluated = trainer.evaluate()
        trainer.model.zero_grad()
        trainer.train()
        logs.append([*history(trainer), {name: evaluated[f"eval_{name}"] for name in ("loss", *dpo.METRICS)}])
        found.append(weights(trainer))
    for shared, plain in zip(*logs, strict=True):
        if "tokens" in plain:
            assert shared.pop("tokens_run") < plain.pop("tokens_run") == plain["tokens"]
        assert shared == pytest.approx(plain, rel=1e-4, abs=1e-5)
    assert (gradients[0] - gradients[1]).norm() <= 1e-5 * gradients[1].norm()
    start = weights(SimpleNamespace(model=make_model()))
    assert (found[0] - found[1]).norm() <= 1e-4 * (found[1] - start).norm()


@pytest.mark.parametrize(
    ("rows", "max_length", "prefixes", "run"),
    [
        ([("abcd", "e", "f"), ("abcd", "gh", "i"), ("abcx", "e", "f")], None, [3, 3, 3], 3 + 13 + 6),  # abc of all
        ([("abcd", "e", "e")], None, [3], 9),  # all is common
        ([("a", "bc", "bd"), ("", "abc", "abd")], None, [0, 0], 8 + 8),
        ([("abcd", "efg", "h")], 4, [0], 8),  # efg. and cdh. are left
        ([("abcd", "e", "h")], 4, [1], 7),  # cde. and cdh. are left
    ],
    ids=["several_pairs", "chosen_is_rejected", "none", "other_starts", "one_start"],
)
def test_pairs_share_what_they_begin_with(make_trainer, make_model, tokenizer, rows, max_length, prefixes, run):
    """But for the token that predicts the first one of a completion. Sequences are truncated at their start."""
    tokenize = partial(preference_pair, tokenizer, max_length=max_length, truncation_mode="keep_end")
    rows = [dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in rows]
    trainer = make_trainer(train_dataset=prepare("train_dataset", rows, tokenize))
    rows = [trainer.train_dataset[index] for index in range(len(rows))]
    assert [[each.prefix for each in sequences_of(row, True)] for row in rows] == [[each] * 2 for each in prefixes]
    trainer.model.eval()  # evaluation shares too
    (batch,) = trainer.micro_batches(rows)
    whole = first_pairs(trainer, len(rows))
    assert (batch.num_run, batch.num_tokens) == (run, whole.num_run)
    with torch.no_grad():
        found, expected = logps(trainer.model, batch, fused=True), logps(make_model(), whole, fused=False)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_no_completion_sees_another(make_trainer):
    """One is changed: the others keep their bits."""
    trainer, found = make_trainer(share_prefixes="true"), []
    for chosen in ("aei", "uvw"):
        pairs = [{"prompt": "abcd", "chosen": chosen, "rejected": "xyz"}, {**PAIRS[2], "prompt": "abcd"}]
        dataset = trainer.prepared("train_dataset", pairs)
        (batch,) = trainer.micro_batches([dataset[0], dataset[1]])
        assert batch.num_run < batch.num_tokens
        with torch.no_grad():
            found.append(logps(trainer.model, batch, fused=True))
    assert [one == other for one, other in zip(*map(torch.Tensor.tolist, found), strict=True)] == [False, *[True] * 3]


@pytest.mark.parametrize(("share", "runs"), [("true", [50, 50]), ("false", [44] * 4)])
def test_a_prompt_counts_once_in_the_budget(make_trainer, monkeypatch, share, runs):
    """In training and when the reference's log-probabilities are precomputed."""
    laid_out = []

    def lay_out(self, sequences, *args, **options):
        laid_out.append(original(self, sequences, *args, **options))
        return laid_out[-1]

    original = DPOTrainer.lay_out
    monkeypatch.setattr(DPOTrainer, "lay_out", lay_out)
    pairs = [{"prompt": letter * 20, "chosen": "x", "rejected": "y"} for letter in "abcd"]
    trainer = make_trainer(
        train_dataset=pairs, share_prefixes=share, token_budget=50, precompute_ref_log_probs=True, max_steps=1
    )
    assert [batch.num_run for batch in laid_out] == runs
    laid_out.clear()
    trainer.train()
    assert [batch.num_run for batch in laid_out] == runs
    (log,) = history(trainer)
    assert (log["tokens"], log["tokens_run"]) == (176, sum(runs))


def test_prefixes_are_shared_in_bfloat16(make_trainer, make_model):
    """The forward pass of the reference, and that of a model that was trained before, is in bfloat16 by itself."""
    model = make_model()
    for _ in range(2):
        trainer = make_trainer(model=model, bf16=True, max_steps=1)
        assert trainer.padding_free and trainer.shares_prefixes
        trainer.train()
        for each in (trainer.model, trainer.reference_model):
            with torch.autocast("cpu", torch.bfloat16):
                expected = logps(each, first_pairs(trainer), fused=True)
            assert logps(each, first_pairs(trainer), fused=True).equal(expected)


@pytest.mark.parametrize("precompute", [False, True], ids=["kept", "precomputed"])
def test_a_reference_that_cannot_share(make_trainer, precompute):
    """It gets whole sequences; with share_prefixes true it is refused."""
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=66, hidden_size=16, num_hidden_layers=1, state_size=4)
    options = {"ref_model": MambaForCausalLM(config), "precompute_ref_log_probs": precompute}
    trainer = make_trainer(**options)
    assert not trainer.shares_prefixes
    (batch,) = trainer.micro_batches([trainer.train_dataset[index] for index in range(3)])
    assert batch.num_tokens == sum(trainer.train_dataset["num_tokens"][:3])
    with pytest.raises(ValueError, match="share_prefixes must be auto or false where batches are padded; got true"):
        make_trainer(train_dataset=PAIRS[1:], share_prefixes="true", **options)


def test_metrics_are_those_of_the_first_loss(make_trainer):
    trainer = make_trainer(loss_type=["sigmoid", "simpo"], max_steps=1)
    trainer.train()
    assert history(trainer)[0]["rewards/chosen"] == 0  # of the ratio to the reference; simpo's are of the model alone


@pytest.mark.parametrize("precompute", [False, True], ids=["kept", "precomputed"])
@pytest.mark.parametrize("as_path", [False, True], ids=["in_memory", "path"])
def test_another_reference(make_trainer, make_model, tmp_path, as_path, precompute):
    model, other = make_model(), make_model(seed=1)
    other.save_pretrained(tmp_path / "other")
    trainer = make_trainer(
        model, ref_model=str(tmp_path / "other") if as_path else other, precompute_ref_log_probs=precompute
    )
    (batch,) = trainer.micro_batches([trainer.train_dataset[index] for index in range(3)])
    trainer.compute_loss(trainer.model, batch)
    metrics = trainer.metrics.flush(trainer.accelerator)
    with torch.no_grad():
        whole = first_pairs(trainer)
        of_model, of_other = (logps(each, whole, fused=False) for each in (make_model(), make_model(seed=1)))
    chosen, rejected = (0.1 * (of_model - of_other)).view(2, 3).mean(1).tolist()
    assert metrics["rewards/chosen"] == pytest.approx(chosen, rel=1e-4)
    assert metrics["rewards/rejected"] == pytest.approx(rejected, rel=1e-4)


@pytest.mark.parametrize("precompute", [False, True], ids=["run", "precomputed"])
def test_the_reference_of_adapters_is_the_model_without_them(make_trainer, make_model, precompute):
    trainer = make_trainer(peft_config=lora(), precompute_ref_log_probs=precompute)
    assert trainer.reference_model is None
    trainer.train()
    (batch,) = trainer.micro_batches([trainer.train_dataset[index] for index in range(3)])
    trainer.metrics.sums.clear()
    trainer.compute_loss(trainer.model, batch)
    metrics = trainer.metrics.flush(trainer.accelerator)
    with torch.no_grad():
        now = logps(trainer.model, batch, fused=True)
        base = logps(make_model(), first_pairs(trainer), fused=False)
    assert metrics["rewards/chosen"] == pytest.approx(0.1 * (now - base)[:3].mean().item(), rel=1e-3)
    assert abs(metrics["rewards/chosen"]) > 1e-3


def test_a_synced_reference(make_trainer, make_model):
    trainer = make_trainer(sync_ref_model=True, ref_model_sync_steps=3, ref_model_mixup_alpha=0.25, max_steps=3)
    start = weights(trainer).clone()
    trainer.train()
    reference = torch.cat([parameter.flatten() for parameter in trainer.reference_model.parameters()])
    torch.testing.assert_close(reference, 0.75 * start + 0.25 * weights(trainer))
    assert not torch.equal(reference, start)


def with_dropout(model):
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
        layer.mlp.act_fn = torch.nn.Sequential(layer.mlp.act_fn, torch.nn.Dropout(0.5))
    return model


def test_dropout_is_off(make_trainer, make_model):
    trainer = make_trainer(with_dropout(make_model()), max_steps=1)
    trainer.train()
    assert history(trainer)[0]["loss"] == pytest.approx(0.6931, abs=1e-4)


def test_the_reference_has_no_dropout(make_trainer, make_model):
    """Where training has it."""
    model = with_dropout(make_model())
    trainer = make_trainer(model, disable_dropout=False, precompute_ref_log_probs=True)
    (batch,) = trainer.micro_batches([trainer.train_dataset[index] for index in range(3)])
    with torch.no_grad():
        expected = logps(make_model(), first_pairs(trainer), fused=False)
        torch.testing.assert_close(batch.reference, expected)
        assert (logps(model.train(), batch, fused=True) - expected).abs().min() > 1e-3


# The cache


@pytest.fixture
def runs_of_the_reference(monkeypatch):
    seen = []
    run = DPOTrainer._run_reference
    monkeypatch.setattr(
        DPOTrainer, "_run_reference", lambda self, name, rows: seen.append(name) or run(self, name, rows)
    )
    return seen


def test_the_second_run_neither_loads_nor_runs_the_reference(
    make_trainer, make_model, tmp_path, cache, runs_of_the_reference, monkeypatch
):
    make_model(seed=1).save_pretrained(tmp_path / "other")
    options = {"ref_model": str(tmp_path / "other"), "precompute_ref_log_probs": True, "eval_dataset": PAIRS[:3]}
    first = make_trainer(**options)
    assert runs_of_the_reference == ["train_dataset", "eval_dataset"] and len(list(cache.iterdir())) == 2
    loaded = []
    load = DPOTrainer.load
    monkeypatch.setattr(DPOTrainer, "load", lambda self, model, args: loaded.append(model) or load(self, model, args))
    second = make_trainer(first.model, **options, learning_rate=1e-5)
    assert len(runs_of_the_reference) == 2 and all(each is first.model for each in loaded)
    assert second.train_dataset[:] == first.train_dataset[:]
    assert "ref_chosen_logps" in second.eval_dataset.column_names


@pytest.mark.parametrize(
    "change",
    ["weights", "one_weight", "config", "dtype", "bf16", "row", "boundary", "order", "max_length", "ld_alpha"],
)
def test_what_changes_makes_another_file(make_trainer, make_model, cache, change):
    make_trainer(precompute_ref_log_probs=True)
    model, pairs, options = make_model(), PAIRS, {}
    if change == "weights":
        model = make_model(seed=1)
    elif change == "one_weight":
        model.model.norm.weight.data[7] += 1e-6
    elif change == "config":
        model.config.rope_parameters["rope_theta"] = 5000.0
    elif change == "dtype":
        model = model.bfloat16()
    elif change == "bf16":
        options = {"bf16": True}
    elif change == "row":
        pairs = [*PAIRS[:-1], PAIRS[-1] | {"chosen": "aeio"}]
    elif change == "boundary":  # the same tokens, of which others are in the loss
        assert PAIRS[-1] == {"prompt": "abccd", "chosen": "ae", "rejected": "xy"}
        pairs = [*PAIRS[:-1], {"prompt": "abcc", "chosen": "dae", "rejected": "dxy"}]
    elif change == "order":
        pairs = [PAIRS[1], PAIRS[0], *PAIRS[2:]]
    elif change == "max_length":
        options = {"max_length": 8}
    else:
        options = {"ld_alpha": 0.5}
    make_trainer(model, pairs, precompute_ref_log_probs=True, **options)
    assert len(list(cache.iterdir())) == 2


def test_a_folder_whose_weights_change(make_model, tmp_path):
    found = set()
    for seed in (0, 1, 1):
        make_model(seed).save_pretrained(tmp_path / "other")
        (tmp_path / "other" / "optimizer.pt").write_text(str(len(found)))
        found.add(reference_cache.hash_model(str(tmp_path / "other"), "settings"))
    found.add(reference_cache.hash_model(str(tmp_path / "other"), "other settings"))
    assert len(found) == 3


@pytest.mark.parametrize("damage", ["torn", "empty", "flipped", "other"])
def test_a_damaged_file_is_made_anew(make_trainer, cache, runs_of_the_reference, damage):
    first = make_trainer(precompute_ref_log_probs=True)
    (file,) = cache.iterdir()
    content = bytearray(file.read_bytes())
    if damage == "flipped":
        content[-100 - len(PAIRS) * 4] ^= 1
    file.write_bytes({"torn": content[:-40], "empty": b"", "flipped": content, "other": b"not numbers"}[damage])
    second = make_trainer(precompute_ref_log_probs=True)
    assert len(runs_of_the_reference) == 2
    assert second.train_dataset[:] == first.train_dataset[:]
    make_trainer(precompute_ref_log_probs=True)
    assert len(runs_of_the_reference) == 2


def test_an_interrupted_write_leaves_nothing(cache, monkeypatch, tmp_path):
    def interrupted(file, **arrays):
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(reference_cache.np, "savez", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reference_cache.write(cache / "x.npz", torch.zeros(2, 3).numpy())
    assert list(cache.iterdir()) == []


def test_another_dataset_is_evaluated(make_trainer):
    """Also after training, where the reference is still there."""
    for options in ({}, {"precompute_ref_log_probs": True, "peft_config": lora()}):
        trainer = make_trainer(**options)
        trainer.train()
        both = trainer.evaluate({"a": PAIRS[:3], "b": PAIRS[3:]})
        assert {"eval_a_loss", "eval_b_rewards/margins"} <= set(both)
    trainer = make_trainer(precompute_ref_log_probs=True)
    assert "eval_loss" in trainer.evaluate(PAIRS[:3])
    trainer.train()
    assert "eval_loss" in trainer.evaluate(PAIRS[:3])
    with pytest.raises(ValueError, match="eval_dataset: with precompute_ref_log_probs the reference"):
        trainer.evaluate(PAIRS[:4])


# The config


OURS = [
    field
    for field in dataclasses.fields(DPOConfig)
    if field not in dataclasses.fields(TrainingArguments) or field.name in vars(DPOConfig)
]


def test_config_names_and_defaults_are_those_of_trl(tmp_path):
    trl = pytest.importorskip("trl")
    options = {"output_dir": str(tmp_path), "use_cpu": True}
    theirs, ours = trl.DPOConfig(**options), DPOConfig(**options)
    # The run name and the log folder carry a time; bf16 follows the device; TRL's padding_free is switched off.
    different = ("bf16", "run_name", "logging_dir", "padding_free", "remove_unused_columns")
    different += ("activation_checkpointing",)  # by its older name where transformers has that
    own = {"simpo_gamma", "token_budget", "share_prefixes"}
    for field in dataclasses.fields(DPOConfig):
        if field.name not in (*different, *own):
            assert getattr(ours, field.name) == getattr(theirs, field.name), field.name
    assert ours.simpo_gamma == 0.5


def test_every_field_has_its_own_help():
    helps = [field.metadata["help"] for field in OURS]
    assert len(helps) > 20
    assert all(len(text) > 20 and text.endswith(".") for text in helps)
    assert len(set(helps)) == len(helps)


def test_command_line(tmp_path):
    parser = HfArgumentParser(DPOConfig)
    options = f"--output_dir {tmp_path} --loss_type sigmoid bco_pair sft --loss_weights 0.8 0.2 1 --use_cpu"
    (config,) = parser.parse_args_into_dataclasses(options.split())
    assert (config.loss_type, config.loss_weights) == (["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0])
    assert "cDPO" in parser.format_help()
    assert DPOConfig(output_dir=str(tmp_path), loss_type="ipo", use_cpu=True).loss_type == ["ipo"]


def test_every_loss_is_a_choice():
    assert set(DPOConfig.__dataclass_fields__["loss_type"].metadata["choices"]) == set(op.PAIR_LOSSES)
    assert set(op.SMOOTHED) == dpo.SMOOTHED
    assert set(op.WITHOUT_REFERENCE) == dpo.WITHOUT_REFERENCE


# Bad input


def test_bad_input(make_trainer, make_model, tmp_path):
    model = make_model()
    with pytest.raises(TypeError, match="train_dataset must be a sequence of rows; got NoneType"):
        make_trainer(train_dataset=None)
    with pytest.raises(ValueError, match="train_dataset has no column 'rejected'"):
        make_trainer(train_dataset=[{"prompt": "a", "chosen": "b"}])
    with pytest.raises(ValueError, match="train_dataset, row 1: rejected must be text"):
        make_trainer(train_dataset=[PAIRS[0], PAIRS[0] | {"rejected": 3}])
    for precompute in (False, True):
        with pytest.raises(ValueError, match="ref_model must be another object than model"):
            make_trainer(model, ref_model=model, precompute_ref_log_probs=precompute)
    with pytest.raises(ValueError, match="eval_dataset\\['b'\\], row 0: rejected must be text"):
        make_trainer(eval_dataset={"a": PAIRS, "b": [PAIRS[0] | {"rejected": 3}]})
    with pytest.raises(FileNotFoundError, match="model 'nowhere': there is no such folder"):
        make_trainer(ref_model="nowhere", precompute_ref_log_probs=True)
    with pytest.raises(ValueError, match="sync_ref_model needs a reference of its own"):
        make_trainer(sync_ref_model=True, peft_config=lora())
    with pytest.raises(ValueError, match="sync_ref_model needs a reference, which"):
        make_trainer(sync_ref_model=True, loss_type=["simpo"])
    assert not (tmp_path / "run").exists()


def test_a_model_that_needs_its_logits(make_trainer, make_model, monkeypatch):
    """Its loss is the same; use_weighting, which looks at whole distributions, is refused."""
    expected = make_trainer()
    expected.train()

    def refuse(model, **options):
        raise ValueError("no")

    monkeypatch.setattr(scoring.rlkernels, "wrap_lm_head", refuse)
    trainer = make_trainer()
    assert not trainer.fused
    trainer.train()
    torch.testing.assert_close(weights(trainer), weights(expected), rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="use_weighting needs models whose LM head gives"):
        make_trainer(use_weighting=True)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"loss_type": ["dpo"]}, "loss_type must be one of sigmoid, hinge, .*, simpo, orpo; got 'dpo'"),
        ({"loss_type": ["kto"]}, "got 'kto'"),
        ({"loss_type": []}, "loss_type must name at least one loss"),
        ({"loss_weights": [1.0, 2.0]}, "loss_weights must have one entry per loss, 1; got 2"),
        ({"loss_weights": [float("nan")]}, "loss_weights must be finite"),
        ({"beta": 0.0}, "beta must be"),
        ({"f_divergence_type": "kl"}, "f_divergence_type must be one of"),
        (
            {"loss_type": ["sigmoid", "aot"], "f_divergence_type": "forward_kl"},
            "loss_type aot with f_divergence_type forward_kl: divergence must be reverse_kl",
        ),
        ({"loss_type": ["exo_pair"]}, "label_smoothing must be > 0 with loss 'exo_pair'"),
        ({"loss_type": ["robust"], "label_smoothing": 0.5}, "label_smoothing must be < 0.5"),
        ({"loss_type": ["hinge"], "label_smoothing": 0.1}, "label_smoothing must be 0 with loss_type hinge; got 0.1"),
        ({"discopop_tau": 0.0}, "discopop_tau must be"),
        ({"ld_alpha": 1.5}, "ld_alpha must be from 0 to 1; got 1.5"),
        ({"max_length": 1}, "max_length must be at least 2; got 1"),
        ({"use_weighting": True, "loss_type": ["sft"]}, "use_weighting must be off with aot, aot_unpaired, orpo, sft"),
        ({"sync_ref_model": True, "precompute_ref_log_probs": True}, "exclude each other"),
        ({"ref_model_mixup_alpha": 0.0}, "ref_model_mixup_alpha must be above 0"),
        ({"ref_model_sync_steps": 0}, "ref_model_sync_steps must be at least 1"),
    ],
)
def test_bad_values(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        DPOConfig(output_dir=str(tmp_path), use_cpu=True, **options)
