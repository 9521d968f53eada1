"""Sequences of one micro-batch laid end to end, without padding, and attention that keeps them apart.

Where a sequence starts and ends is known from its length, never from token ids: the padding token may be the
end-of-sequence token, and either may be sampled.
"""

import contextlib
import itertools
import re
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

logger = transformers.utils.logging.get_logger(__name__)

IGNORE = -100  # the label of a token that is not in the loss

# Scores of so many tokens are stored for the backward pass, which is faster on a CPU than to compute them again.
STORED_SCORES = 512

# Lengths of the sequences that a model is tried on, and how many tokens its windows and chunks then have.
PROBE, NARROW = (11, 7, 7), 2
# What they are called, in modules and configs.
WIDTH = re.compile(
    r"(?!.*(pattern|layers|type|ids|index(es)?$|indices))"
    r".*(window|(attention|attn)_chunk|local_att|compress|budget|(index|block)_topk|topk_blocks|block_size)"
)
# A position that no window reaches back from to the first.
FAR = 2**20


@dataclass
class Sequence:
    """One sequence of tokens. A label is the token itself where it is in the loss, else -100; the first token, which
    nothing predicts, never is."""

    input_ids: list[int]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.input_ids)


def fill(lengths: Iterable[int], budget: int) -> list[list[int]]:
    """Indices of the sequences of each micro-batch: in order, as many as `budget` tokens hold, and at least one."""
    batches: list[list[int]] = []
    room = 0
    for index, length in enumerate(lengths):
        if not batches or length > room:
            batches.append([])
            room = budget
        batches[-1].append(index)
        room -= length
    return batches


def fill_by_length(lengths: list[int], budget: int, rows: Iterable[int] | None = None) -> list[list[int]]:
    """`fill` with these of the sequences, all if None, by length: attention then does neighbours together."""
    order = sorted(range(len(lengths)) if rows is None else rows, key=lengths.__getitem__)
    return [[order[index] for index in batch] for batch in fill([lengths[row] for row in order], budget)]


def lay_out(
    sequences: Rows[Sequence], device: torch.device, *, padding_free: bool = True, pad_token_id: int = 0
) -> dict[str, Any]:
    """One micro-batch of N tokens in S sequences.

    What is per token is packed, [N], and shifted: position p holds what belongs to the token that p predicts, so that
    the last position of each sequence is never scored.

        model_inputs   what the model takes: [1, N] with reset position ids, or [S, T] padded on the right
        shift_labels   the labels, shifted, shaped as the model's input_ids
        index          None, or [N], where the packed tokens stand among the padded ones
        token_ids      [N], the labels, shifted;  mask  [N], where they are not -100
        cu_seqlens     int32 [S + 1], where each sequence starts
        num_scored     how many tokens are in the loss
    """
    lengths = [len(sequence) for sequence in sequences]
    starts = list(itertools.accumulate(lengths, initial=0))
    packed = torch.tensor([token for sequence in sequences for token in sequence.input_ids], dtype=torch.long)
    labels = [token for sequence in sequences for token in (*sequence.labels[1:], IGNORE)]
    token_ids = torch.tensor(labels, dtype=torch.long)
    mask = token_ids != IGNORE
    cu_seqlens = torch.tensor(starts, dtype=torch.int32)
    inputs: dict[str, Any] = {"use_cache": False}
    index = None
    if padding_free:
        inputs |= {
            "input_ids": packed.unsqueeze(0),
            "position_ids": torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0),
            # For flash attention, which would find them itself, but wait for the device to do so.
            "cu_seq_lens_q": cu_seqlens,
            "cu_seq_lens_k": cu_seqlens,
            "max_length_q": max(lengths),
            "max_length_k": max(lengths),
        }
        shift_labels = token_ids.unsqueeze(0)
    else:
        real = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
        inputs |= {
            "input_ids": pad_sequence(packed.split(lengths), batch_first=True, padding_value=pad_token_id),
            "attention_mask": real.long(),
        }
        shift_labels = pad_sequence(token_ids.split(lengths), batch_first=True, padding_value=IGNORE)
        index = real.flatten().nonzero().squeeze(1).to(device)
    return {
        "model_inputs": {name: to(value, device) for name, value in inputs.items()},
        "shift_labels": shift_labels.to(device),
        "index": index,
        "token_ids": token_ids.to(device),
        "mask": mask.to(device),
        "cu_seqlens": cu_seqlens.to(device),
        "num_scored": int(mask.sum()),
    }


