"""Shared prefixes: run once for all sequences of a micro-batch that begin with them, with the results of whole ones."""

import copy
import itertools
import random

import pytest
import torch
import transformers
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import labelled_models
from rlkernels.trainers import GRPOConfig, GRPOTrainer, Rollout
from rlkernels.trainers.base import trainer as base_trainer
from rlkernels.trainers.batch import probe, scoring
from rlkernels.trainers.batch.batch import IGNORE, Batch, Sequence, num_run, sharing
from rlkernels.trainers.batch.packing import fill_by_length
from rlkernels.trainers.rollouts import experience as experiences
from tiny_model import build_mixture, build_model
from tolerance import assert_as_accurate_as_torch

CPU = torch.device("cpu")


# Layout


def completed(prompt: list[int], *completions: list[int]) -> list[Sequence]:
    """A group: completions of a prompt, which they share but for its last token."""
    labels = [IGNORE] * len(prompt)
    return [Sequence(prompt + each, labels + each, len(prompt) - 1) for each in completions]


def blocks_of(batch: Batch) -> list[tuple[int, int]]:
    starts = (batch.model_inputs[name].diff().tolist() for name in ("cu_seq_lens_q", "cu_seq_lens_k"))
    return list(zip(*starts, strict=True))


def test_branches_follow_their_prefix():
    """In the order of the first of each group; values are in the order of the sequences."""
    first, second = completed([1, 2, 3], [4, 5], [6])
    plain = Sequence([7, 8], [IGNORE, 8])
    batch = Batch.lay_out([first, plain, second], CPU)
    inputs = batch.model_inputs
    assert inputs["input_ids"].tolist() == [[1, 2, 3, 4, 5, 3, 6, 7, 8]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4, 2, 3, 0, 1]]
    assert blocks_of(batch) == [(2, 2), (3, 5), (2, 4), (2, 2)]
    assert (inputs["max_length_q"], inputs["max_length_k"]) == (3, 5)
    assert batch.index.tolist() == [2, 3, 4, 7, 8, 5, 6]
    assert batch.token_ids.tolist() == [4, 5, IGNORE, 8, IGNORE, 6, IGNORE]
    assert batch.shift_labels.tolist() == [[IGNORE, IGNORE, 4, 5, IGNORE, 6, IGNORE, 8, IGNORE]]
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 7]
    assert (batch.num_tokens, batch.num_run, batch.num_scored) == (11, 9, 4)
    assert num_run([first, plain, second]) == 9


def test_a_prefix_of_one_sequence_is_part_of_it():
    (alone,) = completed([1, 2, 3], [4, 5])
    batch = Batch.lay_out([alone, Sequence([7, 8], [IGNORE, 8])], CPU)
    assert batch.model_inputs["input_ids"].tolist() == [[1, 2, 3, 4, 5, 7, 8]]
    assert batch.model_inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1]]
    assert blocks_of(batch) == [(5, 5), (2, 2)] and batch.index.tolist() == [2, 3, 4, 5, 6]
    assert batch.token_ids.tolist() == [4, 5, IGNORE, 8, IGNORE]


def test_prefixes_of_equal_length_are_apart():
    one, other = completed([1, 2, 3], [4], [5]), completed([1, 9, 3], [4], [5])
    batch = Batch.lay_out([one[0], other[0], one[1], other[1]], CPU)
    assert batch.model_inputs["input_ids"].tolist() == [[1, 2, 3, 4, 3, 5, 1, 9, 3, 4, 3, 5]]
    assert batch.index.tolist() == [2, 3, 8, 9, 4, 5, 10, 11]


def test_padded_rows_hold_their_prefix():
    first, second = completed([1, 2, 3], [4, 0], [6])
    batch = Batch.lay_out([first, second, Sequence([7, 8], [IGNORE, 8])], CPU, padding_free=False)
    assert batch.model_inputs["input_ids"].tolist() == [[1, 2, 3, 4, 0], [1, 2, 3, 6, 0], [7, 8, 0, 0, 0]]
    assert batch.model_inputs["attention_mask"].sum(1).tolist() == [5, 4, 2]
    assert batch.index.tolist() == [2, 3, 4, 7, 8, 10, 11]
    assert batch.shift_labels[1].tolist() == [IGNORE, IGNORE, 6, IGNORE, IGNORE]
    assert (batch.num_tokens, batch.num_run) == (11, 15)


