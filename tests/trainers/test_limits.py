"""Tokens and positions beyond a model are refused, by the row, before anything is trained."""

import copy

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
)

from rlkernels.trainers import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    PPOConfig,
    PPOTrainer,
    RewardConfig,
    RewardTrainer,
    RolloutError,
    SamplingOptions,
    SFTConfig,
    SFTTrainer,
)
from rlkernels.trainers.base.limits import learned_positions
from rlkernels.trainers.rollouts.generate import TransformersEngine
from tiny_model import WORDS, build_model

POSITIONS = 16
SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": POSITIONS}
GPT2 = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": POSITIONS}
FAMILIES = {
    "gpt2": GPT2,
    "gptj": {**GPT2, "rotary_dim": 2},
    "opt": {**SIZES, "ffn_dim": 8, "word_embed_proj_dim": 8},
    "roberta": {**SIZES, "max_position_embeddings": POSITIONS + 2, "intermediate_size": 8, "is_decoder": True},
    "mpt": {"d_model": 8, "n_layers": 1, "n_heads": 2, "expansion_ratio": 1, "max_seq_len": POSITIONS},
}
BOUNDLESS = {
    "llama": {**SIZES, "intermediate_size": 8},
    "bloom": {"hidden_size": 8, "n_layer": 1, "n_head": 2},
    # As many sizes as could be taken for positions.
    "mistral": {**SIZES, "num_key_value_heads": 2, "intermediate_size": 8, "vocab_size": POSITIONS, "head_dim": 32},
}


def gpt2(tokens: int = len(WORDS), cls: type = GPT2LMHeadModel) -> torch.nn.Module:
    torch.manual_seed(0)
    ends = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    return cls(GPT2Config(vocab_size=tokens, num_labels=1, **GPT2, **ends))


def classifier(tokens: int = len(WORDS)) -> torch.nn.Module:
    return gpt2(tokens, GPT2ForSequenceClassification)


@pytest.mark.parametrize("family", [*FAMILIES, *BOUNDLESS])
def test_positions(family):
    """Where the model itself fails, and nowhere else."""
    options = {"vocab_size": 32, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **options | FAMILIES.get(family, {}) | BOUNDLESS.get(family, {}))
    ).eval()
    positions = learned_positions(model)
    assert positions == (POSITIONS if family in FAMILIES else None)
    with torch.no_grad():
        model(torch.full((1, positions or 40), 5))
        if positions is not None:
            with pytest.raises((IndexError, RuntimeError)):
                model(torch.full((1, positions + 1), 5))


@pytest.mark.parametrize(
    "adapted",
    [{"modules_to_save": ["embed_tokens"]}, {"target_modules": ["embed_tokens"]}, {"trainable_token_indices": [1]}],
    ids=str,
)
def test_adapted_tokens_are_no_positions(adapted):
    """Where there are as many tokens as positions."""
    peft = pytest.importorskip("peft")
    model = build_model()
    model.config.max_position_embeddings = model.config.vocab_size
    config = peft.LoraConfig(task_type="CAUSAL_LM", **{"target_modules": ["q_proj"]} | adapted)
    assert learned_positions(peft.get_peft_model(model, config)) is None


LONG, SHORT = "a" * POSITIONS, "ab"
TOO_LONG = f"has {POSITIONS + 1} tokens, more than the {POSITIONS} positions of the model"
BEYOND = f"holds token {len(WORDS)}, beyond the {len(WORDS)} rows of the model's embedding"
ONLINE = {"per_device_train_batch_size": 2, "bf16": False, "use_cpu": True, "report_to": "none"}


def train(method: str, text: str, model, tokenizer, tmp_path, **options):
    """The second of two rows holds the text."""
    trainers = {"sft": (SFTTrainer, SFTConfig), "dpo": (DPOTrainer, DPOConfig), "reward": (RewardTrainer, RewardConfig)}
    trainer, config = trainers[method]
    rows = [{"text": each} if method == "sft" else {"chosen": each, "rejected": "c"} for each in (SHORT, text)]
    args = config(output_dir=str(tmp_path / "out"), **ONLINE)
    return trainer(model, args, Dataset.from_list(rows), processing_class=tokenizer, **options)


