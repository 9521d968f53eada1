"""Group relative policy optimization: SmolLM2-135M-Instruct learns from a rule to answer sums in one sentence.

    python examples/grpo.py [--seed 0] [--steps 16] [--output_dir runs/grpo]

examples/demo.py is a longer run of the same method. Writes result.json, curves.png, completions/ and model/ to the
output folder.
"""

import sys
from typing import Any

import program


def train(run: program.Run) -> list[Any]:
    from datasets import Dataset

    import lesson
    from rlkernels.trainers import GRPOConfig, GRPOTrainer

    model, tokenizer = lesson.load()

    def ended(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [float(ids[-1] == tokenizer.eos_token_id) for ids in completion_ids]

    def is_sentence(completions: list, **_: Any) -> list[float]:
        return [float(lesson.is_sentence(messages[0]["content"])) for messages in completions]

    trainer = GRPOTrainer(
        model,
        [ended, is_sentence],
        GRPOConfig(
            **lesson.options(run),
            learning_rate=2e-5,
            per_device_train_batch_size=32,
            num_generations=8,
            max_completion_length=lesson.SAMPLING.max_completion_length,
            num_completions_to_print=0,
        ),
        Dataset.from_list(lesson.TRAIN),
        processing_class=tokenizer,
    )
    return lesson.learn(run, trainer, lambda: lesson.rates(trainer, model), {"reward": "reward"})


def main(arguments: list[str] | None = None) -> int:
    return program.main(__doc__, train, steps=16, folder="runs/grpo", arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
