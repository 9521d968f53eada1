"""The tiny model and its tokenizer, and what runs here have in common."""

import pytest
import torch

from rlkernels.trainers.base.reporting import CurvesCallback
from tiny_model import CHAT_TEMPLATE, build_model, build_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(autouse=True)
def own_template(tokenizer):
    """One tokenizer serves all tests: what one of them makes of its template, the next does not see."""
    yield
    tokenizer.chat_template = CHAT_TEMPLATE


@pytest.fixture
def make_model():
    return build_model


@pytest.fixture
def count_passes():
    """What counts the passes of a model's first layer that gradients go through: twice where it is computed again."""

    def count(model: torch.nn.Module) -> list:
        passes = []
        (layer,) = (module for name, module in model.named_modules() if name.endswith("layers.0"))
        # As it begins: a repetition ends with the last of what it is for, in the midst of the layer.
        layer.mlp.register_forward_pre_hook(lambda *_: passes.append(layer) if torch.is_grad_enabled() else None)
        return passes

    return count


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """No curves.png: to draw it takes longer than most runs here."""
    monkeypatch.setattr(CurvesCallback, "on_train_end", lambda *args, **kwargs: None)


@pytest.fixture
def run_options(tmp_path):
    """Options of a config: a short run on a CPU that leaves nothing but what a test asks for."""
    return {
        "output_dir": str(tmp_path / "run"),
        "logging_steps": 1,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "activation_checkpointing": False,
        "disable_tqdm": True,
    }