def to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def shift(rows: Iterable[Any], device: torch.device) -> Tensor:
    """float32 [N] of one value per token of each sequence, laid out and shifted as in `lay_out`; the first token's
    value is dropped and the last position's is 0."""
    parts = [torch.as_tensor(row, dtype=torch.float32, device=device).roll(-1) for row in rows]
    for part in parts:
        part[-1] = 0.0
    return torch.cat(parts)


def split(values: Tensor, batch: dict[str, Any]) -> list[Tensor]:
    """The parts of [N] that belong to each sequence."""
    return list(values.split(batch["cu_seqlens"].diff().tolist()))


# Attention


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: list[int],
    scaling: float | None,
    dropout: float,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    """Causal attention within each of the sequences laid end to end: [1, heads, N, D] to [1, N, heads, D].

    Neighbours of equal length are computed together. What a mask over N x N would add to that is all wasted: with it,
    a pass over 16 sequences of 102 tokens takes more than twice as long."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    groups = query.shape[1] // key.shape[1]
    outputs, start = [], 0
    for length, run in itertools.groupby(lengths):
        count = len(list(run))
        stop = start + count * length
        # [sequences, heads, length, D]
        q, k, v = (part[0, :, start:stop].unflatten(1, (count, length)).transpose(0, 1) for part in (query, key, value))
        start = stop
        long = length > STORED_SCORES and softcap is None
        causal = None
        if not long or (sliding_window is not None and sliding_window < length):
            causal = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
            if sliding_window is not None:
                causal = causal.triu(1 - sliding_window)
        if long:
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
            out = nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=causal, is_causal=causal is None, dropout_p=dropout, scale=scaling
            )
        else:
            # Query heads of one key are rows of one product.
            scores = (q * scaling).reshape(count, key.shape[1], groups * length, -1) @ k.transpose(2, 3)
            scores = scores.unflatten(2, (groups, length))
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            weights = scores.masked_fill(~causal, -torch.inf).softmax(-1, dtype=torch.float32).to(q.dtype)
            weights = nn.functional.dropout(weights, dropout, module.training)
            out = (weights.flatten(2, 3) @ v).view(count, query.shape[1], length, -1)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).unsqueeze(0)


def by_sequence(other: str) -> str:
    """Registers with transformers an attention function that does packed sequences one after the other, and leaves all
    else (generation, padded batches) to the implementation `other`. Returns its name."""

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        starts = kwargs.get("cu_seq_lens_q")
        if starts is None:
            return ALL_ATTENTION_FUNCTIONS[other](
                module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
            )
        for name in ("s_aux", "position_bias"):
            if kwargs.get(name) is not None:
                raise NotImplementedError(name)
        if not getattr(module, "is_causal", True) or query.shape[2] != key.shape[2]:
            raise NotImplementedError("attention that is not causal self-attention")
        lengths = starts.diff().tolist()
        window, softcap = kwargs.get("sliding_window"), kwargs.get("softcap")
        return attend(module, query, key, value, lengths, scaling, dropout, window, softcap), None

    name = f"rlkernels_by_sequence_{other}"
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[other])
    return name


def prepare_packing(model: Any, device: torch.device) -> bool:
    """Whether the model keeps packed sequences apart, found by running it on some; on a CPU its attention goes sequence
    by sequence from now on, where that gives the same. `device` is that of training."""
    adapters = getattr(model, "peft_config", {}).values()
    if any(getattr(adapter, "alora_invocation_tokens", None) for adapter in adapters):
        logger.warning(f"{type(model).__name__}: aLoRA begins once in each row of tokens: its batches are padded.")
        return False
    model = _base_model(model)
    own = model.config._attn_implementation
    if own.startswith("flash") and model.device != device:
        return True  # it cannot run before FSDP places it; flash attention is told where sequences start
    alone = probe(model, packed=False)
    # A model's own eager attention is not among transformers' functions; sdpa then serves what is not packed.
    if device.type == "cpu" and own in ("sdpa", "eager"):
        with contextlib.suppress(ValueError):  # of a model without such attention
            if has_plain_masks(model, "sdpa", alone):
                model.set_attn_implementation(by_sequence("sdpa"))
                if _same(probe(model, packed=True), alone):
                    return True
        if model.config._attn_implementation != own:
            model.set_attn_implementation(own)
    if _same(probe(model, packed=True), alone):
        return True
    logger.warning(f"{type(model).__name__} does not keep packed sequences apart: its batches are padded.")
    return False


def _base_model(model: Any) -> Any:
    while hasattr(model, "get_base_model"):  # of PEFT
        model = model.get_base_model()
    return model


def warn_of_batch_dependence(model: Any) -> None:
    """Where the model's positions change for all sequences of a batch, packed or padded, once one of them is long."""
    for module in _base_model(model).modules():
        kinds = getattr(module, "rope_type", None)  # one, or one of each type of layer
        for layers, kind in kinds.items() if isinstance(kinds, dict) else [(None, kinds)]:
            if kind in ("dynamic", "longrope"):
                options = getattr(getattr(module, "config", None), "rope_parameters", None) or {}
                options = options if layers is None else options[layers]
                own = getattr(module, "original_max_seq_len", "a certain number of")
                length = options.get("original_max_position_embeddings") or own
                logger.warning_once(
                    f"{type(model).__name__}: its RoPE is '{kind}', which changes for the whole batch where a sequence "
                    f"is longer than {length} tokens: what it says of the others then depends on that."
                )


