"""Training and evaluation against TRL's SFTTrainer, given the same weights and rows: all losses, all gradients."""

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

trl = pytest.importorskip("trl")

from cases import by_turns, thorough  # noqa: E402
from rlkernels.trainers import SFTConfig, SFTTrainer  # noqa: E402
from tiny_model import build_mixture  # noqa: E402

WORDS = ["a", "bcd", "efghijk", "lm nop", "qrstuvwxyz", "", "0123", "z 9"]
TALKS = [[{"role": "user", "content": word}, {"role": "assistant", "content": word[::-1] + "?"}] for word in WORDS]
FORMATS = {
    "text": ([{"text": f"{word} and more"} for word in WORDS], {}),
    # One row's prompt leaves no room for its completion.
    "completion": ([{"prompt": f"{word}: ", "completion": word[::-1]} for word in WORDS], {}),
    "prompt too": ([{"prompt": f"{w}:", "completion": w[::-1]} for w in WORDS], {"completion_only_loss": False}),
    "messages": ([{"messages": talk} for talk in TALKS], {}),
    "assistant": ([{"messages": [*talk, *talk]} for talk in TALKS], {"assistant_only_loss": True, "max_length": 30}),
    "completion as messages": ([{"prompt": talk[:1], "completion": talk[1:]} for talk in TALKS], {}),
    "tokens": ([{"input_ids": [*range(n, 2 * n)], "labels": [-100, *range(n + 1, 2 * n)]} for n in range(2, 10)], {}),
}
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}a:{% generation %}{{ m['content'] }}{% endgeneration %}"
    "{% else %}u:{{ m['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


class Gradients(TrainerCallback):
    """Those of each optimizer step."""

    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.seen.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))


@pytest.fixture
def train_both(make_model, tokenizer, tmp_path, monkeypatch):
    """Two epochs of both, then an evaluation of all rows at once."""
    monkeypatch.setattr(tokenizer, "chat_template", MARKED)

    def train(rows, make_model=make_model, ours=None, **options):
        options = {
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": len(rows),
            "num_train_epochs": 2,
            "optim": "sgd",
            "learning_rate": 2e-3,
            "max_grad_norm": 1e9,
            "logging_steps": 1,
            "bf16": False,
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "gradient_checkpointing": False,
            "max_length": 12,
        } | options
        dataset = Dataset.from_list(rows)
        results = []
        for config, trainer_class in (
            (trl.SFTConfig(**options), trl.SFTTrainer),
            (SFTConfig(**{**options, "token_budget": 20, **(ours or {})}), SFTTrainer),
        ):
            gradients = Gradients()
            trainer = trainer_class(
                make_model(),
                args=config,
                train_dataset=dataset,
                eval_dataset=dataset,
                processing_class=tokenizer,
                callbacks=[gradients],
            )
            trainer.train()
            logs = [log for log in trainer.state.log_history if "loss" in log]
            results.append((logs, gradients.seen, trainer.evaluate()))
        return results

    return train


def assert_equal(theirs, ours):
    steps = len(theirs[1])
    assert steps > 1 and len(theirs[0]) == len(ours[0]) == len(ours[1]) == steps
    for log, our_log in zip(theirs[0], ours[0], strict=True):
        for name in ("loss", "num_tokens", "grad_norm"):
            assert our_log[name] == pytest.approx(log[name], rel=1e-5), name
    for gradient, our_gradient in zip(theirs[1], ours[1], strict=True):
        assert gradient.norm() > 1e-3
        # float32 against float32: two orders of summation of the same terms.
        assert (our_gradient - gradient).norm() <= 1e-5 * gradient.norm()
    for name in ("eval_loss", "eval_mean_token_accuracy", "eval_entropy"):
        assert ours[2][name] == pytest.approx(theirs[2][name], rel=1e-5), name


@by_turns("form, accumulation", FORMATS, (1, 4))  # in one batch, or in four micro-batches
def test_formats(train_both, form, accumulation):
    rows, options = FORMATS[form]
    assert_equal(*train_both(rows, **options, gradient_accumulation_steps=accumulation))


@pytest.mark.parametrize("accumulation", [thorough(1, id="one_batch"), pytest.param(4, id="four_micro_batches")])
def test_dft(train_both, accumulation):
    rows, _ = FORMATS["completion"]
    assert_equal(*train_both(rows, loss_type="dft", gradient_accumulation_steps=accumulation))


def test_truncation_from_the_start(train_both):
    rows, _ = FORMATS["completion"]
    assert_equal(*train_both(rows, truncation_mode="keep_end", max_length=6))


@pytest.mark.parametrize("coef", [10.0, thorough(None)])
@by_turns("accumulation, padding_free", (1, 4), (False, True))
def test_router_loss(train_both, accumulation, padding_free, coef):
    """A mean over TRL's micro-batches; padded positions are in none."""
    rows, _ = FORMATS["completion"]
    ours = {"padding_free": padding_free, "token_budget": 100, "router_aux_loss_coef": coef}
    results = train_both(rows, build_mixture, ours, router_aux_loss_coef=coef, gradient_accumulation_steps=accumulation)
    assert_equal(*results)
    (logs, _, evaluation), (our_logs, _, our_evaluation) = results
    aux = [log["aux_loss"] for log in logs]
    assert [log["aux_loss"] for log in our_logs] == pytest.approx(aux, rel=1e-5) and min(aux) > 1
    assert our_evaluation["eval_aux_loss"] == pytest.approx(evaluation["eval_aux_loss"], rel=1e-5)
