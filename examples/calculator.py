"""Several turns and a tool: SmolLM2-135M-Instruct learns by GRPO to use a calculator.

    python examples/calculator.py [--seed 0] [--steps 16] [--output_dir runs/calculator]

The model is asked for sums of three-digit numbers. It may answer at once, or write the sum between tags; then it reads
the calculator's result and answers. The calculator's tokens are in the context but not in the loss. Writes result.json,
curves.png, completions/ and model/ to the output folder.
"""

import re
import sys
from dataclasses import replace
from typing import Any

import program

# Conversations that the prompt shows before the question. With these two, the untrained model writes a sum between tags
# about every other time. They include an answer after the result; without it the model's second turn has no answer.
EXAMPLES = {"12 + 34": "46", "71 - 8": "63"}
SYSTEM_PROMPT = "Use the calculator."
TURN = 16
"""The most tokens of one turn. The longest expression takes 15."""
CALLS = 2
"""The most calls of the calculator in one completion."""
REPLY = "\n<|im_start|>tool\n{result}<|im_end|>\n<|im_start|>assistant\n"
"""What is appended after the model's turn, in the format of SmolLM2's chat template."""


def prompt(expression: str) -> list[dict[str, str]]:
    shown = []
    for example, result in EXAMPLES.items():
        said = ("user", example), ("assistant", f"<calc>{example}</calc>"), ("tool", result), ("assistant", result)
        shown += [{"role": role, "content": content} for role, content in said]
    return [{"role": "system", "content": SYSTEM_PROMPT}, *shown, {"role": "user", "content": expression}]


def problems(train: int, held_out: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(rows to train on, held-out rows). They are disjoint even if terms are swapped, and the same on every call."""
    import reasoning_gym

    from arithmetic import unordered

    drawn = reasoning_gym.create_dataset(
        "chain_sum", min_terms=2, max_terms=2, min_digits=3, max_digits=3, size=2 * (train + held_out), seed=0
    )
    rows = {}
    for entry in drawn:
        expression = entry["metadata"]["expression"]
        row = {"prompt": prompt(expression), "expression": expression, "answer": int(entry["answer"])}
        rows.setdefault(unordered(row), row)
    every = list(rows.values())
    return every[:train], every[train : train + held_out]


def calculate(text: str) -> int | None:
    """The result of the sum between the tags, or None unless the whole turn is such a sum."""
    found = re.fullmatch(r"<calc>\s*(\d{1,9})\s*([-+])\s*(\d{1,9})\s*</calc>", text)
    if found is None:
        return None
    left, right = int(found[1]), int(found[3])
    return left + right if found[2] == "+" else left - right


def last_turn(text: str) -> str:
    return text.rpartition("\nassistant\n")[2]


class Calculator:
    """An engine of several turns: `engine` samples the model's turns, and the calculator's replies stand between."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.tokenizer = engine, engine.tokenizer
        # Passed on for an engine that has its own weights, such as VLLMEngine.
        self.update_weights = getattr(engine, "update_weights", None)

    def __call__(self, prompts: list, options: Any) -> list[Any]:
        turn = replace(options, max_completion_length=TURN)
        rollouts = self.engine(prompts, turn)
        asking = list(range(len(rollouts)))
        for _ in range(CALLS):
            asking = [row for row in asking if self.answers(rollouts[row])]
            if not asking:
                break
            so_far = [rollouts[row].prompt_ids + rollouts[row].completion_ids for row in asking]
            for row, said in zip(asking, self.engine.complete(so_far, turn.of(asking)), strict=True):
                rollout = rollouts[row]
                rollout.extend(said.completion_ids, said.logprobs, own=True)
                rollout.ended = said.ended
        return rollouts

    def answers(self, rollout: Any) -> bool:
        """Appends the result if the last turn asks for one. Returns whether it does."""
        text = self.tokenizer.decode(rollout.completion_ids, skip_special_tokens=True)
        result = calculate(last_turn(text)) if rollout.ended else None
        if result is not None:
            reply = self.tokenizer(REPLY.format(result=result), add_special_tokens=False)
            rollout.extend(reply["input_ids"], own=False)
        return result is not None


def correct(completions: list, answer: list[int], **_: Any) -> list[float]:
    """1 if the last integer of the last turn is the answer, else 0."""
    from arithmetic import last_integer

    texts = [last_turn(messages[0]["content"]) for messages in completions]
    return [float(last_integer(text) == wanted) for text, wanted in zip(texts, answer, strict=True)]


def calculated(completions: list, **_: Any) -> list[float]:
    """1 if the calculator was used, else 0."""
    return [float("\ntool\n" in messages[0]["content"]) for messages in completions]


def train(run: program.Run) -> list[Any]:
    from datasets import Dataset

    import lesson
    from rlkernels.trainers import GRPOConfig, GRPOTrainer, TransformersEngine
    from rlkernels.trainers.rollouts.completions import choose, completions_table

    model, tokenizer = lesson.load()
    rows, held_out = problems(train=400, held_out=100)
    config = GRPOConfig(
        **lesson.options(run),
        learning_rate=2e-5,
        per_device_train_batch_size=32,
        num_generations=8,
        max_completion_length=(CALLS + 1) * TURN,
        # Using the calculator is logged but not rewarded.
        reward_weights=[1.0, 0.0],
        per_device_eval_batch_size=100,
        num_generations_eval=1,
        num_completions_to_print=0,
    )
    trainer = GRPOTrainer(
        model,
        [correct, calculated],
        config,
        Dataset.from_list(rows),
        Dataset.from_list(held_out),
        tokenizer,
        rollout=Calculator(TransformersEngine(model, tokenizer)),
    )

    def measure() -> dict[str, float]:
        values = trainer.evaluate()
        return {
            "right answers": values["eval_rewards/correct/mean"],
            "calculator used": values["eval_rewards/calculated/mean"],
        }

    shown = lesson.learn(run, trainer, measure, {"reward": "reward", "calculator": "rewards/calculated/mean"})
    return [completions_table(choose(trainer.completions, 4, unique=True), "completions of the last step"), *shown]


def main(arguments: list[str] | None = None) -> int:
    return program.main(__doc__, train, steps=16, folder="runs/calculator", arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
