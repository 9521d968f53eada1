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
from rlkernels.trainers.batch import probe, scoring
from rlkernels.trainers.batch.batch import IGNORE, Batch, Sequence, num_run, sharing
from rlkernels.trainers.batch.packing import fill_by_length
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
