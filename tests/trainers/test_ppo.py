"""PPOTrainer end to end on a tiny model: learning, resuming, value models and heads, rewards, what is in the loss."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import tokenizers
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast
from transformers.trainer_utils import EvalLoopOutput

import rlkernels
from cases import thorough
from rlkernels.trainers import PPOConfig, PPOTrainer, Rollout

PROMPTS = [{"prompt": "ab" + "c" * (i % 5) + "d", "index": i} for i in range(13)]


def lowercase(completions, **kwargs):
    return [sum(letter.islower() for letter in text) / (1 + len(text)) for text in completions]


def vowels(completions, **kwargs):
    return [sum(letter in "aeiou" for letter in text) / (1 + len(text)) for text in completions]


@pytest.fixture
def make_classifier(make_model):
    def make(seed=1, **options):
        config = make_model().config
        config.num_labels = 1
        config.update(options)
        torch.manual_seed(seed)
        return AutoModelForSequenceClassification.from_config(config)

    return make


@pytest.fixture
def make_trainer(make_model, tokenizer, run_options):
    def make(reward_funcs=vowels, model=None, train_dataset=PROMPTS, eval_dataset=None, trainer=None, **options):
        models = {name: options.pop(name) for name in ("value_model", "ref_model", "peft_config") if name in options}
        options = {
            **run_options,
            "per_device_train_batch_size": 4,
            "num_ppo_epochs": 2,
            "num_mini_batches": 2,
            "response_length": 6,
            "temperature": 1.0,
            "learning_rate": 3e-3,
            "max_steps": 4,
        } | options
        rollout = options.pop("rollout", None)
        model = make_model() if model is None else model
        args = PPOConfig(**options)
        return PPOTrainer(model, reward_funcs, args, train_dataset, eval_dataset, tokenizer, rollout=rollout, **models)

    return make


def history(trainer) -> list[dict]:
    """What was logged, but for timings."""
    timings = ("runtime", "per_second", "total_flos", "train_loss")
    logs = [{k: v for k, v in log.items() if not k.endswith(timings)} for log in trainer.state.log_history]
    return [log for log in logs if "loss" in log]


def weights(model) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def gradient(trainer) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters() if parameter.requires_grad])


@pytest.mark.parametrize("value", ["head", thorough("model")])
def test_learns(make_trainer, make_classifier, value):
    """In 28 optimizer steps, on 7 batches of completions."""
    value_model = make_classifier() if value == "model" else None
    if value_model is not None:
        torch.nn.init.zeros_(value_model.score.weight)
    trainer = make_trainer(
        lowercase,
        train_dataset=PROMPTS * 5,
        eval_dataset=PROMPTS * 5,
        value_model=value_model,
        per_device_train_batch_size=64,
        max_steps=28,
        learning_rate=1e-2,
        vf_coef=1.0,
        kl_coef=0.01,
    )
    before = trainer.evaluate()["eval_reward"]
    trainer.train()
    assert trainer.evaluate()["eval_reward"] > before + 0.15


@pytest.mark.parametrize(
    "step, value",
    [
        pytest.param(3, "head", id="between_minibatches"),
        thorough(4, "model", id="between_batches"),
        pytest.param(6, "model", id="between_epochs"),
    ],
)
def test_resumes_exactly(make_trainer, make_classifier, value, step, tmp_path):
    """Rollouts, order of the rows, KL coefficient, value, losses and weights go on bit for bit."""

    def make(folder, **others):
        return make_trainer(
            value_model=make_classifier() if value == "model" else None,
            output_dir=str(tmp_path / folder),
            max_steps=9,
            save_strategy="steps",
            save_steps=step,
            adap_kl_ctrl=True,
            target_kl=0.1,
            horizon=20,
            **others,
        )

    whole = make("whole")
    whole.train()
    resumed = make("resumed")
    torch.manual_seed(12345)  # whatever happened in this process before
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    assert history(resumed) == history(whole)
    assert len(history(resumed)) == 9
    assert torch.equal(weights(resumed.model), weights(whole.model))
    assert resumed.kl.coef == whole.kl.coef != 0.05


@pytest.mark.parametrize("value", ["head", "model"])
def test_packed_is_padded(make_trainer, make_classifier, value):
    """Losses and gradients, at once or in micro-batches of few tokens."""
    results = []
    for options in ({}, {"padding_free": False}, {"token_budget": 25}):
        trainer = make_trainer(
            value_model=make_classifier() if value == "model" else None,
            max_grad_norm=0.0,
            num_mini_batches=1,
            per_device_train_batch_size=8,
            vf_coef=1.0,
            **options,
        )
        if value == "head":
            torch.nn.init.normal_(trainer.model.value.weight, generator=torch.Generator().manual_seed(0))
        torch.manual_seed(7)
        count = len(trainer.micro_batches(PROMPTS[:8]))
        assert (count > 1) == ("token_budget" in options)
        results.append((trainer.training_step(trainer.model, PROMPTS[:8]), gradient(trainer)))
    for loss, grad in results[1:]:
        torch.testing.assert_close(loss, results[0][0], rtol=1e-5, atol=1e-6)
        assert (grad - results[0][1]).norm() <= 1e-5 * grad.norm()
        assert grad.norm() > 1e-2


@pytest.mark.parametrize("value", ["head", "model"])
def test_saved_models_load(make_trainer, make_classifier, value, tmp_path):
    """The policy is a model as any other; beside it, what says its value."""
    trainer = make_trainer(value_model=make_classifier() if value == "model" else None)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(weights(policy), weights(trainer.model.policy))
    assert (tmp_path / "saved" / "tokenizer.json").is_file()
    if value == "model":
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved" / "value")
        assert torch.equal(weights(loaded), weights(trainer.model.value))
    else:
        saved = safetensors.torch.load_file(tmp_path / "saved" / "value" / "model.safetensors")
        assert torch.equal(saved["weight"], trainer.model.value.weight)


def test_best_model_is_loaded_at_the_end(make_trainer, make_classifier):
    """Policy and value."""
    trainer = make_trainer(
        eval_dataset=PROMPTS,
        value_model=make_classifier(),
        max_steps=6,
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
    )
    rewards = iter([0.1, 0.9, 0.3])
    trainer.evaluation_loop = lambda *args, **kwargs: EvalLoopOutput(None, None, {"eval_reward": next(rewards)}, 13)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == "checkpoint-4"
    policy = AutoModelForCausalLM.from_pretrained(best)
    value = AutoModelForSequenceClassification.from_pretrained(best / "value")
    assert torch.equal(weights(trainer.model), torch.cat([weights(policy), weights(value)]))


@pytest.mark.parametrize("value", ["head", "model", "adapters"])
def test_adapters(make_trainer, make_model, make_classifier, value, tmp_path):
    """Adapters and the value are trained; the reference is the model without its adapters; the base is not saved."""
    peft = pytest.importorskip("peft")

    def make(folder):
        value_model = None if value == "head" else make_classifier()
        if value == "adapters":
            config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="SEQ_CLS")
            value_model = peft.get_peft_model(value_model, config)
        return make_trainer(
            value_model=value_model,
            peft_config=peft.LoraConfig(
                r=4, lora_dropout=0.5, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
            ),
            output_dir=str(tmp_path / folder),
            max_steps=6,
            save_strategy="steps",
            save_steps=3,
            learning_rate=1e-2,
        )

    trainer = make("whole")
    assert trainer.reference_model is None
    trainer.train()
    assert [log["objective/kl"] != 0 for log in history(trainer) if "objective/kl" in log] == [False, True]
    # The first step on a new batch is by the policy that sampled it: nothing is dropped at random.
    assert history(trainer)[4]["policy/approxkl_avg"] == pytest.approx(0.0, abs=1e-6)
    base, policy = weights(make_model()), trainer.model.policy
    frozen = [parameter.detach().flatten() for parameter in policy.parameters() if not parameter.requires_grad]
    assert torch.equal(torch.cat(frozen).sort().values, base.sort().values)
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    assert (checkpoint / "adapter_model.safetensors").is_file() and not (checkpoint / "model.safetensors").is_file()
    assert not (checkpoint / "reference").exists()
    resumed = make("resumed")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert history(resumed) == history(trainer)
    assert torch.equal(weights(resumed.model), weights(trainer.model))


def test_adapters_that_it_was_given_are_the_reference(make_trainer, make_model, tmp_path):
    """Those of the start, also where a run that goes on is given those of the checkpoint."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    options = {"max_steps": 10, "save_strategy": "steps", "save_steps": 5, "learning_rate": 1e-2}
    torch.manual_seed(1)
    model = peft.get_peft_model(make_model(), config)
    whole = make_trainer(model=model, output_dir=str(tmp_path / "whole"), **options)
    whole.train()
    kl = [log["objective/kl"] for log in history(whole) if "objective/kl" in log]
    assert kl[0] == 0 and kl[-1] != 0
    checkpoint = str(tmp_path / "whole" / "checkpoint-5")
    model = peft.PeftModel.from_pretrained(make_model(), checkpoint, is_trainable=True)
    resumed = make_trainer(model=model, output_dir=str(tmp_path / "resumed"), **options)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert history(resumed) == history(whole)


