"""Whether a model keeps sequences apart that are laid end to end, and whether it can run a prefix once for several."""

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from .batch import IGNORE, Batch, Sequence
from .implementations import attention_function, by_mask, by_sequence, gather_keys

logger = transformers.utils.logging.get_logger(__name__)


# The lengths of the sequences that a model is tried on, and of a prefix that they share; and the width of its windows
# and chunks then, in tokens.
PROBE, PREFIX, NARROW = (11, 7, 7), 5, 2
# The names of such widths in modules and configs.
WIDTH = re.compile(
    r"(?!.*(pattern|layers|type|ids|index(es)?$|indices))"
    r".*(window|(attention|attn)_chunk|local_att|compress|budget|(index|block)_topk|topk_blocks|block_size)"
)
# A position so far from the first one that no window reaches back to it.
FAR = 2**20


def prepare_packing(model: Any, device: torch.device) -> bool:
    """Whether the model keeps packed sequences apart. The model is run on a few to find out. On a CPU its attention is
    replaced by `by_sequence`, where that gives the same. `device` is the one that the model is trained on."""
    adapters = getattr(model, "peft_config", {}).values()
    if any(getattr(adapter, "alora_invocation_tokens", None) for adapter in adapters):
        logger.warning(f"{type(model).__name__}: aLoRA begins once in each row of tokens: its batches are padded.")
        return False
    model = _base_model(model)
    own = model.config._attn_implementation
    if "flash" in own and model.device != device:
        return True  # the model cannot run before FSDP places it; flash attention is told where sequences start
    alone = probe(model, packed=False)
    # Where both serve, sdpa also samples for a model of eager attention: it is the faster of the two.
    for other in ("sdpa", "eager") if device.type == "cpu" and own in ("sdpa", "eager") else ():
        if has_plain_masks(model, other, alone):
            name = by_sequence(other)
            if _with_attention(model, name, lambda: _same(probe(model, packed=True), alone)):
                model.set_attn_implementation(name)
                return True
    if _same(probe(model, packed=True), alone):
        return True
    logger.warning(f"{type(model).__name__} does not keep packed sequences apart: its batches are padded.")
    return False


def prepare_sharing(model: Any, device: torch.device) -> bool:
    """Whether a model that `prepare_packing` took gives the branches of a shared prefix what it gives whole sequences.
    The model is run on a few to find out. Its attention is replaced where branches need that. `device` is the one that
    the model is trained on."""
    model = _base_model(model)
    own = model.config._attn_implementation
    if own.startswith("rlkernels"):
        shares = _shares(model)
    elif "flash" in own:
        shares = _shares_by_flash(model, own, device)
    else:
        shares = _shares_by_mask(model, own)
    if not shares:
        logger.warning(f"{type(model).__name__} does not share prefixes: each sequence is run as a whole.")
    return shares


def _shares(model: Any, gradient: bool = False) -> bool:
    return _same(probe(model, packed=True, prefix=PREFIX, gradient=gradient), probe(model, packed=False, prefix=PREFIX))


def _shares_by_flash(model: Any, own: str, device: torch.device) -> bool:
    """Whether prefixes are shared by flash attention, which would read memory out of range for a model that does not
    pass all of its arguments on. A model must therefore share by `by_sequence` first, which runs on CPUs too. Where
    FSDP has yet to place the model on its GPU, that alone decides."""

    def shares_by_sequence(plain: str) -> bool:
        is_plain = _with_attention(model, plain, lambda: has_plain_masks(model, plain, probe(model, packed=False)))
        return is_plain and _with_attention(model, by_sequence(plain), lambda: _shares(model))

    if not any(map(shares_by_sequence, ("sdpa", "eager"))):
        return False
    gather_keys(own)
    return model.device != device or _shares(model)


def _shares_by_mask(model: Any, own: str) -> bool:
    """Whether prefixes are shared by FlexAttention, or by the model's own attention, if they are given a mask."""
    if not has_plain_masks(model, own, probe(model, packed=False)):
        return False
    for masked in dict.fromkeys(("flex_attention", own)):
        name = by_mask(own, masked)
        if _with_attention(model, name, lambda: _shares(model, gradient=True)):
            model.set_attn_implementation(name)
            return True
    return False


def _with_attention(model: Any, implementation: str, found: Callable[[], bool]) -> bool:
    """What is `found` while the model has this implementation of attention; False if it cannot have it."""
    configs = {id(part.config): part.config for part in model.modules() if hasattr(part, "config")}
    before = [(config, config._attn_implementation) for config in configs.values()]
    try:
        model.set_attn_implementation(implementation)
        return found()
    except (ValueError, ImportError):  # raised by a model without such attention
        return False
    finally:
        for config, own in before:
            config._attn_implementation = own


def _base_model(model: Any) -> Any:
    while hasattr(model, "get_base_model"):  # PEFT's
        model = model.get_base_model()
    return model


def warn_of_batch_dependence(model: Any) -> None:
    """Warns of positions that change for all sequences of a batch, packed or padded, once one of them is long."""
    for module in _base_model(model).modules():
        kinds = getattr(module, "rope_type", None)  # one, or a dict of one per type of layer
        for layers, kind in kinds.items() if isinstance(kinds, dict) else [(None, kinds)]:
            if kind in ("dynamic", "longrope"):
                options = getattr(getattr(module, "config", None), "rope_parameters", None) or {}
                options = options if layers is None else options[layers]
                own = getattr(module, "original_max_seq_len", "a certain number of")
                length = options.get("original_max_position_embeddings") or own
                logger.warning_once(
                    f"{type(model).__name__}: its RoPE is '{kind}', which changes for the whole batch where a sequence "
                    f"is longer than {length} tokens: the outputs for the other sequences then depend on that one."
                )


