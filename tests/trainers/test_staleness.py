"""staleness=1: the next batch is sampled while the trainer learns from this one, by weights one batch older."""

import json
import threading

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from cases import thorough
from rlkernels.trainers import (
    GRPOConfig,
    GRPOTrainer,
    PPOConfig,
    PPOTrainer,
    Rollout,
    RolloutError,
    SamplingOptions,
    TransformersEngine,
)
from rlkernels.trainers.rollouts import ahead, collector

ROWS = [{"prompt": "ab" + "c" * (i % 5) + "d", "index": i} for i in range(12)]


class Apart:
    """An engine with weights of its own. It notes which it had for each batch, and waits where it is told to."""

    def __init__(self, model, tokenizer, folder):
        self.model, self.tokenizer, self.folder = model, tokenizer, folder
        self.weights_of, self.prompts_of = {}, {}
        self.step = None
        self.sampling = threading.Lock()
        self.fails = {}
        self.threads = {}
        self.gates = {}

    def update_weights(self, save, step):
        assert not self.sampling.locked()
        save(self.folder / str(step))
        self.step, self.model = step, AutoModelForCausalLM.from_pretrained(self.folder / str(step))

    def __call__(self, prompts, options):
        with self.sampling:
            if options.step in self.gates:
                assert self.gates[options.step].wait(20)
            if options.step in self.fails:
                raise self.fails[options.step]
            self.weights_of.setdefault(options.step, self.step)
            self.prompts_of[options.step] = prompts
            self.threads[options.step] = threading.current_thread().name
            return TransformersEngine(self.model, self.tokenizer)(prompts, options)


def vowels(completions, **kwargs):
    return [sum(letter in "aeiou" for letter in text) / (1 + len(text)) for text in completions]


@pytest.fixture
def make_trainer(make_model, tokenizer, run_options, tmp_path):
    def make(method="grpo", rows=ROWS, reward=vowels, eval_dataset=None, **options):
        shared = {
            **run_options,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "max_steps": 6,
            "staleness": 1,
        }
        shared |= {"importance_sampling_correction": True}
        own = {
            "grpo": {"num_generations": 2, "max_completion_length": 5},
            "ppo": {"response_length": 5, "num_ppo_epochs": 1},
        }
        trainer, config = {"grpo": (GRPOTrainer, GRPOConfig), "ppo": (PPOTrainer, PPOConfig)}[method]
        engine = Apart(make_model(), tokenizer, tmp_path / "sent")
        args = config(**shared | own[method] | options)
        return trainer(make_model(), reward, args, rows, eval_dataset, tokenizer, rollout=engine)

    return make


def logged(trainer, name="loss"):
    return [log[name] for log in trainer.state.log_history if name in log]


@pytest.mark.parametrize("method, steps", [thorough("grpo", 1), ("grpo", 2), ("ppo", 2)])
def test_the_weights_are_one_batch_older(method, steps, make_trainer):
    """In each of two epochs the batches are those that they would be without."""
    serves = {"grpo": {"num_iterations": steps}, "ppo": {"num_ppo_epochs": steps}}[method]
    stale, fresh = (make_trainer(method, staleness=staleness, **serves, max_steps=8) for staleness in (1, 0))
    stale.train()
    fresh.train()
    batches = range(0, 8, steps)
    assert fresh.collector.engine.weights_of == {step: step for step in batches}
    assert stale.collector.engine.weights_of == {step: max(step - steps, 0) for step in batches}
    assert stale.collector.engine.prompts_of == fresh.collector.engine.prompts_of
    assert [stale.collector.engine.threads[step] == "ahead" for step in batches] == [step > 0 for step in batches]
    assert logged(stale)[:steps] == logged(fresh)[:steps] and logged(stale)[-1] != logged(fresh)[-1]
    assert logged(stale, "sampling/staleness")[0] == 0 and set(logged(stale, "sampling/staleness")[1:]) == {1}


def test_it_samples_while_the_trainer_learns(make_trainer):
    """The third batch is not sampled before the step on the second has begun its reward."""
    gate = threading.Event()

    def reward(completions, trainer_state, **columns):
        if trainer_state.global_step == 1:
            assert trainer.collector.engine.sampling.locked()
            gate.set()
        return vowels(completions)

    trainer = make_trainer(reward=reward, max_steps=3)
    trainer.collector.engine.gates[2] = gate
    trainer.train()
    assert gate.is_set()


