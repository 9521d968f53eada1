"""PPO against numbers of TRL's last PPO trainer on the same rollouts, recorded by `record_ppo.py`: what the loss is
made of, and over all epochs and minibatches the losses and their gradients, while the weights move."""

import dataclasses
import itertools
import json
import runpy
from pathlib import Path

import pytest
import torch

from rlkernels.trainers import PPOConfig, PPOTrainer, Rollout

recorder = runpy.run_path(str(Path(__file__).with_name("record_ppo.py")))
RECORDED = json.loads(recorder["FILE"].read_text())
RUNS = RECORDED["runs"]


@pytest.fixture(params=[True, False], ids=["packed", "padded"])
def run(request, make_model, tokenizer, tmp_path):
    """Trains on the recorded rollouts; what each step saw."""

    def train(name: str, **options):
        recorded = RUNS[name]
        models = recorder["build_models"](make_model)
        completions = dict(zip(recorder["PROMPTS"], recorder["COMPLETIONS"], strict=True))

        def engine(prompts, sampling):
            return [Rollout(tokenizer(p)["input_ids"], completions[p], completions[p][-1] == 0) for p in prompts]

        args = PPOConfig(
            **recorder["SHARED"],
            **recorded["options"],
            **options,
            score_at="after_last",
            output_dir=str(tmp_path),
            num_train_epochs=1,
            logging_steps=1,
            max_grad_norm=0.0,
            shuffle_dataset=False,
            padding_free=request.param,
            activation_checkpointing=False,
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = PPOTrainer(
            models["model"],
            models["reward_model"],
            args,
            [{"prompt": prompt} for prompt in recorder["PROMPTS"]],
            processing_class=tokenizer,
            value_model=models["value_model"],
            ref_model=models["ref_model"],
            rollout=engine,
        )
        make_experience, training_step, steps = trainer.make_experience, trainer.training_step, []

        def in_recorded_order(inputs):
            rollouts = make_experience(inputs)
            rows = [step["rows"] for step in recorded["steps"]]
            size = args.num_mini_batches
            starts = range(0, len(rows), size)
            rollouts.order = [list(itertools.chain(*rows[start : start + size])) for start in starts]
            return rollouts

        def recording(model, *args):
            loss = training_step(model, *args)
            steps.append({"loss": loss.item(), "gradient": recorder["summary"](trainer.model)})
            return loss

        trainer.make_experience, trainer.training_step = in_recorded_order, recording
        trainer.train()
        return trainer, recorded, steps

    return train


def assert_close(ours, theirs):
    # float32 against float32: two orders of summation of the same terms.
    torch.testing.assert_close(torch.as_tensor(ours), torch.as_tensor(theirs), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", RUNS)
def test_what_the_loss_is_made_of(run, name):
    trainer, recorded, _ = run(name, max_steps=1)
    rollouts = trainer.collector.buffer.experience
    for row, completion in enumerate(recorder["COMPLETIONS"]):
        sequence = rollouts.sequences[row]
        in_loss = torch.tensor([label != -100 for label in [*sequence.labels[sequence.prefix + 1 :], -100]])
        for ours, theirs, where in (
            (rollouts.old_logprobs, "logprobs", in_loss),
            (rollouts.advantages, "advantages", in_loss),
            (rollouts.old_values, "values", rollouts.has_value[row]),
            (rollouts.returns, "returns", rollouts.has_value[row]),
        ):
            assert_close(ours[row][where], recorded[theirs][row])
            assert len(recorded[theirs][row]) == len(completion) + (where is not in_loss) * (len(completion) < 7)
    log = trainer.state.log_history[0]
    assert log["objective/scores"] == pytest.approx(recorded["metrics"]["objective/scores"], rel=1e-5)
    assert log["objective/kl"] == pytest.approx(recorded["metrics"]["objective/kl"], rel=1e-4)
    for metric in ("objective/non_score_reward", "objective/rlhf_reward", "val/num_eos_tokens"):
        assert log[metric] == pytest.approx(recorded["metrics"][metric], rel=1e-4)
    # TRL's counts -1 for each token of padding.
    assert log["objective/entropy"] == pytest.approx(-sum(map(sum, recorded["logprobs"])) / 8, rel=1e-5)


@pytest.mark.parametrize("name", RUNS)
def test_losses_and_gradients(run, name):
    trainer, recorded, steps = run(name)
    assert len(steps) == len(recorded["steps"])
    logs = [log for log in trainer.state.log_history if "loss" in log]
    for step, theirs, log in zip(steps, recorded["steps"], logs, strict=True):
        assert_close(step["loss"], theirs["loss"])
        for metric, recorded_metric in (
            ("loss/policy_avg", "pg_loss"),
            ("loss/value_avg", "vf_loss"),
            ("policy/clipfrac_avg", "pg_clipfrac"),
            ("val/clipfrac_avg", "vf_clipfrac"),
        ):
            assert_close(log[metric], theirs[recorded_metric])
        for parameter, numbers in theirs["gradient"].items():
            ours = step["gradient"][parameter.replace("value_model.", "value.")]
            assert max(abs(a - b) for a, b in zip(ours, numbers, strict=True)) <= 2e-5 * numbers[0], parameter
    assert any(step["pg_clipfrac"] or step["vf_clipfrac"] for step in recorded["steps"])


def test_names_and_defaults():
    ours = {field.name: field.default for field in dataclasses.fields(PPOConfig)}
    shared = (RECORDED["config"].keys() & ours) - {"gradient_checkpointing"}  # activation_checkpointing, since
    assert len(shared) >= 20
    assert {name: ours[name] for name in shared} == {name: RECORDED["config"][name] for name in shared}
