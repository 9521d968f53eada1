"""The arguments of the LM head's functions: their checks, and the Head and the scored rows made from them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlkernels import _backends
from rlkernels.ops import _checks
from rlkernels.ops.lm_head.head import Head, shares
from rlkernels.ops.lm_head.tiles import Rows, chosen_tile, fill_up, scored_index
from rlkernels.ops.logprobs import check_ids

LOGITS_BUDGET_MB = 128.0
LOSS_LOGITS_BUDGET_MB = 64.0


@dataclass(frozen=True)
class Inputs:
    hidden: Tensor
    """[N, H]"""
    weight: Tensor
    bias: Tensor | None
    adapter: Tensor | None
    """[N, r]"""
    adapter_weight: Tensor | None
    token_ids: Tensor
    """int64 [N]"""

    def tensors(self) -> tuple[Tensor | None, ...]:
        return (self.hidden, self.weight, self.bias, self.adapter, self.adapter_weight, self.token_ids)


@dataclass(frozen=True)
class Options:
    temperature: float
    """The temperature divided by `scale`, since the kernels see the logits before they are scaled."""
    softcap: float
    """The softcap divided by `scale`; 0 for none."""
    ignore_index: int
    group: Any
    num_scored: int | None
    tile: tuple[int, int] | None
    backend: str
    return_entropy: bool = False
    outputs: tuple[str, ...] = ()
    budget: int = 0
    differentiated: bool = True


def check_head(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    bias: Tensor | None,
    adapter: tuple[Tensor, Tensor] | None,
    temperature: float,
    softcap: float | None,
    scale: float,
    ignore_index: int,
    group: Any,
    num_scored: int | None,
    prefix: str = "",
) -> tuple[Inputs, Options]:
    """Check the arguments, cast them to the dtype of the products, and flatten their leading dimensions to one.
    Messages put `prefix` before the names hidden, weight, bias, softcap and scale."""
    _checks.tensor(f"{prefix}hidden", hidden, _checks.FLOATS)
    _checks.tensor(f"{prefix}weight", weight, _checks.FLOATS)
    _checks.tensor("token_ids", token_ids, _checks.INTEGERS)
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        raise ValueError(f"{prefix}hidden must have the shape [..., H] with H >= 1; got {list(hidden.shape)}")
    width = hidden.shape[-1]
    # A process in a group may have no share of the vocabulary. An error here would leave the others waiting.
    if weight.dim() != 2 or (weight.shape[0] == 0 and group is None) or weight.shape[1] != width:
        raise ValueError(f"{prefix}weight must have the shape [V, {width}] with V >= 1; got {list(weight.shape)}")
    vocab_size = weight.shape[0]
    leading = tuple(hidden.shape[:-1])
    _checks.shape("token_ids", token_ids, leading, because=f"the shape of {prefix}hidden without its last dimension")
    named: dict[str, Tensor | None] = {f"{prefix}weight": weight, f"{prefix}bias": bias}
    if bias is not None:
        _checks.tensor(f"{prefix}bias", bias, _checks.FLOATS)
        _checks.shape(f"{prefix}bias", bias, (vocab_size,), because=f"one element for each row of {prefix}weight")
    if adapter is not None:
        if not isinstance(adapter, tuple | list) or len(adapter) != 2:
            raise TypeError(f"adapter must be a pair of tensors; got {type(adapter).__name__}")
        for name, factor in zip(("adapter[0]", "adapter[1]"), adapter, strict=True):
            _checks.tensor(name, factor, _checks.FLOATS)
            named[name] = factor
        if adapter[0].dim() == 0 or adapter[0].shape[-1] == 0 or adapter[0].shape[:-1] != hidden.shape[:-1]:
            raise ValueError(
                f"adapter[0] must have the shape {[*hidden.shape[:-1], 'r']} with r >= 1; got {list(adapter[0].shape)}"
            )
        _checks.shape("adapter[1]", adapter[1], (vocab_size, adapter[0].shape[-1]), because="[V, r]")
    _checks.same_device("token_ids", token_ids, f"{prefix}hidden", hidden)
    dtype = hidden.dtype
    autocast = dtype != torch.float64 and torch.is_autocast_enabled(hidden.device.type)
    if autocast:
        dtype = torch.get_autocast_dtype(hidden.device.type)
    for name, value in named.items():
        if value is not None:
            _checks.same_device(name, value, f"{prefix}hidden", hidden)
            if not autocast and value.dtype != dtype:
                raise TypeError(f"{name} must have the dtype of {prefix}hidden, {dtype}; got {value.dtype}")
    temperature = _checks.number("temperature", temperature, above=0.0)
    softcap = 0.0 if softcap is None else _checks.number(f"{prefix}softcap", softcap, above=0.0)
    scale = _checks.number(f"{prefix}scale", scale, above=0.0)
    # The kernels see the logits before `scale`.
    of_logits, most = f"divided by {prefix}scale", _checks.MOST_DIVISOR
    temperature = _checks.number(f"temperature {of_logits}", temperature / scale, at_most=most)
    softcap = _checks.number(f"{prefix}softcap {of_logits}", softcap / scale, at_most=most)
    ignore_index = _checks.integer("ignore_index", ignore_index)
    if num_scored is not None:
        num_scored = _checks.integer("num_scored", num_scored)
        if not 0 <= num_scored <= token_ids.numel():
            raise ValueError(
                f"num_scored must be between 0 and {token_ids.numel()}, the number of rows; got {num_scored}"
            )
    if group is not None and not isinstance(group, torch.distributed.ProcessGroup):
        raise TypeError(f"group must be a torch.distributed.ProcessGroup; got {type(group).__name__}")
    if group is not None and torch.compiler.is_compiling():
        raise ValueError("group cannot be given under torch.compile")

    inputs = Inputs(
        hidden.reshape(-1, width).to(dtype),
        weight.to(dtype),
        None if bias is None else bias.to(dtype),
        None if adapter is None else adapter[0].reshape(-1, adapter[0].shape[-1]).to(dtype),
        None if adapter is None else adapter[1].to(dtype),
        token_ids.reshape(-1).long().contiguous(),
    )
    backend = _backends.select(inputs.hidden, "linear_token_logprobs")
    stored = backend == "reference" and group is None and dtype != torch.float64
    if stored and not hidden.is_cpu and not torch.compiler.is_compiling():
        _backends.note_stored_logits(hidden.device.type)
    if group is None and _checks.values_in_python(backend, token_ids):
        check_ids(inputs.token_ids, vocab_size, ignore_index)
    options = Options(temperature, softcap, ignore_index, group, num_scored, chosen_tile(), backend)
    return inputs, options


def budget_bytes(logits_budget_mb: float) -> int:
    """At most what 64 bits hold, since torch.compile takes no more."""
    return min(int(_checks.number("logits_budget_mb", logits_budget_mb, at_least=0.0) * 2**20), 2**63 - 1)


def start(inputs: Inputs, options: Options, share: tuple[int, int, int] | None = None) -> Head:
    """The head of these inputs. Processes of a group exchange the sizes of their shares, unless `share` is given."""
    if options.group is not None and share is None:
        share = shares(inputs.weight, options.group)
    return Head(
        inputs.weight,
        inputs.bias,
        inputs.adapter_weight,
        options.temperature,
        options.softcap,
        options.backend,
        options.return_entropy,
        options.tile,
        options.group,
        share,
    )


def scored_rows(inputs: Inputs, options: Options, head: Head) -> tuple[Rows, Tensor | None]:
    """The scored rows in whole blocks, and on a GPU whether there are more than num_scored."""
    check_tokens(inputs, options, head)
    index, too_few = scored_index(inputs.token_ids != options.ignore_index, options.num_scored)
    total = len(inputs.token_ids)
    whole = options.num_scored is None and len(index) == total and total % head.block_rows == 0
    index = fill_up(index, head.block_rows, total)
    return Rows.gather(index, inputs.hidden, inputs.adapter, inputs.token_ids, whole), too_few


def check_tokens(inputs: Inputs, options: Options, head: Head) -> None:
    if inputs.token_ids.is_cpu or _checks.CHECK_VALUES:
        vocab_size = inputs.weight.shape[0] if head.share is None else head.share[1]
        check_ids(inputs.token_ids, vocab_size, options.ignore_index)
