"""TRL on our kernels.

    import rlkernels.integrations.trl as rk

    rk.patch()              # or: with rk.patched(): ...

Its trainers need no other change, not even those that exist already. Replaced, in TRL 1.13 and later:

- `_ChunkedLogProbFunction`, the log-probabilities of the fused LM head, on which SFT, DPO, KTO, GRPO and RLOO train
  since 1.15 (some of GRPO before): by `rlkernels.linear_token_logprobs`.
- `selective_log_softmax`, `entropy_from_logits` and `selective_log_softmax_and_entropy`, for wherever logits exist: by
  `rlkernels.token_logprobs`.
- `_chunked_divergence_loss`, the loss of the distillation trainer: by `rlkernels.linear_kl_divergence`.

Left as it is:

- the functions of logits where these are bfloat16 or float16 on a CPU: TRL's own tests want them equal, bit for bit, to
  log_softmax in that dtype, and theirs serve;
- what is written out in the trainers and is no function: the advantages, ratios and losses of GRPO and RLOO, the losses
  of DPO and KTO, and SFT's own chunked cross-entropy before 1.15;
- `nanstd`, a function of few numbers a step;
- the Reward trainer, which calls none of the above.

What differs from TRL:

- An id outside of the vocabulary raises ValueError on a CPU and gives NaN on a GPU (there: RuntimeError, or as if its
  logit were 0), but for -100 given to the fused head, whose row is 0 throughout.
- A logit of -inf adds 0 to the entropy (there: NaN). No rows are no error. There is no second derivative.
- The fused head takes no temperature of 0 or below, and chooses the sizes of its tiles itself. A weight of another
  dtype than that of the products gets a gradient rounded to the latter, as by torch.nn.Linear under autocast.
- Gradients of the fused head in bfloat16 and float16 are those of PyTorch, and of TRL since 1.15, which rounds the
  gradient of a tile of logits for its products. Before, TRL multiplied them in float32, somewhat nearer the truth.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from rlkernels import linear_kl_divergence, linear_token_logprobs, token_logprobs
from rlkernels.integrations._patch import Patch, Replacement

_HALF = (torch.bfloat16, torch.float16)
_SKIPPED = torch.iinfo(torch.int64).min
"""The id of a row that is not scored: one that nobody has, since TRL takes -100 for a mistake."""

_OUTPUTS = {"log_sum_sq_probs": "log_sum_sq_probs", "mean_logits": "mean_logit", "is_top1": "is_top1"}
"""TRL's names of them, and ours."""