@pytest.fixture
def with_added(tokenizer):
    """A tokenizer with one token more than the model."""
    added = copy.deepcopy(tokenizer)
    added.add_special_tokens({"additional_special_tokens": ["<more>"]})
    return added


@pytest.mark.parametrize("method", ["sft", "dpo", "reward"])
def test_rows(method, tokenizer, with_added, tmp_path):
    make = classifier if method == "reward" else gpt2
    with pytest.raises(ValueError, match=f"^train_dataset, row 1: {TOO_LONG}"):
        train(method, LONG, make(), tokenizer, tmp_path)
    with pytest.raises(ValueError, match=f"^train_dataset, row 1: {BEYOND}; .*resize_token_embeddings"):
        train(method, "a<more>", make(), with_added, tmp_path)
    train(method, LONG[1:], make(), tokenizer, tmp_path)
    train(method, SHORT, make(), with_added, tmp_path)


def test_labels(tokenizer, with_added, tmp_path):
    rows = [{"input_ids": [3, 4], "labels": [3, len(WORDS)]}]
    with pytest.raises(ValueError, match=f"^train_dataset, row 0: {BEYOND}"):
        SFTTrainer(build_model(), SFTConfig(str(tmp_path), **ONLINE), rows, processing_class=with_added)


@pytest.mark.parametrize("precompute", [False, True])
def test_reference(precompute, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"prompt": "", "chosen": each, "rejected": "c"} for each in (SHORT, LONG)]
    args = DPOConfig(str(tmp_path / "out"), precompute_ref_log_probs=precompute, **ONLINE)
    with pytest.raises(ValueError, match=f"^train_dataset, row 1: {TOO_LONG}"):
        DPOTrainer(build_model(), args, Dataset.from_list(rows), processing_class=tokenizer, ref_model=gpt2())


def online(trainer, config, model, tokenizer, tmp_path, prompts, rewards=None, **options):
    size = {"max_completion_length": 6, "num_generations": 2} if config is GRPOConfig else {"response_length": 6}
    rewards = (lambda completions, **columns: [0.0] * len(completions)) if rewards is None else rewards
    rows = [{"prompt": prompt} for prompt in prompts]
    args = config(output_dir=str(tmp_path / "out"), **ONLINE, **size)
    return trainer(model, rewards, args, rows, processing_class=tokenizer, **options)


GRPO, PPO = (GRPOTrainer, GRPOConfig), (PPOTrainer, PPOConfig)
WITH_COMPLETION = f"has {POSITIONS - 5} tokens and a completion of 6, more than the {POSITIONS} positions of the model"
READERS = {
    "policy": (GRPO, gpt2, lambda: {}),
    "reference": (PPO, build_model, lambda: {"ref_model": gpt2()}),
    "value": (PPO, build_model, lambda: {"value_model": classifier()}),
    "reward model": (GRPO, build_model, lambda: {"rewards": classifier()}),
}


@pytest.mark.parametrize("reader", READERS)
def test_prompts(reader, tokenizer, with_added, tmp_path):
    """With all that may follow them, for every model that reads both."""
    method, make, options = READERS[reader]
    prompts = [SHORT, LONG[5:]]
    with pytest.raises(ValueError, match=f"^train_dataset, row 1: {WITH_COMPLETION}"):
        online(*method, make(), tokenizer, tmp_path, prompts, **options())
    with pytest.raises(ValueError, match=f"^train_dataset, row 1: {BEYOND}"):
        online(*method, make(), with_added, tmp_path, [SHORT, "<more>"], **options())
    online(*method, make(), with_added, tmp_path, [SHORT, LONG[6:]], **options()).train()


