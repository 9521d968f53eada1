"""GRPOTrainer end to end on a tiny model: learning, resuming, evaluation, what is run through the model."""

import json
import random

import pytest
import torch

import rlkernels
from cases import thorough
from rlkernels.trainers import GRPOConfig, GRPOTrainer, grpo
from rlkernels.trainers.batch import scoring
from rlkernels.trainers.batch.probe import prepare_packing, prepare_sharing

PROMPTS = [{"prompt": "ab" + "c" * (i % 5) + "d", "index": i} for i in range(13)]


def vowels(completions, **kwargs):
    return [sum(letter in "aeiou" for letter in text) / (1 + len(text)) for text in completions]


@pytest.fixture
def make_trainer(make_model, tokenizer, run_options):
    def make(reward_funcs=vowels, model=None, train_dataset=PROMPTS, eval_dataset=None, callbacks=None, **options):
        options = {
            **run_options,
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_completion_length": 6,
            "learning_rate": 3e-3,
            "max_steps": 4,
        } | options
        model = make_model() if model is None else model
        return GRPOTrainer(
            model, reward_funcs, GRPOConfig(**options), train_dataset, eval_dataset, tokenizer, callbacks=callbacks
        )

    return make


def history(trainer) -> list[dict]:
    """What was logged, but for timings."""
    timings = ("runtime", "per_second", "total_flos", "train_loss")
    logs = [{k: v for k, v in log.items() if not k.endswith(timings)} for log in trainer.state.log_history]
    return [log for log in logs if "loss" in log]