def chunked_logprobs(
    hidden,
    weight,
    bias,
    targets,
    temperature,
    chunk_size,
    final_logit_softcapping=None,
    logit_scale=1.0,
    outputs=("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
):
    """(logprobs, entropy, log_sum_sq_probs, mean_logits, is_top1), float32; None for what is not in `outputs`."""
    names = [name for name in ("entropy", *_OUTPUTS) if name in outputs]
    values = linear_token_logprobs(
        **_head(hidden, weight, bias, final_logit_softcapping, logit_scale),
        token_ids=targets,
        temperature=temperature,
        return_entropy="entropy" in outputs,
        outputs=tuple(_OUTPUTS[name] for name in names if name != "entropy"),
    )
    named = dict(zip(["logprobs", *names], values if names else [values], strict=True))
    # Also of float64 TRL makes float32, which its trainers copy into buffers of that dtype.
    named = {name: value if value.dtype == torch.bool else value.float() for name, value in named.items()}
    return tuple(named.get(name) for name in ("logprobs", "entropy", *_OUTPUTS))


def chunked_logprobs_and_entropy(
    last_hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping=None, logit_scale=1.0
):
    """As it was before 1.15."""
    options = (temperature, chunk_size, final_logit_softcapping, logit_scale)
    return chunked_logprobs(last_hidden, weight, bias, targets, *options, outputs=("entropy",))[:2]


def selective_log_softmax(logits, index, temperature=1.0, row_mask=None):
    """The dtype is that of theirs, and float32 until then."""
    if _theirs_serves(logits, index, row_mask):
        return _theirs("selective_log_softmax")(logits, index, temperature, row_mask)
    return _scored(logits, index, temperature, row_mask)[0]


def selective_log_softmax_of_logits(logits, index):
    """As it was before 1.14."""
    if _theirs_serves(logits, index):
        return _theirs("selective_log_softmax")(logits, index)
    return _scored(logits, index)[0]


def entropy_from_logits(logits, chunk_size=128):
    """The dtype is that of theirs."""
    index = logits.new_zeros(logits.shape[:-1], dtype=torch.long)
    if _theirs_serves(logits, index):
        return _theirs("entropy_from_logits")(logits, chunk_size)
    return _scored(logits, index, with_entropy=True)[1]


def selective_log_softmax_and_entropy(logits, index, entropy_requires_grad=True, temperature=1.0, row_mask=None):
    """The dtypes are those of theirs."""
    if _theirs_serves(logits, index, row_mask):
        name = "selective_log_softmax_and_entropy"
        return _theirs(name)(logits, index, entropy_requires_grad, temperature, row_mask)
    logprobs, entropy = _scored(logits, index, temperature, row_mask, with_entropy=True)
    return logprobs, entropy if entropy_requires_grad else entropy.detach()


def chunked_divergence_loss(
    student_hidden_states,
    teacher_hidden_states,
    student_lm_head_weight,
    teacher_lm_head_weight,
    completion_mask,
    beta,
    num_items_in_batch=None,
    student_lm_head_bias=None,
    teacher_lm_head_bias=None,
    student_logit_scale=1.0,
    teacher_logit_scale=1.0,
    student_final_logit_softcapping=None,
    teacher_final_logit_softcapping=None,
    temperature=1.0,
):
    """(loss, sum of the student's entropies, number of scored positions). The entropy is data, as it is since 1.15."""
    from trl.trainer.utils import maybe_gather_lm_head_ctx

    device = student_hidden_states.device.type
    student = [student_hidden_states, student_lm_head_weight, student_lm_head_bias]
    teacher = [teacher_hidden_states, teacher_lm_head_weight, teacher_lm_head_bias]
    student, teacher = ([_whole(value) for value in head] for head in (student, teacher))
    valid = completion_mask != 0
    num_valid = valid.sum()
    with (
        maybe_gather_lm_head_ctx(*student[1:]),
        maybe_gather_lm_head_ctx(*teacher[1:]),
        # A CPU's products of bfloat16 are rounded to it, and theirs are not.
        torch.autocast(device, enabled=device != "cpu" and torch.is_autocast_enabled(device)),
    ):
        if device == "cpu":
            student, teacher = ([_at_least_float32(value) for value in head] for head in (student, teacher))
        head = _head(*student, student_final_logit_softcapping, student_logit_scale)
        of_teacher = _head(*teacher, teacher_final_logit_softcapping, teacher_logit_scale)
        options = {"temperature": temperature, "num_scored": int(num_valid)}
        divergence = linear_kl_divergence(
            **head,
            **{f"teacher_{name}": value for name, value in of_teacher.items()},
            mask=valid,
            kind="js",
            beta=beta,
            **options,
        )
        with torch.no_grad():
            ids = torch.where(valid, 0, _SKIPPED)
            _, entropy = linear_token_logprobs(
                **head, token_ids=ids, ignore_index=_SKIPPED, return_entropy=True, **options
            )
    if num_items_in_batch is None:
        num_items_in_batch = num_valid.clamp(min=1)
    elif isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(divergence.device)
    return divergence.float().sum() / num_items_in_batch, entropy.float().sum(), num_valid


def chunked_divergence_loss_by_chunk_size(
    student_hidden_states,
    teacher_hidden_states,
    student_lm_head_weight,
    teacher_lm_head_weight,
    completion_mask,
    beta,
    chunk_size,
    num_items_in_batch=None,
    student_lm_head_bias=None,
    teacher_lm_head_bias=None,
    student_logit_scale=1.0,
    teacher_logit_scale=1.0,
    student_final_logit_softcapping=None,
    teacher_final_logit_softcapping=None,
    temperature=1.0,
):
    """As it was before 1.15."""
    return chunked_divergence_loss(
        student_hidden_states,
        teacher_hidden_states,
        student_lm_head_weight,
        teacher_lm_head_weight,
        completion_mask,
        beta,
        num_items_in_batch,
        student_lm_head_bias,
        teacher_lm_head_bias,
        student_logit_scale,
        teacher_logit_scale,
        student_final_logit_softcapping,
        teacher_final_logit_softcapping,
        temperature,
    )


def _head(hidden, weight, bias, softcap, scale):
    """A head as our functions take it."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    # Saved for the backward pass are aliases: DeepSpeed's ZeRO-3 takes a parameter's data away after the forward pass.
    weight, bias = (None if value is None else value.view_as(value).to(dtype) for value in (weight, bias))
    if scale <= 0:
        hidden, bias, scale = hidden * scale, None if bias is None else bias * scale, 1.0
    if softcap is not None:
        softcap = abs(softcap) or 1.0
    return {"hidden": hidden, "weight": weight, "bias": bias, "softcap": softcap, "scale": scale}


def _whole(value):
    return value.full_tensor() if isinstance(value, DTensor) else value


def _at_least_float32(value):
    return value.float() if value is not None and value.dtype in _HALF else value


def _theirs(name):
    return PATCH.original(f"trl.trainer.utils:{name}")


def _theirs_serves(logits, index, row_mask=None):
    """Whether TRL's own function does: none that rounds less often than log_softmax of 16 bits gives the same bits."""
    if logits.device.type != "cpu" or logits.dtype not in _HALF or not logits.numel():
        return False
    return _dtype_of_theirs(logits, index, row_mask) in _HALF


def _scored(logits, index, temperature=1.0, row_mask=None, with_entropy=False):
    """Log-probabilities of `index`, and the entropy if it is asked for."""
    if temperature <= 0:
        raise ValueError("temperature must be positive")
    several = index.dim() == logits.dim()
    dtype = _dtype_of_theirs(logits, index, row_mask)
    if dtype in _HALF and temperature != 1.0:
        logits, temperature = logits / temperature, 1.0  # rounded as theirs
    # Of several tokens a row, the likeliest gives the logsumexp, since it has a log-probability that is finite.
    ids = logits.detach().argmax(-1) if several else index
    if row_mask is not None and not several:
        ids = ids.long().masked_fill(row_mask == 0, _SKIPPED)
    if several and logits.dtype in _HALF:
        # Three gradients come together at each logit. In float32 they are rounded but once.
        logits = logits.float()
    values = token_logprobs(logits, ids, temperature=temperature, ignore_index=_SKIPPED, return_entropy=with_entropy)
    logprobs, entropy = values if with_entropy else (values, None)
    if several:
        z = logits.gather(-1, torch.cat([ids.unsqueeze(-1), index], -1)) / temperature
        logprobs = z[..., 1:] - (z[..., 0] - logprobs).unsqueeze(-1)
        if row_mask is not None:
            logprobs = logprobs.masked_fill(row_mask == 0, 0.0)
    # Copies, since TRL's trainers change them in place, and ours needs its own for the backward pass.
    return logprobs.to(dtype, copy=True), None if entropy is None else entropy.to(dtype, copy=True)


def _dtype_of_theirs(logits, index, row_mask):
    from trl.trainer import utils

    kernel_serves = getattr(utils, "_supports_trl_loss_kernel", None)  # since 1.14, float32 on GPUs
    if kernel_serves is not None and kernel_serves(logits, index, row_mask):
        return torch.float32
    return F.log_softmax(logits.new_zeros(1), -1).dtype  # which autocast has a say in


PATCH = Patch(
    "trl",
    ">=1.13",
    (
        Replacement(
            "trl.trainer.utils:_ChunkedLogProbFunction.apply",
            chunked_logprobs_and_entropy,
            "(ctx, last_hidden, weight, bias, targets, temperature, chunk_size, "
            "final_logit_softcapping=None, logit_scale=1.0)",
            signature_of="_ChunkedLogProbFunction.forward",
            versions="<1.15",
        ),
        Replacement(
            "trl.kernels.chunked_logprob:ChunkedLogProbFunction.apply",  # the class of the same name as before, too
            chunked_logprobs,
            "(ctx, hidden, weight, bias, targets, temperature, chunk_size, "
            "final_logit_softcapping=None, logit_scale=1.0, "
            "outputs=('entropy', 'log_sum_sq_probs', 'mean_logits', 'is_top1'))",
            signature_of="ChunkedLogProbFunction.forward",
            versions=">=1.15",
        ),
        Replacement(
            "trl.trainer.utils:selective_log_softmax",
            selective_log_softmax_of_logits,
            "(logits, index)",
            versions="<1.14",
        ),
        Replacement(
            "trl.trainer.utils:selective_log_softmax",
            selective_log_softmax,
            "(logits, index, temperature=1.0, row_mask=None)",
            versions=">=1.14",
        ),
        Replacement("trl.trainer.utils:entropy_from_logits", entropy_from_logits, "(logits, chunk_size=128)"),
        Replacement(
            "trl.trainer.utils:selective_log_softmax_and_entropy",
            selective_log_softmax_and_entropy,
            "(logits, index, entropy_requires_grad=True, temperature=1.0, row_mask=None)",
            versions=">=1.14",
        ),
        Replacement(
            "trl.trainer.distillation_trainer:_chunked_divergence_loss",
            chunked_divergence_loss_by_chunk_size,
            "(student_hidden_states, teacher_hidden_states, student_lm_head_weight, teacher_lm_head_weight, "
            "completion_mask, beta, chunk_size, num_items_in_batch=None, student_lm_head_bias=None, "
            "teacher_lm_head_bias=None, student_logit_scale=1.0, teacher_logit_scale=1.0, "
            "student_final_logit_softcapping=None, teacher_final_logit_softcapping=None, temperature=1.0)",
            versions="<1.15",
        ),
        Replacement(
            "trl.trainer.distillation_trainer:_chunked_divergence_loss",
            chunked_divergence_loss,
            "(student_hidden_states, teacher_hidden_states, student_lm_head_weight, teacher_lm_head_weight, "
            "completion_mask, beta, num_items_in_batch=None, student_lm_head_bias=None, "
            "teacher_lm_head_bias=None, student_logit_scale=1.0, teacher_logit_scale=1.0, "
            "student_final_logit_softcapping=None, teacher_final_logit_softcapping=None, temperature=1.0)",
            versions=">=1.15",
        ),
    ),
)
patch, unpatch, patched = PATCH.patch, PATCH.unpatch, PATCH.patched
