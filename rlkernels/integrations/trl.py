"""TRL on our kernels.

    import rlkernels.integrations.trl as rk

    rk.patch()              # or: with rk.patched(): ...

TRL's trainers need no other change, and even existing trainer objects use ours. Replaced in TRL 1.13 and later:

- `_ChunkedLogProbFunction`, the log-probabilities of the fused LM head, by `rlkernels.linear_token_logprobs`. SFT, DPO,
  KTO, GRPO and RLOO train on it since 1.15, and part of GRPO before.
- `selective_log_softmax`, `entropy_from_logits` and `selective_log_softmax_and_entropy`, used wherever logits exist, by
  `rlkernels.token_logprobs`.
- `_chunked_divergence_loss`, the loss of the distillation trainer, by `rlkernels.linear_kl_divergence`.

Not replaced:

- the functions of logits for bfloat16 or float16 logits on a CPU, since TRL's own tests want them equal, bit for bit,
  to log_softmax in that dtype;
- code written out in the trainers, which is no function: the advantages, ratios and losses of GRPO and RLOO, the losses
  of DPO and KTO, and SFT's chunked cross-entropy before 1.15;
- `nanstd`, which handles few numbers per step;
- the Reward trainer, which calls none of these functions.

Differences from TRL:

- An id outside the vocabulary raises ValueError on a CPU and gives NaN on a GPU. TRL raises RuntimeError, or treats its
  logit as 0. The fused head accepts -100, and that row's results are 0.
- A logit of -inf adds 0 to the entropy (TRL: NaN). Zero rows are no error. There is no second derivative.
- The fused head needs a temperature above 0 and chooses its tile sizes itself. If the weight has another dtype than the
  products, its gradient is rounded to the products' dtype, as with torch.nn.Linear under autocast.
- In bfloat16 and float16 the fused head's gradients are PyTorch's, and those of TRL since 1.15, which rounds the
  gradient of a tile of logits for its products. Earlier TRL multiplied in float32, which is slightly more precise.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from rlkernels import linear_kl_divergence, linear_token_logprobs, token_logprobs
from rlkernels.integrations._patch import Patch, Replacement

_HALF = (torch.bfloat16, torch.float16)
_SKIPPED = torch.iinfo(torch.int64).min
"""The id that marks a row as not scored. No data has it; -100 would not do, since TRL treats it as a mistake."""

_OUTPUTS = {"log_sum_sq_probs": "log_sum_sq_probs", "mean_logits": "mean_logit", "is_top1": "is_top1"}
"""TRL's names of outputs -> our names."""


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
    # float32 even for float64 inputs, as in TRL, whose trainers copy the values into float32 buffers.
    named = {name: value if value.dtype == torch.bool else value.float() for name, value in named.items()}
    return tuple(named.get(name) for name in ("logprobs", "entropy", *_OUTPUTS))


def chunked_logprobs_and_entropy(
    last_hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping=None, logit_scale=1.0
):
    """chunked_logprobs as in TRL before 1.15."""
    options = (temperature, chunk_size, final_logit_softcapping, logit_scale)
    return chunked_logprobs(last_hidden, weight, bias, targets, *options, outputs=("entropy",))[:2]


def selective_log_softmax(logits, index, temperature=1.0, row_mask=None):
    """Computes in float32 and returns the dtype that TRL would."""
    if _theirs_serves(logits, index, row_mask):
        return _theirs("selective_log_softmax")(logits, index, temperature, row_mask)
    return _scored(logits, index, temperature, row_mask)[0]


def selective_log_softmax_of_logits(logits, index):
    """selective_log_softmax as in TRL before 1.14."""
    if _theirs_serves(logits, index):
        return _theirs("selective_log_softmax")(logits, index)
    return _scored(logits, index)[0]


