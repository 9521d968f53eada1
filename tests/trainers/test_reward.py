"""The reward trainer: its loss and gradients are TRL's, its scores those of each sequence alone."""

import copy
import random

import datasets
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from cases import thorough
from rlkernels.trainers import RewardConfig, RewardTrainer
from rlkernels.trainers.batch import scoring
from rlkernels.trainers.data import sequences_of

ROWS = 8
TIMINGS = ("runtime", "per_second", "preparation_time")


def texts(seed: int = 0) -> list[dict]:
    """Pairs of uneven length."""
    rng = random.Random(seed)

    def text() -> str:
        return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randrange(1, 12)))

    return [{"prompt": text(), "chosen": text(), "rejected": text()} for _ in range(ROWS)]


def messages() -> list[dict]:
    def turn(role: str, text: str) -> list[dict]:
        return [{"role": role, "content": text}]

    return [
        {
            "prompt": turn("user", row["prompt"]),
            "chosen": turn("assistant", row["chosen"]),
            "rejected": turn("assistant", row["rejected"]),
        }
        for row in texts()
    ]


def without_prompt(rows: list[dict]) -> list[dict]:
    return [{name: row["prompt"] + row[name] for name in ("chosen", "rejected")} for row in rows]


def with_margin(rows: list[dict]) -> list[dict]:
    return [{**row, "margin": 0.4 * index - 1} for index, row in enumerate(rows)]


FORMATS = {
    "text": texts(),
    "text_without_prompt": without_prompt(texts()),
    "messages": messages(),
    "messages_without_prompt": without_prompt(messages()),
}


@pytest.fixture
def make_trainer(make_model, tokenizer, tmp_path):
    """A trainer of the tiny model, a causal one from a folder unless another is given."""

    def make(
        rows=None, *, model=None, pad_token=None, classes=(RewardTrainer, RewardConfig), peft_config=None, **options
    ):
        if model is None:
            model = str(tmp_path / "model")
            make_model().save_pretrained(model)
        rows = texts() if rows is None else rows
        processing_class = copy.deepcopy(tokenizer)
        processing_class.pad_token = pad_token or tokenizer.pad_token
        trainer, config = classes
        options = {
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": ROWS,
            "gradient_checkpointing": False,
            "bf16": False,
            "use_cpu": True,
            "report_to": "none",
        } | options
        return trainer(
            model,
            args=config(**options),
            train_dataset=datasets.Dataset.from_list(rows),
            eval_dataset=datasets.Dataset.from_list(rows),
            processing_class=processing_class,
            peft_config=peft_config,
        )

    return make