def test_tokens_of_a_tool(make_trainer, make_model, tokenizer):
    """They are in neither loss; values, rewards and advantages go over them as if they were part of the prompt."""
    rows = [([1, 2, 3], [5, 6, 40, 41, 7, 0]), ([4], [40, 8, 9, 41, 41, 10])]

    def engine(prompts, options):
        masks = [[token < 40 for token in completion] for _, completion in rows]
        return [
            Rollout(prompt, completion, completion[-1] == 0, mask=mask)
            for (prompt, completion), mask in zip(rows, masks, strict=True)
        ]

    trainer = make_trainer(
        rollout=engine, per_device_train_batch_size=2, num_mini_batches=1, response_length=7, gamma=0.9, kl_coef=0.0
    )
    torch.nn.init.normal_(trainer.model.value.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    (batch,) = trainer.micro_batches(PROMPTS[:2])
    rollouts = trainer.collector.buffer.experience
    for row, (prompt, completion) in enumerate(rows):
        start = len(prompt) - 1 - rollouts.sequences[row].prefix
        places = [start + place for place, token in enumerate(completion) if token < 40]
        assert rollouts.old_logprobs[row].nonzero().flatten().tolist() == places
        assert rollouts.has_value[row].nonzero().flatten().tolist() == places
        values = [*rollouts.old_values[row][places].tolist(), 0.0]
        expected, advantage = [], 0.0
        score = vowels(tokenizer.batch_decode([completion], skip_special_tokens=True))[0]
        for place in reversed(range(len(places))):
            reward = score if place == len(places) - 1 else 0.0
            delta = reward + 0.9 * values[place + 1] - values[place]
            advantage = delta + 0.9 * 0.95 * advantage
            expected.insert(0, advantage + values[place])
        torch.testing.assert_close(rollouts.returns[row][places], torch.tensor(expected))

    def loss(change):
        names = ("advantages", "returns", "old_values", "old_logprobs")
        changed = {name: torch.where(batch.has_value, getattr(batch, name), change) for name in names}
        return trainer.compute_loss(trainer.model, replace(batch, **changed)).item()

    assert loss(0.0) == loss(3.0) != 0.0


def test_score_at(make_trainer):
    """Behind the last token if there is room for one, or always at it."""
    completions = [[5, 6, 0], [7, 8, 9, 10, 11, 0], [7, 8, 9, 10, 11, 12], [0]]

    def engine(prompts, options):
        return [Rollout([1, 2], completion, completion[-1] == 0) for completion in completions]

    for score_at, room in (("after_last", [True, False, False, True]), ("last", [False] * 4)):
        trainer = make_trainer(score_at=score_at, rollout=engine)
        trainer.micro_batches(PROMPTS[:4])
        rollouts = trainer.collector.buffer.experience
        for sequence, places, completion, has_room in zip(
            rollouts.sequences, rollouts.has_value, completions, room, strict=True
        ):
            assert places.tolist() == [False] * (1 - sequence.prefix) + [True] * len(completion) + [has_room]


@pytest.mark.parametrize("whiten_rewards", [False, True])
@pytest.mark.parametrize("score_at", ["last", "after_last"])
def test_completions_without_any_reward(make_trainer, make_model, score_at, whiten_rewards):
    """The batch is what it would be without them, at which nothing is learned."""
    completions = [[5, 6, 0], [7, 8, 9, 10], [11, 12, 13, 14, 15, 16], [0]]

    def run(rows, reward):
        def engine(prompts, options):
            return [Rollout([1, 2], completions[row], completions[row][-1] == 0) for row in rows]

        options = {"missing_eos_penalty": 1.0, "adap_kl_ctrl": True, "whiten_rewards": whiten_rewards, "max_steps": 1}
        options |= {"score_at": score_at}
        options |= {"num_mini_batches": 1, "num_ppo_epochs": 1, "per_device_train_batch_size": len(rows)}
        trainer = make_trainer(reward, rollout=engine, ref_model=make_model(1), **options)
        trainer.train()
        return trainer

    some = run(range(4), lambda completions, **columns: [None, 2.0, None, 1.0])
    others = run([1, 3], lambda completions, **columns: [2.0, 1.0])
    logs, expected = history(some)[0], history(others)[0]
    for name in logs:
        if not name.startswith(("completions/", "val/num_eos_tokens", "num_tokens", "tokens", "epoch")):
            assert logs[name] == pytest.approx(expected[name], rel=1e-4), name
    assert some.kl.coef == pytest.approx(others.kl.coef, rel=1e-6) != 0.05
    torch.testing.assert_close(weights(some.model), weights(others.model))
    assert [row["advantage"] for row in some.completions][::2] == [0.0, 0.0]


def test_missing_eos_penalty(make_trainer):
    trainer = make_trainer(lambda completions, **kwargs: [2.0] * len(completions), missing_eos_penalty=3.0, max_steps=1)
    trainer.train()
    log = history(trainer)[0]
    assert log["completions/clipped_ratio"] > 0
    assert log["objective/scores"] == pytest.approx(2.0 - 3.0 * log["completions/clipped_ratio"])
    assert log["val/num_eos_tokens"] == 4 * (1 - log["completions/clipped_ratio"])


def test_adaptive_kl_coefficient(make_trainer, monkeypatch):
    """It rises, by a fifth of the share of the horizon at most, where the divergence is above the target."""
    used, shaped_rewards = [], rlkernels.shaped_rewards

    def recording(*args, **options):
        used.append(options["kl_coef"])
        return shaped_rewards(*args, **options)

    monkeypatch.setattr(rlkernels, "shaped_rewards", recording)
    trainer = make_trainer(
        adap_kl_ctrl=True, target_kl=1e-4, horizon=8, kl_estimator="k3", num_ppo_epochs=1, num_mini_batches=1
    )
    trainer.train()
    assert history(trainer)[0]["objective/kl"] == 0.0
    assert used[1] == pytest.approx(0.05 * (1 - 0.2 * 4 / 8))
    assert used[2] == pytest.approx(used[1] * (1 + 0.2 * 4 / 8))
    log = history(trainer)[2]
    assert log["objective/kl_coef"] == pytest.approx(used[2])
    assert log["objective/non_score_reward"] == pytest.approx(-used[2] * log["objective/kl"])


def test_attention_has_no_dropout(make_trainer, make_model):
    """Else the policy that is trained would not be the one whose log-probabilities were scored."""
    model = make_model()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    trainer = make_trainer(model=model, num_ppo_epochs=1, num_mini_batches=1, max_steps=1)
    trainer.train()
    assert history(trainer)[0]["val/ratio"] == pytest.approx(1.0, abs=1e-4)


def test_without_kl_coef_there_is_no_reference(make_trainer, make_model):
    trainer = make_trainer(kl_coef=0.0)
    trainer.train()
    assert trainer.reference_model is None
    assert "objective/kl" not in history(trainer)[0]
    with pytest.raises(ValueError, match="ref_model must be None with kl_coef 0"):
        make_trainer(kl_coef=0.0, ref_model=make_model(1))


def test_reward_models(make_trainer, make_classifier, tokenizer, tmp_path):
    """In memory or a folder, beside a function, weighted; they read the policy's own tokens, and stay as they are."""
    scorer = make_classifier()
    scorer.save_pretrained(tmp_path / "scorer")
    trainer = make_trainer([scorer, str(tmp_path / "scorer"), vowels], reward_weights=[1.0, -0.5, 2.0])
    trainer.train()
    assert torch.equal(weights(scorer), weights(make_classifier()))
    samples = trainer.collector.collect(PROMPTS[:4])
    assert trainer.collector.rewards.names == ["LlamaForSequenceClassification", "scorer", "vowels"]
    for rollout, rewards in zip(samples.rollouts, samples.rewards.tolist(), strict=True):
        ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids])
        score = scorer.score(scorer.model(ids).last_hidden_state)[0, -1].item()
        assert rewards[:2] == pytest.approx([score] * 2, rel=1e-4)


