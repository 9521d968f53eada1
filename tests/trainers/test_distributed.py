"""Two processes under DDP (gloo, on the CPU)."""

import json
from pathlib import Path

import pytest
import torch

from rlkernels.trainers import GRPOConfig, GRPOTrainer, PPOConfig, PPOTrainer, grpo, ppo

WORKER = Path(__file__).with_name("distributed_worker.py")


ONE_GROUP_EACH = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
HALF_A_GROUP_EACH = {
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "num_iterations": 2,
    "beta": 0.1,
}
PPO = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "num_ppo_epochs": 2,
    "whiten_rewards": True,
    "adap_kl_ctrl": True,
    "horizon": 80,
}
# The second process's group has no signal, so that it alone draws other prompts, in the last step as many as it may.
OVER_ALL_TOKENS = ONE_GROUP_EACH | {
    "advantage": "reinforce_plus_plus",
    "dynamic_sampling_max_rounds": 2,
    "top_entropy_quantile": 0.4,
    "beta": 0.1,
    "overlong_buffer_length": 3,
}


FINE_TUNING = None


@pytest.fixture(scope="module")
def results(tmp_path_factory, forked):
    """What two processes saw of a run, which is made when it is first asked for."""
    found = {}

    def of(options: dict | None) -> list[dict]:
        key = json.dumps(options)
        if key not in found:
            folder = tmp_path_factory.mktemp("distributed")
            code, printed = forked.run_together(2, str(WORKER), str(folder), key)
            assert code == 0, printed[-4000:]
            found[key] = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]
        return found[key]

    return of


def test_a_process_without_signal(results):
    """Each process holds one group, and one of the two has nothing to run: it must not leave the other waiting."""
    first, second = results(ONE_GROUP_EACH)
    signal = [[any(rollouts["advantages"]) for rollouts in rank["rollouts"]] for rank in (first, second)]
    assert signal == [[True] * 3, [False] * 3]
    assert first["micro_batches"] == second["micro_batches"] and min(first["micro_batches"]) > 1
    assert torch.equal(first["weights"], second["weights"])
    assert first["table"] == second["table"]
    assert len(first["table"]) == 8
    assert [log["frac_reward_zero_std"] for log in first["logs"]] == [0.5] * 3
    assert all(log["grad_norm"] > 0 for log in first["logs"])
    # Three prompts, four completions each: those that fill the last batch of the second process are not counted.
    assert first["eval"]["eval_reward"] == second["eval"]["eval_reward"] == pytest.approx((4 * 0.5 + 4 + 4 * 0.5) / 12)


def test_a_group_over_two_processes(results):
    """Advantages are those of the whole group, and old log-probabilities and micro-batches stay in step."""
    first, second = results(HALF_A_GROUP_EACH)
    assert torch.equal(first["weights"], second["weights"])
    rewards = torch.tensor([row["rewards/one_group_differs"] for row in first["table"]]).view(-1, 4)
    expected = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(torch.tensor([row["advantage"] for row in first["table"]]).view(-1, 4), expected)
    # The two were given the same prompt, and must not draw the same completions.
    assert first["rollouts"][0]["sequences"] != second["rollouts"][0]["sequences"]
    halves = [rank["rollouts"][-1]["advantages"] for rank in (first, second)]
    assert [len(half) for half in halves] == [2, 2]
    assert [row["advantage"] for row in first["table"]] == halves[0] + halves[1]


def test_drawn_prompts_and_whitening_over_two_processes(results):
    first, second = results(OVER_ALL_TOKENS)
    assert torch.equal(first["weights"], second["weights"])
    assert first["table"] == second["table"]
    assert first["logs"][0]["dynamic_sampling/rounds"] > 0
    sums = []
    for rollouts in zip(first["rollouts"], second["rollouts"], strict=True):
        values = [torch.cat(each["token_advantages"]) for each in rollouts]
        scored = [
            torch.tensor([label != -100 for row in each["sequences"] for label in row.labels]) for each in rollouts
        ]
        every = torch.cat([part[(part != 0)] for part in values])
        assert len(every) == sum(int(mask.sum()) for mask in scored)
        assert every.mean().abs() < 1e-5 and every.std(correction=0).item() == pytest.approx(1, rel=1e-4)
        sums.append(values[0].sum().abs())
    assert max(sums) > 0.1  # whitened together, not each by itself