@pytest.mark.parametrize(
    ("rows", "labels", "prefix"),
    [
        ([[1, 2, 3, 4], [1, 2, 5]], [[IGNORE, IGNORE, 3, 4], [IGNORE, IGNORE, 5]], 1),
        # The token before the first one in the loss predicts it.
        ([[1, 2, 3, 4], [1, 2, 3, 5]], [[IGNORE, IGNORE, 3, 4], [IGNORE, IGNORE, IGNORE, 5]], 1),
        ([[1, 2, 3, 4], [1, 2, 3, 4]], [[IGNORE, IGNORE, IGNORE, 4]] * 2, 2),
        # Nothing is in the loss: the last token stays in the branch.
        ([[1, 2, 3], [1, 2, 3]], [[IGNORE] * 3] * 2, 2),
        ([[1, 2, 3], [1, 2]], [[IGNORE] * 3, [IGNORE] * 2], 1),
        ([[1, 2], [3, 2]], [[IGNORE, 2]] * 2, 0),
        ([[1], [1]], [[IGNORE]] * 2, 0),
        ([[1, 2], [1, 2]], [[1, 2]] * 2, 0),
    ],
    ids=["parts", "is predicted", "all but the last", "no loss", "ends", "none in common", "one token", "all in loss"],
)
def test_longest_common_prefix(rows, labels, prefix):
    assert [each.prefix for each in sharing(list(map(Sequence, rows, labels)))] == [prefix] * 2


def test_groups_fill_micro_batches():
    """A prefix counts once for each micro-batch; a group that fits into one stays together."""
    long = completed([1, 2, 3, 4, 5], [6], [6, 7], [6, 7, 8])  # 4 and 2, 3, 4
    short = completed([1, 2, 3], [4], [5, 6])  # 2 and 2, 3
    plain = [Sequence([9] * 4, [IGNORE] * 4), Sequence([9] * 4, [IGNORE] * 4)]
    rows = [*long, plain[0], *short, plain[1]]
    assert fill_by_length(rows, 100) == [[3, 6, 4, 5, 0, 1, 2]]
    assert fill_by_length(rows, 15) == [[3, 6, 4, 5], [0, 1, 2]]
    assert fill_by_length(rows, 13) == [[3, 6], [4, 5], [0, 1, 2]]  # 8, 2 + 2 + 3, 4 + 2 + 3 + 4
    assert fill_by_length(rows, 9) == [[3, 6], [4, 5], [0, 1], [2]]  # 4 + 2 + 3, and 4 + 4
    assert fill_by_length(rows, 1) == [[3], [6], [4], [5], [0], [1], [2]]
    assert fill_by_length(rows, 13, rows=[6, 2, 0, 4]) == [[6, 4], [0, 2]]
    assert fill_by_length([], 9) == [] and fill_by_length(rows, 9, rows=[]) == []


def random_rows(drawn: random.Random) -> list[Sequence]:
    """Groups and plain sequences in random order; some prefixes are equally long, some begin others."""
    prompts = [[drawn.randrange(1, 3) for _ in range(drawn.randrange(1, 6))] for _ in range(3)]
    rows = [
        row
        for prompt in prompts
        for row in completed(prompt, *([drawn.randrange(1, 9)] * drawn.randrange(1, 4) for _ in range(3)))
    ]
    rows += [Sequence([drawn.randrange(1, 9)] * length, [IGNORE] * length) for length in (1, 4)]
    return drawn.sample(rows, drawn.randrange(1, len(rows) + 1))


@pytest.mark.parametrize("seed", range(20))
def test_branches_see_their_prefix_and_themselves(seed):
    drawn = random.Random(seed)
    rows = random_rows(drawn)
    budget = drawn.randrange(1, 40)
    chunks = fill_by_length(rows, budget)
    assert sorted(itertools.chain.from_iterable(chunks)) == list(range(len(rows)))
    for chunk in chunks:
        sequences = [rows[row] for row in chunk]
        batch = Batch.lay_out(sequences, CPU)
        assert batch.num_run == num_run(sequences) and (batch.num_run <= budget or len(chunk) == 1)
        branches = [row.input_ids[row.prefix :] for row in sequences]
        assert batch.packed(batch.model_inputs["input_ids"]).tolist() == list(itertools.chain.from_iterable(branches))
        positions = batch.split(batch.packed(batch.model_inputs["position_ids"]))
        assert [each.tolist() for each in positions] == [list(range(row.prefix, len(row))) for row in sequences]
        assert batch.packed(batch.shift_labels).equal(batch.token_ids) and batch.num_scored == int(batch.mask.sum())
        # What each block reads, by the rule of trainers/batch/attention.py.
        ids, start, prefix, keys_of = batch.model_inputs["input_ids"][0].tolist(), 0, [], {}
        for queries, keys in blocks_of(batch):
            own = ids[start : start + queries]
            prefix = own if keys == queries else prefix
            assert keys in (queries, queries + len(prefix))
            keys_of |= {start + place: (own if keys == queries else prefix + own) for place in range(queries)}
            start += queries
        places = batch.split(torch.arange(batch.num_run) if batch.index is None else batch.index)
        for row, own in zip(sequences, places, strict=True):
            assert own.diff().eq(1).all() and keys_of[int(own[0])] == keys_of[int(own[-1])] == row.input_ids


