from collections.abc import Sequence

import torch
from torch import Tensor

from rlkernels import _backends, _registry
from rlkernels._codes import BASELINES, SCALES
from rlkernels.ops import _checks
from rlkernels.reference import groups as reference


def group_advantages(
    rewards: Tensor,
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    baseline: str = "mean",
    scale: str = "group",
    eps: float = 1e-4,
    weights: Tensor | Sequence[float] | None = None,
    normalize: str = "after_sum",
    singleton: str = "zero",
    return_signal: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Advantages of completions relative to their group: those of the same prompt (GRPO, RLOO, Dr. GRPO).

        score[i]     = sum_r weights[r] * rewards[i, r]                    over the rewards that are not NaN
        advantage[i] = (score[i] - baseline of its group) / (std + eps)

    baseline "mean": the group's mean; "leave_one_out": the mean of the group's other scores (RLOO); "none": 0.
    scale "group": the standard deviation of the group's scores; "batch": that of all scores; "none": no division.
    Standard deviations are of samples (ddof 1).

    normalize="before_sum" (TRL's normalize_then_sum, GDPO) applies the formula to each reward on its own, sums the
    results with the weights, and normalises the sums once more over the whole batch: (sum - mean) / (std + eps).

    Args:
        rewards: [B] or [B, R], float32, bfloat16, float16 or float64 (served by the reference, in float64). NaN: that
            reward did not apply to that completion.
        group_size: groups are consecutive rows of this many; B must be a multiple of it.
        group_ids: int [B]; equal ids are one group, in any order, of any sizes. With neither, the batch is one group.
        eps: >= 0, added to the standard deviation. TRL 1e-4, verl 1e-6.
        weights: [R], or None for 1 each.
        singleton: what a score alone in its group gets when there is a baseline: "zero", or "keep": the score itself,
            scaled as if its standard deviation were 1 (verl).
        return_signal: also return which rows are of groups whose scores differ. The others teach nothing, and need not
            be run through the model.

    Returns:
        float32 [B] (float64 for float64 rewards); with return_signal also bool [B].

    Not differentiable: rewards are data. Forward mode raises NotImplementedError.

    Edge cases: a row without any reward gets advantage 0, no signal, and counts in no statistic. A group whose scores
    are all equal gets exactly 0 (with a baseline) and no signal. A standard deviation needs two scores: one alone is
    only divided by 1 + eps. A group with an infinite reward has no finite mean: where the formula then gives NaN the
    advantage is 0, as in TRL.

    Raises: TypeError, ValueError for wrong dtypes, shapes and options, and for rewards or weights that require a
    gradient.

    Traffic: reads the rewards and writes one float and one byte a row; scale="batch" and normalize="before_sum", whose
    output waits for a statistic of the whole batch, read [B] floats once more. With group_ids a GPU compares each pair
    of ids up to 16,384 rows, and sorts more with PyTorch.

    References: Shao et al. 2024 (GRPO, arXiv 2402.03300); Ahmadian et al. 2024 (RLOO, arXiv 2402.14740); Liu et al.
    2025 (Dr. GRPO, arXiv 2503.20783).
    """
    _checks.tensor("rewards", rewards, _checks.FLOATS)
    _checks.no_gradient("rewards", rewards, "advantages are data: gradients do not flow through them")
    if rewards.dim() not in (1, 2) or (rewards.dim() == 2 and rewards.shape[1] == 0):
        raise ValueError(f"rewards must have the shape [B] or [B, R] with R >= 1; got {list(rewards.shape)}")
    count, kinds = rewards.shape[0], rewards.shape[1] if rewards.dim() == 2 else 1
    _checks.choice("baseline", baseline, BASELINES)
    _checks.choice("scale", scale, SCALES)
    _checks.choice("normalize", normalize, ("after_sum", "before_sum"))
    _checks.choice("singleton", singleton, ("zero", "keep"))
    eps = _checks.number("eps", eps, at_least=0.0)

    backend = _backends.select(rewards, "group_advantages")
    dtype = _checks.arithmetic(rewards)
    weights = _checks.numbers(_weights(weights, kinds, rewards, backend), backend, dtype)
    rewards = _checks.numbers(rewards.detach().reshape(count, kinds), backend, dtype)
    order = offsets = None
    if group_ids is not None:
        if group_size is not None:
            raise ValueError(f"group_size and group_ids exclude each other; got both (group_size={group_size})")
        _checks.tensor("group_ids", group_ids, _checks.INTEGERS)
        _checks.shape("group_ids", group_ids, (count,), because="one id a row of rewards")
        _checks.same_device("group_ids", group_ids, "rewards", rewards)
        if count:
            by_kernel = backend in _checks.ON_GPUS and count <= MOST_COUNTED
            segments = _registry.op("group_segments", backend) if by_kernel else _segments
            order, offsets = segments(group_ids.contiguous())
    elif group_size is not None:
        group_size = _checks.integer("group_size", group_size)
        if group_size < 1 or count % group_size:
            raise ValueError(f"group_size must be >= 1 and divide the number of rows, {count}; got {group_size}")
    size = group_size if group_size is not None else max(count, 1)

    before_sum, keep = normalize == "before_sum", singleton == "keep"
    if backend == "reference":
        advantages, signal = reference.group_advantages(
            rewards,
            weights=weights,
            order=order,
            offsets=offsets,
            group_size=size,
            baseline=baseline,
            scale=scale,
            eps=eps,
            normalize_before_sum=before_sum,
            keep_singleton=keep,
        )
    else:
        advantages, signal = _registry.op("group_advantages", backend)(
            rewards,
            weights,
            order,
            offsets,
            size,
            BASELINES.index(baseline),
            SCALES.index(scale),
            eps,
            before_sum,
            keep,
        )
    return (advantages, signal) if return_signal else advantages


def _weights(weights: Tensor | Sequence[float] | None, kinds: int, rewards: Tensor, backend: str) -> Tensor | None:
    because = "one weight a column of rewards"
    if weights is None:
        return None
    if not isinstance(weights, Tensor | Sequence) or isinstance(weights, str | bytes | bytearray):
        raise TypeError(f"weights must be a tensor or a sequence of numbers; got {type(weights).__name__}")
    if not isinstance(weights, Tensor):
        given = [_checks.number("weights", weight) for weight in weights]
        if len(given) != kinds:
            raise ValueError(f"weights must have the shape [{kinds}] ({because}); got [{len(given)}]")
        if backend in _checks.ON_GPUS:
            return _registry.op("numbers_on_device", backend)(given, rewards)
        return torch.tensor(given, dtype=_checks.arithmetic(rewards), device=rewards.device)
    _checks.tensor("weights", weights, _checks.FLOATS)
    _checks.shape("weights", weights, (kinds,), because=because)
    _checks.same_device("weights", weights, "rewards", rewards)
    _checks.no_gradient("weights", weights, "advantages are data: gradients do not flow through them")
    return weights.detach()


MOST_COUNTED = 16384
"""Rows up to which a GPU finds each row's place by counting the ids before it: beyond, PyTorch sorts, by a dozen
launches."""


def _segments(group_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Rows sorted by group, and where each group starts; offsets has room for B groups, the spare ones are empty."""
    sorted_ids, order = torch.sort(group_ids, stable=True)
    starts = torch.nn.functional.pad(sorted_ids[1:] != sorted_ids[:-1], (1, 0))
    group = starts.cumsum(0)
    offsets = torch.searchsorted(group, torch.arange(len(group_ids) + 1, device=group.device))
    return order, offsets


_registry.define(
    "group_advantages",
    "(Tensor rewards, Tensor? weights, Tensor? order, Tensor? offsets, int group_size, int baseline, int scale, "
    "float eps, bool normalize_before_sum, bool keep_singleton) -> (Tensor advantages, Tensor signal)",
    lambda rewards, *rest: (
        rewards.new_empty(rewards.shape[0], dtype=torch.float32),
        rewards.new_empty(rewards.shape[0], dtype=torch.bool),
    ),
    part_of="group_advantages",
)
_registry.define(
    "group_segments",
    "(Tensor group_ids) -> (Tensor order, Tensor offsets)",
    lambda group_ids: (
        group_ids.new_empty(group_ids.shape, dtype=torch.int64),
        group_ids.new_empty(group_ids.shape[0] + 1, dtype=torch.int64),
    ),
    part_of="group_advantages",
    backends=_checks.ON_GPUS,
)
# A copy from the host would wait for it, and in a CUDA graph read memory that is long gone: numbers are a kernel's
# arguments.
_registry.define(
    "numbers_on_device",
    "(float[] numbers, Tensor like) -> Tensor",
    lambda numbers, like: like.new_empty(len(numbers), dtype=torch.float32),
    part_of="group_advantages",
    backends=_checks.ON_GPUS,
)