def weights(trainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def test_learns(make_trainer):
    trainer = make_trainer(max_steps=80, eval_dataset=PROMPTS)
    before = trainer.evaluate()["eval_reward"]
    trainer.train()
    assert trainer.evaluate()["eval_reward"] > before + 0.15


def test_metrics(make_trainer):
    def two(completions, log_metric, log_extra, **kwargs):
        log_metric("halves", 0.5)
        log_extra("length", [len(text) for text in completions])
        return [None if i % 2 else 1.0 for i in range(len(completions))]

    trainer = make_trainer([vowels, two], beta=0.1, max_steps=1, reward_weights=[1, 1])
    trainer.train()
    log = history(trainer)[0]
    table = trainer.completions
    assert len(table) == 8
    assert log["rewards/two/mean"] == 1.0
    assert log["rewards/two/std"] == 0.0
    totals = torch.tensor([row["rewards/vowels"] + (row["rewards/two"] == 1.0) for row in table])
    assert log["reward"] == pytest.approx(totals.mean().item())
    assert log["reward_std"] == pytest.approx(totals.std().item())
    assert log["halves"] == 0.5
    assert [row["length"] for row in table] == [len(row["completion"]) for row in table]
    assert {"kl", "frac_reward_zero_std", "completions/mean_length", "completions/clipped_ratio"} <= log.keys()
    assert log["clip_ratio/region_mean"] == 0.0


def test_num_tokens_counts_prompts_and_completions(make_trainer):
    seen = []

    def count(prompts, completion_ids, **kwargs):
        seen.append(sum(map(len, prompts)) + sum(map(len, completion_ids)))
        return [0.0, 1.0] * 4

    trainer = make_trainer(count, max_steps=3)
    trainer.train()
    assert [log["num_tokens"] for log in history(trainer)] == [sum(seen[: i + 1]) for i in range(3)]


SCHEDULES = {
    "one_step_each": {},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    "three_iterations": {"num_iterations": 3},
    "two_steps_per_generation": {"steps_per_generation": 2, "per_device_train_batch_size": 4},
}


@pytest.mark.parametrize(
    ("schedule", "beta"),
    [
        ("accumulation", 0.1),
        ("three_iterations", 0.0),
        ("two_steps_per_generation", 0.1),
        thorough("one_step_each", 0.0),
        thorough("one_step_each", 0.1),
        thorough("accumulation", 0.0),
        thorough("three_iterations", 0.1),
        thorough("two_steps_per_generation", 0.0),
    ],
)
def test_resumes_exactly(make_trainer, schedule, beta, tmp_path):
    """Step 5 lies in the second epoch, or within a generation batch: rollouts, losses and weights go on bit for bit."""
    options = {"max_steps": 9, "save_strategy": "steps", "save_steps": 5, "beta": beta, **SCHEDULES[schedule]}
    whole = make_trainer(output_dir=str(tmp_path / "whole"), **options)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-5"

    resumed = make_trainer(output_dir=str(tmp_path / "resumed"), **options)
    torch.manual_seed(12345)  # whatever happened in this process before
    random.seed(12345)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert history(resumed) == history(whole)
    assert len(history(resumed)) == 9
    assert torch.equal(weights(resumed), weights(whole))
    assert resumed.completions == whole.completions


def test_resume_at_the_end_of_an_epoch(make_trainer, tmp_path):
    options = {"max_steps": 9, "save_strategy": "steps", "save_steps": 6}  # 13 prompts, 2 at a time: 6 steps an epoch
    whole = make_trainer(output_dir=str(tmp_path / "whole"), **options)
    whole.train()
    resumed = make_trainer(output_dir=str(tmp_path / "resumed"), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert history(resumed) == history(whole)
    assert torch.equal(weights(resumed), weights(whole))


def test_resumed_reference_is_that_of_the_start(make_trainer, tmp_path):
    """Also where the trainer is given the checkpoint, not the model of the start."""
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "beta": 0.1}
    whole = make_trainer(output_dir=str(tmp_path / "whole"), **options)
    whole.train()
    checkpoint = str(tmp_path / "whole" / "checkpoint-3")
    resumed = make_trainer(model=checkpoint, output_dir=str(tmp_path / "resumed"), **options)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert history(resumed) == history(whole)
    assert history(whole)[-1]["kl"] > 0


def test_epochs_visit_every_prompt_in_a_new_order(make_trainer):
    seen = []

    def note(index, **kwargs):
        seen.extend(index[::4])
        return vowels(**kwargs)

    make_trainer(note, max_steps=-1, num_train_epochs=2, train_dataset=PROMPTS[:12]).train()
    first, second = seen[:12], seen[12:]
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second != sorted(second)


def test_prompts_in_order_without_shuffling(make_trainer):
    seen = []

    def note(index, **kwargs):
        seen.extend(index)
        return vowels(**kwargs)

    make_trainer(note, shuffle_dataset=False, max_steps=2).train()
    assert seen == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4


def test_reference_of_a_model_in_memory(make_trainer, make_model):
    """The reference is what the model was when it was handed over, and stays so."""
    model = make_model()
    trainer = make_trainer(model=model, beta=0.5)
    trainer.train()
    assert history(trainer)[0]["kl"] == 0.0
    assert history(trainer)[-1]["kl"] > 0.0
    start = torch.cat([parameter.flatten() for parameter in make_model().parameters()])
    reference = torch.cat([parameter.flatten() for parameter in trainer.reference_model.parameters()])
    assert torch.equal(reference, start)
    assert not torch.equal(weights(trainer), start)


def test_without_beta_there_is_no_reference(make_trainer):
    assert make_trainer().reference_model is None


def group_rewards(completions, **kwargs):
    """One group of equal rewards, and one that differs, in which a row is exactly at the mean."""
    return [1.0] * 4 + [0.0, 1.0, 2.0, 1.0]


@pytest.fixture
def rows_run(monkeypatch):
    """The number of rows of each micro-batch that runs through the model with a gradient."""
    counts = []

    def counting(original):
        def function(model, batch, *args, **options):
            if torch.is_grad_enabled():
                counts.append(len(batch.cu_seqlens) - 1)
            return original(model, batch, *args, **options)

        return function

    for name in ("token_logprobs", "policy_loss"):
        monkeypatch.setattr(scoring, name, counting(getattr(scoring, name)))
    return counts


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "bnpo", "dr_grpo"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_rows_without_signal_are_not_run(make_trainer, monkeypatch, rows_run, loss_type, accumulation):
    """Loss and gradient are those of running every row."""
    options = {
        "loss_type": loss_type,
        "gradient_accumulation_steps": accumulation,
        "per_device_train_batch_size": 8 // accumulation,
        "max_grad_norm": 0.0,
    }
    results = []
    for everything in (False, True):
        trainer = make_trainer(group_rewards, **options)
        if everything:
            monkeypatch.setattr(grpo.Experience, "has_gradient", lambda self, row: True)
        inputs = [PROMPTS[row // 4] for row in range(8)]
        loss = trainer.training_step(trainer.model, inputs)
        gradient = torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters()])
        results.append((loss, gradient, history(trainer)))
        if not everything:
            assert rows_run == [2]
    assert sum(rows_run[1:]) == 8
    (loss, gradient, _), (full_loss, full_gradient, _) = results
    assert full_gradient.norm() > 1e-3
    torch.testing.assert_close(loss, full_loss, rtol=1e-5, atol=1e-6)
    assert (gradient - full_gradient).norm() <= 1e-5 * full_gradient.norm()


def test_with_beta_every_row_is_run(make_trainer, rows_run):
    make_trainer(group_rewards, beta=0.1, max_steps=1).train()
    assert rows_run == [8]


def test_a_step_without_any_signal(make_trainer, rows_run):
    """Gradients are zero, not missing: the optimizer steps as it would have."""
    trainer = make_trainer(lambda completions, **kwargs: [1.0] * len(completions), max_steps=2)
    trainer.train()
    assert rows_run == [1, 1]
    assert [log["loss"] for log in history(trainer)] == [0.0, 0.0]
    assert [log["grad_norm"] for log in history(trainer)] == [0.0, 0.0]
    assert [log["frac_reward_zero_std"] for log in history(trainer)] == [1.0, 1.0]
    assert history(trainer)[-1]["reward"] == 1.0


def test_evaluation_leaves_training_alone(make_trainer):
    """Weights, random numbers and logs of training are those of a run without evaluation; evaluation repeats itself."""

    def noisy(completions, **kwargs):
        return [random.random() for _ in completions]

    plain = make_trainer(noisy)
    plain.train()
    evaluated = make_trainer(noisy, eval_dataset=PROMPTS, eval_strategy="steps", eval_steps=1)
    evaluated.train()
    assert history(evaluated) == history(plain)
    assert torch.equal(weights(evaluated), weights(plain))
    last = [log for log in evaluated.state.log_history if "eval_reward" in log][-1]["eval_reward"]
    assert evaluated.evaluate()["eval_reward"] == last


@pytest.mark.parametrize("rows, batch", [(13, 8), (5, 16), (3, 5)])
def test_evaluation_counts_every_completion_once(make_trainer, rows, batch):
    seen = []

    def first(index, **kwargs):
        seen.extend(index)
        return [float(i == 0) for i in index]

    trainer = make_trainer(first, eval_dataset=PROMPTS[:rows], per_device_eval_batch_size=batch, num_generations_eval=3)
    assert trainer.evaluate()["eval_reward"] == pytest.approx(1 / rows)
    assert seen == [i for i in range(rows) for _ in range(3)]


def test_reward_functions_may_compute_gradients(make_trainer):
    """In training and in evaluation alike."""

    def slope(completions, **kwargs):
        lengths = torch.tensor([float(len(text)) for text in completions], requires_grad=True)
        lengths.square().sum().backward()
        return lengths.grad.tolist()

    trainer = make_trainer(slope, eval_dataset=PROMPTS[:2], max_steps=1)
    trainer.train()
    assert trainer.evaluate()["eval_reward"] > 0


def test_evaluation_of_several_sets(make_trainer):
    trainer = make_trainer(eval_dataset={"easy": PROMPTS[:3], "hard": PROMPTS[3:]}, num_generations_eval=2)
    metrics = trainer.evaluate()
    assert {"eval_easy_reward", "eval_hard_reward", "eval_easy_completions/mean_length"} <= metrics.keys()


def test_chat_prompts(make_trainer):
    dataset = [{"prompt": [{"role": "user", "content": f"x{i}"}], "index": i} for i in range(4)]
    seen = {}

    def note(prompts, completions, completion_ids, index, **kwargs):
        seen.update(prompts=prompts, completions=completions, completion_ids=completion_ids, index=index)
        return [0.0, 1.0] * 4

    trainer = make_trainer(note, train_dataset=dataset, max_steps=1)
    trainer.train()
    assert seen["prompts"] == [dataset[i]["prompt"] for i in seen["index"]]
    for (message,), ids in zip(seen["completions"], seen["completion_ids"], strict=True):
        assert message == {
            "role": "assistant",
            "content": trainer.processing_class.decode(ids, skip_special_tokens=True),
        }


def test_hugging_face_dataset(make_trainer):
    import datasets

    trainer = make_trainer(train_dataset=datasets.Dataset.from_list(PROMPTS), max_steps=1)
    trainer.train()
    assert len(history(trainer)) == 1


def test_saved_model_loads(make_trainer, make_model, tmp_path):
    trainer = make_trainer(max_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    loaded = type(make_model()).from_pretrained(tmp_path / "model")
    assert torch.equal(torch.cat([parameter.flatten() for parameter in loaded.parameters()]), weights(trainer))


def test_activation_checkpointing(make_trainer, count_passes):
    """On by default, as in TRL; what is learned is the same."""
    learned, passes = [], []
    for setting in (False, None):
        trainer = make_trainer(activation_checkpointing=setting, num_iterations=2)
        seen = count_passes(trainer.model)
        trainer.train()
        learned.append(weights(trainer))
        passes.append(len(seen))
    torch.testing.assert_close(*learned)
    assert passes[1] == 2 * passes[0] > 0


def test_bfloat16_computes_over_float32_weights(make_trainer):
    trainer = make_trainer(bf16=True, max_steps=2)
    trainer.train()
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())
    assert history(trainer)[-1]["grad_norm"] > 0


def test_logits_are_stored_for_sampling_alone(make_trainer):
    """Neither the policy nor the reference nor the weights before a step's updates are scored by way of logits."""
    trainer = make_trainer(beta=0.1, num_iterations=2, max_steps=2)
    rows = []
    for model in (trainer.model, trainer.reference_model):
        model.lm_head.register_forward_hook(lambda head, inputs, output: rows.append(output.shape[1]))
    trainer.train()
    assert set(rows) == {0, 1}
    assert sum(count == 0 for count in rows) == 4  # two steps, and the two scorings of their rollout


@pytest.mark.parametrize(
    "options",
    [thorough({}, id="plain"), pytest.param({"beta": 0.1, "num_iterations": 2, "temperature": 0.7}, id="all")],
)
def test_a_model_whose_logits_cannot_be_left_out(make_trainer, make_model, monkeypatch, caplog, options):
    """It is trained by its logits, to the same weights, after one warning with the reason."""
    wanted = make_trainer(**options)
    wanted.train()
    odd = make_model()
    monkeypatch.setattr(odd.config, "is_encoder_decoder", True)
    trainer = make_trainer(model=odd, **options)
    assert [record.message for record in caplog.records if "Logits are stored" in record.message] == [
        "Logits are stored: LlamaForCausalLM cannot give log-probabilities without logits: "
        "it is an encoder-decoder model, whose labels are not shifted"
    ]
    monkeypatch.undo()
    trainer.train()
    torch.testing.assert_close(weights(trainer), weights(wanted), rtol=1e-3, atol=1e-5)


def test_a_model_is_trained_again(make_trainer, make_model):
    """accelerate leaves its mixed-precision forward on the model: the reference is a copy under that."""
    model = make_model()
    for _ in range(2):
        trainer = make_trainer(model=model, bf16=True, beta=0.1, max_steps=3)
        trainer.train()
        kl = [log["kl"] for log in history(trainer)]
        assert kl[0] == 0 and kl[-1] > 0


def test_adapters_are_trained_without_logits(make_trainer, make_model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    trainer = make_trainer(model=peft.get_peft_model(make_model(), config), beta=0.1)
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    rows = []
    trainer.model.get_output_embeddings().register_forward_hook(lambda head, x, output: rows.append(output.shape[1]))
    trainer.train()
    assert set(rows) == {0, 1}
    changed = {name for name, parameter in trainer.model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}


def test_log_probabilities_are_those_of_the_sampler_without_dropout(make_trainer, make_model):
    model = make_model()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    trainer = make_trainer(model=model, num_iterations=2, max_steps=1, learning_rate=0.0, beta=0.1)
    trainer.train()
    experience = trainer.collector.buffer.experience
    found, batch = experience.old_logprobs, trainer._lay_out(experience, range(8))
    without = make_model()
    assert prepare_packing(without, torch.device("cpu")) and prepare_sharing(without, torch.device("cpu"))
    expected = batch.split(scoring.token_logprobs(without, batch, fused=False))
    for old, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(old, wanted, rtol=1e-4, atol=1e-5)
    assert trainer.model.training


def test_reward_error_ends_the_run_with_nothing_written(make_trainer, tmp_path):
    def fails(completions, **kwargs):
        return [1.0] * 7

    trainer = make_trainer(fails, save_strategy="steps", save_steps=1)
    with pytest.raises(rlkernels.trainers.RewardError, match="'fails' must return one reward for each of the 8"):
        trainer.train()
    assert list((tmp_path / "run").iterdir()) == []


def test_bad_input(make_trainer, tmp_path):
    with pytest.raises(ValueError, match=r"16 completions .* must be divisible by num_generations \(3\)"):
        make_trainer(per_device_train_batch_size=16, num_generations=3)
    with pytest.raises(ValueError, match="train_dataset has no column 'prompt'; its columns are question"):
        make_trainer(train_dataset=[{"question": "a"}])
    with pytest.raises(ValueError, match="eval_dataset has no column 'prompt'"):
        make_trainer(eval_dataset=[{"question": "a"}])
    with pytest.raises(ValueError, match=r"eval_dataset\['hard'\] has no column 'prompt'"):
        make_trainer(eval_dataset={"easy": PROMPTS, "hard": [{"question": "a"}]})
    with pytest.raises(TypeError, match="train_dataset must be a sequence of rows; got dict"):
        make_trainer(train_dataset={"train": PROMPTS})
    with pytest.raises(ValueError, match="train_dataset has 1 rows, fewer than the 2 prompts"):
        make_trainer(train_dataset=PROMPTS[:1])
    with pytest.raises(ValueError, match="train_dataset is empty"):
        make_trainer(train_dataset=[])
    with pytest.raises(TypeError, match="train_dataset must be a sequence of rows; got NoneType"):
        make_trainer(train_dataset=None)
    with pytest.raises(ValueError, match="reward_weights must have one entry per reward function, 1; got 2"):
        make_trainer(reward_weights=[1.0, 2.0])
    with pytest.raises(ValueError, match="reward_funcs must hold at least one function"):
        make_trainer([])
    with pytest.raises(TypeError, match="reward_funcs must be functions; got 1"):
        make_trainer(1)
    with pytest.raises(FileNotFoundError, match="model 'vowels': there is no such folder"):
        make_trainer("vowels")
    for missing in (str(tmp_path / "nowhere"), "nowhere/at-all", "runs/a/b/c"):
        with pytest.raises(FileNotFoundError, match=f"model '{missing}': there is no such folder"):
            make_trainer(model=missing)
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        make_trainer(model=str(tmp_path))


def test_generation_config_of_the_model_does_not_touch_sampling(make_trainer, make_model):
    """A model folder may ask for top_k 1 or a repetition penalty; the policy that is trained is not that one."""
    texts = []
    for top_k in (None, 1):
        model = make_model()
        if top_k:
            model.generation_config.top_k = top_k
            model.generation_config.repetition_penalty = 1.5
        trainer = make_trainer(model=model, max_steps=1)
        trainer.train()
        texts.append([row["completion"] for row in trainer.completions])
        assert model.generation_config.top_k == top_k
    assert texts[0] == texts[1]


def test_checkpoint_state_is_complete(make_trainer, tmp_path):
    trainer = make_trainer(num_iterations=2, max_steps=1, save_strategy="steps", save_steps=1, beta=0.1)
    trainer.train()
    checkpoint = tmp_path / "run" / "checkpoint-1"
    assert (checkpoint / "rollouts_0.pth").is_file()
    assert (checkpoint / "reference" / "model.safetensors").is_file()
    assert json.loads((checkpoint / "trainer_state.json").read_text())["num_input_tokens_seen"] > 0