@pytest.mark.parametrize("chat", [False, True], ids=["text", "messages"])
def test_reward_model_of_another_tokenizer(make_trainer, make_classifier, tokenizer, tmp_path, chat):
    """It reads the text in its own tokens, and an end of its own where the completion ended."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = backend["model"]["vocab"]
    backend["model"]["vocab"] = {word: len(vocab) - 1 - token for word, token in vocab.items()}
    backend["added_tokens"] = []
    own = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(backend)), eos_token="<eos>", unk_token="?"
    )
    own.chat_template = tokenizer.chat_template
    scorer = make_classifier()
    for each in (scorer, own):
        each.save_pretrained(tmp_path / "scorer")

    def engine(prompts, options):
        return [Rollout([1, 2], completion, completion[-1] == 0) for completion in ([3, 4, 0], [5, 6, 7])]

    # The tiny tokenizer decodes with spaces.
    prompt, texts = "ab", ["abc d<eos>", "abe f g"]
    if chat:
        prompt, texts = [{"role": "user", "content": "ab"}], ["u:aba:c d", "u:aba:e f g"]
    trainer = make_trainer(str(tmp_path / "scorer"), rollout=engine)
    rewards = trainer.collector.collect([{"prompt": prompt}] * 2).rewards
    for text, reward in zip(texts, rewards[:, 0].tolist(), strict=True):
        ids = own(text)["input_ids"]
        assert len(ids) == len(text.replace("<eos>", "."))
        hidden = scorer.model(torch.tensor([ids])).last_hidden_state
        assert reward == pytest.approx(scorer.score(hidden)[0, -1].item(), rel=1e-4)


def test_classifiers_without_a_padding_token(make_trainer, make_classifier):
    """They score padded batches all the same."""
    scores = []
    for padding_free in (True, False):
        models = [make_classifier(seed, pad_token_id=None) for seed in (1, 2)]
        trainer = make_trainer(models[0], value_model=models[1], padding_free=padding_free, max_steps=1)
        trainer.train()
        scores.append(history(trainer)[0]["loss/value_avg"])
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)


def test_metrics_and_table(make_trainer):
    trainer = make_trainer(max_steps=1)
    trainer.train()
    log = history(trainer)[0]
    for name in ("approxkl_avg", "clipfrac_avg", "entropy_avg"):
        assert f"policy/{name}" in log
    assert log["val/ratio"] == pytest.approx(1.0)
    assert log["loss"] == pytest.approx(log["loss/policy_avg"] + 0.1 * log["loss/value_avg"], rel=1e-3)
    assert log["objective/rlhf_reward"] == log["objective/scores"] + log["objective/non_score_reward"]
    table = trainer.completions
    assert [row["rewards/vowels"] for row in table] == pytest.approx(vowels([row["completion"] for row in table]))
    assert sum(row["advantage"] for row in table) == pytest.approx(0.0, abs=1e-5)


def test_total_episodes(make_trainer):
    """In whole batches of completions, each of which serves 4 optimizer steps."""
    seen = []

    def note(index, **kwargs):
        seen.append(index)
        return [0.0] * len(index)

    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "shuffle_dataset": False}
    make_trainer(note, total_episodes=9, max_steps=-1, **options).train()
    assert seen == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


@pytest.mark.parametrize("value", ["head", "model"])
def test_what_saves_memory_changes_nothing(make_trainer, make_model, make_classifier, value, count_passes, monkeypatch):
    """Activations computed again, as by default; and, after a warning, a model whose logits cannot be left out."""
    learned, passes = [], []
    for options in ({}, {"activation_checkpointing": None}, {"model": make_model()}):
        value_model = make_classifier() if value == "model" else None
        with monkeypatch.context() as patch:
            if "model" in options:
                patch.setattr(options["model"].config, "is_encoder_decoder", True)
            trainer = make_trainer(value_model=value_model, optim="sgd", max_grad_norm=0.0, vf_coef=1.0, **options)
        if value == "head":
            torch.nn.init.normal_(trainer.model.value.weight, std=0.1, generator=torch.Generator().manual_seed(0))
        seen = [count_passes(model) for model in (trainer.model.policy, value_model or trainer.model.policy)]
        trainer.train()
        assert trainer.fused == ("model" not in options)
        learned.append(weights(trainer.model))
        passes.append([len(each) for each in seen])
    stored, computed_again, with_logits = passes
    assert computed_again == [2 * count for count in stored] and with_logits == stored and all(stored)
    for others in learned[1:]:
        torch.testing.assert_close(others, learned[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"token_budget": 25}, {"score_at": "after_last"}], ids=str)
@pytest.mark.parametrize("value", ["head", "model"])
def test_prompts_that_repeat_are_run_once(make_trainer, make_model, make_classifier, value, options):
    """By the policy, its value function and the reference. All but the number of tokens run is as without sharing."""
    learned = []
    for share in ("true", "false"):
        trainer = make_trainer(
            train_dataset=[row for row in PROMPTS for _ in range(4)],
            shuffle_dataset=False,
            value_model=make_classifier() if value == "model" else None,
            ref_model=make_model(1),
            per_device_train_batch_size=8,
            num_mini_batches=1,
            importance_sampling_correction=True,
            share_prefixes=share,
            optim="sgd",
            max_grad_norm=0.0,
            **options,
        )
        if value == "head":
            torch.nn.init.normal_(trainer.model.value.weight, std=0.1, generator=torch.Generator().manual_seed(0))
        trainer.train()
        learned.append((history(trainer), weights(trainer.model)))
    (shared, found), (whole, expected) = learned
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for log, other in zip(shared, whole, strict=True):
        assert log.pop("tokens_run") < other.pop("tokens_run") == other["tokens"]
        assert log == pytest.approx(other, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("value, epochs", [("head", 1), ("head", 2), ("model", 2), ("adapters", 2), ("logits", 2)])
def test_the_pass_that_scores_is_that_of_the_first_step(
    make_trainer, make_model, make_classifier, value, epochs, monkeypatch
):
    """Each model runs once less for a batch of completions, and learns what it would learn in a further pass."""

    def run(again):
        options = {"value_model": make_classifier() if value != "head" else None, "model": make_model()}
        if value == "adapters":
            peft = pytest.importorskip("peft")
            options["peft_config"] = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
        with monkeypatch.context() as patch:
            if value == "logits":  # are stored
                patch.setattr(options["model"].config, "is_encoder_decoder", True)
            trainer = make_trainer(num_ppo_epochs=epochs, num_mini_batches=1, whiten_rewards=True, **options)
        if value == "head":
            torch.nn.init.normal_(trainer.model.value.weight, std=0.1, generator=torch.Generator().manual_seed(0))
        passes = {"policy": 0, "value": 0}

        def count(name):
            def seen(module, args, kwargs):
                passes[name] += "cu_seq_lens_q" in kwargs  # sampling has none

            return seen

        for name in passes if value != "head" else ["policy"]:
            getattr(trainer.model, name).register_forward_pre_hook(count(name), with_kwargs=True)
        if again:
            make_experience = trainer.make_experience
            trainer.make_experience = lambda rows: replace(make_experience(rows), forward_pass=None)
        trainer.train()
        return passes, history(trainer), weights(trainer.model)

    (more, logs, expected), (fewer, ours, found) = run(again=True), run(again=False)
    batches = 4 // epochs
    references = {"policy": batches if value == "adapters" else 0, "value": 0}  # the same policy, without its values
    for name in more if value != "head" else ["policy"]:
        assert fewer[name] == 4 + references[name] and more[name] == fewer[name] + batches
    # To the last bit, because one tile holds all logits.
    assert ours == logs and torch.equal(found, expected)


def test_a_pass_serves_a_step_of_all_rows_in_one_micro_batch(make_trainer):
    for options, serves in (({}, [True, False]), ({"token_budget": 25}, [False]), ({"num_mini_batches": 2}, [False])):
        trainer = make_trainer(**{"num_mini_batches": 1, "per_device_train_batch_size": 8, **options})
        for step, expected in enumerate(serves):
            trainer.state.global_step = step
            batches = trainer.micro_batches(PROMPTS[:8])
            assert [batch.forward_pass is not None for batch in batches] == [expected] * len(batches)
        assert (len(batches) > 1) == ("token_budget" in options)
        assert trainer.collector.buffer.experience.forward_pass is None


def test_value_head_teaches_the_policy_too(make_trainer):
    """The gradient of the value loss goes on through the hidden states."""
    trainer = make_trainer(vf_coef=2.0, cliprange_value=1e6, num_mini_batches=1)
    policy, head = trainer.model.policy, trainer.model.value
    torch.nn.init.normal_(head.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    (batch,) = trainer.micro_batches(PROMPTS[:4])
    batch.advantages.zero_()
    trainer.compute_loss(trainer.model, batch).backward()
    ours = gradient(trainer)
    trainer.model.zero_grad()
    errors = []
    rollouts = trainer.collector.buffer.experience
    for sequence, returns, places in zip(rollouts.sequences, rollouts.returns, rollouts.has_value, strict=True):
        hidden = policy.model(torch.tensor([sequence.input_ids])).last_hidden_state
        values = head(hidden)[0, sequence.prefix :, 0]
        errors.append((values - returns)[places])
    (2.0 * 0.5 * torch.cat(errors).square().mean()).backward()
    theirs = [torch.zeros_like(each) if each.grad is None else each.grad for each in trainer.model.parameters()]
    theirs = torch.cat([each.flatten() for each in theirs])
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize("value", ["head", "model", "adapters"])
def test_bfloat16_computes_over_float32_weights(make_trainer, make_classifier, value):
    """Before the first update the policy is the reference, and has the log-probabilities that it sampled with."""
    options = {"value_model": make_classifier() if value == "model" else None}
    if value == "adapters":
        peft = pytest.importorskip("peft")
        options["peft_config"] = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = make_trainer(bf16=True, max_steps=2, **options)
    trainer.train()
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())
    first, second = history(trainer)
    assert first["objective/kl"] == pytest.approx(0.0, abs=1e-3)
    assert first["val/ratio"] == pytest.approx(1.0, abs=1e-3)
    assert second["grad_norm"] > 0


def test_bad_input(make_trainer, make_model, make_classifier, tmp_path):
    for options, message in (
        ({"kl_estimator": "k4"}, "kl_estimator must be one of k1, k2, k3, abs; got 'k4'"),
        ({"score_at": "first"}, "score_at must be one of last, after_last; got 'first'"),
        ({"response_length": 0}, "response_length must be at least 1; got 0"),
        ({"num_mini_batches": 3}, r"the 4 completions of a process .* must be divisible by num_mini_batches \(3\)"),
        ({"lam": 1.5}, "lam must be between 0 and 1; got 1.5"),
        ({"missing_eos_penalty": -1.0}, "missing_eos_penalty must be a finite number, at least 0; got -1.0"),
        ({"horizon": 0.0}, "horizon must be a finite number above 0; got 0.0"),
        ({"adap_kl_ctrl": True, "kl_coef": 0.0}, "adap_kl_ctrl needs a kl_coef above 0"),
        ({"total_episodes": 0}, "total_episodes must be at least 1; got 0"),
        ({"per_device_train_batch_size": 16}, "train_dataset has 13 rows, fewer than the 16 prompts of one batch"),
        ({"value_model": make_model()}, "value_model must be a sequence classifier with num_labels=1 and a score head"),
        ({"value_model": make_classifier(num_labels=2)}, "got LlamaForSequenceClassification with num_labels=2"),
        ({"reward_funcs": [make_model()]}, "reward_funcs must be a sequence classifier with num_labels=1"),
    ):
        with pytest.raises(ValueError, match=message):
            make_trainer(**options)
    scorer, policy = make_classifier(), make_model()
    with pytest.raises(ValueError, match="value_model must be another object than the reward model"):
        make_trainer(scorer, value_model=scorer)
    with pytest.raises(ValueError, match="ref_model must be another object than model"):
        make_trainer(model=policy, ref_model=policy)
    with pytest.raises(FileNotFoundError, match="model 'nowhere': there is no such folder"):
        make_trainer(value_model="nowhere")
    assert not (tmp_path / "run").exists()
