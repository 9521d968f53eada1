"""Imitation: SmolLM2-135M-Instruct learns from demonstrations to answer sums in one sentence.

    python examples/sft.py [--seed 0] [--steps 12] [--output_dir runs/sft]

Writes result.json, curves.png and model/ to the output folder.
"""

import sys
from typing import Any

import program


def train(run: program.Run) -> list[Any]:
    import lesson
    from rlkernels.trainers import SFTConfig, SFTTrainer

    model, tokenizer = lesson.load()
    trainer = SFTTrainer(
        model,
        SFTConfig(**lesson.options(run), learning_rate=2e-5, per_device_train_batch_size=8),
        lesson.demonstrations(lesson.TRAIN),
        lesson.demonstrations(lesson.HELD_OUT),
        tokenizer,
    )

    def measure() -> dict[str, float]:
        return {"loss": trainer.evaluate()["eval_loss"], **lesson.rates(trainer, model)}

    return lesson.learn(run, trainer, measure, {"loss": "loss"})


def main(arguments: list[str] | None = None) -> int:
    return program.main(__doc__, train, steps=12, folder="runs/sft", arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
