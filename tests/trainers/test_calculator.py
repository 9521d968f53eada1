"""The example with a tool: what is calculated, where the result stands, and what a broken-off turn asks for."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from rlkernels.trainers import Rollout, SamplingOptions

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))
arithmetic, calculator = importlib.import_module("arithmetic"), importlib.import_module("calculator")

END = 3
"""The end of a turn, <|im_end|>: a character that no text has."""


class Characters:
    """A tokenizer of one token per character, and one of the end of a turn."""

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(letter) for letter in text.replace("<|im_end|>", chr(END))]}

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "".join(map(chr, ids)).replace(chr(END), "").replace("<|im_start|>", "")


class Scripted:
    """An engine whose model says one turn after the other; \\3 ends a turn."""

    tokenizer = Characters()

    def __init__(self, *turns: list[str]) -> None:
        self.turns, self.contexts, self.rows = list(turns), [], []

    def __call__(self, prompts: list, options: SamplingOptions) -> list[Rollout]:
        return self.complete([[ord(letter) for letter in prompt] for prompt in prompts], options)

    def complete(self, prompt_ids: list[list[int]], options: SamplingOptions) -> list[Rollout]:
        assert options == SamplingOptions(0.7, calculator.TURN, logprobs=True, rows=options.rows)
        self.rows.append(options.rows)
        self.contexts.append(["".join(map(chr, ids)) for ids in prompt_ids])
        said = [[ord(letter) for letter in text] for text in self.turns.pop(0)]
        return [
            Rollout(prompt, ids, ids[-1] == END, [-float(len(self.contexts))] * len(ids))
            for prompt, ids in zip(prompt_ids, said, strict=True)
        ]


def test_result_stands_between_the_turns_and_is_not_the_models():
    engine = Scripted(["<calc>2 + 3</calc>\3", "4\3", "<calc>2 + 3</calc>"], ["It is 5.\3"])
    first, second, third = calculator.Calculator(engine)(
        ["a", "b", "c"], SamplingOptions(0.7, 48, logprobs=True, rows=(7, 8, 9))
    )
    assert engine.rows == [(7, 8, 9), (7,)]
    reply = "\n<|im_start|>tool\n5\3\n<|im_start|>assistant\n"
    assert "".join(map(chr, first.completion_ids)) == f"<calc>2 + 3</calc>\3{reply}It is 5.\3"
    assert engine.contexts == [["a", "b", "c"], [f"a<calc>2 + 3</calc>\3{reply}"]]
    lengths = 19, len(reply), 9
    assert first.mask == [True] * lengths[0] + [False] * lengths[1] + [True] * lengths[2]
    assert first.logprobs[:19] == [-1.0] * 19 and first.logprobs[-9:] == [-2.0] * 9
    # One answers at once; of the other the turn was cut off.
    assert (second.mask, second.ended, third.mask, third.ended) == (None, True, None, False)


def test_calculator_is_used_so_often_at_most():
    asks = "<calc>2 + 3</calc>\3"
    engine = Scripted(*[[asks]] * (calculator.CALLS + 1))
    (rollout,) = calculator.Calculator(engine)(["a"], SamplingOptions(0.7, 48, logprobs=True))
    assert not engine.turns and rollout.completion_ids[-1] == END
    assert "".join(map(chr, rollout.completion_ids)).count("tool\n5") == calculator.CALLS


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("<calc>205 - 838</calc>", -633),
        ("<calc>12+34</calc>", 46),
        ("<calc> 999 + 999 </calc>", 1998),
        ("<calc>12 + 34</calc> is", None),
        ("It is <calc>12 + 34</calc>", None),
        ("<calc>12 + 34 + 5</calc>", None),
        ("<calc>12 * 34</calc>", None),
        ("<calc>__import__('os')</calc>", None),
        ("<calc>12 + 34", None),
        ("46", None),
    ],
)
def test_what_is_calculated(text, result):
    assert calculator.calculate(text) == result


def completion(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def test_rewards_are_for_the_last_turn():
    texts = {
        "46": (1.0, 0.0),
        "<calc>12 + 34</calc>\ntool\n46\nassistant\nIt is 46.": (1.0, 1.0),
        "<calc>12 + 34</calc>\ntool\n46\nassistant\nIt is 12.": (0.0, 1.0),
        "<calc>12 + 34</calc>\ntool\n46\nassistant\n": (0.0, 1.0),
        "<calc>12 + 34</calc>": (0.0, 0.0),
    }
    rows = {"completions": [completion(text) for text in texts], "answer": [46] * len(texts)}
    given = zip(calculator.correct(**rows), calculator.calculated(**rows), strict=True)
    assert dict(zip(texts, given, strict=True)) == texts


def test_held_out_sums_are_not_trained_on_also_not_with_their_terms_swapped():
    train, held_out = calculator.problems(400, 100)
    assert (len(train), len(held_out)) == (400, 100) and calculator.problems(400, 100) == (train, held_out)
    keys = [{arithmetic.unordered(row) for row in rows} for rows in (train, held_out)]
    assert keys[0].isdisjoint(keys[1]) and len(keys[0]) == 400 and len(keys[1]) == 100
    for row in train + held_out:
        assert calculator.calculate(f"<calc>{row['expression']}</calc>") == row["answer"]
        assert row["prompt"][-1]["content"] == row["expression"]
        assert row["expression"] not in calculator.EXAMPLES


def test_example_runs(make_model, tokenizer, tmp_path, monkeypatch, capsys):
    """With the tiny model, which never asks for a calculation."""
    make_model().save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    monkeypatch.setattr(importlib.import_module("lesson"), "model_folder", lambda: tmp_path / "start")
    folder = tmp_path / "run"
    assert calculator.main(["--steps", "1", "--seed", "3", "--output_dir", str(folder)]) == 0
    assert {entry.name for entry in folder.iterdir()} == {"result.json", "completions", "model"}
    result = json.loads((folder / "result.json").read_text())
    assert (result["seed"], result["steps"]) == (3, 1)
    assert result["before"].keys() == result["after"].keys() == {"right answers", "calculator used"}
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("right answers", "calculator used", "completions of the last step"))