def has_plain_masks(model: Any, other: str, alone: Tensor | None) -> bool:
    """Whether the attention of each layer is causal in the window that its function is told, whatever the length: what
    `attend` computes. Found by the masks that the model asks for, and uses, when its attention is `other` by another
    name, which must not change what `probe` gives of each sequence alone."""
    asked: set[int | None] = set()
    told: set[int | None] = set()
    made: list[Tensor | None] = []

    def mask(*args: Any, **kwargs: Any) -> Any:
        asked.add(_window_of(kwargs["mask_function"]))
        made.append(ALL_MASK_ATTENTION_FUNCTIONS[other](*args, **kwargs))
        return made[-1]

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Any:
        if not any(_equal(attention_mask, each) for each in made):
            raise NotImplementedError("a mask that the model changed")
        window = kwargs.get("sliding_window")
        told.add(None if window is None or window >= FAR else window)
        return ALL_ATTENTION_FUNCTIONS[other](module, query, key, value, attention_mask, **kwargs)

    name = f"rlkernels_masks_of_{other}"
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)
    model.set_attn_implementation(name)
    return _same(probe(model, packed=False), alone) and told <= asked and len(told) > 0


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and one.equal(other))


def _window_of(mask_function: Any) -> int | None:
    """How many tokens, with itself, a position attends to; None if to all before it."""
    keys = torch.arange(FAR + 1)
    first, last = (mask_function(keys[0], keys[0], keys[query], keys) for query in (-2, -1))
    window = int(last.sum())
    for query, seen in ((FAR - 1, first), (FAR, last)):
        if not seen.equal((keys <= query) & (keys > query - window)):
            raise NotImplementedError("a mask that is neither causal nor sliding")
    return None if window > FAR else window


