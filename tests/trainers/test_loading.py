"""Models, classifiers and tokenizers from folders: whole ones are loaded, others are refused, and no code runs that
they bring."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, LlamaForSequenceClassification

from rlkernels import trainers
from rlkernels.trainers import SFTConfig
from rlkernels.trainers.base.loading import load_classifier, load_model, load_tokenizer
from rlkernels.trainers.rewards.model import RewardModel
from tiny_model import build_model

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

open("ran", "w").close()

class Config(LlamaConfig):
    model_type = "mine"

class Model(LlamaForCausalLM):
    config_class = Config

class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


class Command:
    """What a pickle could run."""

    def __reduce__(self):
        return (open, ("ran", "w"))


@pytest.fixture(scope="module")
def sound(tmp_path_factory, tokenizer):
    """A tiny model, and a classifier of its kind."""
    folder = tmp_path_factory.mktemp("sound")
    model = build_model()
    model.save_pretrained(folder / "model")
    model.config.num_labels = 1
    LlamaForSequenceClassification(model.config).save_pretrained(folder / "classifier")
    model.model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "model")
    return folder


@pytest.fixture
def args(tmp_path):
    return SFTConfig(output_dir=str(tmp_path / "out"), use_cpu=True, bf16=False, report_to="none")


@pytest.fixture
def folder(sound, tmp_path, monkeypatch):
    """A copy of the model in the current folder; whoever asks on stdin is told yes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *prompt: "y")
    return Path(shutil.copytree(sound / "model", "model"))


