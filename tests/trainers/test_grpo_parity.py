"""Loss and gradient of an optimizer step against TRL's GRPOTrainer, given the same weights, prompts and completions."""

import math
import random
from types import SimpleNamespace

import pytest
import torch

trl = pytest.importorskip("trl")
import trl.trainer.grpo_trainer as trl_grpo  # noqa: E402
import trl.trainer.rloo_trainer as trl_rloo  # noqa: E402

from cases import by_turns, thorough  # noqa: E402
from rlkernels.trainers import GRPOConfig, GRPOTrainer, Rollout, SamplingOptions  # noqa: E402
from tiny_model import build_mixture  # noqa: E402

MAX_LENGTH = 6
PROMPTS = ["ab", "cdefg", "a", "hijk"]
# Per prompt: rewards that differ, that are all equal, and that some or all functions leave out.
CORRECT = [[1.0, 0.0, 0.5, 2.0], [1.0, 1.0, 1.0, 1.0], [None, 1.0, 0.0, None], [0.0, -1.0, 3.0, 0.0]]
SHORT = [[0.1, 0.2, 0.3, 0.4], [0.5, 0.5, 0.5, 0.5], [None, None, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0]]


CLIPPED = ["grpo", "bnpo", "dr_grpo", "dapo", "luspo"]
LOSS_TYPES = [*CLIPPED, "cispo", "sapo", "vespo"]
OPTIONS = {
    "cispo": {"epsilon_high": 1.05},
    "sapo": {"sapo_temperature_pos": 0.8, "sapo_temperature_neg": 1.3},
    "vespo": {"vespo_k_pos": 1.5, "vespo_lambda_pos": 2.5, "vespo_k_neg": 2.0, "vespo_lambda_neg": 1.5},
}


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


def sampled(fixed: list[list[int]]) -> list[list[float]]:
    """What an engine says of its tokens, some of which it says nothing of."""
    rng = random.Random(1)
    return [[math.nan if rng.random() < 0.1 else -4 * rng.random() for _ in ids] for ids in fixed]


def own_tokens(fixed: list[list[int]]) -> list[list[bool]]:
    """Which are the model's, and not a tool's: all of some completions, none of one."""
    rng = random.Random(2)
    return [[row != 4 and (row % 3 == 0 or rng.random() < 0.6) for _ in ids] for row, ids in enumerate(fixed)]


@pytest.fixture
def train_both(make_model, tokenizer, tmp_path, monkeypatch):
    """Runs `steps` optimizer steps' gradients of both trainers; the weights move, equally, before each. `theirs` and
    `ours` are options of one alone; with `sampler`, log-probabilities of the sampler are corrected for; with `tools`,
    some tokens are not the model's."""

    def run(
        steps: int = 1, peer="GRPO", theirs=None, ours=None, sampler=False, tools=False, make=make_model, **options
    ) -> tuple:
        make().save_pretrained(tmp_path / "model")
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
            "gradient_checkpointing": False,
        } | options
        fixed = completions(seed=0)
        logprobs = sampled(fixed) if sampler else [None] * 16
        masks = own_tokens(fixed) if tools else [None] * 16
        inputs = [{"prompt": prompt} for prompt in PROMPTS for _ in range(4)]
        dataset = [{"prompt": prompt} for prompt in PROMPTS]

        import datasets

        their_options = options | {"epsilon_high": options.get("epsilon_high")} | (theirs or {})
        their_trainer = getattr(trl, f"{peer}Trainer")(
            str(tmp_path / "model"),
            [correct, short],
            args=getattr(trl, f"{peer}Config")(**their_options),
            train_dataset=datasets.Dataset.from_list(dataset),
            processing_class=tokenizer,
        )
        # Which row falls into which micro-batch is up to chance in TRL; bnpo depends on it.
        for module in (trl_grpo, trl_rloo):
            monkeypatch.setattr(module, "shuffle_sequence_dict", lambda batch: batch)
        their_trainer.current_gradient_accumulation_steps = accumulation
        if peer == "RLOO":
            monkeypatch.setattr(their_trainer, "_generate_single_turn", lambda *args, **kwargs: fixed)
        else:
            their_trainer.rollout_func = lambda prompts, trainer: {
                "prompt_ids": tokenizer(prompts)["input_ids"],
                "completion_ids": fixed,
                "logprobs": logprobs if sampler else None,
                **({"env_mask": [[int(own) for own in mask] for mask in masks]} if tools else {}),
            }
        if sampler:
            their_trainer.use_vllm, their_trainer._last_loaded_step = True, 0
            their_trainer.vllm_generation = SimpleNamespace(sync_weights=lambda: None)

        def engine(prompts: list, sampling: SamplingOptions) -> list[Rollout]:
            assert sampling.logprobs is sampler
            rows = zip(tokenizer(prompts)["input_ids"], fixed, logprobs, masks, strict=True)
            return [Rollout(prompt, ids, ids[-1] == 0, says, mask) for prompt, ids, says, mask in rows]

        our_trainer = GRPOTrainer(
            str(tmp_path / "model"),
            [correct, short],
            args=GRPOConfig(**options, **(ours or {}), importance_sampling_correction=sampler),
            train_dataset=dataset,
            processing_class=tokenizer,
            rollout=engine,
        )

        results: tuple[list, list] = ([], [])
        for step in range(steps):
            for trainer, result in zip((their_trainer, our_trainer), results, strict=True):
                add_noise(trainer.model, seed=step)
                trainer.model.zero_grad()
                trainer.state.global_step = step
                micro_steps = accumulation if trainer is their_trainer else 1
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


