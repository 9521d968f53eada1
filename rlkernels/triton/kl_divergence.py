import torch
import triton
import triton.language as tl
from torch import Tensor

from rlkernels._codes import DIVERGENCES
from rlkernels.triton._config import num_warps, threads
from rlkernels.triton._launch import implements, multiple_of_16
from rlkernels.triton._math import expm1, expm1_minus_x, log1p, soft_cap, tanh_derivative

FORWARD = tl.constexpr(DIVERGENCES.index("forward"))
REVERSE = tl.constexpr(DIVERGENCES.index("reverse"))

# Two variants are compiled per dtype and kind, ALIGNED or not, whatever the vocabulary, the strides and the options.
_DO_NOT_SPECIALIZE = [
    "grad",
    "centre",
    "student",
    "teacher",
    "student_stats",
    "teacher_stats",
    "parts",
    "gradient",
    "stride",
    "teacher_stride",
    "gradient_stride",
    "vocab_size",
]


@triton.jit
def _token_pair(log_student, log_teacher, d):
    """d = log p_T - log p_S, both probabilities, their difference p_S - p_T, and exp and expm1 of -|d|."""
    # A token that neither has: the difference of two -inf would be NaN.
    d = tl.where((log_student == float("-inf")) & (log_teacher == float("-inf")), 0.0, d)
    teacher_leads = d >= 0.0
    # Each from its logarithm, which has seen fewer roundings than d; their difference from d: they may be nearly equal.
    student = tl.exp(log_student)
    teacher = tl.exp(log_teacher)
    ratio = tl.exp(-tl.abs(d))
    less = expm1(-tl.abs(d))
    return d, student, teacher, tl.where(teacher_leads, teacher, -student) * less, ratio, less


@triton.jit
def _excess(p, d, gap):
    """p log(p / q) - p + q >= 0, from d = log(p / q) and gap = q - p."""
    value = tl.where(tl.abs(d) < 1.0, p * expm1_minus_x(tl.where(tl.abs(d) < 1.0, -d, 0.0)), p * d + gap)
    # p = 0 times an infinite d is NaN. Where q alone is 0 the divergence is infinite, also if p has been rounded to 0.
    return tl.where(d == float("inf"), d, tl.where(p == 0.0, gap, value))


@triton.jit
def _over_mixture(d, ratio, less, beta, one_minus_beta):
    """log(p_S / m) and log(p_T / m) for the mixture m = beta p_T + (1 - beta) p_S."""
    teacher_leads = d >= 0.0
    distance = tl.abs(d)
    of_larger = tl.where(teacher_leads, beta, one_minus_beta)
    of_smaller = tl.where(teacher_leads, one_minus_beta, beta)
    # m / larger = 1 + below, m / smaller = 1 + above. Nearly equal probabilities, and a beta near 0 or 1, keep their
    # digits where the logarithm of the one that is nearer to 1 is taken, and the other made of it.
    below = of_smaller * less
    above = -(of_larger * less) / ratio
    by_smaller = of_smaller > of_larger
    x = tl.where(by_smaller, above, below)
    far = x >= 1.0
    by_smaller = by_smaller & ~far
    logarithm = tl.where(far, tl.log(of_larger + of_smaller * ratio), log1p(tl.where(far, 0.0, x)))
    over_larger = tl.where(by_smaller, logarithm - distance, logarithm)
    over_smaller = tl.where(by_smaller, logarithm, logarithm + distance)
    student = tl.where(teacher_leads, over_smaller, over_larger)
    teacher = tl.where(teacher_leads, over_larger, over_smaller)
    return -student, -teacher


@triton.jit
def _jensen_shannon(d, student, teacher, over_student, over_teacher, beta, one_minus_beta):
    """beta p_T log(p_T / m) + (1 - beta) p_S log(p_S / m) >= 0"""
    is_near = tl.abs(d) < 1.0
    of_student = tl.where(is_near, expm1_minus_x(tl.where(is_near, -over_student, 0.0)), over_student)
    of_teacher = tl.where(is_near, expm1_minus_x(tl.where(is_near, -over_teacher, 0.0)), over_teacher)
    of_student = tl.where(student == 0.0, 0.0, one_minus_beta * student * of_student)
    return of_student + tl.where(teacher == 0.0, 0.0, beta * teacher * of_teacher)


