"""Loss and gradient of an optimizer step against TRL's DPOTrainer, given the same weights and pairs."""

import datasets
import pytest
import torch

trl = pytest.importorskip("trl")

from cases import by_turns  # noqa: E402
from rlkernels.trainers import DPOConfig, DPOTrainer  # noqa: E402
from tiny_model import build_mixture  # noqa: E402

# Lengths differ: those of prompts and of completions, and which of a pair is longer. One token is end and padding.
PAIRS = [
    ("ab", "cdefgh", "ij"),
    ("klmno", "p", "qrstuvw"),
    ("x", "yzAB", "CDEFG"),
    ("HIJKLMN", "OPQ<eos>", "RST"),
    ("U", "VW", "X"),
    ("YZ01", "234567", "89ab"),
    ("cd", "e", "fghijklmn"),
    ("op", "qr", "st"),
]
COLUMNS = ("prompt", "chosen", "rejected")
LOSSES = ["sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"]
LOSSES += ["apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"]
OF_DIFFERENCE = ["sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"]


@pytest.fixture
def train_both(make_model, tokenizer, tmp_path, monkeypatch):
    """One optimizer step's loss, gradient and metrics of both trainers, of a model that has left its reference."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def run(ours=None, make_model=make_model, adapt=None, **options) -> list[tuple]:
        make_model().save_pretrained(tmp_path / "model")
        accumulation = options.setdefault("gradient_accumulation_steps", 1)
        options = {
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": len(PAIRS) // accumulation,
            "beta": 0.3,
            "label_smoothing": 1e-3 if options.get("loss_type") == ["exo_pair"] else 0.0,
            "max_length": 9,
            "bf16": False,
            "use_cpu": True,
            "report_to": "none",
            "gradient_checkpointing": False,
        } | options
        dataset = datasets.Dataset.from_list([dict(zip(COLUMNS, pair, strict=True)) for pair in PAIRS])
        results = []
        for module, config, extra in ((trl.DPOTrainer, trl.DPOConfig, {}), (DPOTrainer, DPOConfig, ours or {})):
            trainer = module(
                str(tmp_path / "model") if adapt is None else adapt(make_model()),
                args=config(**(options | extra)),
                train_dataset=dataset,
                processing_class=tokenizer,
            )
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for parameter in filter(lambda parameter: parameter.requires_grad, trainer.model.parameters()):
                    parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
            rows = [trainer.train_dataset[index] for index in range(len(PAIRS))]
            if module is DPOTrainer:
                loss = trainer.training_step(trainer.model, rows)
                metrics = trainer.metrics.flush(trainer.accelerator)
            else:
                trainer.current_gradient_accumulation_steps = accumulation
                size = len(PAIRS) // accumulation
                micro = [trainer.data_collator(rows[start : start + size]) for start in range(0, len(PAIRS), size)]
                loss = sum(trainer.training_step(trainer.model, batch, None) for batch in micro)
                metrics = {name: sum(values) / len(values) for name, values in trainer._metrics["train"].items()}
            gradients = [parameter.grad for parameter in trainer.model.parameters() if parameter.requires_grad]
            gradient = torch.cat([gradient.flatten() for gradient in gradients])
            results.append((loss, gradient, metrics))
        return results

    return run


def assert_equal(theirs: tuple, ours: tuple, with_reference: bool = True) -> None:
    loss, gradient, metrics = theirs
    our_loss, our_gradient, our_metrics = ours
    assert gradient.norm() > 1e-3
    # float32 against float32: two orders of summation of the same terms.
    torch.testing.assert_close(our_loss, loss, rtol=1e-5, atol=1e-6)
    assert (our_gradient - gradient).norm() <= 1e-5 * gradient.norm()
    assert len(our_metrics) == 9
    assert our_metrics.pop("tokens") > 0 and our_metrics.pop("tokens_run") > 0
    del our_metrics["entropy"]  # of the tokens of a step; TRL's is the mean of that of each micro-batch
    if with_reference:
        assert our_metrics == pytest.approx({name: metrics[name] for name in our_metrics}, rel=1e-4, abs=1e-5)


@by_turns("loss, accumulation", LOSSES, (1, 4))  # in one batch, or in four micro-batches
def test_losses(train_both, loss, accumulation):
    results = train_both(loss_type=[loss], gradient_accumulation_steps=accumulation)
    assert_equal(*results, with_reference=loss != "sft")


@pytest.mark.parametrize("accumulation", [1, 4], ids=["one_batch", "four_micro_batches"])
@pytest.mark.parametrize("losses", [["sigmoid", "bco_pair", "sft"], ["hinge", "aot"]], ids="+".join)
def test_mixtures(train_both, losses, accumulation):
    weights = [0.8, 0.2, 1.5][: len(losses)]
    assert_equal(*train_both(loss_type=losses, loss_weights=weights, gradient_accumulation_steps=accumulation))


@by_turns("loss, divergence", OF_DIFFERENCE, ["forward_kl", "js_divergence", "alpha_divergence"])
def test_divergences(train_both, loss, divergence):
    """The log-ratios of these pairs stay below forward_kl's and alpha_divergence's greatest exponents."""
    results = train_both(loss_type=[loss], f_divergence_type=divergence, f_alpha_divergence_coef=0.7)
    assert_equal(*results, with_reference=loss != "sft")


@pytest.mark.parametrize("loss", ["exo_pair", "robust", "aot", "aot_unpaired"])
def test_label_smoothing(train_both, loss):
    assert_equal(*train_both(loss_type=[loss], label_smoothing=0.2))


def test_adapters_that_a_model_was_given(train_both):
    """As they are at the start they are the reference."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)

    def adapt(model):
        torch.manual_seed(1)
        return peft.get_peft_model(model, config)

    assert_equal(*train_both(adapt=adapt))


