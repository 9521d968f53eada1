"""TRL's trainers for five steps, on their own functions and on ours: every number that they log is the same.

TRL ships no tests. The model is a tiny random Qwen3, the tokenizer is made here, and nothing is downloaded.
"""

import importlib
import math

import pytest
import torch

from cases import thorough
from counting import patched_and_counted

trl = pytest.importorskip("trl")
import datasets  # noqa: E402
from peft import LoraConfig  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import (  # noqa: E402
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
)

from rlkernels.integrations.trl import PATCH  # noqa: E402

STEPS = 5
WORDS = ["<eos>", "<pad>", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .:?"]
TIMES = ("time", "runtime", "per_second", "mfu")

HEAD = "trl.kernels.chunked_logprob:ChunkedLogProbFunction.apply"
LOGPROBS = "trl.trainer.utils:selective_log_softmax"
BOTH = "trl.trainer.utils:selective_log_softmax_and_entropy"
DIVERGENCE = "trl.trainer.distillation_trainer:_chunked_divergence_loss"


@pytest.fixture(scope="module")
def tokenizer():
    """One token per character."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>", unk_token="?")


def config(**options):
    return Qwen3Config(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        initializer_range=0.3,
        eos_token_id=0,
        pad_token_id=1,
        bos_token_id=None,
        **options,
    )


@pytest.fixture(scope="module")
def path(tmp_path_factory, tokenizer):
    """Where the saved models are."""
    folder = tmp_path_factory.mktemp("models")
    for seed, (name, model, options) in enumerate(
        [
            ("policy", Qwen3ForCausalLM, {}),
            ("tied", Qwen3ForCausalLM, {"tie_word_embeddings": True}),
            ("reward", Qwen3ForSequenceClassification, {"num_labels": 1}),
        ]
    ):
        torch.manual_seed(seed)
        model(config(**options)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


PROMPTS = ["ab", "cdefg", "a", "hijk", "lmn", "opqrst", "uv", "wxyz"]
CHOSEN = ["CDEFGH", "P", "ZAB", "OPQ", "VWXYZ0", "12", "345", "6789"]
REJECTED = ["ij", "qrstuvw", "CDEFG", "RST", "X", "YZ0123", "a", "b c"]


def rows(*columns):
    every = {
        "prompt": PROMPTS,
        "chosen": CHOSEN,
        "rejected": REJECTED,
        "completion": CHOSEN,
        "reference": ["c", "pq", "Za", "O", "VW", "123", "4", "67"],
        "label": [True, False, True, True, False, False, True, False],
    }
    return datasets.Dataset.from_dict({name: every[name] for name in columns})


def vowels(completions, **kwargs):
    return [sum(letter in "aeiouAEIOU" for letter in text) / 4 - len(text) / 9 for text in completions]


def length(completions, **kwargs):
    return [None if len(text) % 3 == 0 else -abs(len(text) - 4.0) for text in completions]


@pytest.fixture
def build(path, tokenizer, tmp_path, monkeypatch):
    """A trainer by its name, with its config's options."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")

    def of(name, columns, module=trl, model="policy", given=(), **options):
        options = {
            "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "max_steps": STEPS,
            "logging_steps": 1,
            "bf16": False,
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "seed": 3,
        } | options
        torch.manual_seed(7)
        return getattr(module, f"{name}Trainer")(
            str(path / model),
            args=getattr(module, f"{name}Config")(**options),
            train_dataset=rows(*columns),
            processing_class=tokenizer,
            **{key: str(path / value) if key == "teacher_model" else value for key, value in given},
        )

    return of


def logged(trainer):
    """What it logs of each step and evaluation, without what time it took."""
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "train_runtime" not in entry]
    return [{k: v for k, v in entry.items() if not any(time in k for time in TIMES)} for entry in history]


def assert_same(ours, theirs, rel=1e-5, names=None):
    """Numbers that are the difference of larger ones, as the loss of equal policies or a reward, to 2e-6."""
    assert len(ours) == len(theirs)
    assert sum("loss" in entry for entry in theirs) == STEPS
    for step, (of_ours, of_theirs) in enumerate(zip(ours, theirs, strict=True)):
        assert of_ours.keys() == of_theirs.keys()
        for name in names or of_theirs:
            value = of_theirs[name]
            if isinstance(value, float) and math.isfinite(value):
                assert of_ours[name] == pytest.approx(value, rel=rel, abs=2e-6), (step, name)
            else:
                assert str(of_ours[name]) == str(value), (step, name)


