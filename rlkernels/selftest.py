"""Compares every kernel that serves a device with float64, for `rlkernels selftest`.

Each op is called on small ragged inputs, masked and packed, in each dtype. Its results and gradients are held to the
rule in `_accuracy`: the standard is the reference, which is plain PyTorch, on the same low-precision inputs. The
largest error among some numbers is a matter of chance, and so is that of the reference: where a case is over the limit,
the median over five draws of its inputs decides.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import rlkernels
from rlkernels import _backends
from rlkernels._accuracy import comparable, measures

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Sizes:
    sequences: int
    tokens: int  # of the longest sequence
    hidden: int
    vocabulary: int


# With few rows eager PyTorch may happen to round each of them well, and would be too strict a standard.
QUICK_SIZES = (Sizes(16, 37, 24, 1003),)
SIZES = (*QUICK_SIZES, Sizes(16, 7, 16, 65), Sizes(4, 150, 64, 5001))


DRAWS = 5


@dataclass(frozen=True)
class Case:
    op: str
    layout: str
    differentiable: dict[str, Tensor] = field(default_factory=dict)
    others: dict[str, Any] = field(default_factory=dict)
    """Numbers without a gradient, ids, masks and options."""
    dtypes: tuple[torch.dtype, ...] = DTYPES

    def run(self, device_type: str, dtype: torch.dtype, precise: bool) -> dict[str, Tensor]:
        """The results, and the gradients of a weighted sum of them. With `precise` the same inputs, rounded to `dtype`,
        are computed with in float64."""

        def prepared(value: Any, is_number: bool) -> Any:
            if not torch.is_tensor(value):
                return value
            value = value.to(device_type, dtype) if is_number else value.to(device_type)
            return value.double() if is_number and precise else value

        inputs = {name: prepared(value, True).detach().requires_grad_() for name, value in self.differentiable.items()}
        others = {
            name: prepared(value, torch.is_tensor(value) and value.is_floating_point())
            for name, value in self.others.items()
        }
        arguments = {**inputs, **others}
        if "adapter" in arguments:
            arguments["adapter"] = (arguments["adapter"], arguments.pop("adapter_weight"))
        if arguments.get("inplace_backward"):
            arguments["logits"] = 1 * arguments["logits"]  # a leaf must not be overwritten
        results = getattr(rlkernels, self.op)(**arguments)
        outputs = results if isinstance(results, tuple) else (results,)
        found = {f"output {index}": output for index, output in enumerate(outputs)}
        differentiable = [output for output in outputs if output.requires_grad]
        if inputs:
            generator = torch.Generator().manual_seed(1)

            def upstream(output: Tensor) -> Tensor:
                """1 for a loss, as in loss.backward(). Float32 numbers, since results are float32 or float64."""
                shape = output.shape
                return (torch.randn(shape, generator=generator) if shape else torch.ones(shape)).to(output)

            weights = [upstream(output) for output in differentiable]
            gradients = torch.autograd.grad(differentiable, list(inputs.values()), weights)
            found |= {f"gradient of {name}": grad for name, grad in zip(inputs, gradients, strict=True)}
        return found


def cases(sizes: Sizes, draw: int = 0) -> Iterator[Case]:
    """Every public op that has kernels on padded sequences, and where it takes them on packed ones."""
    generator = torch.Generator().manual_seed(draw)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def logprobs(*shape: int) -> Tensor:
        return -numbers(*shape).abs()

    rows, tokens, hidden, vocabulary = sizes.sequences, sizes.tokens, sizes.hidden, sizes.vocabulary
    lengths = torch.randint(1, tokens + 1, (rows,), generator=generator)
    lengths[0] = tokens
    padded_mask = torch.arange(tokens) < lengths[:, None]
    packed_mask = torch.rand(int(lengths.sum()), generator=generator) < 0.9
    packed_mask[lengths.cumsum(0) - 1] = True  # no sequence is without a token
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
    padded: tuple = ("padded", (rows, tokens), {"mask": padded_mask})
    packed: tuple = ("packed", packed_mask.shape, {"mask": packed_mask, "cu_seqlens": cu_seqlens})

    for layout, shape, sequences in (padded, packed):
        mask = sequences["mask"]
        ids = torch.randint(vocabulary, shape, generator=generator).masked_fill(~mask, -100)
        logits = {"logits": 3 * numbers(*shape, vocabulary)}
        yield Case("token_logprobs", layout, logits, {"token_ids": ids, "return_entropy": True})
        yield Case("token_logprobs", f"{layout}, in place", logits, {"token_ids": ids, "inplace_backward": True})

        new, ref, sampler = logprobs(*shape), logprobs(*shape), logprobs(*shape)
        old = new + 0.3 * numbers(*shape)
        yield Case("kl_penalty", layout, {"logprobs": new, "ref_logprobs": ref})
        shaped = {"scores": numbers(rows), "logprobs": new, "ref_logprobs": ref, "kl_coef": 0.1}
        yield Case("shaped_rewards", layout, {}, shaped | sequences)

        returns = {"rewards": numbers(*shape), "bootstrap_values": numbers(rows), "gamma": 0.9} | sequences
        advantages = {**returns, "values": numbers(*shape)}
        yield Case("gae", layout, {}, advantages)
        yield Case("td_lambda", layout, {}, advantages)
        yield Case("discounted_returns", layout, {}, returns)
        yield Case("vtrace", layout, {}, {**advantages, "logprobs": new, "behavior_logprobs": old})

        # Advantages around 0 would cancel in the loss, and leave little of it but rounding errors.
        policy = {
            "old_logprobs": old,
            "advantages": 2 + numbers(rows),
            "ref_logprobs": ref,
            "sampler_logprobs": sampler,
        }
        policy |= {"entropy_coef": 0.1, "kl_coef": 0.1} | sequences
        yield Case("policy_loss", layout, {"logprobs": new, "entropy": numbers(*shape).abs()}, policy)
        values = numbers(*shape)
        data = {"old_values": values + 0.3 * numbers(*shape), "returns": numbers(*shape)}
        yield Case("value_loss", layout, {"values": values}, data | sequences)
        yield Case("masked_mean", layout, {"x": numbers(*shape)}, {"mask": mask})
        yield Case("masked_whiten", layout, {}, {"x": numbers(*shape), "mask": mask})

        student = {"hidden": numbers(*shape, hidden), "weight": numbers(vocabulary, hidden) / hidden**0.5}
        student |= {"bias": numbers(vocabulary)}
        adapted = student | {"adapter": numbers(*shape, 2), "adapter_weight": 0.5 * numbers(vocabulary, 2)}
        logits_of_head = torch.nn.functional.linear(student["hidden"], student["weight"], student["bias"])
        near = logits_of_head.log_softmax(-1).gather(-1, ids.clamp(min=0)[..., None])[..., 0]
        names = ("old_logprobs", "ref_logprobs", "sampler_logprobs")
        # A policy far from the others would have one token with almost all of the gradient.
        policy = policy | {name: near + 0.3 * numbers(*shape) for name in names} | {"token_ids": ids}
        # In 16 bits an adapter's product, and so the logits, are rounded in another way than eager PyTorch's.
        for name, head, dtypes in (("", student, DTYPES), (", adapter", adapted, (torch.float32,))):
            for op, others in (
                ("linear_token_logprobs", {"return_entropy": True}),
                ("linear_policy_loss", policy),
                ("linear_preference_logps", sequences),
            ):
                yield Case(op, layout + name, head, {**others, "token_ids": ids}, dtypes)
        teacher = {
            "teacher_hidden": numbers(*shape, 2 * hidden),
            "teacher_weight": numbers(vocabulary, 2 * hidden) / hidden**0.5,
            "teacher_bias": numbers(vocabulary),
        }
        yield Case("linear_kl_divergence", layout, student, teacher | {"mask": mask})

    yield Case("masked_mean", "by row", {"x": numbers(rows, tokens)}, {"mask": padded_mask, "dim": 1})
    rewards, weights = numbers(4 * rows, 2), torch.tensor([1.0, 0.5])
    by_size = {"rewards": rewards, "weights": weights, "group_size": 4}
    yield Case("group_advantages", "by size", {}, by_size)
    ids = torch.arange(rows).repeat(4)
    yield Case("group_advantages", "by id", {}, {"rewards": rewards[:, 0], "group_ids": ids})


@dataclass
class Check:
    """What was found of one op, backend and dtype."""

    op: str
    backend: str
    dtype: str
    worst: float = 0.0  # error / allowed error
    why: str = ""  # of a failure

    @property
    def passed(self) -> bool:
        return not self.why

    def fail(self, why: str) -> None:
        self.why = self.why or " ".join(why.split())


def serving(op: str, device_type: str) -> list[str]:
    """The backends with kernels for `op` on a device."""
    return [name for name in _backends.BACKENDS_OF[op] if _backends.status(name, device_type) is None]


def errors(
    case: Case, where: str, backend: str, device_type: str, dtype: torch.dtype
) -> dict[str, tuple[float, float]]:
    """By result and measure: the error, and what the rule allows."""
    with rlkernels.use_backend(backend):
        got = case.run(device_type, dtype, precise=False)
    with rlkernels.use_backend("reference"):
        naive = case.run(device_type, dtype, precise=False)
        oracle = case.run(device_type, dtype, precise=True)
    found = {}
    for what, value in got.items():
        parts = comparable(value, oracle[what], naive[what], f"{where}, {what}")
        for measure, pair in measures(*parts, gradient=what.startswith("gradient")).items():
            found[f"{where}, {what}: {measure}"] = pair
    return found


def ratio(error: float, allowed: float) -> float:
    return error / allowed if allowed else float("inf") if error else 0.0


def compare(draws: Sequence[Case], where: str, check: Check, device_type: str, dtype: torch.dtype) -> None:
    """Hold one case to the rule, and note in `check` what was found."""
    found = [errors(draws[0], where, check.backend, device_type, dtype)]
    if any(not error <= allowed for error, allowed in found[0].values()):
        found += [errors(case, where, check.backend, device_type, dtype) for case in draws[1:]]
    for what in found[0]:
        middle = sorted((each[what] for each in found), key=lambda pair: ratio(*pair))[len(found) // 2]
        if not middle[0] <= middle[1]:
            check.fail(f"{what} {middle[0]:.3g} > {middle[1]:.3g}")
        check.worst = max(check.worst, ratio(*middle))


def checks(device_type: str, quick: bool = False) -> Iterator[Check]:
    """One check for each op, backend with kernels and dtype, over all sizes and layouts."""
    by_op: dict[str, list[tuple[str, tuple[Case, ...]]]] = {op: [] for op in _backends.BACKENDS_OF}
    for sizes in QUICK_SIZES if quick else SIZES:
        for draws in zip(*(cases(sizes, draw) for draw in range(DRAWS)), strict=True):
            case = draws[0]
            by_op[case.op].append((f"{case.layout} {sizes.sequences}x{sizes.tokens}", draws))
    for op, its_cases in by_op.items():
        for backend in serving(op, device_type):
            for dtype in DTYPES:
                check = Check(op, backend, str(dtype).removeprefix("torch."))
                for where, draws in its_cases:
                    if dtype not in draws[0].dtypes:
                        continue
                    try:
                        compare(draws, where, check, device_type, dtype)
                    except Exception as error:  # a kernel may fail in any way, and the others are still checked
                        check.fail(str(error) if isinstance(error, AssertionError) else f"{where}: {error!r}")
                yield check
