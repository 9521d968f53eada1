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
        DPOConfig(
            **lesson.options(run),
            learning_rate=2e-5,
            per_device_train_batch_size=8,
            # Both completions of a pair end, so their difference does not teach the model to end. The sft loss also
            # makes the chosen one itself more likely (arXiv 2404.19733).
            loss_type=["sigmoid", "sft"],
        ),
        lesson.pairs(lesson.TRAIN, lesson.OTHER_WORDS, model, tokenizer),
        processing_class=tokenizer,
    )
    shown = {"loss": "loss", "accuracy": "rewards/accuracies"}
    return lesson.learn(run, trainer, lambda: lesson.rates(trainer, model), shown)


def main(arguments: list[str] | None = None) -> int:
    return program.main(__doc__, train, steps=16, folder="runs/dpo", arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