def step(trainer: RewardTrainer) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of one optimizer step, and the gradient of all parameters."""
    trainer.model.zero_grad()
    loss = trainer.training_step(trainer.model, [trainer.train_dataset[index] for index in range(ROWS)])
    gradients = [parameter.grad for parameter in trainer.model.parameters() if parameter.requires_grad]
    return loss, torch.cat([gradient.flatten() for gradient in gradients])


def assert_equal(one: tuple, other: tuple) -> None:
    # float32 against float32: two orders of summation of the same terms.
    torch.testing.assert_close(one[0], other[0], rtol=1e-5, atol=1e-6)
    assert other[1].norm() > 1e-3
    assert (one[1] - other[1]).norm() <= 1e-5 * other[1].norm()


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize(
    ("rows", "options"),
    [
        *((rows, {}) for rows in FORMATS.values()),
        (with_margin(texts()), {}),
        (with_margin(messages()), {"center_rewards_coefficient": 0.1}),
    ],
    ids=[*FORMATS, "margin", "centred_with_margin"],
)
def test_loss_and_gradient_are_those_of_trl(make_trainer, rows, options, accumulation):
    trl = pytest.importorskip("trl")
    # TRL reads the score before the trailing tokens that look like padding, even if they are not.
    options |= {
        "pad_token": "?",
        "gradient_accumulation_steps": accumulation,
        "per_device_train_batch_size": ROWS // accumulation,
    }
    theirs = make_trainer(rows, classes=(trl.RewardTrainer, trl.RewardConfig), **options)
    ours = make_trainer(rows, **options)
    for one, other in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)  # the new head's, too
    theirs.current_gradient_accumulation_steps = accumulation
    size = ROWS // accumulation
    total = torch.zeros(())
    for start in range(0, ROWS, size):
        batch = theirs.data_collator([theirs.train_dataset[index] for index in range(start, start + size)])
        total += theirs.training_step(theirs.model, batch)
    gradient = torch.cat([parameter.grad.flatten() for parameter in theirs.model.parameters()])
    assert_equal(step(ours), (total, gradient))

    mean = {name: sum(values) / len(values) for name, values in theirs._metrics["train"].items()}
    logged = ours.metrics.flush(ours.accelerator)
    for name in ("accuracy", "margin", "mean_reward"):
        assert logged[name] == pytest.approx(mean[name], rel=1e-5, abs=1e-6)
    if accumulation == 1:  # of one micro-batch; ours is all that token_budget holds
        assert logged["min_reward"] == pytest.approx(mean["min_reward"], rel=1e-5)
        assert logged["max_reward"] == pytest.approx(mean["max_reward"], rel=1e-5)


@pytest.mark.parametrize("options", [{"padding_free": False}, {"token_budget": 60}, {"token_budget": 1}])
def test_laying_out_and_splitting_change_nothing(make_trainer, options):
    rows = with_margin(texts())
    whole, other = make_trainer(rows), make_trainer(rows, **options)
    inputs = [whole.train_dataset[index] for index in range(ROWS)]
    assert whole.padding_free and len(whole.micro_batches(inputs)) == 1
    if "token_budget" in options:
        assert len(other.micro_batches(inputs)) > 2
    assert_equal(step(other), step(whole))


def test_scores_are_those_of_each_sequence_alone(make_trainer, tokenizer):
    """Also where the last token looks like padding."""
    trainer = make_trainer(without_prompt(messages()), per_device_eval_batch_size=3)
    differences = []
    for row in without_prompt(messages()):
        scores = []
        for name in ("chosen", "rejected"):
            ids = torch.tensor([tokenizer.apply_chat_template(row[name], return_dict=True)["input_ids"]])
            scores.append(trainer.model.score(trainer.model.model(ids).last_hidden_state)[0, -1, 0])
        differences.append(scores[0] - scores[1])
    differences = torch.stack(differences)
    metrics = trainer.evaluate()
    assert metrics["eval_margin"] == pytest.approx(differences.mean().item(), rel=1e-4)
    assert metrics["eval_accuracy"] == (differences > 0).float().mean().item()
    assert 0 < metrics["eval_accuracy"] < 1
    assert metrics["eval_loss"] == pytest.approx(torch.nn.functional.softplus(-differences).mean().item(), rel=1e-4)

    trainer = make_trainer(texts())  # text ends with the end-of-sequence token, the padding token
    ids = trainer.train_dataset[0]["sequences"][0]["input_ids"]
    assert ids[-1] == tokenizer.pad_token_id
    batch = trainer.micro_batches([trainer.train_dataset[0]])[0]
    score = batch.last(scoring.token_scores(trainer.model, batch))[0]
    alone = trainer.model.score(trainer.model.model(torch.tensor([ids])).last_hidden_state)[0, -1, 0]
    torch.testing.assert_close(score, alone)


# Shared prefixes


def weights(trainer: RewardTrainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def turns(text: str) -> list[dict]:
    """The tokens are u:, then those of the text."""
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize(
    "options",
    [
        {"center_rewards_coefficient": 0.1},
        {"token_budget": 60},
        thorough({"token_budget": 1}),
        thorough({"activation_checkpointing": True, "gradient_checkpointing": None}),
    ],
    ids=lambda options: "_".join(options),
)
def test_sharing_prefixes_changes_rounding_alone(make_trainer, options):
    """Loss, gradient and what is logged, in evaluation too, and the weights after two steps."""
    options |= {"max_steps": 2, "optim": "sgd", "learning_rate": 0.1, "save_strategy": "no", "disable_tqdm": True}
    steps, logs, moves = [], [], []
    for share in ("true", "false"):
        trainer = make_trainer(with_margin(messages()), share_prefixes=share, **options)
        assert trainer.shares_prefixes == (share == "true")
        steps.append(step(trainer))
        evaluated = {name: value for name, value in trainer.evaluate().items() if not name.endswith(TIMINGS)}
        logs.append(trainer.metrics.flush(trainer.accelerator) | evaluated)
        start = weights(trainer)
        trainer.model.zero_grad()
        trainer.train()
        moves.append(weights(trainer) - start)
    assert_equal(*steps)
    assert (moves[0] - moves[1]).norm() <= 1e-4 * moves[1].norm() and moves[1].norm() > 0
    shared, plain = logs
    assert shared.pop("tokens_run") < plain.pop("tokens_run") == plain["tokens"]
    assert shared == pytest.approx(plain, rel=1e-4, abs=1e-5) and "eval_margin" in plain


@pytest.mark.parametrize(
    ("pairs", "prefixes", "run"),
    [
        ([(turns("abc"), turns("abde"))], [4], 4 + 1 + 2),
        ([(turns("abc"), turns("abcd"))], [4], 4 + 1 + 2),  # the shorter one's last token is its own
        ([(turns("abc"), turns("abc"))], [4], 4 + 1 + 1),
        ([(turns("abc"), turns("abd")), (turns("abef"), turns("abg"))], [4, 4], 4 + 2 + 3),
        ([("abc", "xabc"), ("", "a")], [0, 0], 4 + 5 + 1 + 2),  # each with its end
    ],
    ids=["some", "the_shorter_one", "all", "several_pairs", "none"],
)
def test_pairs_share_what_they_begin_with(make_trainer, pairs, prefixes, run):
    rows = [{"chosen": chosen, "rejected": rejected} for chosen, rejected in pairs]
    trainer = make_trainer(rows, share_prefixes="true")
    rows = list(trainer.train_dataset)
    assert [[each.prefix for each in sequences_of(row, True)] for row in rows] == [[each] * 2 for each in prefixes]
    (batch,) = trainer.micro_batches(rows)
    assert (batch.num_run, batch.num_tokens) == (run, sum(row["num_tokens"] for row in rows))
    scores = batch.last(scoring.token_scores(trainer.model, batch)).view(2, -1).T
    for row, pair in zip(rows, scores, strict=True):
        for sequence, score in zip(row["sequences"], pair, strict=True):
            hidden = trainer.model.model(torch.tensor([sequence["input_ids"]])).last_hidden_state
            torch.testing.assert_close(score, trainer.model.score(hidden)[0, -1, 0], rtol=1e-5, atol=1e-5)


def test_no_sequence_sees_another(make_trainer):
    """One is changed: the others keep their bits."""
    found, trainer = [], make_trainer(share_prefixes="true")
    for chosen in ("xyz", "uvw"):
        rows = [{"prompt": "abcd", "chosen": chosen, "rejected": "efg"}, {"chosen": "abcdh", "rejected": "abcdij"}]
        (batch,) = trainer.micro_batches(list(trainer.prepared("train_dataset", rows)))
        assert batch.num_run < batch.num_tokens
        found.append(batch.last(scoring.token_scores(trainer.model, batch)).tolist())
    assert [one == other for one, other in zip(*found, strict=True)] == [False, True, True, True]


@pytest.mark.parametrize(("share", "runs"), [("true", [48, 48]), ("false", [44] * 4)])
def test_what_a_pair_begins_with_counts_once_in_the_budget(make_trainer, share, runs):
    rows = [{"chosen": letter * 20 + "x", "rejected": letter * 20 + "y"} for letter in "abcd"]
    trainer = make_trainer(rows, share_prefixes=share, token_budget=50)
    assert [batch.num_run for batch in trainer.micro_batches(list(trainer.train_dataset))] == runs


def test_it_learns(make_trainer):
    trainer = make_trainer(max_steps=20, learning_rate=1e-2, logging_steps=5)
    before = trainer.evaluate()
    trainer.train()
    assert trainer.state.num_input_tokens_seen == 20 * sum(trainer.train_dataset["num_tokens"])
    after = trainer.evaluate()
    assert before["eval_accuracy"] < 0.9 and after["eval_accuracy"] == 1.0
    assert after["eval_loss"] < 0.1 * before["eval_loss"]


def test_new_head_is_random_by_the_seed(make_trainer):
    heads = [make_trainer(seed=seed).model.score.weight for seed in (0, 0, 1)]
    assert (heads[0] == heads[1]).all()
    assert (heads[0] != heads[2]).any()


def test_saved_model_is_a_classifier(make_trainer, tmp_path):
    trainer = make_trainer()
    trainer.save_model(str(tmp_path / "saved"))
    loaded, report = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not report["missing_keys"] and loaded.config.num_labels == 1
    assert (loaded.score.weight == trainer.model.score.weight).all()
    again = make_trainer(model=str(tmp_path / "saved"), seed=1)
    assert (again.model.score.weight == trainer.model.score.weight).all()
    assert_equal(step(again), step(trainer))


def test_adapters_and_head_are_trained_and_saved(make_trainer, tmp_path):
    peft = pytest.importorskip("peft")
    trainer = make_trainer(peft_config=peft.LoraConfig(r=2, target_modules=["q_proj"]), max_steps=3, learning_rate=1e-2)
    start = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, parameter in trainer.model.named_parameters() if (parameter != start[name]).any()}
    assert moved == {name for name in start if "lora_" in name or "score.modules_to_save" in name}
    trainer.save_model(str(tmp_path / "saved"))
    assert not (tmp_path / "saved" / "model.safetensors").exists()
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", num_labels=1)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "saved")
    ids = torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(loaded.eval()(ids).logits, trainer.model.eval()(ids).logits)


def test_pairs_that_are_too_long_are_left_out(make_trainer):
    rows = [{"chosen": "abc", "rejected": "a"}, {"chosen": "a", "rejected": "abcd"}, {"chosen": "a", "rejected": "b"}]
    trainer = make_trainer(rows, max_length=4)  # with the end-of-sequence token
    assert trainer.train_dataset["_row_id"] == [0, 2]


@pytest.mark.parametrize("disabled", [True, False])
def test_dropout(make_model, make_trainer, disabled):
    config = make_model().config
    config.attention_dropout, config.num_labels = 0.5, 1
    model = AutoModelForSequenceClassification.from_config(config)
    trainer = make_trainer(model=model, disable_dropout=disabled)
    assert (step(trainer)[0] == step(trainer)[0]) == disabled


def test_model_without_a_padding_token_is_padded_too(make_model, make_trainer):
    config = make_model().config
    config.pad_token_id, config.num_labels = None, 1
    model = AutoModelForSequenceClassification.from_config(config)
    padded, whole = (make_trainer(model=copy.deepcopy(model), padding_free=free) for free in (False, True))
    assert_equal(step(padded), step(whole))


def test_evaluating_other_rows(make_trainer):
    trainer, other = make_trainer(), make_trainer(texts(seed=1))
    metrics = trainer.evaluate(texts(seed=1))
    assert metrics["eval_margin"] == pytest.approx(other.evaluate()["eval_margin"])
    assert metrics["eval_margin"] != pytest.approx(trainer.evaluate()["eval_margin"])
    with pytest.raises(ValueError, match="eval_dataset has no column 'rejected'"):
        trainer.evaluate([{"chosen": "a"}])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a", "chosen": "b"}], "train_dataset has no column 'rejected'; its columns are prompt, chosen"),
        ([{"chosen": "b", "rejected": [{"role": "user", "content": "a"}]}], "train_dataset, row 0: "),
    ],
)
def test_wrong_rows(make_model, tokenizer, tmp_path, rows, message):
    make_model().save_pretrained(tmp_path / "model")
    args = RewardConfig(output_dir=str(tmp_path / "out"), use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match=message):
        RewardTrainer(str(tmp_path / "model"), args, rows, processing_class=tokenizer)
    assert not (tmp_path / "out").exists()


def test_wrong_models(make_model, make_trainer):
    with pytest.raises(ValueError, match="LlamaForCausalLM has no score head"):
        make_trainer(model=make_model())
    config = make_model().config
    config.num_labels = 3
    with pytest.raises(ValueError, match="num_labels=1; got 3"):
        make_trainer(model=AutoModelForSequenceClassification.from_config(config))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"center_rewards_coefficient": -0.1},
            "center_rewards_coefficient must be a finite number, at least 0; got -0.1",
        ),
        ({"max_length": 0}, "max_length must be at least 1; got 0"),
    ],
)
def test_bad_values(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        RewardConfig(output_dir=str(tmp_path), use_cpu=True, **options)
