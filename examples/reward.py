"""A reward model: SmolLM2-135M-Instruct with a score head learns from pairs which of two answers to a sum is preferred.

    python examples/reward.py [--seed 0] [--steps 12] [--output_dir runs/reward]

Writes result.json, curves.png and model/ to the output folder. examples/ppo.py learns from that model.
"""

import sys
from typing import Any

import program


def train(run: program.Run) -> list[Any]:
    import lesson
    from rlkernels.trainers import RewardConfig, RewardTrainer

    model, tokenizer = lesson.load()
    trainer = RewardTrainer(
        str(lesson.model_folder()),
        RewardConfig(**lesson.options(run), learning_rate=2e-5, per_device_train_batch_size=8),
        lesson.pairs(lesson.TRAIN, lesson.OTHER_WORDS, model, tokenizer),
        lesson.pairs(lesson.HELD_OUT, lesson.HELD_OUT_WORDS, model, tokenizer),
        tokenizer,
    )

    def measure() -> dict[str, float]:
        values = trainer.evaluate()
        return {name: values[f"eval_{name}"] for name in ("accuracy", "margin", "loss")}

    return lesson.learn(run, trainer, measure, {"loss": "loss", "accuracy": "accuracy"})


def main(arguments: list[str] | None = None) -> int:
    return program.main(__doc__, train, steps=12, folder="runs/reward", arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