def probe(model: Any, packed: bool) -> Tensor | None:
    """The last hidden states, [..., N, H], of some sequences laid end to end or each alone, longer than every
    window and chunk; None if the model cannot do that."""
    try:
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0
        lengths = [min(length, limit) if limit > 0 else length for length in PROBE]
        parts = torch.tensor(_plain_tokens(model, sum(lengths)), device=_device(model)).split(lengths)
        # Rows alone, because classifiers without a padding token refuse several.
        inputs: list[dict[str, Any]] = [{"input_ids": part[None]} for part in parts]
        if packed:
            inputs = [lay_out([Sequence(part.tolist(), []) for part in parts], parts[0].device)["model_inputs"]]
        with probing(model):
            return torch.cat([_hidden_states(model, each) for each in inputs], -2)
    except Exception:  # whatever a model raises that cannot do this
        return None


def _same(found: Tensor | None, expected: Tensor | None) -> bool:
    """At each position, but for rounding."""
    if found is None or expected is None:
        return False
    error = (found.float() - expected.float()).norm(dim=-1)
    return bool((error <= (1e-3 if found.dtype == torch.float32 else 0.1) * expected.float().norm(dim=-1)).all())


@torch.no_grad()
def _hidden_states(model: Any, inputs: dict[str, Any]) -> Tensor:
    flash = model.config._attn_implementation.startswith("flash")  # which has no float32
    with torch.autocast(_device(model).type, torch.bfloat16, enabled=flash):
        output = model(**inputs | {"use_cache": False, "output_hidden_states": True})
    hidden = output.hidden_states[-1].flatten(-3, -2)
    return hidden.bfloat16() if flash else hidden


def _device(model: Any) -> torch.device:
    return model.get_input_embeddings().weight.device


def _plain_tokens(model: Any, count: int) -> list[int]:
    """Tokens that mean nothing to the model's config."""
    config = model.config.to_dict() | model.config.get_text_config().to_dict()
    special = {value for name, value in config.items() if "token" in name and isinstance(value, int)}
    plain = [token for token in range(min(len(model.get_input_embeddings().weight), 1000)) if token not in special]
    # Neighbours are not those of another sequence.
    return [plain[(5 + index * index) % len(plain)] for index in range(count)]


@contextlib.contextmanager
def probing(model: Any) -> Iterator[None]:
    """In evaluation mode, with windows and chunks of NARROW tokens, so that short sequences go past them; and the masks
    that the model stores are as large as one of these, not as all end to end.

    What this and the calls inside change is put back: numbers in modules and configs, buffers, random numbers."""

    def kept(name: str, value: Any) -> bool:
        return type(value) in (int, float) or name == "training" or WIDTH.match(name) is not None

    modules = list(model.modules())
    configs = {id(module.config): module.config for module in modules if hasattr(module, "config")}
    numbers = [
        (holder, {name: value for name, value in vars(holder).items() if kept(name, value)})
        for holder in [*modules, *configs.values()]
    ]
    buffers = [(module._buffers, dict(module._buffers)) for module in modules if module._buffers]
    contents = [(buffer, buffer.clone()) for _, named in buffers for buffer in named.values() if buffer is not None]
    device = _device(model)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            for holder, values in numbers:
                vars(holder).update({name: _narrow(value) for name, value in values.items() if WIDTH.match(name)})
            for module in modules:
                module.training = False
            for own, named in buffers:
                own.update({name: _cut(buffer) for name, buffer in named.items()})
            yield
    finally:
        for holder, values in numbers:
            vars(holder).update(values)
        for own, named in buffers:
            own.update(named)
        for buffer, content in contents:
            buffer.copy_(content)


def _cut(buffer: Tensor | None) -> Tensor | None:
    if buffer is None or buffer.dtype not in (torch.bool, torch.uint8) or buffer.dim() < 2:
        return buffer
    return buffer[..., : max(PROBE), : max(PROBE)] if buffer.shape[-2] == buffer.shape[-1] else buffer


def _narrow(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _narrow(each) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_narrow, value))
    return min(value, NARROW) if type(value) is int else value