def entropy_from_logits(logits, chunk_size=128):
    """Returns the dtype that TRL would."""
    index = logits.new_zeros(logits.shape[:-1], dtype=torch.long)
    if _theirs_serves(logits, index):
        return _theirs("entropy_from_logits")(logits, chunk_size)
    return _scored(logits, index, with_entropy=True)[1]


def selective_log_softmax_and_entropy(logits, index, entropy_requires_grad=True, temperature=1.0, row_mask=None):
    """Returns the dtypes that TRL would."""
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
    """(loss, sum of the student's entropies, number of scored positions). No gradient flows through the entropies, as
    in TRL since 1.15."""
    from trl.trainer.utils import maybe_gather_lm_head_ctx  # TRL is imported only when it is patched

    device = student_hidden_states.device.type
    student = [student_hidden_states, student_lm_head_weight, student_lm_head_bias]
    teacher = [teacher_hidden_states, teacher_lm_head_weight, teacher_lm_head_bias]
    student, teacher = ([_whole(value) for value in head] for head in (student, teacher))
    valid = completion_mask != 0
    num_valid = valid.sum()
    with (
        maybe_gather_lm_head_ctx(*student[1:]),
        maybe_gather_lm_head_ctx(*teacher[1:]),
        # On a CPU bfloat16 products are rounded to bfloat16; TRL's are not.
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
    """chunked_divergence_loss as in TRL before 1.15."""
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
    """Keyword arguments of our linear_* functions for one LM head."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    # The backward pass keeps aliases, since DeepSpeed's ZeRO-3 frees a parameter's data after the forward pass.
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
    """Whether to call TRL's own function: 16-bit logits on a CPU must match log_softmax bit for bit, and a function
    that rounds less often cannot."""
    if logits.device.type != "cpu" or logits.dtype not in _HALF or not logits.numel():
        return False
    return _dtype_of_theirs(logits, index, row_mask) in _HALF


def _scored(logits, index, temperature=1.0, row_mask=None, with_entropy=False):
    """(log-probabilities of `index`, entropy or None)."""
    if temperature <= 0:
        raise ValueError("temperature must be positive")
    several = index.dim() == logits.dim()
    dtype = _dtype_of_theirs(logits, index, row_mask)
    if dtype in _HALF and temperature != 1.0:
        logits, temperature = logits / temperature, 1.0  # rounded as in TRL
    # With several tokens per row, the most likely token gives the logsumexp: its log-probability is finite.
    ids = logits.detach().argmax(-1) if several else index
    if row_mask is not None and not several:
        ids = ids.long().masked_fill(row_mask == 0, _SKIPPED)
    if several and logits.dtype in _HALF:
        # Three gradients are added at each logit. In float32 the sum is rounded only once.
        logits = logits.float()
    values = token_logprobs(logits, ids, temperature=temperature, ignore_index=_SKIPPED, return_entropy=with_entropy)
    logprobs, entropy = values if with_entropy else (values, None)
    if several:
        z = logits.gather(-1, torch.cat([ids.unsqueeze(-1), index], -1)) / temperature
        logprobs = z[..., 1:] - (z[..., 0] - logprobs).unsqueeze(-1)
        if row_mask is not None:
            logprobs = logprobs.masked_fill(row_mask == 0, 0.0)
    # Copies, since TRL's trainers change them in place, and our backward pass needs the originals.
    return logprobs.to(dtype, copy=True), None if entropy is None else entropy.to(dtype, copy=True)


def _dtype_of_theirs(logits, index, row_mask):
    from trl.trainer import utils  # TRL is imported only when it is patched

    kernel_serves = getattr(utils, "_supports_trl_loss_kernel", None)  # TRL since 1.14 has a float32 kernel on GPUs
    if kernel_serves is not None and kernel_serves(logits, index, row_mask):
        return torch.float32
    return F.log_softmax(logits.new_zeros(1), -1).dtype  # depends on autocast


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
            "trl.kernels.chunked_logprob:ChunkedLogProbFunction.apply",  # trl.trainer.utils holds the same class
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