def edit(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def torch_save(value, file: Path) -> None:
    (file.parent / "model.safetensors").unlink()
    torch.save(value, file)


OWN = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
LACKING = "it lacks model.layers.2.input_layernorm.weight, model.layers.2.mlp.down_proj.weight, .* and 6 more$"

BROKEN = {
    "weights of fewer layers": (
        lambda folder: edit(folder / "config.json", num_hidden_layers=3),
        rf"^model: 'model' is no trained language model; {LACKING}",
    ),
    "weights of more layers": (
        lambda folder: edit(folder / "config.json", num_hidden_layers=1),
        r"it has, unknown to its config, model\.layers\.1\.input_layernorm\.weight, .* and 6 more$",
    ),
    "weights of other shapes": (
        lambda folder: edit(folder / "config.json", vocab_size=70),
        r"no trained language model; it has in another shape lm_head\.weight, model\.embed_tokens\.weight$",
    ),
    "no head": (
        lambda folder: shutil.copytree(folder.parent / "base", folder, dirs_exist_ok=True),
        r"no trained language model; it lacks lm_head\.weight$",
    ),
    "a classifier": (
        lambda folder: shutil.copytree(folder.parent / "classifier", folder, dirs_exist_ok=True),
        r"no trained language model; it lacks lm_head\.weight; it has, unknown to its config, score\.weight$",
    ),
    "no heads": (lambda folder: edit(folder / "config.json", num_attention_heads=0), "cannot be loaded: Zero"),
    "a config of text": (
        lambda folder: edit(folder / "config.json", hidden_size="large"),
        "cannot be loaded: .*hidden",
    ),
    "a dropout of -1": (lambda folder: edit(folder / "config.json", attention_dropout=-1), "dropout must be between"),
    "a config that is a number": (lambda folder: (folder / "config.json").write_text("3"), "cannot be loaded: Type"),
    "a deep config": (
        lambda folder: (folder / "config.json").write_text("[" * 100_000),
        "cannot be loaded: RecursionError",
    ),
    "a pickle": (
        lambda folder: torch_save(Command(), folder / "pytorch_model.bin"),
        "its pickle holds more than tensors",
    ),
    "a file of nothing": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "cannot be loaded: .*header"),
    "an index of nothing": (
        lambda folder: (folder / "model.safetensors").rename(folder / "model.safetensors.index.json"),
        "cannot be loaded: UnicodeDecodeError",
    ),
    "code of its own": (
        lambda folder: edit(folder / "config.json", model_type="mine", auto_map=OWN),
        "cannot be loaded: .*custom code.*trust_remote_code=True",
    ),
    "a generation config cut off": (
        lambda folder: (folder / "generation_config.json").write_text("{"),
        "cannot be loaded: .*generation_config.json",
    ),
    "a generation config that is a list": (
        lambda folder: (folder / "generation_config.json").write_text("[]"),
        "cannot be loaded: TypeError",
    ),
    "an end token of text": (
        lambda folder: edit(folder / "generation_config.json", eos_token_id=[0, "x"]),
        r"eos_token_id must be a token id or a list of them; got \[0, 'x'\]$",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_model_is_refused(folder, sound, args, case):
    (folder / "code.py").write_text(CODE)
    for name in ("base", "classifier"):
        Path(name).symlink_to(sound / name)
    change, message = BROKEN[case]
    change(folder)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        load_model("model", args)
    assert not Path("ran").exists()


@pytest.mark.parametrize("method", ["SFT", "GRPO"])
def test_a_generation_config_that_could_not_be_saved_is_refused_before_the_first_step(folder, tmp_path, method):
    """transformers saves a doubtful one only as it was published; its Trainer changes one of other special tokens."""
    config, trainer = getattr(trainers, f"{method}Config"), getattr(trainers, f"{method}Trainer")
    options = {"output_dir": str(tmp_path / "out"), "use_cpu": True, "bf16": False, "report_to": "none", "max_steps": 1}
    rewards = [lambda completions, **columns: [0.0] * len(completions)] if method == "GRPO" else ()
    options |= {"max_completion_length": 2, "num_generations": 2} if method == "GRPO" else {}
    rows = [{"prompt": "a", "completion": "b"}] * 4
    edit(folder / "generation_config.json", temperature=0.5, do_sample=False)
    trainer("model", *rewards, config(**options), rows).train()
    edit(folder / "generation_config.json", eos_token_id=3, pad_token_id=3)
    with pytest.raises(ValueError, match=r"^generation_config of the model cannot be saved: .*`temperature`"):
        trainer("model", *rewards, config(**options), rows).train()


def test_code_that_is_trusted_runs(folder, args):
    (folder / "code.py").write_text(CODE)
    edit(folder / "config.json", model_type="mine", auto_map=OWN)
    edit(folder / "tokenizer_config.json", tokenizer_class="Mine", auto_map={"AutoTokenizer": [None, "code.Tokenizer"]})
    args.trust_remote_code = True
    model = load_model("model", args)
    assert type(model).__name__ == "Model" and Path("ran").exists()
    assert type(load_tokenizer(model, args)).__name__ == "Tokenizer"


BROKEN_TOKENIZERS = {
    "tokenizer_config.json": '{"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": [null, "code.Tokenizer"]}}',
    "tokenizer.json": "{}",
    "special_tokens_map.json": "{",
}


@pytest.mark.parametrize("file", BROKEN_TOKENIZERS)
def test_a_broken_tokenizer_is_refused(folder, args, file):
    """A reward model's tokenizer too: it would be given the policy's tokens."""
    (folder / "code.py").write_text(CODE)
    (folder / file).write_text(BROKEN_TOKENIZERS[file])
    model = load_model("model", args)
    with pytest.raises(ValueError, match=r"^processing_class: no tokenizer could be loaded from 'model': "):
        load_tokenizer(model, args)
    with pytest.raises(ValueError, match=r"^reward_funcs: no tokenizer could be loaded from 'model': "):
        RewardModel(model, args).prepare(None, None)
    assert not Path("ran").exists()


def test_what_is_asked_for_may_be_new(folder, sound, args):
    """The score head of a language model's classifier, and weights of other shapes, by from_pretrained's own option."""
    value = load_classifier("value_model", "model", args)
    assert torch.equal(value.model.embed_tokens.weight, load_model("model", args).model.embed_tokens.weight)
    with pytest.raises(ValueError, match=r"^reward_funcs: 'model' is no trained classifier; it lacks score\.weight$"):
        load_classifier("reward_funcs", "model", args, trained=True)
    load_classifier("reward_funcs", str(sound / "classifier"), args, trained=True)
    edit(folder / "config.json", num_hidden_layers=3)
    with pytest.raises(ValueError, match=f"^value_model: 'model' is no trained classifier; {LACKING}"):
        load_classifier("value_model", "model", args)
    edit(folder / "config.json", num_hidden_layers=2, vocab_size=70)
    args.model_init_kwargs = {"ignore_mismatched_sizes": True}
    assert load_model("model", args).lm_head.weight.shape == (70, 32)


def test_tied_weights_are_not_missing(folder, args):
    config = AutoConfig.from_pretrained("model", tie_word_embeddings=True)
    model = type(build_model())(config)
    model.save_pretrained("tied")
    loaded = load_model("tied", args)
    assert torch.equal(loaded.lm_head.weight, model.model.embed_tokens.weight)