@pytest.mark.parametrize("ld_alpha", [0.0, 0.4])
def test_ld_alpha(train_both, ld_alpha):
    assert_equal(*train_both(ld_alpha=ld_alpha, loss_type=["sigmoid", "ipo"], precompute_ref_log_probs=True))
    assert_equal(*train_both(ld_alpha=ld_alpha, gradient_accumulation_steps=4))


def test_weighting(train_both):
    assert_equal(*train_both(use_weighting=True, loss_type=["sigmoid", "nca_pair"], gradient_accumulation_steps=2))


@pytest.mark.parametrize("accumulation", [1, 4], ids=["one_batch", "four_micro_batches"])
def test_precomputed_reference(train_both, accumulation):
    assert_equal(*train_both(precompute_ref_log_probs=True, gradient_accumulation_steps=accumulation))


@pytest.mark.parametrize("padding_free", [True, False], ids=["packed", "padded"])
def test_activation_checkpointing(train_both, padding_free):
    ours = {"padding_free": padding_free, "activation_checkpointing": True, "gradient_checkpointing": None}
    assert_equal(*train_both(ours))


@pytest.mark.parametrize("budget", [1, 40], ids=["a_pair_at_a_time", "some_pairs_at_a_time"])
def test_token_budget(train_both, budget):
    assert_equal(*train_both({"token_budget": budget}, gradient_accumulation_steps=2))


@by_turns("accumulation, padding_free", (1, 4), (True, False))
def test_router_loss(train_both, accumulation, padding_free):
    theirs, (*ours, metrics) = train_both(
        {"padding_free": padding_free},
        build_mixture,
        loss_type=["sigmoid"],
        router_aux_loss_coef=10.0,
        gradient_accumulation_steps=accumulation,
    )
    assert metrics.pop("aux_loss") == pytest.approx(theirs[2]["aux_loss"], rel=1e-5)
    assert_equal(theirs, (*ours, metrics))
