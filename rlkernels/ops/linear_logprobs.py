from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from rlkernels import _backends, _registry
from rlkernels.ops import _checks
from rlkernels.ops._first_order import first_order_only, leads_to_inputs, no_second_derivative
from rlkernels.ops.lm_head.gradients import nan_if
from rlkernels.ops.lm_head.head import forward_backward
from rlkernels.ops.lm_head.inputs import LOGITS_BUDGET_MB, Inputs, Options, budget_bytes, check_head, scored_rows, start
from rlkernels.ops.lm_head.outputs import OUTPUTS, Outputs
from rlkernels.ops.lm_head.tiles import POOL, scored_index, slices
from rlkernels.reference import linear_logprobs as reference


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = None,
    adapter: tuple[Tensor, Tensor] | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    ignore_index: int = -100,
    return_entropy: bool = False,
    outputs: tuple[str, ...] = (),
    group: Any = None,
    num_scored: int | None = None,
    logits_budget_mb: float = LOGITS_BUDGET_MB,
) -> Tensor | tuple[Tensor, ...]:
    """token_logprobs of the LM head's logits, which never exist as a whole.

        logits = scale * (hidden @ weight.T + bias + adapter[0] @ adapter[1].T)
        z = softcap * tanh(logits / softcap) / temperature     (softcap=None: logits / temperature)
        logprobs[i] = z[i, token_ids[i]] - logsumexp(z[i])
        entropy[i]  = -sum_v p[i, v] log p[i, v],  p = softmax(z)

    Only rows that are scored meet the head. They are gathered into blocks, and the product of a block with a range of
    the vocabulary is a tile of logits, which is folded into its rows' sums at once. The backward pass computes the tile
    again and turns it, in place, into its gradient. The gradients of hidden and weight are summed from these, in
    float32. A tile has 256 rows (512 on a GPU) and as many tokens as the L2 cache has room for. A row's bits depend on
    the size of the tiles, not on the other rows.

    On a CPU, PyTorch rounds every product of bfloat16 or float16 matrices to 16 bits. There the tiles are rounded, as
    all logits would be, and so is each term of hidden's gradient, one per range of the vocabulary. Kept logits give
    hidden's gradient in one product, rounded once.

    Args:
        hidden: [..., H], float32, bfloat16, float16 or float64 (served by the reference, in float64).
        weight: [V, H], of the dtype of hidden. Under autocast all floating-point inputs are cast first, as those of
            torch.nn.functional.linear are.
        token_ids: [...], any integer dtype, the shape of hidden without its last dimension.
        bias: [V].
        adapter: a pair [..., r] and [V, r], whose product is added to the logits: LoRA on the head, with
            scaling * dropout(hidden) @ A.T and B.
        temperature: > 0, divides the logits after the softcap.
        softcap: > 0, or None (Gemma's final_logit_softcapping).
        scale: > 0 (Cohere's logit_scale, 1 / Granite's logits_scaling).
        ignore_index: rows with this id are not scored: their results and gradients are 0, whatever they hold.
        return_entropy: also return the entropy.
        outputs: further results, not differentiable, which PyTorch computes from each row's z, tile by tile:
            "log_sum_sq_probs": log sum_v p_v^2;  "mean_logit": the mean of z;  "is_top1": whether the token is the
            likeliest, and the first one in a tie.
        group: a torch.distributed process group. Its processes have the same rows of hidden, and each has a share of
            the vocabulary (of weight, bias and adapter[1]), in the order of their ranks. Each process gets all results,
            the whole gradient of hidden, and the gradient of its share of weight. The host waits for the sizes of the
            shares. Not under torch.compile.
        num_scored: the number of rows to project, at least that of the scored rows. Without it the host waits for the
            device to count them, the only time that it waits.
        logits_budget_mb: if the logits of all scored rows take no more memory, they are kept for the backward pass, not
            computed again, which saves one product in four. The default, 128, has room for 680 rows of a vocabulary of
            49,152 in float32 and 1,360 in bfloat16. On a CPU the next call uses that memory again. On a GPU logits of
            16-bit factors that are not kept are computed and used in one kernel, where they round differently.

    Returns:
        float32 [...] (float64 for float64 hidden), or a tuple (logprobs, entropy, *outputs) of those asked for;
        is_top1 is bool.

    Differentiable: logprobs and entropy with respect to hidden, weight, bias and both parts of adapter, once. Second
    derivatives and forward mode raise NotImplementedError, except in the reference.

    Edge cases: as in token_logprobs. With nothing scored all results and gradients are 0. Logprobs are never above 0.

    Raises:
        TypeError, ValueError: for wrong dtypes, shapes, devices and options; on a CPU for an id outside [0, V) that is
            not ignore_index, and for more scored rows than num_scored. On a GPU such a row gives NaN, and too small a
            num_scored makes everything NaN; with RLKERNELS_CHECK=1 an id raises there too.

    Traffic: three products of [scored, H] x [H, V]; four where logits are computed again; two where weight, bias and
    adapter are not differentiated and no entropy is asked for (the forward pass then makes the gradient of hidden for
    an upstream gradient of 1). Besides the factors of the products, each tile of logits is written and read once per
    product, and read and written once for its gradient. Where a GPU computes and uses logits in one kernel, only their
    gradient is written, once, in 16 bits, and read by two products.

    References: Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models" (arXiv 2411.09009).
    """
    inputs, options = check_head(
        hidden, weight, token_ids, bias, adapter, temperature, softcap, scale, ignore_index, group, num_scored
    )
    if not isinstance(outputs, tuple | list):
        raise TypeError(f"outputs must be a sequence of names, a tuple or a list; got {outputs!r}")
    outputs = tuple(outputs)
    for name in outputs:
        _checks.choice("outputs", name, OUTPUTS)
    budget = budget_bytes(logits_budget_mb)
    options = replace(options, return_entropy=return_entropy, outputs=outputs, budget=budget)
    logprobs, entropy, others = evaluate(inputs, options)
    results = [value.view(token_ids.shape) for value in (logprobs, *([entropy] if return_entropy else []), *others)]
    return tuple(results) if len(results) > 1 else results[0]