REWARDS = (("reward_funcs", [vowels, length]),)
ONLINE = {"num_generations": 4, "max_completion_length": 8, "per_device_train_batch_size": 8}
CASES = {
    "SFT": (
        "SFT",
        ["prompt", "completion"],
        {"given": (("eval_dataset", rows("prompt", "completion")),), "eval_strategy": "steps", "eval_steps": 2},
        {HEAD},
    ),
    "SFT of a tied head": (
        "SFT",
        ["prompt", "completion"],
        {"model": "tied", "packing": True, "max_length": 16},
        {HEAD},
    ),
    "SFT with dft loss": ("SFT", ["prompt", "completion"], {"loss_type": "dft"}, {HEAD}),
    "DPO": ("DPO", ["prompt", "chosen", "rejected"], {"gradient_accumulation_steps": 2}, {HEAD}),
    "DPO with ipo and sft loss": (
        "DPO",
        ["prompt", "chosen", "rejected"],
        {"loss_type": ["ipo", "sft"], "loss_weights": [1.0, 0.5]},
        {HEAD},
    ),
    "DPO of an adapter": (
        "DPO",
        ["prompt", "chosen", "rejected"],
        {"given": (("peft_config", LoraConfig(r=4, target_modules=["q_proj", "v_proj"])),)},
        {HEAD},
    ),
    "KTO": ("KTO", ["prompt", "completion", "label"], {}, {HEAD}),
    "GRPO": ("GRPO", ["prompt"], ONLINE | {"given": REWARDS, "num_iterations": 2, "beta": 0.05}, {HEAD}),
    "GRPO of the most uncertain tokens": (
        "GRPO",
        ["prompt"],
        ONLINE | {"given": REWARDS, "temperature": 0.8, "top_entropy_quantile": 0.5, "loss_type": "dr_grpo"},
        {HEAD},
    ),
    "RLOO": ("RLOO", ["prompt"], ONLINE | {"given": REWARDS, "num_iterations": 2, "beta": 0.05}, {HEAD}),
    "Reward": ("Reward", ["prompt", "chosen", "rejected"], {"model": "reward"}, set()),
    "Distillation": (
        "Distillation",
        ["prompt"],
        {"given": (("teacher_model", "tied"),), "max_completion_length": 8, "beta": 0.3, "temperature": 0.9},
        {DIVERGENCE},
    ),
    "ORPO": ("ORPO", ["prompt", "chosen", "rejected"], {"module": "orpo", "max_length": 16}, {LOGPROBS}),
    "TPO": ("TPO", ["prompt", "chosen", "rejected", "reference"], {"module": "tpo"}, {BOTH}),
}


@pytest.mark.parametrize("case", [case if case in ("SFT", "DPO", "GRPO") else thorough(case) for case in CASES])
def test_five_steps(build, case):
    name, columns, options, expected = CASES[case]
    if "module" in options:
        options = options | {"module": importlib.import_module(f"trl.experimental.{options['module']}")}
    theirs = logged(build(name, columns, **options))
    with patched_and_counted(PATCH) as calls:
        ours = logged(build(name, columns, **options))
    assert_same(ours, theirs)
    called = {target for target in calls if not target.startswith("rlkernels::")}
    assert called == expected
    assert any(kernel.startswith("rlkernels::") for kernel in calls) == bool(expected)


@pytest.mark.parametrize("case", ["SFT", *map(thorough, ("DPO", "GRPO", "Distillation"))])
def test_five_steps_in_bfloat16(build, case):
    """As TRL trains if nothing is said: float32 weights, products in bfloat16, 2 digits of which are the same."""
    name, columns, options, expected = CASES[case]
    options = options | {"bf16": True, "learning_rate": 1e-5}
    theirs = logged(build(name, columns, **options))
    with patched_and_counted(PATCH) as calls:
        ours = logged(build(name, columns, **options))
    assert expected <= set(calls)
    # Sampled tokens come to differ, and with them the losses of later steps.
    one = slice(0, 1) if case in ("GRPO", "Distillation") else slice(None)
    for of_ours, of_theirs in zip(ours[one], theirs[one], strict=True):
        for key in ("loss", "eval_loss", "entropy"):
            if key in of_theirs:
                assert of_ours[key] == pytest.approx(of_theirs[key], rel=1e-2, abs=1e-2), key


def test_trainer_from_before_the_patch(build):
    """Uses ours from then on, and theirs again afterwards."""
    trainer, again = (build("SFT", ["prompt", "completion"]) for _ in range(2))
    theirs = logged(again)
    with patched_and_counted(PATCH) as calls:
        ours = logged(trainer)
    count = calls[HEAD]
    assert count >= STEPS
    assert_same(ours, theirs)
    trainer.train()
    assert calls[HEAD] == count