@triton.jit
def _terms(log_student, log_teacher, d, beta, one_minus_beta, KIND: tl.constexpr):
    d, student, teacher, difference, ratio, less = _token_pair(log_student, log_teacher, d)
    if KIND == FORWARD:
        divergence = _excess(teacher, d, difference)
        moment = difference
    elif KIND == REVERSE:
        divergence = _excess(student, -d, -difference)
        moment = tl.where(student == 0.0, 0.0, student * -d)
    else:
        over_student, over_teacher = _over_mixture(d, ratio, less, beta, one_minus_beta)
        divergence = _jensen_shannon(d, student, teacher, over_student, over_teacher, beta, one_minus_beta)
        moment = tl.where(student == 0.0, 0.0, student * over_student)
    return divergence, moment, student


@triton.jit
def _gradient(log_student, log_teacher, d, centre, beta, one_minus_beta, KIND: tl.constexpr):
    d, student, _, difference, ratio, less = _token_pair(log_student, log_teacher, d)
    if KIND == FORWARD:
        return difference - student * centre
    elif KIND == REVERSE:
        return tl.where(student == 0.0, 0.0, student * (-d - centre))
    else:
        over_student, _ = _over_mixture(d, ratio, less, beta, one_minus_beta)
        return tl.where(student == 0.0, 0.0, one_minus_beta * student * (over_student - centre))


