from dataclasses import astuple, dataclass, replace
from functools import partial

import torch
from torch import Tensor

from rlkernels import _backends, _registry
from rlkernels._codes import DIVERGENCES
from rlkernels.ops import _checks
from rlkernels.ops._first_order import first_order_only, leads_to_inputs, no_second_derivative
from rlkernels.ops.kl_divergence import divergence_and_centre
from rlkernels.ops.lm_head.gradients import nan_if
from rlkernels.ops.lm_head.head import Head
from rlkernels.ops.lm_head.inputs import LOGITS_BUDGET_MB, Inputs, Options, budget_bytes, check_head, scored_rows, start
from rlkernels.ops.lm_head.tiles import POOL, Rows, slices
from rlkernels.reference import linear_kl_divergence as reference

_NOT_SCORED = -100
_NO_TOKEN = -1  # an id in no tile, so that the sums leave out no logit


def linear_kl_divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    mask: Tensor | None = None,
    *,
    kind: str = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    scale: float = 1.0,
    teacher_scale: float = 1.0,
    num_scored: int | None = None,
    logits_budget_mb: float = LOGITS_BUDGET_MB,
) -> Tensor:
    """Divergence of a student's and a teacher's next-token distributions over the whole vocabulary, per token.

        S = softmax(z),  z = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap) / temperature
        (softcap=None: scale * (hidden @ weight.T + bias) / temperature), T of the teacher_* likewise

        forward:  KL(T || S) = sum_v T_v log(T_v / S_v)
        reverse:  KL(S || T) = sum_v S_v log(S_v / T_v)
        js:       beta KL(T || M) + (1 - beta) KL(S || M),  M = beta T + (1 - beta) S

    beta is the weight of the teacher, both in the mixture and outside of it, as in GKD and in TRL. The js divergence
    goes to 0 as beta goes to 0 or 1. At 0 itself it is KL(T || S), and at 1 KL(S || T), as in TRL. No divergence is
    multiplied by the square of the temperature.

    The logits of neither model exist as a whole. The product of a block of rows and a range of the vocabulary is a
    tile, which is folded into the rows' maxima and sums, and into the divergence once these are known. Every term that
    is added is >= 0 and formed from log T - log S, so that divergences of nearly equal distributions keep their digits
    and none is negative. The backward pass turns a tile of the student's logits, in place, into its gradient.

    Args:
        hidden: [..., H], float32, bfloat16, float16 or float64 (served by the reference, in float64).
        weight: [V, H], of the dtype of hidden. Under autocast all floating-point inputs are cast first.
        teacher_hidden: [..., H'], of any width. Its dtype may differ from the student's, except that float64 goes only
            with float64.
        teacher_weight: [V, H'], of the dtype of teacher_hidden.
        mask: [...] of bool, integer or float dtype, nonzero is scored; None scores every row. Rows that are not scored
            are not projected.
        kind: "forward", "reverse" or "js".
        beta: in [0, 1], for "js".
        temperature: > 0, divides the logits of both.
        bias, teacher_bias: [V].
        softcap, teacher_softcap: > 0, or None. Each belongs to its model; neither is the default of the other.
        scale, teacher_scale: > 0, likewise.
        num_scored: the number of rows to project, at least that of the scored rows. Without it the host waits for the
            device to count them, the only time that it waits.
        logits_budget_mb: if the logits of all scored rows, of both models, take no more memory, they are kept for the
            backward pass, not computed again. The forward pass holds the logits of as many rows as fit, at least one
            block of rows.

    Returns:
        float32 [...] (float64 for float64 hidden), >= 0.

    Differentiable: with respect to hidden, weight and bias, once. Second derivatives and forward mode raise
    NotImplementedError, except in the reference. The teacher is data: no gradient reaches it, even where it is the
    student, and a tangent is refused.

    Edge cases: rows that are not scored give 0, and their gradient is 0, whatever they hold. A logit of -inf has
    probability 0, which adds nothing where both models have it. "forward" is inf where T_v > 0 = S_v, and "reverse"
    where S_v > 0 = T_v, both with a gradient that is not finite; "js" is at most log 2 for beta = 0.5. A row gives NaN
    if the logits of either model hold a NaN or +inf, or nothing but -inf. With no rows the result is empty.

    Raises:
        TypeError, ValueError: for wrong dtypes, shapes, devices and options, and on a CPU for more scored rows than
            num_scored; on a GPU these make everything NaN.

    Traffic: one product of [scored, H] x [H, V] for each model, two more for the gradients, and one more for each model
    where logits are computed again. Besides the factors of the products, each tile is written once and read twice; with
    a gradient it is read once more, and the student's is written once more.

    References: Agarwal et al. 2023, "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes"
    (arXiv 2306.13649).
    """
    _checks.tensor("hidden", hidden, _checks.FLOATS)
    _checks.tensor("teacher_hidden", teacher_hidden, _checks.FLOATS)
    if teacher_hidden.shape[:-1] != hidden.shape[:-1] or teacher_hidden.dim() != hidden.dim():
        raise ValueError(
            f"teacher_hidden must have the shape {[*hidden.shape[:-1], 'H']}, as hidden does except for the last "
            f"dimension; got {list(teacher_hidden.shape)}"
        )
    _checks.same_device("teacher_hidden", teacher_hidden, "hidden", hidden)
    if (teacher_hidden.dtype == torch.float64) != (hidden.dtype == torch.float64):
        raise TypeError(
            f"teacher_hidden must be float64 if and only if hidden is, {hidden.dtype}; got {teacher_hidden.dtype}"
        )
    _checks.choice("kind", kind, DIVERGENCES)
    beta = _checks.number("beta", beta, at_least=0.0, at_most=1.0)
    scored = hidden.new_zeros(hidden.shape[:-1], dtype=torch.int64)
    if mask is not None:
        _checks.mask("mask", mask, "hidden without its last dimension", scored)
        scored = scored.masked_fill(~_checks.scored(mask), _NOT_SCORED)
    rest = (_NOT_SCORED, None, num_scored)
    inputs, options = check_head(hidden, weight, scored, bias, None, temperature, softcap, scale, *rest)
    _checks.tensor("teacher_weight", teacher_weight, _checks.FLOATS)
    _checks.shape(
        "teacher_weight",
        teacher_weight,
        (weight.shape[0], teacher_hidden.shape[-1]),
        because="the vocabulary of weight and the width of teacher_hidden",
    )
    if teacher_bias is not None:
        _checks.tensor("teacher_bias", teacher_bias, _checks.FLOATS)
    for name, value in (("hidden", teacher_hidden), ("weight", teacher_weight), ("bias", teacher_bias)):
        if value is not None:
            _checks.no_tangent(f"teacher_{name}", value, "the teacher is data")
    teacher, teacher_options = check_head(
        teacher_hidden.detach(),
        teacher_weight.detach(),
        scored,
        None if teacher_bias is None else teacher_bias.detach(),
        None,
        temperature,
        teacher_softcap,
        teacher_scale,
        *rest,
        prefix="teacher_",
    )
    budget = budget_bytes(logits_budget_mb)
    if kind == "js" and beta in (0.0, 1.0):
        kind = "reverse" if beta else "forward"
    options = replace(options, budget=budget, differentiated=torch.is_grad_enabled())
    pair = _Options(
        DIVERGENCES.index(kind),
        beta,
        *(options.temperature, teacher_options.temperature, options.softcap, teacher_options.softcap),
    )
    return _evaluate(inputs, teacher, options, pair).view(scored.shape)


