"""SFTTrainer as its user meets it."""

import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from rlkernels.trainers import NonFiniteLoss, SFTConfig, SFTTrainer
from rlkernels.trainers.data import Packed, prepare, supervised

ROWS = [{"prompt": "ab" * (i % 4) + ":", "completion": "cdefgh"[: i % 6] * (1 + i % 3)} for i in range(13)]


@pytest.fixture
def make_trainer(make_model, tokenizer, run_options):
    def make(train_dataset=ROWS, eval_dataset=None, model=None, peft_config=None, **options):
        options = {
            **run_options,
            "per_device_train_batch_size": 8,
            "learning_rate": 3e-3,
            "max_steps": 4,
            "max_length": 16,
        } | options
        model = make_model() if model is None else model
        args = SFTConfig(**options)
        return SFTTrainer(model, args, train_dataset, eval_dataset, tokenizer, peft_config=peft_config)

    return make


def losses(trainer) -> list[float]:
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def step(trainer) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient of one step on all rows."""
    rows = list(trainer.train_dataset)
    loss = trainer.training_step(trainer.model, rows)
    return loss, torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters()])


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointing"])
def test_packed_is_padded(make_trainer, checkpointing, loss_type):
    """Loss and gradient of a step, in one micro-batch, in several, and in one for each sequence."""
    results, counts = [], []
    for options in ({"padding_free": False}, {}, {"token_budget": 20}, {"token_budget": 1}):
        trainer = make_trainer(loss_type=loss_type, activation_checkpointing=checkpointing, **options)
        assert trainer.padding_free == options.get("padding_free", True)
        batches = trainer.micro_batches(list(trainer.train_dataset))
        counts.append(len(batches))
        results.append(step(trainer))
    assert counts[:2] == [1, 1] and 1 < counts[2] < counts[3] == len(ROWS)
    for loss, gradient in results[1:]:
        torch.testing.assert_close(loss, results[0][0], rtol=1e-5, atol=1e-6)
        assert (gradient - results[0][1]).norm() <= 1e-5 * results[0][1].norm() != 0


def test_with_logits_stored(make_trainer):
    """A model whose LM head cannot be taken."""
    results = []
    for fused in (True, False):
        trainer = make_trainer(eval_dataset=ROWS)
        assert trainer.fused
        trainer.fused = fused
        results.append((*step(trainer), trainer.evaluate()))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-6)
    assert (results[1][1] - results[0][1]).norm() <= 1e-5 * results[0][1].norm()
    for name in ("eval_loss", "eval_mean_token_accuracy", "eval_entropy"):
        assert results[1][2][name] == pytest.approx(results[0][2][name], rel=1e-5)


def test_packing(tokenizer):
    """Places are filled as well as TRL fills them, each row is in one, and none holds more than its size."""
    data_utils = pytest.importorskip("trl.data_utils")
    generator = torch.Generator().manual_seed(0)
    rows = [{"text": "a" * int(n)} for n in torch.randint(1, 60, (200,), generator=generator)]
    rows = prepare("train_dataset", rows, lambda row: supervised(tokenizer, row))
    packed = Packed(rows, 64)
    places = [packed[index] for index in range(len(packed))]
    assert sorted(index for place in places for index in place["_row_id"]) == list(range(200))
    assert max(sum(len(sequence["input_ids"]) for sequence in place["sequences"]) for place in places) == 64
    flat = Dataset.from_list([{"input_ids": row["sequences"][0]["input_ids"]} for row in rows])
    assert len(packed) == len(data_utils.pack_dataset(flat, 64, "bfd"))
    # Into the emptiest place with room, the last would find none.
    rows = [{"text": "a" * (length - 1)} for length in (50, 40, 14, 12, 12)]
    packed = Packed(prepare("train_dataset", rows, lambda row: supervised(tokenizer, row)), 64)
    assert [place["_row_id"] for place in packed] == [[0, 2], [1, 3, 4]]


def test_packing_is_the_same_step(make_trainer):
    """A step with packing equals one without, if it has the same rows."""
    (loss, gradient), (other_loss, other_gradient) = step(make_trainer()), step(packed := make_trainer(packing=True))
    assert len(packed.train_dataset) < len(ROWS)
    torch.testing.assert_close(loss, other_loss, rtol=1e-5, atol=1e-6)
    assert (gradient - other_gradient).norm() <= 1e-5 * gradient.norm()
    assert packed.evaluate(packed.train_dataset)["eval_loss"] == pytest.approx(loss.item(), rel=1e-5)
    packed.train()
    assert len(losses(packed)) == 4


def test_a_loss_that_is_not_finite_names_the_rows_of_a_place(make_trainer, monkeypatch):
    trainer = make_trainer(packing=True, per_device_train_batch_size=1)
    monkeypatch.setattr(trainer, "compute_loss", lambda model, batch: next(model.parameters()).sum() * math.nan)
    with pytest.raises(NonFiniteLoss, match=r"step 1: the loss is nan, on rows \d+, \d+.* of train_dataset"):
        trainer.train()


def test_resumed_is_uninterrupted(make_trainer):
    options = {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2, "max_steps": 5}
    options |= {"per_device_train_batch_size": 2}
    whole = make_trainer(**options)
    whole.train()
    again = make_trainer(**options)
    again.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")
    assert losses(again) == losses(whole)
    assert again.state.num_input_tokens_seen == whole.state.num_input_tokens_seen > 0
    for one, other in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_batches_of_one_length(make_trainer):
    """Every row once an epoch, each epoch in another order, which a resumed run finds again."""
    rows = [{"text": "a" * (index % 7 + 1)} for index in range(60)]
    options = {"train_sampling_strategy": "group_by_length", "per_device_train_batch_size": 3, "num_train_epochs": 2}
    trainer = make_trainer(rows, eval_dataset=rows, max_steps=-1, **options)
    seen, micro_batches = [], trainer.micro_batches
    trainer.micro_batches = lambda inputs: seen.append([row["_row_id"] for row in inputs]) or micro_batches(inputs)
    trainer.train()
    first, second = ([index for step in seen[start : start + 20] for index in step] for start in (0, 20))
    assert sorted(first) == sorted(second) == list(range(60)) and first != second
    trainer.state.epoch = 1.4
    assert list(trainer._get_train_sampler()) == second
    lengths = [[len(rows[index]["text"]) for index in step] for step in seen]
    assert sum(max(step) - min(step) for step in lengths) / len(lengths) < 2  # by chance it would be 3
    trainer.micro_batches = micro_batches
    assert "eval_loss" in trainer.evaluate()


def test_noise_is_of_each_row(make_trainer, monkeypatch):
    """Of NEFTune: its size depends on the length of the rows, not on how many lie end to end."""
    sizes = []
    trainer = make_trainer(neftune_noise_alpha=5.0, max_steps=1)
    embedding = trainer.model.get_input_embeddings()
    embedding.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape) and None)
    trainer.train()
    longest = max(trainer.train_dataset["num_tokens"])
    assert sizes and all(rows > 1 and width <= longest for rows, width, _ in sizes)


def test_what_is_learned(make_trainer):
    """The completions, and not the prompts: also where rows are left out, in several evaluation sets."""
    rows = [{"prompt": f"{letter} is", "completion": letter.upper()} for letter in "abcdefgh"]
    too_long = {"prompt": "x" * 20, "completion": "left out"}
    evaluations = {"seen": rows, "unseen": [{"prompt": "z is", "completion": "Z"}, too_long]}
    when = {"eval_strategy": "steps", "eval_steps": 40, "eval_on_start": True}
    trainer = make_trainer([*rows, too_long], evaluations, max_steps=40, **when)
    assert len(trainer.train_dataset) == 8
    trainer.train()
    logs = [log for log in trainer.state.log_history if "eval_seen_loss" in log]
    before, after = (log["eval_seen_mean_token_accuracy"] for log in logs)
    assert after == 1.0 > before
    assert "eval_unseen_loss" in trainer.evaluate()
    prompts = trainer.evaluate([{"text": row["prompt"]} for row in rows])
    assert prompts["eval_mean_token_accuracy"] < 0.5 and prompts["eval_loss"] > 1


def test_evaluation_counts_tokens(make_trainer):
    """Its loss is that of all its tokens, whatever its batches hold; and it leaves no trace in what training counts."""
    trainer = make_trainer(eval_dataset=ROWS, per_device_eval_batch_size=3)
    other = make_trainer(eval_dataset=ROWS, per_device_eval_batch_size=13)
    expected = step(other)[0].item()
    seen = trainer.state.num_input_tokens_seen
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert other.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert trainer.state.num_input_tokens_seen == seen


@pytest.mark.parametrize("rows", [[{"prompt": "a", "completion": ""}], [{"text": "a" * 5000}]], ids=["empty", "huge"])
@pytest.mark.parametrize("options", [{"max_length": None, "token_budget": 64}, {"packing": True}])
def test_one_row(make_model, make_trainer, rows, options):
    """A sequence longer than the token budget runs alone."""
    model = make_model()
    trainer = make_trainer(rows, model=model, max_steps=2, remove_unused_columns=True, **options)
    trainer.train()
    assert len(losses(trainer)) == 2 and all(map(math.isfinite, losses(trainer)))


def test_adapters(make_trainer, make_model, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = make_trainer(peft_config=config, activation_checkpointing=True, max_steps=8, learning_rate=3e-2)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    trainer.save_model(str(tmp_path / "saved"))
    assert {path.name for path in (tmp_path / "saved").glob("*.safetensors")} == {"adapter_model.safetensors"}


def test_a_path(make_trainer, make_model, tokenizer, tmp_path):
    """The path of a folder with a model and its tokenizer."""
    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    args = make_trainer().args
    trainer = SFTTrainer(str(tmp_path / "model"), args, ROWS)
    assert torch.equal(step(trainer)[0], step(make_trainer())[0])


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (
            {"train_dataset": [{"question": "a"}]},
            ValueError,
            "train_dataset, row 0: wanted the columns prompt",
        ),
        (
            {"train_dataset": [*ROWS, {"prompt": "a"}]},
            ValueError,
            "train_dataset, row 13: wanted the columns",
        ),
        ({"train_dataset": []}, ValueError, "train_dataset is empty"),
        ({"train_dataset": None}, TypeError, "train_dataset must be a sequence of rows; got NoneType"),
        ({"train_dataset": [{"prompt": "a" * 20, "completion": "b"}]}, ValueError, "none of its 1 rows has a token"),
        ({"train_dataset": [{"input_ids": [1, 2], "labels": [-100, -100]}]}, ValueError, "none of its 1 rows has a"),
        ({"eval_dataset": [{"prompt": 5, "completion": "b"}]}, ValueError, "eval_dataset, row 0: prompt must be text"),
        ({"eval_dataset": {"x": [{"prompt": 5, "completion": ""}]}}, ValueError, r"eval_dataset\['x'\], row 0: prompt"),
        (
            {"assistant_only_loss": True},
            ValueError,
            "train_dataset, row 0: assistant_only_loss needs messages; got text",
        ),
        (
            {"truncation_mode": "middle"},
            ValueError,
            "must be one of keep_start, keep_end; got 'middle'",
        ),
        ({"loss_type": "l2"}, ValueError, "loss_type must be one of nll, dft; got 'l2'"),
        ({"max_length": 1}, ValueError, "max_length must be at least 2, so that there is a token to predict; got 1"),
        ({"max_length": None, "packing": True}, ValueError, "packing needs max_length; got None"),
        ({"label_smoothing_factor": 0.1}, ValueError, "label_smoothing_factor is not supported; got 0.1"),
    ],
)
def test_wrong_arguments(make_trainer, tmp_path, arguments, error, message):
    """Before anything is written."""
    with pytest.raises(error, match=message):
        make_trainer(**arguments)
    assert list(Path(tmp_path).iterdir()) == []
