"""Loss and gradient of an optimizer step against TRL's GRPOTrainer, given the same weights, prompts and completions."""

import random

import pytest
import torch

trl = pytest.importorskip("trl")
import trl.trainer.grpo_trainer as trl_grpo  # noqa: E402

from rlkernels.trainers import GRPOConfig, GRPOTrainer, rollout  # noqa: E402

MAX_LENGTH = 6
PROMPTS = ["ab", "cdefg", "a", "hijk"]
# Per prompt: rewards that differ, that are all equal, and that some or all functions leave out.
CORRECT = [[1.0, 0.0, 0.5, 2.0], [1.0, 1.0, 1.0, 1.0], [None, 1.0, 0.0, None], [0.0, -1.0, 3.0, 0.0]]
SHORT = [[0.1, 0.2, 0.3, 0.4], [0.5, 0.5, 0.5, 0.5], [None, None, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0]]


def correct(completions, **kwargs):
    return [reward for group in CORRECT for reward in group]


def short(completions, **kwargs):
    return [reward for group in SHORT for reward in group]


def completions(seed: int) -> list[list[int]]:
    """16 of uneven length, with token 0, the end and the padding: ended early, ended at the limit, not ended."""
    rng = random.Random(seed)
    rows = [[rng.randrange(1, 38) for _ in range(rng.randrange(1, MAX_LENGTH))] + [0] for _ in range(16)]
    for row in (2, 5, 9, 15):
        rows[row] = [rng.randrange(1, 38) for _ in range(MAX_LENGTH)]
    rows[7] = [0]
    return rows


def add_noise(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)


@pytest.fixture
def train_both(make_model, tokenizer, tmp_path, monkeypatch):
    """Runs `steps` optimizer steps' gradients of both trainers; the weights move, equally, before each."""

    def run(steps: int = 1, **options) -> tuple[list, list]:
        make_model().save_pretrained(tmp_path / "model")
        accumulation = options.setdefault("gradient_accumulation_steps", 1)
        options = {
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 16 // options.get("steps_per_generation", accumulation),
            "num_generations": 4,
            "max_completion_length": MAX_LENGTH,
            "temperature": 0.7,
            "reward_weights": [1.0, 0.5],
            "bf16": False,
            "use_cpu": True,
            "report_to": "none",
            "activation_checkpointing": False,
        } | options
        fixed = completions(seed=0)
        inputs = [{"prompt": prompt} for prompt in PROMPTS for _ in range(4)]
        dataset = [{"prompt": prompt} for prompt in PROMPTS]

        import datasets

        theirs = trl.GRPOTrainer(
            str(tmp_path / "model"),
            [correct, short],
            args=trl.GRPOConfig(**options),
            train_dataset=datasets.Dataset.from_list(dataset),
            processing_class=tokenizer,
        )
        monkeypatch.setattr(theirs, "_generate_single_turn", lambda *args, **kwargs: (fixed, None))
        # Which row falls into which micro-batch is up to chance in TRL; bnpo depends on it.
        monkeypatch.setattr(trl_grpo, "shuffle_sequence_dict", lambda batch: batch)
        theirs.current_gradient_accumulation_steps = accumulation

        ours = GRPOTrainer(
            str(tmp_path / "model"),
            [correct, short],
            args=GRPOConfig(**options),
            train_dataset=dataset,
            processing_class=tokenizer,
        )
        monkeypatch.setattr(
            rollout.TransformersEngine,
            "complete",
            lambda self, prompt_ids, options: [
                rollout.Rollout(prompt, ids, ended=ids[-1] == 0) for prompt, ids in zip(prompt_ids, fixed, strict=True)
            ],
        )

        results: tuple[list, list] = ([], [])
        for step in range(steps):
            for trainer, result in zip((theirs, ours), results, strict=True):
                add_noise(trainer.model, seed=step)
                trainer.model.zero_grad()
                trainer.state.global_step = step
                micro_steps = accumulation if trainer is theirs else 1
                losses = [trainer.training_step(trainer.model, inputs, None) for _ in range(micro_steps)]
                gradient = torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters()])
                result.append((sum(losses), gradient))
        return results

    return run


def assert_equal(theirs: list, ours: list) -> None:
    for (loss, gradient), (our_loss, our_gradient) in zip(theirs, ours, strict=True):
        assert gradient.norm() > 1e-3
        # float32 against float32: two orders of summation of the same terms.
        torch.testing.assert_close(our_loss, loss, rtol=1e-5, atol=1e-6)
        assert (our_gradient - gradient).norm() <= 1e-5 * gradient.norm()


@pytest.mark.parametrize("accumulation", [1, 2], ids=["one_batch", "two_micro_batches"])
@pytest.mark.parametrize("beta", [0.0, 0.3], ids=["no_kl", "kl"])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "bnpo", "dr_grpo"])
def test_loss_types(train_both, loss_type, beta, accumulation):
    assert_equal(*train_both(loss_type=loss_type, beta=beta, gradient_accumulation_steps=accumulation))


@pytest.mark.parametrize("bias_correction", [True, False], ids=["bias_corrected", "k3"])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_reused_completions(train_both, loss_type, bias_correction):
    """The second iteration is off-policy: the ratio is not 1, and some tokens are clipped."""
    assert_equal(
        *train_both(
            steps=2,
            num_iterations=2,
            loss_type=loss_type,
            beta=0.3,
            epsilon=0.05,
            epsilon_high=0.1,
            use_bias_correction_kl=bias_correction,
        )
    )


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "bnpo", "dr_grpo"])
def test_generation_batch_of_two_steps(train_both, loss_type):
    assert_equal(
        *train_both(steps=2, loss_type=loss_type, steps_per_generation=4, gradient_accumulation_steps=2, epsilon=0.05)
    )


@pytest.mark.parametrize("beta", [0.0, 0.3], ids=["no_kl", "kl"])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "bnpo", "dr_grpo"])
def test_truncated_completions_masked(train_both, loss_type, beta):
    assert_equal(*train_both(loss_type=loss_type, beta=beta, mask_truncated_completions=True))


@pytest.mark.parametrize("k3", [True, False], ids=["bias_corrected", "k3"])
def test_kl_on_policy(train_both, k3):
    assert_equal(*train_both(beta=0.3, use_bias_correction_kl=k3))


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none", True, False])
def test_scale_rewards(train_both, scale_rewards):
    assert_equal(*train_both(scale_rewards=scale_rewards))


def test_normalize_then_sum(train_both):
    assert_equal(*train_both(multi_objective_aggregation="normalize_then_sum"))