@pytest.mark.parametrize("method", ["grpo", "ppo"])
def test_old_weights_are_corrected_for(method, make_trainer):
    options = {"max_steps": 3, "importance_sampling_mode": "token_truncate", "temperature": 1.0}

    def reward(completion_ids, **columns):
        return [ids[0] % 7 for ids in completion_ids]

    trainer = make_trainer(method, reward=reward, learning_rate=3e-2, **options)
    trainer.train()
    ratios = logged(trainer, "sampling/importance_sampling_ratio/mean")
    assert ratios[0] == pytest.approx(1.0, abs=1e-5)
    assert len(ratios) > 1 and all(abs(ratio - 1) > 1e-3 for ratio in ratios[1:])


@pytest.mark.parametrize("method, step", [thorough("grpo", 2), ("grpo", 3), ("ppo", 2)])
def test_resuming_gives_the_same(method, step, make_trainer, tmp_path):
    """From the end of a batch and from the middle of one; what was sampled ahead is not sampled again."""
    serves = {"grpo": {"num_iterations": 2}, "ppo": {"num_ppo_epochs": 2}}[method]
    options = {"save_strategy": "steps", "save_steps": 1, **serves, "max_steps": 8}
    whole = make_trainer(method, output_dir=str(tmp_path / "whole"), **options)
    whole.train()
    resumed = make_trainer(method, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    assert logged(resumed) == logged(whole) and logged(resumed, "reward") == logged(whole, "reward")
    ours, theirs = resumed.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert min(resumed.collector.engine.weights_of) == (4 if step == 2 else 6)


def test_what_an_engine_returns_is_saved_as_plain_numbers(make_trainer, tmp_path):
    def numpy_of(rollouts):
        for rollout in rollouts:
            rollout.completion_ids = np.array(rollout.completion_ids)
            rollout.logprobs = list(np.array(rollout.logprobs, dtype=np.float32))
            rollout.note = object()
        return rollouts

    class OfNumpy(Apart):
        def __call__(self, prompts, options):
            return numpy_of(super().__call__(prompts, options))

    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    whole = make_trainer(output_dir=str(tmp_path / "whole"), **options)
    whole.collector.engine.__class__ = OfNumpy
    whole.train()
    resumed = make_trainer(**options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert logged(resumed) == logged(whole) and not resumed.collector.engine.weights_of


def test_what_is_wrong_with_the_next_batch_is_told_when_it_is_needed(make_trainer, tmp_path):
    class Nothing(Apart):
        def __call__(self, prompts, options):
            return None if options.step else super().__call__(prompts, options)

    trainer = make_trainer(save_strategy="steps", save_steps=1)
    trainer.collector.engine.__class__ = Nothing
    with pytest.raises(RolloutError, match=r"^rollout must return a list of Rollout; got NoneType$"):
        trainer.train()
    assert (tmp_path / "run" / "checkpoint-1").is_dir()


def test_a_checkpoint_of_a_run_without_it_and_the_other_way_round(make_trainer, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2}
    make_trainer(staleness=0, **options).train()
    later = make_trainer(output_dir=str(tmp_path / "later"), **options)
    later.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert later.collector.engine.weights_of == {2: 2, 3: 2, 4: 3, 5: 4}
    back = make_trainer(staleness=0)
    back.train(resume_from_checkpoint=str(tmp_path / "later" / "checkpoint-4"))
    assert back.collector.engine.weights_of == {5: 5}


@pytest.mark.parametrize(
    "change", [{"seed": 7}, {"rows": [{"prompt": row["prompt"] + "x", "index": 0} for row in ROWS]}]
)
def test_what_was_sampled_ahead_for_others_is_sampled_anew(make_trainer, tmp_path, monkeypatch, change):
    """A run that goes on with another seed, or other rows, learns from its own."""
    options = {"save_strategy": "steps", "save_steps": 2}
    make_trainer(**options).train()
    again, warnings = make_trainer(output_dir=str(tmp_path / "again"), **options, **change), []
    for module in (collector, ahead):
        monkeypatch.setattr(module.logger, "warning", warnings.append)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert again.collector.engine.weights_of == {2: 2, 3: 2, 4: 3, 5: 4}
    (warning,) = warnings
    assert ("seed (was 42, is 7)" if "seed" in change else "step 3: completed anew") in warning


@pytest.mark.thorough
def test_evaluation_in_between_does_not_disturb_it(make_trainer):
    options = {"eval_strategy": "steps", "eval_steps": 1}
    with_it, without = make_trainer(eval_dataset=ROWS[:2], **options), make_trainer()
    with_it.train()
    without.train()
    assert logged(with_it) == logged(without)
    assert {
        step: of for step, of in with_it.collector.engine.weights_of.items() if step >= 0
    } == without.collector.engine.weights_of


def test_dynamic_sampling_stays_in_step(make_trainer):
    trainer = make_trainer(reward=lambda completions, **_: [1.0] * len(completions), dynamic_sampling_max_rounds=1)
    trainer.train()
    assert logged(trainer, "dynamic_sampling/rounds") == [1.0] * 6


@pytest.mark.thorough
def test_the_last_step_samples_nothing_ahead(make_trainer):
    trainer = make_trainer()
    trainer.train()
    assert max(trainer.collector.engine.weights_of) == 5
    # A second run of the same trainer has nothing of the first.
    trainer.collector.engine.weights_of.clear()
    trainer.train()
    assert trainer.collector.engine.weights_of == {step: max(step - 1, 0) for step in range(6)}


@pytest.mark.parametrize(
    "error, message",
    [
        (RolloutError("no luck"), "^no luck$"),
        (KeyError("gone"), "^rollout failed while it sampled ahead .* KeyError: 'gone'$"),
    ],
)
def test_what_fails_in_the_background_is_raised_when_it_is_needed(error, message, make_trainer, tmp_path):
    trainer = make_trainer(save_strategy="steps", save_steps=1)
    trainer.collector.engine.fails[3] = error
    with pytest.raises(RolloutError, match=message):
        trainer.train()
    assert trainer.state.global_step == 3
    # The checkpoint is whole: what failed is sampled again.
    assert json.loads((tmp_path / "run" / "checkpoint-3" / "trainer_state.json").read_text())["global_step"] == 3
    resumed = make_trainer(output_dir=str(tmp_path / "resumed"))
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert resumed.collector.engine.weights_of == {3: 3, 4: 3, 5: 4}


def test_rows_that_change_are_an_error(make_trainer):
    class Changing(list):
        def __getitem__(self, index):
            self.reads = getattr(self, "reads", 0) + 1
            return {"prompt": f"ab{'c' * (self.reads % 7)}"}

    with pytest.raises(RolloutError, match=r"^staleness 1: step 2 learns from rows .* must be the same each time"):
        make_trainer(rows=Changing(ROWS)).train()


def test_ctrl_c_does_not_wait_for_it(make_trainer):
    gate = threading.Event()

    def reward(completions, trainer_state, **columns):
        if trainer_state.global_step == 1:
            raise KeyboardInterrupt
        return vowels(completions)

    trainer = make_trainer(reward=reward)
    trainer.collector.engine.gates[2] = gate
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.collector.engine.sampling.locked()
    gate.set()


def test_what_it_needs(make_trainer, make_model, tokenizer, run_options):
    with pytest.raises(ValueError, match="staleness 1 needs importance_sampling_correction"):
        make_trainer(importance_sampling_correction=False)
    with pytest.raises(ValueError, match="staleness must be 0 or 1; got 2"):
        make_trainer(staleness=2)
    args = GRPOConfig(
        **run_options, staleness=1, importance_sampling_correction=True, max_completion_length=5, num_generations=2
    )
    with pytest.raises(ValueError, match=r"staleness 1 needs an engine with weights of its own .* TransformersEngine"):
        GRPOTrainer(make_model(), vowels, args, ROWS, None, tokenizer)
    with pytest.raises(ValueError, match=r"rollout and use_vllm, .* exclude each other"):
        make_trainer(vllm_server_base_url="http://127.0.0.1:1")
    with pytest.raises(ValueError, match=r"vllm_server_base_url must begin with http:// or https://.*got '127"):
        make_trainer(vllm_server_base_url="127.0.0.1:8000")


def test_completions_of_ppo_are_checked_by_the_size_of_its_policy(make_trainer):
    trainer = make_trainer("ppo")
    rollout = Rollout([1], [2, 3], ended=False)
    options = SamplingOptions(temperature=1.0, max_completion_length=2)
    assert trainer.collector._checked(lambda prompts, options: [rollout], ["a"], options) == [rollout]
    with pytest.raises(RolloutError, match="but the model's token ids are 0 to 66"):
        trainer.collector._checked(lambda prompts, options: [Rollout([1], [67], ended=True)], ["a"], options)
