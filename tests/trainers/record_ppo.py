"""Records what TRL's last PPO trainer makes of fixed rollouts, for `test_ppo_parity.py`.

    pip install --no-deps --target FOLDER trl==1.8.0
    PYTHONPATH=FOLDER python tests/trainers/record_ppo.py

TRL 1.8.0 runs beside the transformers of this environment. Of each run `recorded/ppo.json` holds the data of the loss,
a list per rollout, and of each optimizer step the rows, the losses and a summary of each parameter's gradient.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

FILE = Path(__file__).parent / "recorded" / "ppo.json"
RESPONSE_LENGTH = 7
PROMPTS = ["ab", "cdefg", "a", "hijk", "bbb", "xyzw", "Q", "rs7"]
# Ended early, at the first token, at the limit; not ended.
COMPLETIONS = [
    [5, 9, 0],
    [17, 3, 22, 8, 40, 11, 2],
    [0],
    [31, 12, 6, 44, 0],
    [7, 7, 19, 25, 33, 4, 0],
    [50, 1, 0],
    [13, 28, 61, 36, 2, 15, 20],
    [9, 10, 11, 12, 13, 0],
]
RUNS = {
    "defaults": {"num_ppo_epochs": 2, "num_mini_batches": 2, "learning_rate": 0.3},
    "all_options": {
        "num_ppo_epochs": 3,
        "learning_rate": 0.1,
        "whiten_rewards": True,
        "kl_coef": 0.2,
        "kl_estimator": "k3",
        "cliprange": 0.01,
        "cliprange_value": 0.1,
        "vf_coef": 0.5,
        "gamma": 0.97,
        "lam": 0.9,
        "temperature": 1.3,
        "missing_eos_penalty": 1.5,
    },
}
SHARED = {
    "per_device_train_batch_size": len(PROMPTS),
    "response_length": RESPONSE_LENGTH,
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
}


def randomize(model: torch.nn.Module, seed: int, scale: float = 0.25) -> torch.nn.Module:
    """Weights that do not depend on the versions of torch and transformers: NumPy keeps this stream as it is."""
    stream = np.random.RandomState(seed)
    for _, parameter in sorted(model.named_parameters()):
        parameter.data = torch.tensor(stream.normal(0, scale, parameter.shape), dtype=torch.float32)
    return model


def build_models(build_model) -> dict[str, torch.nn.Module]:
    from transformers import AutoModelForSequenceClassification

    def build_scorer():
        config = build_model().config
        config.num_labels = 1
        return AutoModelForSequenceClassification.from_config(config)

    policy, ref_model = randomize(build_model(), seed=1), randomize(build_model(), seed=1)
    noise = randomize(build_model(), seed=2, scale=0.03)
    for parameter, change in zip(ref_model.parameters(), noise.parameters(), strict=True):
        parameter.data += change.data
    models = {"model": policy, "ref_model": ref_model}
    models |= {"value_model": randomize(build_scorer(), 3), "reward_model": randomize(build_scorer(), 4)}
    return models


def summary(model: torch.nn.Module) -> dict[str, list[float]]:
    """The norm and two projections of each parameter's gradient."""

    def numbers(gradient: torch.Tensor) -> list[float]:
        gradient = gradient.double().flatten()
        index = torch.arange(len(gradient), dtype=torch.float64)
        return [float(value) for value in (gradient.norm(), gradient @ index.cos(), gradient @ (2 * index).sin())]

    return {name: numbers(parameter.grad) for name, parameter in model.named_parameters()}


def record(options: dict) -> dict:
    import datasets
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    from tiny_model import build_model, build_tokenizer

    tokenizer = build_tokenizer()
    tokenizer.pad_token, tokenizer.padding_side = "?", "left"  # TRL tells padding by its id
    pad = tokenizer.pad_token_id
    prompt_ids = tokenizer(PROMPTS)["input_ids"]
    assert all(pad not in ids for ids in prompt_ids + COMPLETIONS)

    def fixed(model, queries, size, pad_token_id, config):
        rows = [prompt_ids.index([token for token in row if token != pad]) for row in queries.tolist()]
        padded = [COMPLETIONS[row] + [1] * (RESPONSE_LENGTH - len(COMPLETIONS[row])) for row in rows]
        sequences = torch.cat([queries, torch.tensor(padded)], 1)
        logits = ppo_trainer.forward(model, sequences, pad).logits[:, queries.shape[1] - 1 : -1]
        seen["order"] = rows
        return sequences, logits / options.get("temperature", PPOConfig.temperature)

    with tempfile.TemporaryDirectory() as folder:
        trainer = PPOTrainer(
            args=PPOConfig(
                output_dir=folder,
                total_episodes=len(PROMPTS),
                stop_token="eos",
                num_sample_generations=0,
                save_strategy="no",
                gradient_checkpointing=False,
                **SHARED,
                **options,
            ),
            processing_class=tokenizer,
            train_dataset=datasets.Dataset.from_dict({"input_ids": prompt_ids}),
            **build_models(build_model),
        )
    seen: dict = {}
    steps = []
    backward = trainer.accelerator.backward
    ppo_trainer.batch_generation = fixed

    def recording(loss):
        backward(loss)
        seen.update(sys._getframe(1).f_locals)  # of train(), which keeps all that it computes in variables
        step: dict = {name: seen[name].item() for name in ("loss", "pg_loss", "vf_loss", "vf_clipfrac")}
        clipped = (seen["pg_losses2"] > seen["pg_losses"])[~seen["padding_mask"][seen["micro_batch_inds"]]]
        step |= {"pg_clipfrac": clipped.float().mean().item()}
        step |= {"rows": [seen["order"][row] for row in seen["micro_batch_inds"]]}
        steps.append({**step, "gradient": summary(trainer.model)})

    trainer.accelerator.backward = recording
    trainer.train()

    def rows(name: str, mask: str) -> list[list[float]]:
        """Per rollout in the order of PROMPTS, what the mask leaves."""
        kept = [values[~out].tolist() for values, out in zip(seen[name], seen[mask], strict=True)]
        return [kept[seen["order"].index(row)] for row in range(len(PROMPTS))]

    logged = trainer.state.log_history[-1]
    return {
        "options": options,
        "scores": [seen["scores"][seen["order"].index(row)].item() for row in range(len(PROMPTS))],
        **{name: rows(name, "padding_mask") for name in ("logprobs", "ref_logprobs", "advantages")},
        **{name: rows(name, "padding_mask_p1") for name in ("values", "rewards", "returns")},
        "steps": steps,
        "metrics": {name: value for name, value in logged.items() if "/" in name},
    }


def defaults() -> dict:
    import dataclasses

    from transformers import TrainingArguments
    from trl.experimental.ppo import PPOConfig

    own = [field for field in dataclasses.fields(PPOConfig) if field not in dataclasses.fields(TrainingArguments)]
    return {field.name: field.default for field in own if field.default is not dataclasses.MISSING}


if __name__ == "__main__":
    FILE.parent.mkdir(exist_ok=True)
    recorded = {"config": defaults(), "runs": {name: record(options) for name, options in RUNS.items()}}
    FILE.write_text(json.dumps(recorded))
