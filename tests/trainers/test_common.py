"""What all trainers share: stopping at a loss that is not finite, adapters and their reference, micro-batches."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

from cases import thorough
from rlkernels import trainers
from rlkernels.trainers import GRPOConfig, GRPOTrainer, NonFiniteLoss
from rlkernels.trainers.base import loading
from rlkernels.trainers.base import trainer as base_trainer
from rlkernels.trainers.batch import scoring
from rlkernels.trainers.batch.batch import Batch

PROMPTS = [{"prompt": "ab" + "c" * (i % 5) + "d"} for i in range(13)]


def vowels(completions, **kwargs):
    return [sum(letter in "aeiou" for letter in text) / (1 + len(text)) for text in completions]


@pytest.fixture
def make_trainer(make_model, tokenizer, run_options):
    def make(model=None, peft_config=None, **options):
        options = {
            **run_options,
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_completion_length": 6,
            "learning_rate": 3e-3,
            "max_steps": 4,
        } | options
        model = make_model() if model is None else model
        args = GRPOConfig(**options)
        return GRPOTrainer(model, vowels, args, PROMPTS, processing_class=tokenizer, peft_config=peft_config)

    return make


def weights(model) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("value", [math.nan, thorough(math.inf), thorough(-math.inf)])
def test_a_loss_that_is_not_finite_stops_the_run(make_trainer, monkeypatch, value):
    """With the step, the rows, and a checkpoint from which the step is done again."""
    trainer = make_trainer()
    original, seen = trainer.compute_loss, []

    def compute_loss(model, batch):
        if trainer.state.global_step == 2:
            seen.append(weights(trainer.model))
            return original(model, batch) * value
        return original(model, batch)

    monkeypatch.setattr(trainer, "compute_loss", compute_loss)
    with pytest.raises(
        NonFiniteLoss, match=r"step 3: the loss is (nan|-?inf), on rows \d+, \d+ of train_dataset; "
    ) as e:
        trainer.train()
    folder = f"{trainer.args.output_dir}/checkpoint-2"
    assert str(e.value).endswith(f"the state before this step is in {folder}")
    assert json.loads(Path(folder, "trainer_state.json").read_text())["global_step"] == 2
    monkeypatch.undo()
    again = make_trainer()
    again.train(resume_from_checkpoint=folder)
    whole = make_trainer()
    whole.train()
    torch.testing.assert_close(weights(again.model), weights(whole.model), rtol=1e-3, atol=1e-4)
    assert not torch.equal(seen[0], weights(whole.model))


def test_each_process_saves_its_part_of_the_last_good_state(make_trainer, monkeypatch):
    """Also one that comes to it when the main process has already written the file that all look for."""
    trainer, saved = make_trainer(), []

    def gather_object(found):
        folder = Path(trainer.args.output_dir, "checkpoint-0")
        folder.mkdir(parents=True)
        (folder / "trainer_state.json").touch()
        return found

    monkeypatch.setattr(base_trainer, "gather_object", gather_object)
    monkeypatch.setattr(trainer, "accelerator", SimpleNamespace(num_processes=2))
    monkeypatch.setattr(trainer, "_save_checkpoint", lambda *args, **kwargs: saved.append(kwargs))
    with pytest.raises(NonFiniteLoss):
        trainer._stop(math.nan, [{"_row_id": 3}])
    assert len(saved) == 1


def lora():
    return pytest.importorskip("peft").LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def test_adapters_alone_are_trained_and_saved(make_trainer, make_model, tmp_path):
    trainer = make_trainer(peft_config=lora(), beta=0.1)
    assert trainer.reference_model is None
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert {path.name for path in (tmp_path / "saved").glob("*.safetensors")} == {"adapter_model.safetensors"}
    base = {
        name.replace(".base_layer", ""): value for name, value in trainer.model.base_model.model.state_dict().items()
    }
    for name, value in make_model().state_dict().items():
        assert torch.equal(base[name], value), name
    kl = [log["kl"] for log in trainer.state.log_history if "kl" in log]
    assert kl[0] == 0 and kl[-1] > 0


def test_adapters_are_not_put_upon_adapters(make_trainer, make_model):
    adapted = pytest.importorskip("peft").get_peft_model(make_model(), lora())
    with pytest.raises(ValueError, match="peft_config must be None where the model has adapters already"):
        make_trainer(adapted, lora())


PROMPT_LEARNING = {
    "PromptTuningConfig": {"num_virtual_tokens": 2},
    "PrefixTuningConfig": {"num_virtual_tokens": 2},
    "PromptEncoderConfig": {"num_virtual_tokens": 2},
    "CPTConfig": {
        "cpt_token_ids": [5, 6],
        "cpt_mask": [1, 1],
        "cpt_tokens_type_mask": [1, 2],
        "task_type": "CAUSAL_LM",
    },
}


@pytest.mark.parametrize("name", ["SFT", "DPO", "Reward", "PPO", "GRPO"])
@pytest.mark.parametrize("kind", PROMPT_LEARNING)
def test_prompt_learning_is_refused_before_anything_is_loaded(name, kind, run_options):
    """Its virtual tokens are in no sequence: packed, it learned silently from other log-probabilities than padded."""
    peft = pytest.importorskip("peft")
    adapters = getattr(peft, kind)(**PROMPT_LEARNING[kind])
    options = {"reward_funcs": len} if name in ("PPO", "GRPO") else {}
    args = getattr(trainers, f"{name}Config")(**run_options)
    with pytest.raises(
        ValueError, match=f"^peft_config must adapt weights, as LoraConfig does; got {kind}, whose virt"
    ):
        getattr(trainers, f"{name}Trainer")("no folder", args=args, peft_config=adapters, **options)


@pytest.mark.parametrize(
    ("role", "task", "name"),
    [
        ("model", "CAUSAL_LM", "the model"),
        ("ref_model", "CAUSAL_LM", "the model"),
        ("value_model", "SEQ_CLS", "value_model"),
        ("reward_funcs", "SEQ_CLS", "reward_funcs"),
    ],
)
def test_models_with_prompt_learning_are_refused(role, task, name, make_model, tokenizer, run_options):
    peft = pytest.importorskip("peft")
    tuned = make_model()
    if task == "SEQ_CLS":
        tuned = transformers.LlamaForSequenceClassification(tuned.config)
    tuned = peft.get_peft_model(tuned, peft.PromptTuningConfig(num_virtual_tokens=2, task_type=task))
    given = {"model": make_model(), "reward_funcs": len, role: tuned}
    args, rows = trainers.PPOConfig(**run_options), [{"prompt": "1 + 1 = "}] * 8
    with pytest.raises(ValueError, match=f"^peft_config of {name} must adapt weights, .* got PromptTuningConfig"):
        trainers.PPOTrainer(args=args, train_dataset=rows, processing_class=tokenizer, **given)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_reference_of_adapters_is_the_model_without_them(make_trainer, make_model, checkpointing):
    trainer = make_trainer(peft_config=lora(), beta=0.1, activation_checkpointing=checkpointing)
    trainer.train()
    experience = trainer.collector.buffer.experience
    batch = trainer._lay_out(experience, [0, 1, 2])
    # Any model can run whole sequences.
    whole = trainer.lay_out([replace(sequence, prefix=0) for sequence in experience.sequences[:3]], Batch)
    expected = scoring.token_logprobs(make_model(), whole, fused=False)[whole.mask]
    adapted = scoring.token_logprobs(trainer.model, batch, fused=True)
    with trainer.reference() as reference:
        found = scoring.token_logprobs(reference, batch, fused=True)
    torch.testing.assert_close(found[batch.mask], expected, rtol=1e-4, atol=1e-5)
    assert (adapted[batch.mask] - expected).abs().max() > 1e-3
    assert [p.requires_grad for n, p in trainer.model.named_parameters() if "lora" in n] == [True] * 8


def test_micro_batches_by_token_budget_are_one_step(make_trainer):
    """Loss and gradient do not depend on how many micro-batches there are; one that fills up counts for nothing."""
    results = []
    for budget in (8192, 30, 1):
        trainer = make_trainer(token_budget=budget, beta=0.1)
        trainer.collector.buffer.experience = (
            results[0][2] if results else trainer.make_experience([PROMPTS[i // 4] for i in range(8)])
        )
        trainer.make_experience = lambda inputs, rollouts=trainer.collector.buffer.experience: rollouts
        batches = trainer.micro_batches([])
        if budget == 30:
            batches.insert(0, replace(batches[0], is_filler=True))
        trainer.micro_batches = lambda inputs, batches=batches: batches
        loss = trainer.training_step(trainer.model, [])
        gradient = torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters()])
        results.append(
            (
                loss,
                gradient,
                trainer.collector.buffer.experience,
                len(batches),
                trainer.metrics.flush(trainer.accelerator),
            )
        )
    assert results[0][3] == 1 and 1 < results[1][3] < 9 and results[2][3] == 8
    for loss, gradient, _, _, metrics in results[1:]:
        torch.testing.assert_close(loss, results[0][0], rtol=1e-4, atol=1e-6)
        assert (gradient - results[0][1]).norm() <= 1e-5 * results[0][1].norm()
        for name in ("kl", "entropy"):
            assert metrics[name] == pytest.approx(results[0][4][name], rel=1e-4)


def test_padded_is_packed(make_trainer):
    """The whole step, with a reference and the importance ratio of a second pass."""
    results = []
    for padding_free in (True, False):
        trainer = make_trainer(padding_free=padding_free, beta=0.1, num_iterations=2, loss_type="grpo")
        trainer.train()
        results.append(weights(trainer.model))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "installed, dtype, expected",
    [
        ((2, 3), "bf16", "flash_attention_3"),
        ((2,), "fp16", "flash_attention_2"),
        ((2,), None, None),
        ((), "bf16", None),
    ],
)
def test_flash_attention_where_it_is_installed(monkeypatch, installed, dtype, expected):
    for version in (2, 3):
        monkeypatch.setattr(loading, f"is_flash_attn_{version}_available", lambda version=version: version in installed)
    args = SimpleNamespace(use_cpu=False, bf16=dtype == "bf16", fp16=dtype == "fp16")
    assert loading.flash_attention(args).get("attn_implementation") == expected
    args.use_cpu = True
    assert loading.flash_attention(args) == {}


def adapted(model):
    """With adapters that were trained before."""
    torch.manual_seed(1)
    model = pytest.importorskip("peft").get_peft_model(model, lora())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("given", ["the start", "the checkpoint"])
def test_a_model_with_adapters_of_its_own_is_resumed(make_trainer, make_model, given):
    """Its reference is what it was at the start, adapters included, whichever the resumed run is given."""
    options = {"beta": 0.1, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(model=adapted(make_model()), **options)
    start = {name: value.clone() for name, value in whole.reference_model.state_dict().items()}
    assert all(torch.equal(value, start[name]) for name, value in adapted(make_model()).state_dict().items())
    whole.train()
    checkpoint = f"{whole.args.output_dir}/checkpoint-2"
    model = adapted(make_model())
    if given == "the checkpoint":
        peft = pytest.importorskip("peft")
        model = peft.PeftModel.from_pretrained(make_model(), checkpoint, is_trainable=True)
    resumed = make_trainer(model=model, **options)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert torch.equal(weights(resumed.model), weights(whole.model))
    for name, value in resumed.reference_model.state_dict().items():
        assert torch.equal(value, start[name]), name
    kl = [[log["kl"] for log in trainer.state.log_history if "kl" in log] for trainer in (whole, resumed)]
    assert kl[0] == kl[1] and kl[0][-1] > 0


def test_biases_that_adapters_train_are_not_in_the_reference(make_trainer, make_model):
    """They are changed in place: the model without its adapters is not what it was."""
    peft = pytest.importorskip("peft")
    config = make_model().config
    config.attention_bias = True
    model = type(make_model())(config)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    bias = peft.LoraConfig(r=2, target_modules=["q_proj"], bias="all", task_type="CAUSAL_LM")
    trainer = make_trainer(model=model, peft_config=bias, beta=0.1, learning_rate=1e-1)
    trainer.train()
    with trainer.reference() as reference:
        assert all(torch.equal(value, start[name]) for name, value in reference.state_dict().items())


def test_a_column_of_row_ids_is_the_users_own(make_model, tokenizer, run_options):
    seen = []

    def reward(completions, row_id, **kwargs):
        seen.extend(row_id)
        return [0.0] * len(completions)

    args = GRPOConfig(**run_options, max_steps=1, per_device_train_batch_size=4, num_generations=2)
    rows = [{"prompt": "ab", "row_id": f"row {index}"} for index in range(2)]
    GRPOTrainer(make_model(), reward, args, rows, processing_class=tokenizer).train()
    assert sorted(set(seen)) == ["row 0", "row 1"]