@pytest.mark.parametrize("accumulation", [1, 4], ids=["one_batch", "four_micro_batches"])
@pytest.mark.parametrize("beta", [0.0, 0.3], ids=["no_kl", "kl"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_types(train_both, loss_type, beta, accumulation):
    options = OPTIONS.get(loss_type, {})
    assert_equal(*train_both(loss_type=loss_type, beta=beta, gradient_accumulation_steps=accumulation, **options))


@pytest.mark.parametrize("accumulation", [1, 4], ids=["one_batch", "four_micro_batches"])
@pytest.mark.parametrize("kl", [None, "bias_corrected", "k3"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_reused_completions(train_both, loss_type, kl, accumulation):
    """The second iteration is off-policy: the ratio is not 1, and some tokens are clipped."""
    options = {"epsilon": 0.05, "epsilon_high": 0.1, **OPTIONS.get(loss_type, {})}
    options |= {"beta": 0.3 if kl else 0.0, "use_bias_correction_kl": kl == "bias_corrected"}
    accumulated = {"gradient_accumulation_steps": accumulation}
    assert_equal(*train_both(steps=2, num_iterations=2, loss_type=loss_type, **options, **accumulated))


@pytest.mark.parametrize("iterations", [1, 2], ids=["on_policy", "reused"])
@pytest.mark.parametrize("kl", [None, "bias_corrected", "k3"])
@pytest.mark.parametrize("loss_type", CLIPPED)
def test_importance_ratio_of_sequences(train_both, loss_type, kl, iterations):
    options = {"epsilon": 0.02, "epsilon_high": 0.03, "importance_sampling_level": "sequence"}
    options |= {"beta": 0.3 if kl else 0.0, "use_bias_correction_kl": kl == "bias_corrected"}
    assert_equal(*train_both(steps=iterations, num_iterations=iterations, loss_type=loss_type, **options))


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "luspo"])
def test_delta(train_both, loss_type, level):
    options = {"delta": 1.02, "epsilon": 0.05, "importance_sampling_level": level}
    assert_equal(*train_both(steps=2, num_iterations=2, loss_type=loss_type, **options))


@by_turns("loss_type, masked", LOSS_TYPES, (False, True))
def test_top_entropy(train_both, loss_type, masked):
    """The second step too: the tokens of highest entropy are those of the weights then."""
    options = {"top_entropy_quantile": 0.35, "beta": 0.3, "mask_truncated_completions": masked}
    options |= {"steps": 2, "num_iterations": 2, **OPTIONS.get(loss_type, {})}
    assert_equal(*train_both(loss_type=loss_type, **options))


# TRL's gradient of gspo is ours where the weight is one a sequence; of vespo it refuses those.
MODES = [f"{level}_{kind}" for level in ("token", "sequence") for kind in ("truncate", "mask")]
CORRECTED = [(name, mode) for name in LOSS_TYPES for mode in MODES if name != "vespo" or mode.startswith("token")]
CORRECTED += [("gspo", mode) for mode in MODES if mode.startswith("sequence")]


@pytest.mark.parametrize(
    ("loss_type", "mode"), [each if each in CORRECTED[1::3] else thorough(*each) for each in CORRECTED]
)
def test_sampler_correction(train_both, loss_type, mode):
    theirs = {"vllm_importance_sampling_mode": mode, "vllm_importance_sampling_clip_max": 1.5}
    ours = {"importance_sampling_mode": mode, "importance_sampling_cap": 1.5}
    options = {"steps": 2, "num_iterations": 2, "beta": 0.1, **OPTIONS.get(loss_type, {})}
    if loss_type == "gspo":
        loss_type, options["importance_sampling_level"] = "grpo", "sequence"
    assert_equal(*train_both(loss_type=loss_type, theirs=theirs, ours=ours, sampler=True, **options))


@by_turns("loss_type, level", CLIPPED, ("token", "sequence"))
def test_tokens_of_tools(train_both, loss_type, level):
    """They are read by the model, but neither the loss nor what it is divided by knows them."""
    options = {"steps": 2, "num_iterations": 2, "importance_sampling_level": level, "beta": 0.1}
    assert_equal(*train_both(loss_type=loss_type, tools=True, **options))


@pytest.mark.parametrize("accumulation", [1, 4], ids=["one_batch", "four_micro_batches"])
@pytest.mark.parametrize("beta", [0.0, 0.3], ids=["no_kl", "kl_in_reward"])
def test_rloo(train_both, beta, accumulation):
    """Its loss is a product over the sequence, whose gradient at ratio 1 is luspo's sum, but not its value."""
    options = {"beta": beta, "gradient_accumulation_steps": accumulation}
    theirs, ours = train_both(peer="RLOO", ours={"advantage": "rloo", "loss_type": "luspo"}, **options)
    for (_, gradient), (_, our_gradient) in zip(theirs, ours, strict=True):
        assert gradient.norm() > 1e-3
        assert (our_gradient - gradient).norm() <= 1e-5 * gradient.norm()


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "bnpo", "dr_grpo"])
def test_generation_batch_of_two_steps(train_both, loss_type):
    assert_equal(
        *train_both(steps=2, loss_type=loss_type, steps_per_generation=4, gradient_accumulation_steps=2, epsilon=0.05)
    )


@by_turns("loss_type, beta", ["grpo", "dapo", "bnpo", "dr_grpo"], (0.0, 0.3))
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


@by_turns("loss_type, accumulation", ("grpo", "bnpo", "dapo"), (1, 4))
def test_router_loss(train_both, loss_type, accumulation):
    """Those of completions without signal count too, also where all are used again."""
    options = {"router_aux_loss_coef": 10.0, "gradient_accumulation_steps": accumulation, "num_iterations": 2}
    assert_equal(*train_both(steps=2, make=build_mixture, loss_type=loss_type, **options))
