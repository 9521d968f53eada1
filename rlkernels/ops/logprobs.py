import torch
from torch import Tensor

from rlkernels import _backends, _registry
from rlkernels.ops import _checks
from rlkernels.ops._first_order import first_order_only, no_second_derivative
from rlkernels.reference import logprobs as reference


def token_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
    inplace_backward: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probabilities of chosen tokens, and optionally the entropy of the distributions they were chosen from.

        z = logits / temperature                              (softcap=None)
        z = softcap * tanh(logits / softcap) / temperature    (Gemma)
        logprobs[i] = z[i, token_ids[i]] - logsumexp(z[i])
        entropy[i]  = -sum_v p[i, v] log p[i, v],  p = softmax(z)

    The arithmetic is float32 for float32, bfloat16 and float16 logits, whose softmax is never stored. The
    log-probability is formed as -softplus(logsumexp of the other logits - z_t), and its gradient with -expm1(logprob),
    so that confident tokens keep their precision; it is never above 0.

    Args:
        logits: [..., V], float32, bfloat16, float16 or float64 (served by the reference, in float64). Rows may be
            strided in any way that leaves each row dense and the leading dimensions mergeable into two, as
            logits[:, :-1] does; other layouts are copied first.
        token_ids: [...], any integer dtype, the shape of logits without its last dimension.
        temperature: > 0, divides the logits after the softcap.
        softcap: > 0, or None.
        ignore_index: rows with this id are not scored: logprob 0, entropy 0, gradient exactly 0, whatever they hold.
        return_entropy: also return the entropy.
        inplace_backward: the backward pass writes the gradient over the logits instead of allocating as much memory
            again. The logits are lost by then: autograd is told so, and a second backward pass, or a producer that
            saved its output for its own gradient (tanh, exp, softmax), raises instead of computing with the
            overwritten values. Ignored under torch.compile, which plans memory itself, and by the reference.

    Returns:
        float32 [...] (float64 for float64 logits), or the pair (logprobs, entropy).

    Differentiable: both outputs with respect to logits, once. Second derivatives and forward mode raise
    NotImplementedError, but in the reference.

    Edge cases: a -inf logit has probability 0 and contributes 0 to the entropy (but a softcap makes it -softcap: mask
    after capping, not before); a token whose own logit is -inf has the logprob -inf; a row that is -inf throughout, or
    holds a NaN or +inf, gives NaN, as log_softmax does. With no rows the result is empty.

    Raises:
        TypeError, ValueError: for wrong dtypes, shapes, devices and options; for an id outside [0, V) that is not
            ignore_index on a CPU. On a GPU, and in the reference under torch.compile, such a row gives NaN;
            with RLKERNELS_CHECK=1 it raises there too, but under torch.compile. With
            inplace_backward also for leaf logits that require a gradient, and for logits whose elements overlap in
            memory.

    Traffic: forward reads the logits once; backward reads them once and writes the gradient once.

    References: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax" (arXiv 1805.02867).
    """
    _checks.tensor("logits", logits, _checks.FLOATS)
    _checks.tensor("token_ids", token_ids, _checks.INTEGERS)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must have the shape [..., V] with V >= 1; got {list(logits.shape)}")
    _checks.shape("token_ids", token_ids, tuple(logits.shape[:-1]), because="that of logits without its last dimension")
    _checks.same_device("token_ids", token_ids, "logits", logits)
    most = _checks.MOST_DIVISOR
    temperature = _checks.number("temperature", temperature, above=0.0, at_most=most)
    softcap = 0.0 if softcap is None else _checks.number("softcap", softcap, above=0.0, at_most=most)
    ignore_index = _checks.integer("ignore_index", ignore_index)
    inplace_backward = (
        inplace_backward and logits.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    )
    if inplace_backward:
        _refuse_inplace(logits)

    backend = _backends.select(logits, "token_logprobs")
    if _checks.values_in_python(backend, token_ids):
        check_ids(token_ids.long(), logits.shape[-1], ignore_index)
    if backend == "reference":
        logprobs, entropy = reference.token_logprobs(
            logits, token_ids.long(), temperature=temperature, softcap=softcap, ignore_index=ignore_index
        )
        return (logprobs, entropy) if return_entropy else logprobs

    _checks.no_tangent("logits", logits)
    rows = _rows(logits)
    ids = token_ids.reshape(rows.shape[:-1])
    if backend not in _checks.ON_GPUS:
        ids = ids.long().contiguous()
    options = (temperature, softcap, ignore_index, return_entropy)
    if inplace_backward:
        logprobs, entropy = _InplaceBackward.apply(rows, ids, *options, backend)
    else:
        logprobs, entropy, _ = _registry.op("token_logprobs_forward", backend)(rows, ids, *options)
    logprobs = logprobs.view(token_ids.shape)
    return (logprobs, entropy.view(token_ids.shape)) if return_entropy else logprobs


def _rows(logits: Tensor) -> Tensor:
    """logits [..., V] as [A, B, V] with dense rows: a view wherever strides allow one."""
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        logits = logits.contiguous()
    if logits.dim() <= 3:
        return logits[(None,) * (3 - logits.dim())]
    return logits.flatten(0, -3)


def _refuse_inplace(logits: Tensor) -> None:
    base = logits._base if logits._is_view() else logits
    if logits.is_leaf or (base is not None and base.is_leaf and base.requires_grad):
        raise ValueError(
            "logits must not be a leaf that requires a gradient when inplace_backward=True, "
            "which would overwrite its values with the gradient; got a leaf or a view of one"
        )
    extent = 0
    for stride, size in sorted((st, si) for st, si in zip(logits.stride(), logits.shape, strict=True) if si > 1):
        if stride <= extent:
            raise ValueError(
                "logits must not overlap in memory when inplace_backward=True; "
                f"got the shape {list(logits.shape)} with the strides {list(logits.stride())}"
            )
        extent += stride * (size - 1)


def check_ids(token_ids: Tensor, vocab_size: int, ignore_index: int) -> None:
    wrong = ((token_ids < 0) | (token_ids >= vocab_size)) & (token_ids != ignore_index)
    if wrong.any():
        where = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"token_ids must be in [0, {vocab_size}) or ignore_index ({ignore_index}); "
            f"got {token_ids[tuple(where)].item()} at {where}"
        )


class _InplaceBackward(torch.autograd.Function):
    """The forward op with the gradient that overwrites the logits."""

    @staticmethod
    def forward(ctx, logits, token_ids, temperature, softcap, ignore_index, return_entropy, backend):
        logprobs, entropy, row_stats = _registry.op("token_logprobs_forward", backend)(
            logits, token_ids, temperature, softcap, ignore_index, return_entropy
        )
        ctx.save_for_backward(logits, token_ids, logprobs, entropy, row_stats)
        ctx.options = (temperature, softcap, ignore_index)
        ctx.backend = backend
        ctx.set_materialize_grads(False)
        if not return_entropy:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @first_order_only("token_logprobs")
    def backward(ctx, saved, grad_logprobs, grad_entropy):
        logits, token_ids, logprobs, entropy, row_stats = saved()
        _registry.op("token_logprobs_backward_", ctx.backend)(
            _contiguous(grad_logprobs),
            _contiguous(grad_entropy),
            logits,
            token_ids,
            logprobs,
            entropy,
            row_stats,
            *ctx.options,
        )
        # The op runs below autograd, which would not notice: whoever saved these logits must find them changed.
        torch.autograd.graph.increment_version(logits)
        return logits.detach(), None, None, None, None, None, None


def _contiguous(gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else gradient.contiguous()


def _forward_fake(logits, token_ids, temperature, softcap, ignore_index, return_entropy):
    def per_row():
        return logits.new_empty(token_ids.shape, dtype=torch.float32)

    entropy = per_row() if return_entropy else logits.new_empty(0, dtype=torch.float32)
    return per_row(), entropy, logits.new_empty((2, *token_ids.shape), dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    logits, token_ids, temperature, softcap, ignore_index, return_entropy = inputs
    ctx.save_for_backward(logits, token_ids, *output)
    ctx.options = (temperature, softcap, ignore_index)
    ctx.return_entropy = return_entropy
    ctx.set_materialize_grads(False)


def _make_backward(backend):
    def backward(ctx, grad_logprobs, grad_entropy, grad_row_stats):
        logits, token_ids, logprobs, entropy, row_stats = ctx.saved_tensors
        grad_logits = _registry.op("token_logprobs_backward", backend)(
            _contiguous(grad_logprobs),
            _contiguous(grad_entropy) if ctx.return_entropy else None,
            logits,
            token_ids,
            logprobs,
            entropy,
            row_stats,
            *ctx.options,
        )
        return grad_logits, None, None, None, None, None

    return backward


def _backward_fake(grad_logprobs, grad_entropy, logits, *rest):
    return logits.new_empty(logits.shape)


_BACKWARD_ARGUMENTS = (
    "Tensor token_ids, Tensor logprobs, Tensor entropy, Tensor row_stats, "
    "float temperature, float softcap, int ignore_index"
)
_registry.define(
    "token_logprobs_forward",
    "(Tensor logits, Tensor token_ids, float temperature, float softcap, int ignore_index, bool return_entropy)"
    " -> (Tensor logprobs, Tensor entropy, Tensor row_stats)",
    _forward_fake,
    part_of="token_logprobs",
    setup_context=_setup_context,
    backward=_make_backward,
)
_registry.define(
    "token_logprobs_backward",
    f"(Tensor? grad_logprobs, Tensor? grad_entropy, Tensor logits, {_BACKWARD_ARGUMENTS}) -> Tensor",
    _backward_fake,
    part_of="token_logprobs",
    backward=no_second_derivative("token_logprobs_backward"),
)
_registry.define(
    "token_logprobs_backward_",
    f"(Tensor? grad_logprobs, Tensor? grad_entropy, Tensor(a!) logits, {_BACKWARD_ARGUMENTS}) -> ()",
    lambda *inputs: None,
    part_of="token_logprobs",
)
_registry.define(
    "token_logprobs_part",
    "(Tensor logits, Tensor token_ids, int vocab_start, float temperature, float softcap, int ignore_index, "
    "bool return_entropy) -> Tensor",
    lambda logits, token_ids, *options: logits.new_empty((4, *token_ids.shape), dtype=torch.float32),
    part_of="linear_token_logprobs",
)
_registry.define(
    "linear_token_logprobs_sums",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor token_ids, float temperature, float softcap, "
    "bool return_entropy) -> Tensor",
    lambda hidden, *rest: hidden.new_empty((4, len(hidden)), dtype=torch.float32),
    part_of="linear_token_logprobs",
    backends=("triton",),
)
_registry.define(
    "linear_token_logprobs_gradient",
    "(Tensor? grad_logprobs, Tensor? grad_entropy, Tensor hidden, Tensor weight, Tensor? bias, Tensor token_ids, "
    "Tensor logprobs, Tensor entropy, Tensor row_stats, int first, int end, float temperature, float softcap, "
    "int ignore_index) -> Tensor",
    lambda grad_logprobs, grad_entropy, hidden, *rest: hidden.new_empty((len(hidden), rest[7] - rest[6])),
    part_of="linear_token_logprobs",
    backends=("triton",),
)
_registry.define(
    "token_logprobs_join",
    "(Tensor parts, float temperature) -> Tensor",
    lambda parts, temperature: parts.new_empty(parts.shape[1:]),
    part_of="linear_token_logprobs",
    backends=("triton",),
)
_registry.define(
    "token_logprobs_finish",
    "(Tensor parts, float temperature) -> (Tensor logprobs, Tensor entropy, Tensor row_stats)",
    lambda parts, temperature: tuple(parts.new_empty(*shape, parts.shape[2]) for shape in ((), (), (2,))),
    part_of="linear_token_logprobs",
    backends=("triton",),
)
_registry.define(
    "token_logprobs_part_backward",
    "(Tensor? grad_logprobs, Tensor? grad_entropy, Tensor logits, Tensor token_ids, int vocab_start, "
    "Tensor logprobs, Tensor entropy, Tensor row_stats, float temperature, float softcap, int ignore_index, "
    "Tensor(a!) gradient) -> ()",
    lambda *inputs: None,
    part_of="linear_token_logprobs",
)