@pytest.mark.parametrize("run", [ONE_GROUP_EACH, OVER_ALL_TOKENS], ids=["grpo", "over_all_tokens"])
def test_gradient_is_that_of_one_process(results, make_model, tokenizer, tmp_path, run):
    """Which holds the completions of both."""
    first, second = (rank["rollouts"][0] for rank in results(run))
    names = ["sequences", "advantages", "in_loss", *(["token_advantages"] if run == OVER_ALL_TOKENS else [])]
    both = {name: first[name] + second[name] for name in names}
    num_tokens = sum(label != -100 for row in both["sequences"] for label in row.labels)
    options = run | {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    args = GRPOConfig(
        output_dir=str(tmp_path), num_generations=4, bf16=False, use_cpu=True, report_to="none", **options
    )
    trainer = GRPOTrainer(make_model(), lambda **_: [], args, [{"prompt": "a"}] * 2, processing_class=tokenizer)
    trainer.make_experience = lambda inputs: grpo.Experience(**both, num_tokens=num_tokens)
    trainer.training_step(trainer.model, [])
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in trainer.model.parameters()])
    assert norm.item() == pytest.approx(results(run)[0]["logs"][0]["grad_norm"], rel=1e-4)


def test_ppo_is_that_of_one_process(results, make_model, tokenizer, tmp_path):
    """Advantages are whitened over both, and the gradient is that of one process with the rollouts of both."""
    ranks = results(PPO)
    assert torch.equal(ranks[0]["weights"], ranks[1]["weights"])
    first, second = (rank["rollouts"][0] for rank in ranks)
    both = {
        name: first[name] + second[name] for name in first if name not in ("order", "sampler_logprobs", "forward_pass")
    }
    in_loss = torch.cat([torch.tensor([*each.labels[each.prefix + 1 :], -100]) != -100 for each in both["sequences"]])
    advantages = torch.cat(both["advantages"])[in_loss]
    torch.testing.assert_close(advantages.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(advantages.std(), torch.tensor(1.0))
    # The policy is the reference at first: the coefficient falls by a fifth of what 8 completions are of the horizon.
    assert ranks[0]["logs"][2]["objective/kl_coef"] == pytest.approx(0.05 * (1 - 0.2 * 8 / 80))
    assert len(set(ranks[0]["micro_batches"] + ranks[1]["micro_batches"])) == 1 < ranks[0]["micro_batches"][0]

    args = PPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=8, bf16=False, use_cpu=True, report_to="none"
    )
    trainer = PPOTrainer(make_model(), lambda **_: [], args, [{"prompt": "a"}] * 8, processing_class=tokenizer)
    trainer.make_experience = lambda inputs: ppo.Experience(**both, order=[list(range(8))])
    trainer.training_step(trainer.model, [])
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in trainer.model.parameters()])
    assert norm.item() == pytest.approx(ranks[0]["logs"][0]["grad_norm"], rel=1e-4)


def test_ppo_scores_with_a_graph_if_every_process_can(results):
    """Then its first step is what it is in a pass of its own."""
    apart, joined = results(PPO), results(PPO | {"token_budget": 100})
    for own, ours in zip(apart, joined, strict=True):
        assert own["scored_with_graph"] == [False] * 3 and ours["scored_with_graph"] == [True, False, True]
        torch.testing.assert_close(ours["weights"], own["weights"], rtol=1e-4, atol=1e-5)
        for log, other in zip(ours["logs"], own["logs"], strict=True):
            assert log == pytest.approx(other, rel=1e-4, abs=1e-4)
    lengths = [sum(map(len, rank["rollouts"][0]["sequences"])) for rank in apart]
    assert lengths[0] > 24 >= lengths[1]


def test_fine_tuning_is_that_of_one_process(results, tmp_path, monkeypatch):
    """Losses, gradients and the evaluation, in whose last batch one process has one row and the other none."""
    monkeypatch.syspath_prepend(WORKER.parent)
    from distributed_worker import fine_tune

    first, second = results(FINE_TUNING)
    assert torch.equal(first["weights"], second["weights"])
    assert first["micro_batches"] == second["micro_batches"] and min(first["micro_batches"]) > 1
    alone = fine_tune(str(tmp_path))
    torch.testing.assert_close(first["weights"], alone["weights"], rtol=1e-3, atol=1e-4)
    for log, other in zip(first["logs"], alone["logs"], strict=True):
        for name in ("loss", "grad_norm", "entropy", "num_tokens"):
            assert log[name] == pytest.approx(other[name], rel=1e-4), name
    for name in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy"):
        assert first["eval"][name] == second["eval"][name] == pytest.approx(alone["eval"][name], rel=1e-4), name