@dataclass(frozen=True)
class _Options:
    """What the kernels take. Temperatures and softcaps are divided by `scale`, as in `Options`."""

    kind: int
    """An index into DIVERGENCES."""
    beta: float
    temperature: float
    teacher_temperature: float
    softcap: float
    teacher_softcap: float


def _evaluate(inputs: Inputs, teacher: Inputs, options: Options, pair: _Options) -> Tensor:
    """The divergence, [N]."""
    if options.backend == "reference":
        return reference.linear_kl_divergence(
            inputs.hidden,
            inputs.weight,
            inputs.bias,
            teacher.hidden,
            teacher.weight,
            teacher.bias,
            inputs.token_ids != _NOT_SCORED,
            kind=DIVERGENCES[pair.kind],
            beta=pair.beta,
            temperature=pair.temperature,
            teacher_temperature=pair.teacher_temperature,
            softcap=pair.softcap,
            teacher_softcap=pair.teacher_softcap,
        )
    tensors = (*_tensors(inputs), *_tensors(teacher), inputs.token_ids)
    if torch.compiler.is_compiling():
        op = _registry.op("linear_kl_divergence_forward", options.backend)
        return op(*tensors, *astuple(pair), options.num_scored, list(options.tile or ()), options.budget)[0]
    return _LinearKlDivergence.apply(*tensors, options, pair)[0]