# Models


# The longest prefix has 8 tokens. A window of 4 is shorter; one of 11 ends between it and the end of its branches.
FAMILIES = {
    "Llama": ("Llama", {}),
    "Qwen3": ("Qwen3", {"tie_word_embeddings": True}),
    "Gemma3, window 4": ("Gemma3", {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}),
    "Mistral, window 4": ("Mistral", {"sliding_window": 4}),
    "Mistral, window 11": ("Mistral", {"sliding_window": 11}),
    "Phi": ("Phi", {}),
    "Phi3": ("Phi3", {}),
    "GPT2": ("GPT2", {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}),
    "Olmo2": ("Olmo2", {}),
    "Granite": ("Granite", {"logits_scaling": 3.0}),
}


def build(name: str, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    family, options = FAMILIES[name]
    config = getattr(transformers, f"{'Gemma3Text' if family == 'Gemma3' else family}Config")
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM" if family != "GPT2" else "GPT2LMHeadModel")(
        config(**labelled_models.SIZES | options)
    )
    return model.to(dtype).train()


def prepared(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    assert probe.prepare_packing(model, CPU) and probe.prepare_sharing(model, CPU)
    return model


def rows_of_all_kinds() -> list[Sequence]:
    """Groups of four, two and one, one with a prompt of one token; completions of one token and of several; pairs with
    nothing and with everything in common; and a sequence without a prefix."""
    drawn = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [drawn.randrange(3, labelled_models.VOCAB) for _ in range(count)]

    rows = [
        *completed(tokens(9), *map(tokens, (6, 6, 3, 1))),
        *completed(tokens(9), tokens(4), tokens(4)),
        *completed(tokens(1), tokens(3), tokens(5)),
        *completed(tokens(5), tokens(5)),
    ]
    same, other = tokens(8), tokens(7)
    rows += sharing([Sequence(same, [IGNORE] * 5 + same[5:])] * 2)
    rows += sharing([Sequence(each, [IGNORE] * 3 + each[3:]) for each in (other, tokens(6))])
    return [*rows, Sequence(other, [IGNORE, *other[1:]])]


ROWS = rows_of_all_kinds()


def whole(rows: list[Sequence]) -> list[Sequence]:
    return [Sequence(row.input_ids, row.labels) for row in rows]


def branches(values: torch.Tensor, rows: list[Sequence]) -> torch.Tensor:
    """The branches' part of values per token of whole sequences."""
    parts = values.split([len(row) for row in rows])
    return torch.cat([part[row.prefix :] for part, row in zip(parts, rows, strict=True)])


class InFloat64(TorchFunctionMode):
    """Models compute norms and softmax in float32, whatever the dtype of their weights: here in float64."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        function = torch.Tensor.double if function is torch.Tensor.float else function
        args = [torch.float64 if each is torch.float32 else each for each in args]
        kwargs = {key: torch.float64 if each is torch.float32 else each for key, each in (kwargs or {}).items()}
        return function(*args, **kwargs)


def alone_in_float64(model: transformers.PreTrainedModel) -> torch.Tensor:
    """Each row by itself, in transformers' own attention and by its logits."""
    parts = []
    for row in ROWS:
        logits = model(input_ids=torch.tensor([row.input_ids])).logits[0, :-1].log_softmax(-1)
        labels = torch.tensor(row.labels[1:])
        values = logits.gather(1, labels.clamp(min=0)[:, None])[:, 0] * (labels != IGNORE)
        parts.append(torch.cat([values, values.new_zeros(1)]))
    return branches(torch.cat(parts), ROWS)


def backward(model: transformers.PreTrainedModel, logprobs: torch.Tensor) -> torch.Tensor:
    """The gradient of a weighted sum."""
    model.zero_grad()
    (logprobs * torch.linspace(-1, 2, len(logprobs), dtype=logprobs.dtype)).sum().backward()
    return torch.cat([each.grad.flatten() for each in model.parameters() if each.grad is not None])


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("fused", [True, False], ids=["no logits", "logits"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointing"])
def test_as_accurate_as_whole_sequences(name, dtype, fused, checkpointing):
    """Log-probabilities, and the gradient of a loss of them."""
    model = build(name, dtype)
    exact = copy.deepcopy(model).double()
    with InFloat64():
        oracle = alone_in_float64(exact)
        oracle_gradient = backward(exact, oracle)
    prepared(model)
    if fused:
        assert scoring.needs_no_logits(model)
    if checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    batch = Batch.lay_out(ROWS, CPU)
    assert batch.num_run < batch.num_tokens
    apart = branches(scoring.token_logprobs(model, Batch.lay_out(whole(ROWS), CPU), fused=fused), ROWS)
    apart_gradient = backward(model, apart)
    shared = scoring.token_logprobs(model, batch, fused=fused)
    gradient = backward(model, shared)
    assert_as_accurate_as_torch(shared, oracle, apart)
    assert_as_accurate_as_torch(gradient, oracle_gradient, apart_gradient, what="gradient", gradient=True)


def changed(row: Sequence, place: int) -> Sequence:
    tokens = [*row.input_ids]
    tokens[place] = 3 + (tokens[place] + 1) % (labelled_models.VOCAB - 3)
    return Sequence(tokens, row.labels, row.prefix)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_branch_sees_another(name):
    """What changes in one leaves the bits of all others; what changes in a prefix changes its branches alone."""
    model = prepared(build(name))

    def scores(rows: list[Sequence]) -> list[torch.Tensor]:
        batch = Batch.lay_out(rows, CPU)
        with torch.no_grad():
            return batch.split(scoring.token_logprobs(model, batch, fused=False))

    before = scores(ROWS)
    for place, row in enumerate(ROWS):
        for where in {row.prefix, len(row) - 2, len(row) - 1} - {row.prefix - 1}:
            after = scores([changed(each, where) if index == place else each for index, each in enumerate(ROWS)])
            if where <= len(row) - 2:
                assert not after[place].equal(before[place])
            assert all(one.equal(other) for i, (one, other) in enumerate(zip(after, before, strict=True)) if i != place)
    after = scores([changed(row, row.prefix - 1) if index < 4 else row for index, row in enumerate(ROWS)])
    for index, (one, other) in enumerate(zip(after, before, strict=True)):
        assert one.equal(other) == (index >= 4)


def test_products_fall_as_tokens(make_model):
    """Those of the layers, exactly; those of the LM head stay."""
    model = prepared(make_model())
    assert scoring.needs_no_logits(model)
    weights = sum(module.weight.numel() for module in model.model.modules() if isinstance(module, torch.nn.Linear))
    rows = [row for prompt in (6, 9) for row in completed([*range(1, prompt)], *[[3, 4, 5 + g] for g in range(4)])]
    heads = []
    for sequences in (rows, whole(rows)):
        batch = Batch.lay_out(sequences, CPU)
        with FlopCounterMode(display=False) as counter:
            scoring.token_logprobs(model, batch, fused=True).sum().backward()
        counts = counter.get_flop_counts()["Global"]
        products = sum(flops for op, flops in counts.items() if "bmm" not in str(op))
        # Two for a product and a sum, in the forward pass and for the gradients of inputs and weights.
        heads.append(products - 6 * weights * batch.num_run)
    assert heads[0] == heads[1] > 0
    assert num_run(rows) < 0.6 * num_run(whole(rows))


# Trainers


PROMPTS = [{"prompt": "ab" + "c" * (4 + index % 5) + "d", "index": index} for index in range(13)]


@pytest.fixture
def make_trainer(tokenizer, run_options):
    def make(model=None, rollout=None, **options):
        options = {
            **run_options,
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_completion_length": 6,
            "learning_rate": 0.05,
            "max_steps": 3,
            "optim": "sgd",  # which does not magnify rounding where a gradient is near 0
            "token_budget": 32,
        } | options
        model = build_model() if model is None else model
        config = GRPOConfig(**options)
        return GRPOTrainer(model, some_are_better, config, PROMPTS, processing_class=tokenizer, rollout=rollout)

    return make


def some_are_better(completion_ids, index, **columns):
    """Nothing is to be learned from one prompt."""
    rows = enumerate(zip(completion_ids, index, strict=True))
    return [1.0 if number == 3 else float(row % 3 + sum(ids) % 5) for row, (ids, number) in rows]


def turns(prompts: list, sampling) -> list[Rollout]:
    """Completions of two turns of the model, with a tool's tokens in between; some do not end."""
    rollouts = []
    for row, prompt in enumerate(prompts):
        drawn = random.Random(f"{prompt} {sampling.step} {row}")
        rollout = Rollout([1, 2, *[3] * (len(prompt) - 2)], [drawn.randrange(1, 60)], True, [-4.0 - drawn.random()])
        rollout.extend([7, 8, 9][: drawn.randrange(1, 4)], own=False)
        ids = [drawn.randrange(1, 60) for _ in range(drawn.randrange(1, 4))]
        rollout.extend(ids, [-4.0 - drawn.random() for _ in ids], own=True)
        rollout.ended = drawn.random() < 0.7
        rollouts.append(rollout)
    return rollouts


def history(trainer) -> list[dict]:
    timings = ("runtime", "per_second", "total_flos", "train_loss", "tokens_run")
    logs = [{k: v for k, v in log.items() if not k.endswith(timings)} for log in trainer.state.log_history]
    return [log for log in logs if "loss" in log]


def weights(trainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def assert_trained_alike(shared, apart):
    """Every metric but how many tokens were run, and the weights, to rounding."""
    assert shared.shares_prefixes and not apart.shares_prefixes
    for log, other in zip(history(shared), history(apart), strict=True):
        assert log == pytest.approx(other, rel=2e-4, abs=2e-6)
    for log in shared.state.log_history[:-1]:
        assert log["tokens_run"] < log["tokens"]
    assert all(log["tokens_run"] == log["tokens"] for log in apart.state.log_history[:-1])
    torch.testing.assert_close(weights(shared), weights(apart), rtol=1e-4, atol=2e-6)
    assert not torch.equal(weights(shared), torch.cat([each.flatten() for each in build_model().parameters()]))


EVERYTHING = {
    "num_iterations": 2,
    "beta": 0.1,
    "importance_sampling_correction": True,
    "mask_truncated_completions": True,
    # First tokens of a group have one entropy, up to rounding: the quantile must not be among them.
    "top_entropy_quantile": 0.3,
}


@pytest.mark.parametrize(
    ("rollout", "options"),
    [
        pytest.param(None, {}, id="plain"),
        pytest.param(
            None, {"num_iterations": 2, "loss_type": "luspo", "advantage": "rloo", "temperature": 0.7}, id="rloo"
        ),
        pytest.param(turns, EVERYTHING, id="turns"),
        pytest.param(turns, EVERYTHING | {"advantage": "reinforce_plus_plus"}, id="turns, by token"),
        pytest.param(
            None, {"activation_checkpointing": True, "loss_type": "bnpo", "gradient_accumulation_steps": 2}, id="parts"
        ),
    ],
)
def test_grpo_learns_alike(make_trainer, rollout, options):
    trainers = [make_trainer(rollout=rollout, share_prefixes=share, **options) for share in (True, False)]
    micro_batches = []
    for trainer in trainers:
        made = trainer.micro_batches
        trainer.micro_batches = lambda rows, made=made: micro_batches.append(made(rows)) or micro_batches[-1]
        trainer.train()
    assert max(map(len, micro_batches)) > 1
    assert_trained_alike(*trainers)


def test_adapters_learn_alike(make_trainer):
    peft = pytest.importorskip("peft")
    trainers = []
    for share in (True, False):
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        torch.manual_seed(0)
        model = peft.get_peft_model(build_model(), config)
        trainers.append(make_trainer(model, share_prefixes=share, beta=0.1, num_iterations=2))
        trainers[-1].train()
    assert_trained_alike(*trainers)


def test_sampled_completions_are_the_same_bits(make_trainer):
    shared, apart = (make_trainer(share_prefixes=share, max_steps=1) for share in (True, False))
    for trainer in (shared, apart):
        trainer.train()
    assert [row["completion"] for row in shared.completions] == [row["completion"] for row in apart.completions]


def test_a_router_loss_counts_each_token(make_trainer, monkeypatch):
    """Prefixes are shared without one, and the mixture then learns alike."""
    said: list[str] = []
    monkeypatch.setattr(base_trainer.logger, "warning", said.append)
    trainer = make_trainer(build_mixture(), router_aux_loss_coef=0.1)
    assert trainer.padding_free and not trainer.shares_prefixes
    (line,) = [each for each in said if "prefixes" in each]
    assert line.startswith("prefixes are not shared: the router loss counts a token each time") and "\n" not in line
    with pytest.raises(ValueError, match=r"share_prefixes must be auto or false where the router loss .*; got true"):
        make_trainer(build_mixture(), router_aux_loss_coef=0.1, share_prefixes=True)
    shared, apart = (
        make_trainer(build_mixture(), router_aux_loss_coef=0.0, share_prefixes=share) for share in ("auto", "false")
    )
    for trainer in (shared, apart):
        trainer.train()
    assert_trained_alike(shared, apart)


def mamba() -> transformers.MambaForCausalLM:
    sizes = {"vocab_size": build_model().config.vocab_size, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    return transformers.MambaForCausalLM(transformers.MambaConfig(**sizes))


def test_models_that_cannot_share_are_told(make_trainer, caplog):
    trainer = make_trainer(mamba(), rollout=turns)
    assert not trainer.shares_prefixes and not trainer.padding_free
    lines = [each.getMessage() for each in caplog.records if "MambaForCausalLM" in each.getMessage()]
    assert [each for each in lines if "packed" in each] == [
        "MambaForCausalLM does not keep packed sequences apart: its batches are padded."
    ]
    with pytest.raises(ValueError, match="share_prefixes must be auto or false where batches are padded; got true"):
        make_trainer(mamba(), rollout=turns, share_prefixes=True)


def test_models_that_are_packed_but_cannot_share_are_told(make_trainer, monkeypatch, caplog):
    def without_sharing(model, packed, prefix=0, find=probe.probe, **options):
        return None if packed and prefix else find(model, packed, prefix, **options)

    monkeypatch.setattr(probe, "probe", without_sharing)
    trainer = make_trainer()
    assert trainer.padding_free and not trainer.shares_prefixes
    assert [each.getMessage() for each in caplog.records].count(
        "LlamaForCausalLM does not share prefixes: each sequence is run as a whole."
    ) == 1
    with pytest.raises(ValueError, match="share_prefixes must be auto or false where a model cannot share them; got"):
        make_trainer(share_prefixes=True)


# Checkpoints


SAVED = {"num_iterations": 2, "beta": 0.1, "advantage": "reinforce_plus_plus", "top_entropy_quantile": 0.5}
SAVED |= {"importance_sampling_correction": True, "max_steps": 4, "save_strategy": "steps", "save_steps": 3}


@pytest.fixture
def resume(make_trainer, tmp_path, monkeypatch):
    """Goes on from step 3, amid an experience, of a run with `saved`; `edit` changes the state of its checkpoint."""

    def resumed(saved: bool, share: bool, edit=None):
        monkeypatch.undo()
        whole = make_trainer(output_dir=str(tmp_path / "whole"), share_prefixes=saved, **SAVED)
        whole.train()
        checkpoint = tmp_path / "whole" / "checkpoint-3"
        warnings: list[str] = []
        monkeypatch.setattr(experiences.logger, "warning", warnings.append)
        trainer = make_trainer(output_dir=str(tmp_path / "resumed"), share_prefixes=share, **SAVED)
        if edit is not None:
            load = trainer.collector.buffer.load_state_dict
            trainer.collector.buffer.load_state_dict = lambda state: load(edit(state))
        trainer.train(resume_from_checkpoint=str(checkpoint))
        return whole, trainer, [each for each in warnings if "completed anew" in each]

    return resumed


def test_resumes_exactly(resume):
    whole, resumed, warnings = resume(saved=True, share=True)
    assert not warnings and history(resumed) == history(whole)
    assert torch.equal(weights(resumed), weights(whole))


@pytest.mark.parametrize("share", [True, False])
def test_values_of_branches_do_not_serve_whole_sequences(resume, share):
    _, resumed, (warning,) = resume(saved=not share, share=share)
    assert "share_prefixes" in warning and "\n" not in warning
    assert resumed.shares_prefixes == share and resumed.state.global_step == 4


def test_an_experience_of_an_earlier_version_is_of_whole_sequences(resume):
    def older(state):
        rollouts = dict(state["rollouts"])
        sequences = rollouts.pop("sequences")
        assert [each["prefix"] for each in sequences] == [0] * 8
        rollouts |= {name: [each[name] for each in sequences] for name in ("input_ids", "labels")}
        return state | {"rollouts": rollouts}

    whole, resumed, warnings = resume(saved=False, share=False, edit=older)
    assert not warnings and torch.equal(weights(resumed), weights(whole))