def test_reward_model_with_its_own_tokens(tokenizer, tmp_path):
    """Prompts before anything is sampled; completions, whose number of tokens is not known before, when they are."""
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["ab"])
    classifier(len(other)).save_pretrained(tmp_path / "reward")
    other.save_pretrained(tmp_path / "reward")
    rewards = str(tmp_path / "reward")
    with pytest.raises(ValueError, match=f"^train_dataset, row 1: for the reward model reward it has {POSITIONS + 1}"):
        online(*GRPO, build_model(), tokenizer, tmp_path, [SHORT, LONG + "a"], rewards)
    trainer = online(*GRPO, build_model(), tokenizer, tmp_path, [SHORT, LONG], rewards)
    with pytest.raises(ValueError, match="for the reward model reward it has"):
        trainer.train()


def test_evaluation(tokenizer, tmp_path):
    rows = {"hard": [{"prompt": LONG}]}
    with pytest.raises(ValueError, match=r"^eval_dataset\['hard'\], row 0: has"):
        online(*GRPO, gpt2(), tokenizer, tmp_path, [SHORT] * 2, eval_dataset=rows)


def test_further_turns(tokenizer):
    engine = TransformersEngine(gpt2(), tokenizer)
    with pytest.raises(RolloutError, match=f"^a row {WITH_COMPLETION}"):
        engine.complete([[3], [3] * (POSITIONS - 5)], SamplingOptions(temperature=1.0, max_completion_length=6))


def test_special_tokens_beyond(tokenizer, tmp_path):
    """A padding token that was added serves nothing but padding; no completion ends by such an end."""
    padded = copy.deepcopy(tokenizer)
    padded.add_special_tokens({"pad_token": "<pad>"})
    rows = [{"text": text} for text in (SHORT, "abcde")]
    losses = []
    for tokens in (tokenizer, padded):
        args = SFTConfig(str(tmp_path / "out"), padding_free=False, **ONLINE)
        trainer = SFTTrainer(build_model(), args, rows, processing_class=tokens)
        losses.append(trainer.training_step(trainer.model, list(trainer.train_dataset)))
    assert losses[0] == losses[1]
    online(*GRPO, build_model(), padded, tmp_path, [SHORT] * 2).train()
    ended = copy.deepcopy(tokenizer)
    ended.add_special_tokens({"eos_token": "<end>"})
    model = build_model()
    model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match=f"^processing_class: its end-of-sequence token is {len(WORDS)}, beyond"):
        online(*GRPO, model, ended, tmp_path, [SHORT] * 2)


@pytest.mark.parametrize("family", ["falcon", "gpt2"])
def test_classifiers_without_a_padding_token(family, tokenizer, tmp_path):
    """Neither theirs nor the tokenizer's: padded batches give each sequence's own score, and nothing of it is kept."""
    tokens = copy.deepcopy(tokenizer)
    tokens.pad_token = None
    sizes = (
        {**SIZES, "max_position_embeddings": 64, "alibi": True} if family == "falcon" else {**GPT2, "n_positions": 64}
    )
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=len(WORDS), num_labels=1, **sizes, **ends)
    model = AutoModelForSequenceClassification.from_config(config)
    rows = [{"chosen": each, "rejected": "c" * 20} for each in ("ab", "abcdef")]
    args = RewardConfig(str(tmp_path / "out"), padding_free=False, **ONLINE)
    trainer = RewardTrainer(model, args, rows, processing_class=tokens)
    loss = trainer.training_step(trainer.model, list(trainer.train_dataset))
    model.eval()
    alone = [
        [model(torch.tensor([sequence["input_ids"]])).logits.item() for sequence in row["sequences"]]
        for row in trainer.train_dataset
    ]
    expected = -torch.nn.functional.logsigmoid(torch.tensor([one - other for one, other in alone])).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5) and alone[0] != alone[1]
    assert model.config.pad_token_id is None

    value = copy.deepcopy(model)
    for method, options in ((GRPO, {"rewards": model}), (PPO, {"value_model": value})):
        online(*method, build_model(), tokenizer, tmp_path, [SHORT, "abcde"], **options).train()
    assert model.config.pad_token_id is None
