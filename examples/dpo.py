"""Direct preference optimization: SmolLM2-135M-Instruct learns from pairs to answer sums in one sentence.

    python examples/dpo.py [--seed 0] [--steps 16] [--output_dir runs/dpo]

Writes result.json, curves.png and model/ to the output folder.
"""

import sys
from typing import Any

import program


def train(run: program.Run) -> list[Any]:
    import lesson
    from rlkernels.trainers import DPOConfig, DPOTrainer

    model, tokenizer = lesson.load()
    trainer = DPOTrainer(
        model,
        DPOConfig(**lesson.options(run), learning_rate=2e-5, per_device_train_batch_size=8),
        lesson.pairs(lesson.TRAIN, lesson.OTHER_WORDS, model, tokenizer),
        lesson.pairs(lesson.HELD_OUT, lesson.HELD_OUT_WORDS, model, tokenizer),
        tokenizer,
    )

    def measure() -> dict[str, float]:
        return {**lesson.rates(trainer, model), "accuracy of pairs": trainer.evaluate()["eval_rewards/accuracies"]}

    return lesson.learn(run, trainer, measure, {"loss": "loss", "accuracy": "rewards/accuracies"})


def main(arguments: list[str] | None = None) -> int:
    return program.main(__doc__, train, steps=16, folder="runs/dpo", arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