def _tensors(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor | None]:
    return inputs.hidden, inputs.weight, inputs.bias


@dataclass
class _Heads:
    """Two heads over the same rows and ranges of the vocabulary."""

    student: Head
    teacher: Head
    rows: Rows
    teacher_rows: Rows
    pair: _Options
    too_few: Tensor | None
    """On a GPU, whether more rows are scored than num_scored."""

    @classmethod
    def of(
        cls, inputs: Inputs, teacher: Inputs, options: Options, pair: _Options, rows: tuple[Rows, Rows] | None = None
    ) -> "_Heads":
        """The two heads over `rows`, the student's and the teacher's; by default over the scored rows."""
        student = start(inputs, options)
        options = replace(
            options,
            temperature=pair.teacher_temperature,
            softcap=pair.teacher_softcap,
            tile=(student.block_rows, student.tile_columns),
        )
        too_few = None
        if rows is None:
            of_student, too_few = scored_rows(inputs, options, student)
            scored = inputs.token_ids
            rows = of_student, Rows.gather(of_student.index, teacher.hidden, None, scored, of_student.whole)
        return cls(student, start(teacher, options), *rows, pair, too_few)

    @property
    def _row_bytes(self) -> int:
        width = self.student.logits_dtype.itemsize + self.teacher.logits_dtype.itemsize
        return self.student.weight.shape[0] * width

    def fits(self, budget: int) -> bool:
        return len(self.rows) * self._row_bytes <= budget

    def kept(self, rows: int) -> tuple[Tensor, Tensor]:
        """Memory for the logits of the first `rows` rows. Give the student's to POOL in the end."""
        at = slice(0, rows)
        return self.student.kept(self.rows.part(at)), self.teacher.kept(self.teacher_rows.part(at))

    def forward(self, kept: tuple[Tensor, Tensor] | None, budget: int) -> tuple[Tensor, Tensor]:
        """Divergence and centre [2, R], and row_stats [4, R], first the student's, then the teacher's."""
        total, block = len(self.rows), self.student.block_rows
        step = total if kept is not None else min(max(budget // (block * self._row_bytes), 1) * block, total)
        memory = self.kept(step) if kept is None else kept
        sums = self.student.weight.new_empty(3, total, dtype=torch.float64)
        stats = sums.new_empty(4, total, dtype=torch.float32)
        op = _registry.op("kl_divergence_part", self.student.backend)
        for at in slices(total, max(step, 1)):
            size = (at.stop - at.start) * self.student.weight.shape[0]
            student, teacher = self.rows.part(at), self.teacher_rows.part(at)
            logits, teacher_logits = memory[0][:size], memory[1][:size]
            stats[:2, at] = _row_stats(self.student, student, logits)
            stats[2:, at] = _row_stats(self.teacher, teacher, teacher_logits)
            sums[:, at] = 0.0
            tiles = self.student.tiles(logits, student), self.teacher.tiles(teacher_logits, teacher)
            for tile, teacher_tile in zip(*tiles, strict=True):
                sums[:, at] += op(tile, teacher_tile, *_halves(stats, at), *astuple(self.pair))
        if kept is None:
            POOL.give(memory[0])
        return divergence_and_centre(sums), stats

    def backward(
        self,
        grad: Tensor,
        results: Tensor,
        stats: Tensor,
        kept: tuple[Tensor, Tensor] | None,
        wanted: list[bool],
    ) -> tuple[Tensor | None, ...]:
        """The gradients of hidden, weight and bias that are wanted."""
        op = _registry.op("kl_divergence_part_backward", self.student.backend)
        centre = results[1].contiguous()
        tiles = None if kept is None else self.teacher.tiles(kept[1], self.teacher_rows)

        def to_gradient(vocab: slice, block: slice, tile: Tensor, gradient: Tensor) -> None:
            stats_of = _halves(stats, block)
            for tokens in slices(vocab.stop - vocab.start, self.student.tile_columns):
                at = slice(vocab.start + tokens.start, vocab.start + tokens.stop)
                if tiles is None:
                    teacher_tile = self.teacher.logits_tile(self.teacher_rows, block, at)
                else:
                    teacher_tile = tiles[at.start // self.student.tile_columns][block]
                given = (tile[:, tokens], teacher_tile, *stats_of, *astuple(self.pair), gradient[:, tokens])
                op(grad[block], centre[block], *given)

        gradients = self.student.new_gradients(self.rows, [*wanted, False, False], weight_in_pieces=False)
        self.student.backward_tiles(self.rows, to_gradient, None if kept is None else kept[0], gradients)
        return gradients.results(self.rows, self.student.weight.dtype)[:3]

    def scatter(self, values: Tensor) -> Tensor:
        """Values of all rows [K, N] from those of scored rows [K, R]; NaN if too few rows were projected."""
        scattered = torch.stack([self.rows.scatter(value) for value in values])
        return scattered if self.too_few is None else torch.where(self.too_few, float("nan"), scattered)


def _row_stats(head: Head, rows: Rows, kept: Tensor) -> Tensor:
    rows = replace(rows, token_ids=torch.full_like(rows.token_ids, _NO_TOKEN))
    largest, total, *_ = head.sums(rows, kept)
    return torch.stack([largest, total.log()])


def _halves(stats: Tensor, at: slice) -> tuple[Tensor, Tensor]:
    return stats[:2, at].contiguous(), stats[2:, at].contiguous()


class _LinearKlDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, scored, options, pair):
        inputs = Inputs(hidden, weight, bias, None, None, scored)
        teacher = Inputs(teacher_hidden, teacher_weight, teacher_bias, None, None, scored)
        wanted = [options.differentiated and needed for needed in ctx.needs_input_grad[:3]]
        with torch.autocast(hidden.device.type, enabled=False):
            heads = _Heads.of(inputs, teacher, options, pair)
            kept = heads.kept(len(heads.rows)) if any(wanted) and heads.fits(options.budget) else None
            results, stats = heads.forward(kept, options.budget)
            divergence = heads.scatter(results[:1])[0].clone()  # a view could not be changed in place
        ctx.options, ctx.pair, ctx.kept, ctx.wanted, ctx.too_few = options, pair, kept, wanted, heads.too_few
        hidden, teacher_hidden = heads.rows.hidden, heads.teacher_rows.hidden
        # Hidden states are saved by autograd alone, so that checkpointing and offloading hooks can let go of them.
        ctx.rows = tuple(replace(rows, hidden=hidden.new_empty(0)) for rows in (heads.rows, heads.teacher_rows))
        path = leads_to_inputs(hidden)
        ctx.save_for_backward(path, hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, results, stats)
        return divergence, path

    @staticmethod
    @first_order_only("linear_kl_divergence")
    def backward(ctx, saved, grad, grad_path):
        _, hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, results, stats = saved()
        rows = replace(ctx.rows[0], hidden=hidden), replace(ctx.rows[1], hidden=teacher_hidden)
        inputs = Inputs(hidden, weight, bias, None, None, rows[0].token_ids)
        teacher = Inputs(teacher_hidden, teacher_weight, teacher_bias, None, None, rows[1].token_ids)
        with torch.autocast(weight.device.type, enabled=False):
            heads = _Heads.of(inputs, teacher, ctx.options, ctx.pair, rows)
            kept, ctx.kept = ctx.kept, None  # their gradient takes their place
            gradients = heads.backward(rows[0].select(grad), results, stats, kept, ctx.wanted)
        if kept is not None:
            POOL.give(kept[0])
        return *nan_if(ctx.too_few, gradients), *(None,) * 6


# torch.compile sees one op and its gradient, which gathers the scored rows again and computes their logits again.


def _heads(backend: str, given) -> tuple[_Heads, int]:
    hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, scored = given[:7]
    *values, num_scored, tile, budget = given[7:]
    inputs = Inputs(hidden, weight, bias, None, None, scored)
    teacher = Inputs(teacher_hidden, teacher_weight, teacher_bias, None, None, scored)
    pair = _Options(*values)
    options = Options(pair.temperature, pair.softcap, _NOT_SCORED, None, num_scored, tuple(tile) or None, backend)
    return _Heads.of(inputs, teacher, options, pair), budget


def _forward_op(backend: str, *given):
    heads, budget = _heads(backend, given)
    divergence, *saved = heads.scatter(torch.cat(heads.forward(None, budget)))
    return divergence.clone(), torch.stack(saved)


def _backward_op(backend: str, grad, saved, wanted, *given):
    heads, _ = _heads(backend, given)
    rows = torch.stack([heads.rows.select(value) for value in (grad, *saved)])
    gradients = nan_if(heads.too_few, heads.backward(rows[0], rows[:2], rows[2:], None, wanted))
    return tuple(heads.student.weight.new_empty(0) if value is None else value.clone() for value in gradients)


def _forward_fake(hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, scored, *options):
    return hidden.new_empty(scored.shape, dtype=torch.float32), hidden.new_empty(
        (5, *scored.shape), dtype=torch.float32
    )


def _backward_fake(grad, saved, wanted, hidden, weight, bias, *rest):
    return tuple(
        value.new_empty(value.shape) if want and value is not None else weight.new_empty(0)
        for want, value in zip(wanted, (hidden, weight, bias), strict=True)
    )


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:7], output[1])
    ctx.options = inputs[7:]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _make_backward(backend):
    def backward(ctx, grad, grad_saved):
        *tensors, saved = ctx.saved_tensors
        wanted = [bool(needed) for needed in ctx.needs_input_grad[:3]]
        op = _registry.op("linear_kl_divergence_backward", backend)
        gradients = op(grad.contiguous(), saved, wanted, *tensors, *ctx.options)
        gradients = [value if want else None for want, value in zip(wanted, gradients, strict=True)]
        return *gradients, *(None,) * (4 + len(ctx.options))

    return backward


_TENSORS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor teacher_hidden, Tensor teacher_weight, Tensor? teacher_bias, "
    "Tensor scored"
)
_OPTIONS = (
    "int kind, float beta, float temperature, float teacher_temperature, float softcap, float teacher_softcap, "
    "int? num_scored, int[] tile, int budget"
)
_registry.define(
    "linear_kl_divergence_forward",
    f"({_TENSORS}, {_OPTIONS}) -> (Tensor divergence, Tensor saved)",
    _forward_fake,
    part_of="linear_kl_divergence",
    setup_context=_setup_context,
    backward=_make_backward,
)
_registry.define(
    "linear_kl_divergence_backward",
    f"(Tensor grad, Tensor saved, bool[] wanted, {_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    _backward_fake,
    part_of="linear_kl_divergence",
    backward=no_second_derivative("linear_kl_divergence_backward"),
)
for _backend in _backends.BACKENDS_OF["linear_kl_divergence"]:
    _registry.implement("linear_kl_divergence_forward", _backend, partial(_forward_op, _backend))
    _registry.implement("linear_kl_divergence_backward", _backend, partial(_backward_op, _backend))
