"""What `linear_kl_divergence` asks of the kernels: the divergence of two tiles of logits, and its gradient.

kl_divergence_part: from tiles [R, v] of the student's and the teacher's logits their part, [3, R], of the sums

    divergence  whose terms are all >= 0
    moment      forward: sum (p_S - p_T), 0 but for the rounding of the statistics
                reverse, js: sum p_S L, L = log(p_S / p_T) or log(p_S / m)
    total       sum p_S, 1 but for rounding

kl_divergence_part_backward: writes `grad` times the gradient of the student's logits to `gradient`, which may be the
student's tile itself, from the centre of the whole row, moment / total; for temperature 1 and no softcap

    forward: p_S - p_T - p_S centre    reverse: p_S (L - centre)    js: (1 - beta) p_S (L - centre)

A row whose grad is 0 gets 0, whatever it holds. Parts of a row are added. *_stats [2, R] are its largest capped logit
y, and the logarithm of its sum of exp((y - largest) / temperature); kind is an index into DIVERGENCES.
"""

import torch
from torch import Tensor

from rlkernels import _registry


def divergence_and_centre(sums: Tensor) -> Tensor:
    """[2, R] in float32, from the sums over the vocabulary. Divided by the total, the rounding of each p_S weighs
    L - centre in the centre, not L, which is large where the distributions are far apart."""
    divergence, moment, total = sums
    return torch.stack([divergence, moment / total]).float()


_OPTIONS = "int kind, float beta, float temperature, float teacher_temperature, float softcap, float teacher_softcap"
_registry.define(
    "kl_divergence_part",
    f"(Tensor student, Tensor teacher, Tensor student_stats, Tensor teacher_stats, {_OPTIONS}) -> Tensor",
    lambda student, *rest: student.new_empty((3, student.shape[0]), dtype=torch.float32),
    part_of="linear_kl_divergence",
)
_registry.define(
    "kl_divergence_part_backward",
    "(Tensor grad, Tensor centre, Tensor student, Tensor teacher, Tensor student_stats, Tensor teacher_stats, "
    f"{_OPTIONS}, Tensor(a!) gradient) -> ()",
    lambda *inputs: None,
    part_of="linear_kl_divergence",
)