def evaluate(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Log-probabilities, entropy and other outputs, [N] each."""
    options = replace(options, differentiated=torch.is_grad_enabled())
    if options.backend == "reference" and options.group is None:
        if options.num_scored is not None and inputs.token_ids.is_cpu and not torch.compiler.is_compiling():
            scored_index(inputs.token_ids != options.ignore_index, options.num_scored)  # checks it
        adapter = None if inputs.adapter is None else (inputs.adapter, cast(Tensor, inputs.adapter_weight))
        logprobs, entropy, *others = reference.linear_token_logprobs(
            inputs.hidden,
            inputs.weight,
            inputs.token_ids,
            inputs.bias,
            adapter,
            temperature=options.temperature,
            softcap=options.softcap,
            ignore_index=options.ignore_index,
            outputs=options.outputs,
        )
    elif torch.compiler.is_compiling():
        logprobs, entropy, _, packed = _registry.op("linear_token_logprobs_forward", options.backend)(
            *inputs.tensors(),
            options.temperature,
            options.softcap,
            options.ignore_index,
            options.return_entropy,
            list(options.outputs),
            options.num_scored,
            list(options.tile or ()),
        )
        others = list(packed.unbind())
    else:
        logprobs, entropy, *others, _ = _LinearLogprobs.apply(*inputs.tensors(), options)
    return logprobs, entropy, [v.bool() if n == "is_top1" else v for n, v in zip(options.outputs, others, strict=True)]


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, adapter, adapter_weight, token_ids, options):
        inputs = Inputs(hidden, weight, bias, adapter, adapter_weight, token_ids)
        wanted = [options.differentiated and needed for needed in ctx.needs_input_grad[:5]]
        with torch.autocast(hidden.device.type, enabled=False):
            head = start(inputs, options)
            rows, too_few = scored_rows(inputs, options, head)
            also = Outputs(head, rows, options.outputs) if options.outputs else None
            unit = kept = None
            fits = any(wanted) and head.fits(len(rows), options.budget)
            frozen = any(wanted) and not (wanted[1] or wanted[2] or wanted[4])
            # Where products are rounded this rounds once more than two products, one of them in the backward pass.
            in_forward = frozen and not options.return_entropy and not (head.rounds and fits)
            if in_forward and head.fits(head.block_rows, options.budget):
                unit = head.new_gradients(rows, wanted, weight_in_pieces=False)
                groups = slices(len(rows), head.rows_within(options.budget))
                results = forward_backward(head, rows, groups, _one, unit, also)
                head.reduce(unit)
            else:
                if fits:
                    kept = head.kept(rows)
                results = head.forward(rows, kept, also)
            others = [] if also is None else also.results(results[2])
            # Copies, because a caller may not change in place what is saved for the backward pass, or a view.
            values = [rows.scatter(value).clone() for value in (*results[:2], *others)]
        if too_few is not None:
            values = [torch.where(too_few, float("nan"), value) for value in values]
        ctx.options, ctx.share, ctx.unit, ctx.kept, ctx.wanted = options, head.share, unit, kept, wanted
        ctx.too_few = too_few
        # Hidden states are saved by autograd alone, so that checkpointing and offloading hooks can let go of them.
        ctx.rows = replace(rows, hidden=rows.hidden.new_empty(0), adapter=None)
        path = leads_to_inputs(hidden)
        ctx.save_for_backward(path, weight, bias, adapter_weight, rows.hidden, rows.adapter, *results)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*values[2:], *([] if options.return_entropy else [values[1]]))
        return *values, path

    @staticmethod
    @first_order_only("linear_token_logprobs")
    def backward(ctx, saved, grad_logprobs, grad_entropy, *others):
        _, weight, bias, adapter_weight, hidden, adapter, *results = saved()
        rows = replace(ctx.rows, hidden=hidden, adapter=adapter)
        grad_logprobs, grad_entropy = (None if g is None else rows.select(g) for g in (grad_logprobs, grad_entropy))
        with torch.autocast(hidden.device.type, enabled=False):
            if ctx.unit is not None:
                gradients = ctx.unit.scaled(grad_logprobs)
            else:
                inputs = Inputs(hidden, weight, bias, adapter, adapter_weight, rows.token_ids)
                head = start(inputs, ctx.options, ctx.share)
                gradients = head.new_gradients(rows, ctx.wanted, weight_in_pieces=False)
                kept, ctx.kept = ctx.kept, None  # their gradient takes their place
                head.backward(rows, grad_logprobs, grad_entropy, *results, kept, gradients)
                head.reduce(gradients)
                if kept is not None:
                    POOL.give(kept)
        return *nan_if(ctx.too_few, gradients.results(rows, weight.dtype)), None, None


def _one(at: slice, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, None]:
    return torch.ones_like(logprobs), None


# torch.compile sees one op and its gradient, which gathers the scored rows again and computes their logits again.


def _options(backend: str, temperature, softcap, ignore_index, return_entropy, outputs, num_scored, tile) -> Options:
    return Options(
        temperature,
        softcap,
        ignore_index,
        None,
        num_scored,
        tuple(tile) or None,
        backend,
        return_entropy,
        tuple(outputs),
    )


def _forward_op(backend: str, hidden, weight, bias, adapter, adapter_weight, token_ids, *given):
    inputs, options = Inputs(hidden, weight, bias, adapter, adapter_weight, token_ids), _options(backend, *given)
    head = start(inputs, options)
    rows, too_few = scored_rows(inputs, options, head)
    also = Outputs(head, rows, options.outputs) if options.outputs else None
    logprobs, entropy, row_stats = head.forward(rows, None, also)
    others = [] if also is None else also.results(row_stats)
    values = torch.stack([rows.scatter(value) for value in (logprobs, entropy, *row_stats, *others)])
    if too_few is not None:
        values = torch.where(too_few, float("nan"), values)
    return values[0].clone(), values[1].clone(), values[2:4].clone(), values[4:].clone()


def _backward_op(
    backend: str,
    grad_logprobs,
    grad_entropy,
    hidden,
    weight,
    bias,
    adapter,
    adapter_weight,
    token_ids,
    logprobs,
    entropy,
    row_stats,
    wanted,
    *given,
):
    inputs, options = Inputs(hidden, weight, bias, adapter, adapter_weight, token_ids), _options(backend, *given)
    head = start(inputs, options)
    rows, too_few = scored_rows(inputs, options, head)
    grad_logprobs, grad_entropy = (None if g is None else rows.select(g) for g in (grad_logprobs, grad_entropy))
    saved = (rows.select(logprobs), rows.select(entropy), torch.stack([rows.select(value) for value in row_stats]))
    gradients = head.new_gradients(rows, wanted, weight_in_pieces=False)
    head.backward(rows, grad_logprobs, grad_entropy, *saved, None, gradients)
    results = nan_if(too_few, gradients.results(rows, weight.dtype))
    return tuple(weight.new_empty(0) if value is None else value.clone() for value in results)


def _forward_fake(hidden, weight, bias, adapter, adapter_weight, token_ids, *options):
    def of_rows(*leading):
        return hidden.new_empty((*leading, *token_ids.shape), dtype=torch.float32)

    return of_rows(), of_rows(), of_rows(2), of_rows(len(options[4]))


def _backward_fake(grad_logprobs, grad_entropy, hidden, weight, bias, adapter, adapter_weight, *rest):
    inputs = (hidden, weight, bias, adapter, adapter_weight)
    wanted = rest[4]
    return tuple(
        value.new_empty(value.shape) if want and value is not None else weight.new_empty(0)
        for want, value in zip(wanted, inputs, strict=True)
    )


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:6], *output[:3])
    ctx.options = inputs[6:]
    ctx.mark_non_differentiable(output[2], output[3])
    ctx.set_materialize_grads(False)


def _make_backward(backend):
    def backward(ctx, grad_logprobs, grad_entropy, *others):
        tensors = ctx.saved_tensors
        wanted = [bool(needed) for needed in ctx.needs_input_grad[:5]]
        gradients = _registry.op("linear_token_logprobs_backward", backend)(
            None if grad_logprobs is None else grad_logprobs.contiguous(),
            None if grad_entropy is None or not ctx.options[3] else grad_entropy.contiguous(),
            *tensors,
            wanted,
            *ctx.options,
        )
        gradients = [value if want else None for want, value in zip(wanted, gradients, strict=True)]
        return *gradients, None, *(None,) * len(ctx.options)

    return backward


_INPUTS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor? adapter, Tensor? adapter_weight, Tensor token_ids"
_OPTIONS = (
    "float temperature, float softcap, int ignore_index, bool return_entropy, str[] outputs, int? num_scored, "
    "int[] tile"
)
_registry.define(
    "linear_token_logprobs_forward",
    f"({_INPUTS}, {_OPTIONS}) -> (Tensor logprobs, Tensor entropy, Tensor row_stats, Tensor others)",
    _forward_fake,
    part_of="linear_token_logprobs",
    setup_context=_setup_context,
    backward=_make_backward,
)
_registry.define(
    "linear_token_logprobs_backward",
    f"(Tensor? grad_logprobs, Tensor? grad_entropy, {_INPUTS}, Tensor logprobs, Tensor entropy, Tensor row_stats, "
    f"bool[] wanted, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_fake,
    part_of="linear_token_logprobs",
    backward=no_second_derivative("linear_token_logprobs_backward"),
)
for _backend in _backends.BACKENDS_OF["linear_token_logprobs"]:
    _registry.implement("linear_token_logprobs_forward", _backend, partial(_forward_op, _backend))
    _registry.implement("linear_token_logprobs_backward", _backend, partial(_backward_op, _backend))