@triton.jit(do_not_specialize=_DO_NOT_SPECIALIZE)
def _part_kernel(
    student,
    teacher,
    student_stats,
    teacher_stats,
    parts,
    stride: tl.int64,
    teacher_stride: tl.int64,
    vocab_size: tl.int32,
    beta: tl.float32,
    one_minus_beta: tl.float32,
    temperature: tl.float32,
    teacher_temperature: tl.float32,
    softcap: tl.float32,
    teacher_softcap: tl.float32,
    KIND: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0)
    start = student + row * stride
    teacher_start = teacher + row * teacher_stride
    if ALIGNED:
        start = tl.multiple_of(start, 16)
        teacher_start = tl.multiple_of(teacher_start, 16)
    largest = tl.load(student_stats + row)
    teacher_largest = tl.load(teacher_stats + row)
    log_sum = tl.load(student_stats + rows + row)
    teacher_log_sum = tl.load(teacher_stats + rows + row)
    inverse = 1.0 / temperature
    teacher_inverse = 1.0 / teacher_temperature
    ratio = teacher_inverse / inverse

    # Each element of a block has its own running sums.
    divergence = tl.zeros((BLOCK,), tl.float32)
    moment = tl.zeros((BLOCK,), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    columns = tl.arange(0, BLOCK)
    end = multiple_of_16(vocab_size, ALIGNED)
    for first in range(0, end, BLOCK):
        inside = first + columns < end
        x = tl.load(start + first + columns, mask=inside, other=0.0).to(tl.float32)
        teacher_x = tl.load(teacher_start + first + columns, mask=inside, other=0.0).to(tl.float32)
        s = soft_cap(x, softcap, SOFTCAP) - largest
        t = soft_cap(teacher_x, teacher_softcap, TEACHER_SOFTCAP) - teacher_largest
        # The difference of log_student and log_teacher would have both their roundings.
        d = (t * ratio - s) * inverse - (teacher_log_sum - log_sum)
        log_student = s * inverse - log_sum
        log_teacher = t * teacher_inverse - teacher_log_sum
        term, moment_term, probability = _terms(log_student, log_teacher, d, beta, one_minus_beta, KIND)
        divergence += tl.where(inside, term, 0.0)
        moment += tl.where(inside, moment_term, 0.0)
        total += tl.where(inside, probability, 0.0)
    tl.store(parts + row, tl.sum(divergence, 0))
    tl.store(parts + rows + row, tl.sum(moment, 0))
    tl.store(parts + 2 * rows + row, tl.sum(total, 0))


@triton.jit(do_not_specialize=_DO_NOT_SPECIALIZE)
def _part_backward_kernel(
    grad,
    centre,
    student,
    teacher,
    student_stats,
    teacher_stats,
    gradient,
    stride: tl.int64,
    teacher_stride: tl.int64,
    gradient_stride: tl.int64,
    vocab_size: tl.int32,
    beta: tl.float32,
    one_minus_beta: tl.float32,
    temperature: tl.float32,
    teacher_temperature: tl.float32,
    softcap: tl.float32,
    teacher_softcap: tl.float32,
    KIND: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0)
    start = student + row * stride
    teacher_start = teacher + row * teacher_stride
    gradient_start = gradient + row * gradient_stride
    if ALIGNED:
        start = tl.multiple_of(start, 16)
        teacher_start = tl.multiple_of(teacher_start, 16)
        gradient_start = tl.multiple_of(gradient_start, 16)
    largest = tl.load(student_stats + row)
    teacher_largest = tl.load(teacher_stats + row)
    log_sum = tl.load(student_stats + rows + row)
    teacher_log_sum = tl.load(teacher_stats + rows + row)
    inverse = 1.0 / temperature
    teacher_inverse = 1.0 / teacher_temperature
    ratio = teacher_inverse / inverse
    upstream = tl.load(grad + row)
    nothing = upstream == 0.0
    scale = upstream * inverse
    row_centre = tl.load(centre + row)

    columns = tl.arange(0, BLOCK)
    end = multiple_of_16(vocab_size, ALIGNED)
    read = tl.where(nothing, 0, end)
    for first in range(0, end, BLOCK):
        inside = first + columns < end
        x = tl.load(start + first + columns, mask=first + columns < read, other=0.0).to(tl.float32)
        teacher_x = tl.load(teacher_start + first + columns, mask=first + columns < read, other=0.0).to(tl.float32)
        s = soft_cap(x, softcap, SOFTCAP) - largest
        t = soft_cap(teacher_x, teacher_softcap, TEACHER_SOFTCAP) - teacher_largest
        d = (t * ratio - s) * inverse - (teacher_log_sum - log_sum)
        log_student = s * inverse - log_sum
        log_teacher = t * teacher_inverse - teacher_log_sum
        dx = scale * _gradient(log_student, log_teacher, d, row_centre, beta, one_minus_beta, KIND)
        if SOFTCAP:
            dx *= tanh_derivative(x / softcap)
        tl.store(gradient_start + first + columns, tl.where(nothing, 0.0, dx), mask=inside)


@implements("kl_divergence_part")
def kl_divergence_part(
    student: Tensor,
    teacher: Tensor,
    student_stats: Tensor,
    teacher_stats: Tensor,
    kind: int,
    beta: float,
    temperature: float,
    teacher_temperature: float,
    softcap: float,
    teacher_softcap: float,
) -> Tensor:
    rows, vocab_size = student.shape
    parts = torch.empty(3, rows, dtype=torch.float32, device=student.device)
    aligned = _aligned(student) and _aligned(teacher)
    if rows:
        _part_kernel[(rows,)](
            student,
            teacher,
            student_stats,
            teacher_stats,
            parts,
            student.stride(0),
            teacher.stride(0),
            vocab_size,
            beta,
            1 - beta,
            temperature,
            teacher_temperature,
            softcap,
            teacher_softcap,
            KIND=kind,
            SOFTCAP=softcap > 0,
            TEACHER_SOFTCAP=teacher_softcap > 0,
            ALIGNED=aligned,
            BLOCK=_block(aligned, student, teacher),
            num_warps=num_warps("rows"),
        )
    return parts


@implements("kl_divergence_part_backward")
def kl_divergence_part_backward(
    grad: Tensor,
    centre: Tensor,
    student: Tensor,
    teacher: Tensor,
    student_stats: Tensor,
    teacher_stats: Tensor,
    kind: int,
    beta: float,
    temperature: float,
    teacher_temperature: float,
    softcap: float,
    teacher_softcap: float,
    gradient: Tensor,
) -> None:
    rows, vocab_size = student.shape
    aligned = _aligned(student) and _aligned(teacher) and _aligned(gradient)
    if rows:
        _part_backward_kernel[(rows,)](
            grad,
            centre,
            student,
            teacher,
            student_stats,
            teacher_stats,
            gradient,
            student.stride(0),
            teacher.stride(0),
            gradient.stride(0),
            vocab_size,
            beta,
            1 - beta,
            temperature,
            teacher_temperature,
            softcap,
            teacher_softcap,
            KIND=kind,
            SOFTCAP=softcap > 0,
            TEACHER_SOFTCAP=teacher_softcap > 0,
            ALIGNED=aligned,
            BLOCK=_block(aligned, student, teacher, gradient),
            num_warps=num_warps("rows"),
        )


def _block(aligned: bool, *tiles: Tensor) -> int:
    """16 bytes of the narrowest for each thread: two inputs and the logarithms of both leave registers for no more.
    Half as many where each element needs its own address."""
    return threads("rows") * 16 // min(tile.element_size() for tile in tiles) // (2 - aligned)


def _aligned(tile: Tensor) -> bool:
    """Whether rows start at a multiple of 16 bytes and are a multiple of 16 long, as loads of 16 bytes need."""
    stride = tile.stride(0) * tile.element_size() if len(tile) > 1 else 0
    return tile.shape[1] % 16 == 0 and stride % 16 == 0 and tile.data_ptr() % 16 == 0