def has_plain_masks(model: Any, other: str, alone: Tensor | None) -> bool:
    """Whether the attention of each layer is what `attend` computes: causal within the window that its function is
    given, whatever the length. The model runs with its attention `other` under another name, which looks at the masks
    that the model asks for and uses, and must not change what `probe` gives for each sequence alone, `alone`."""
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
        return attention_function(module, other)(module, query, key, value, attention_mask, **kwargs)

    name = f"rlkernels_masks_of_{other}"
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)
    is_same = _with_attention(model, name, lambda: _same(probe(model, packed=False), alone))
    return is_same and told <= asked and len(told) > 0


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and one.equal(other))


def _window_of(mask_function: Any) -> int | None:
    """The number of tokens that a position attends to, itself included; None if to all before it."""
    keys = torch.arange(FAR + 1)
    first, last = (mask_function(keys[0], keys[0], keys[query], keys) for query in (-2, -1))
    window = int(last.sum())
    for query, seen in ((FAR - 1, first), (FAR, last)):
        if not seen.equal((keys <= query) & (keys > query - window)):
            raise NotImplementedError("a mask that is neither causal nor sliding")
    return None if window > FAR else window


def probe(model: Any, packed: bool, prefix: int = 0, gradient: bool = False) -> Tensor | None:
    """The last hidden states [..., N, H] of a few sequences, packed or each alone; None if the model cannot run on
    them, or if it cannot run backward, with `gradient`. The sequences are longer than every window and chunk. With a
    `prefix` they begin with the same `prefix` tokens, which packed sequences share, and N is the number of tokens in
    their branches."""
    try:
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0
        lengths = [min(length, limit) if limit > 0 else length for length in PROBE]
        prefix = min(prefix, min(lengths) - 1)
        parts = torch.tensor(_plain_tokens(model, sum(lengths))).split(lengths)
        rows = [[*parts[0].tolist()[:prefix], *part.tolist()[prefix:]] for part in parts]
        with probing(model):
            if packed:
                sequences = [Sequence(row, [IGNORE] * len(row), prefix) for row in rows]
                batch = Batch.lay_out(sequences, _device(model))
                hidden = _hidden_states(model, batch.model_inputs, gradient)
                return hidden if batch.index is None else hidden.index_select(-2, batch.index)
            # One row at a time, because classifiers without a padding token refuse several.
            alone = [_hidden_states(model, {"input_ids": torch.tensor([row], device=_device(model))}) for row in rows]
            return torch.cat([hidden[..., prefix:, :] for hidden in alone], -2)
    except Exception:  # a model that cannot do this may raise anything
        return None


def _same(found: Tensor | None, expected: Tensor | None) -> bool:
    """Whether the hidden states agree at each position, up to rounding. With 16 bits one position may differ by a fifth
    of its norm; where sequences are not kept apart, all that follow differ by as much on average, and some by all."""
    if found is None or expected is None:
        return False
    at_most, on_average = (1e-3, 1e-3) if found.dtype == torch.float32 else (0.5, 0.1)
    norms = expected.float().norm(dim=-1)
    errors = (found.float() - expected.float()).norm(dim=-1)
    return bool((errors <= at_most * norms).all() and errors.sum() <= on_average * norms.sum())


def _hidden_states(model: Any, inputs: dict[str, Any], gradient: bool = False) -> Tensor:
    flash = "flash" in model.config._attn_implementation  # flash attention has no float32
    embedded: list[Tensor] = []
    hook = model.get_input_embeddings().register_forward_hook(lambda *call: embedded.append(call[-1]))
    try:
        with (
            torch.set_grad_enabled(gradient),
            torch.autocast(_device(model).type, torch.bfloat16, enabled=flash),
        ):
            output = model(**inputs | {"use_cache": False, "output_hidden_states": True})
    finally:
        hook.remove()
    hidden = output.hidden_states[-1].flatten(-3, -2)
    if gradient:
        torch.autograd.grad(hidden.sum(), embedded)
    hidden = hidden.detach()
    return hidden.bfloat16() if flash else hidden


def _device(model: Any) -> torch.device:
    return model.get_input_embeddings().weight.device


def _plain_tokens(model: Any, count: int) -> list[int]:
    """Tokens to which the model's config gives no meaning of their own."""
    config = model.config.to_dict() | model.config.get_text_config().to_dict()
    special = {value for name, value in config.items() if "token" in name and isinstance(value, int)}
    plain = [token for token in range(min(len(model.get_input_embeddings().weight), 1000)) if token not in special]
    # No two tokens are neighbours twice.
    return [plain[(5 + index * index) % len(plain)] for index in range(count)]


@contextlib.contextmanager
def probing(model: Any) -> Iterator[None]:
    """Puts the model in evaluation mode and narrows its windows and chunks to NARROW tokens, so that even short
    sequences are longer. Masks that the model stores are cut to the longest sequence, which is shorter than all of them
    end to end. A model that Accelerate has prepared runs without its autocast, whose rounding would hide or feign a
    difference.

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
    own = vars(model)
    prepared = own["forward"] if "_original_forward" in own else None
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            if prepared is not None:
                own["forward"] = own["_original_forward"]
            for holder, values in numbers:
                vars(holder).update({name: _narrow(value) for name, value in values.items() if WIDTH.match(name)})
            for module in modules:
                module.training = False
            for holder, named in buffers:
                holder.update({name: _cut(buffer) for name, buffer in named.items()})
            yield
    finally:
        if prepared is not None:
            own["forward"] = prepared
        for holder, values in numbers:
            vars(holder).update(values)
        for holder, named in buffers:
            holder.update(named)
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
