"""Proximal policy optimization: SmolLM2-135M-Instruct learns from a reward model to answer sums in one sentence.

    python examples/ppo.py [--seed 0] [--steps 24] [--output_dir runs/ppo]

The reward model comes from examples/reward.py, in the folder reward next to the output folder. If it is not there, it
is trained first. Writes result.json, curves.png, completions/ and model/ to the output folder.
"""

import sys
from typing import Any

import program


def train(run: program.Run) -> list[Any]:
    from datasets import Dataset

    import lesson
    import reward
    from rlkernels.trainers import PPOConfig, PPOTrainer

    folder = run.output_dir.parent / "reward"
    if not (folder / "model").is_dir() and reward.main(["--seed", str(run.seed), "--output_dir", str(folder)]):
        raise KeyboardInterrupt
    model, tokenizer = lesson.load()
    trainer = PPOTrainer(
        model,
        str(folder / "model"),
        PPOConfig(
            **lesson.options(run),
            learning_rate=2e-5,
            per_device_train_batch_size=24,
            per_device_eval_batch_size=50,
            response_length=lesson.SAMPLING.max_completion_length,
            temperature=lesson.SAMPLING.temperature,
            num_completions_to_print=0,
            num_ppo_epochs=2,
            # The reward model was shown whole answers only.
            missing_eos_penalty=5.0,
        ),
        Dataset.from_list(lesson.TRAIN),
        Dataset.from_list(lesson.HELD_OUT),
        tokenizer,
    )

    def measure() -> dict[str, float]:
        return {"score": trainer.evaluate()["eval_reward"], **lesson.rates(trainer, model)}

    return lesson.learn(run, trainer, measure, {"score": "objective/scores", "KL": "objective/kl"})


def main(arguments: list[str] | None = None) -> int:
    return program.main(__doc__, train, steps=24, folder="runs/ppo", arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
