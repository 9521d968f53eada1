"""Datasets of reasoning-gym in our trainers, and GRPO on reward functions of every kind."""

import functools
import pickle

import pytest
import reasoning_gym
import torch
from reasoning_gym.utils import extract_answer

import peer_rewards as peers
from peer_rewards import call
from rlkernels.integrations.rewards import (
    from_openrlhf,
    from_reasoning_gym,
    from_verl,
    to_reasoning_gym,
    to_verl,
)
from rlkernels.trainers import GRPOConfig, GRPOTrainer
from rlkernels.trainers.rewards.functions import RewardFunctions


def gym(name="chain_sum", **options):
    return reasoning_gym.create_dataset(name, size=6, seed=3, **options)


def messages(texts):
    return [[{"role": "assistant", "content": text}] for text in texts]


def columns(rows):
    return {key: [row[key] for row in rows] for key in rows[0] if key != "prompt"}


def test_reasoning_gym_rows_and_scores():
    dataset = gym()
    rows, reward = from_reasoning_gym(dataset, system_prompt="Answer.")
    assert [row["answer"] for row in rows] == [entry["answer"] for entry in dataset]
    assert rows[2]["prompt"] == [
        {"role": "system", "content": "Answer."},
        {"role": "user", "content": dataset[2]["question"]},
    ]
    assert reward.__name__ == "chain_sum"
    texts = [f" {rows[0]['answer']}\n", "wrong", f"it is {rows[2]['answer']}", "", rows[4]["answer"], rows[0]["answer"]]
    shuffled = [5, 3, 1, 0, 2, 4]
    found, logs = call(
        reward,
        {"prompts": shuffled, "completions": messages(texts[i] for i in shuffled)},
        **columns([rows[i] for i in shuffled]),
    )
    expected = [dataset.score_answer(texts[i].strip(), dataset[i]) for i in shuffled]
    assert found == expected and expected[3] == 1.0 and 0 < expected[4] < 1
    assert logs.columns == {}


def test_reasoning_gym_scores_by_metadata():
    """Countdown has many answers, and its metadata no form that a table of columns would keep."""
    dataset = gym("countdown")
    rows, reward = from_reasoning_gym(dataset, chat=False)
    assert rows[0]["prompt"] == dataset[0]["question"]
    texts = [entry["metadata"]["expression"] for entry in dataset]
    assert (
        call(pickle.loads(pickle.dumps(reward)), {"prompts": rows, "completions": texts}, **columns(rows))[0]
        == [1.0] * 6
    )


def test_reasoning_gym_extracts():
    extract = functools.partial(extract_answer, tag_name="answer")
    rows, reward = from_reasoning_gym(gym(), extract=extract)
    texts = [f"so <answer>{row['answer']}</answer>" for row in rows[:5]] + [rows[5]["answer"]]
    found, _ = call(reward, {"prompts": rows, "completions": messages(texts)}, **columns(rows))
    assert found == [1.0] * 5 + [0.0]


def test_reasoning_gym_tasks_together():
    parts = [from_reasoning_gym(gym(), chat=False), from_reasoning_gym(gym("countdown"), chat=False, name="count")]
    rows = [*parts[0][0], *parts[1][0]]
    batch = {"prompts": rows, "completions": [row["answer"] for row in rows]}
    functions = [reward for _, reward in parts]
    found = RewardFunctions(functions)({**batch, "completion_ids": [[0]] * 12, **columns(rows)})
    assert found[:6, 0].tolist() == [1.0] * 6 and found[6:, 0].isnan().all()
    assert found[:6, 1].isnan().all() and found[6:, 1].isfinite().all()


def test_reasoning_gym_errors():
    with pytest.raises(TypeError, match="dataset must be one of reasoning-gym's, with a length; got list"):
        from_reasoning_gym([])
    with pytest.raises(TypeError, match="extract must be a function"):
        from_reasoning_gym(gym(), extract="answer")
    with pytest.raises(ValueError, match=r"column must be one of the rows', \['letter'\]; got 'task'"):
        call(from_reasoning_gym(gym())[1])


def test_reasoning_gym_without_entries_or_a_name():
    rows, _ = from_reasoning_gym(reasoning_gym.create_dataset("chain_sum", size=1), system_prompt="S", chat=False)
    assert rows[0]["prompt"].startswith("S\n\n")

    class Dataset(list):
        def score_answer(self, answer, entry):
            return 1.0

    assert from_reasoning_gym(Dataset())[1].__name__ == "Dataset"
    assert from_reasoning_gym(Dataset([{"question": "q", "answer": "a"}]))[0][0]["task"] == "Dataset"


@pytest.mark.parametrize("reward", [peers.hits, peers.async_hits])
def test_ours_as_reasoning_gyms(reward):
    dataset = gym()
    dataset.score_answer = to_reasoning_gym(reward, column="letter")
    entry = {**dataset[0], "answer": "a"}
    assert dataset.score_answer("a bad", entry) == 2.0
    assert dataset.score_answer(None, entry) == 0.0


# GRPO on all of them


def tiny():
    """A random model, and its tokenizer of one token a character."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<eos>", *map(chr, range(32, 127))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>", unk_token="?")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] }}{% endfor %}"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=256,
        eos_token_id=0,
        pad_token_id=0,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config), tokenizer


@pytest.mark.parametrize("workers", [0, 2])
def test_grpo_trains_on_them(workers, tmp_path):
    rows, gym_reward = from_reasoning_gym(gym())
    rows = [{**row, "letter": "1", "reward_model": {"style": "rule", "ground_truth": "1"}} for row in rows]
    model, tokenizer = tiny()
    functions = [
        gym_reward,
        from_verl(peers.compute_score),
        from_verl(peers.async_score),
        from_openrlhf(peers.reward_func, column="letter", tokenizer=tokenizer),
        from_verl(to_verl(peers.hits, column="letter", default=0.0), column="letter", name="ours"),
    ]
    config = GRPOConfig(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=6,
        logging_steps=1,
        reward_workers=workers,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        num_completions_to_print=0,
    )
    trainer = GRPOTrainer(model, functions, config, rows, processing_class=tokenizer)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 2
    for log in logs:
        means = [log[f"rewards/{each}/mean"] for each in ("compute_score", "async_score", "reward_func", "ours")]
        assert means == [pytest.approx(means[0])] * 4
        assert 0 <= log["rewards/chain_sum/mean"] <= 1
        assert {"async_score/acc", "reward_func/length", "ours/twice"} <= log.keys()
