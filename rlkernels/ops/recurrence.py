import torch
from torch import Tensor

from rlkernels import _backends, _registry
from rlkernels._codes import RECURRENCES
from rlkernels.ops import _checks
from rlkernels.reference import recurrence as reference


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    *,
    gamma: float = 1.0,
    lam: float = 1.0,
    cu_seqlens: Tensor | None = None,
    dones: Tensor | None = None,
    bootstrap_values: Tensor | None = None,
    whiten: bool = False,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation: advantages and returns in one pass backwards over each sequence.

        delta[t] = r[t] + gamma * v[t+1] - v[t]
        A[t]     = delta[t] + gamma * lam * A[t+1]
        returns  = A + v

    t+1 is the next scored token: values and running advantages carry over tokens that are not scored, such as a
    tool's, as verl's do. Behind the last one v is the sequence's bootstrap value and A is 0. `dones[t]` ends an episode
    at t, scored or not: nothing flows back over it, v[t+1] and A[t+1] are 0.

    Args:
        rewards: [B, T] padded, or [N] packed with cu_seqlens; float32, bfloat16, float16 or float64 (served by the
            reference, in float64).
        values: the same shape.
        mask: the same shape, bool, integer or float; nonzero is scored; None scores every token.
        gamma, lam: in [0, 1].
        cu_seqlens: int32 [S + 1], from 0 to N, not decreasing: where each packed sequence starts.
        dones: the shape of rewards, bool, integer or float; nonzero ends an episode; None: none ends.
        bootstrap_values: [B] or [S], the value after each sequence's last token; None: 0.
        whiten: advantages become (A - mean) / sqrt(variance + 1e-8) over the scored tokens of all sequences, with the
            unbiased variance. The returns stay as they were.

    Returns:
        advantages, returns: float32 (float64 for float64 rewards), the shape of rewards, 0 where not scored.

    Differentiable: no. Inputs that require a gradient are refused, and forward mode raises NotImplementedError.

    Edge cases: tokens that are not scored may hold NaN or inf and leave no trace. What is not finite at a scored token
    leaves everything before it in its episode undefined. Whitened advantages of fewer than two scored tokens are 0.

    Raises: TypeError, ValueError for wrong dtypes, shapes, devices and options, and, on a CPU, for cu_seqlens that do
    not run from 0 to N without decreasing. On a GPU they make the results NaN, or raise with RLKERNELS_CHECK=1.

    Traffic: reads each input once and writes each output once; on a GPU the inputs of sequences longer than 32,768
    tokens are read twice, and where there are fewer than 528 sequences of those longer than 2,048. Whitening reads and
    writes the advantages, and reads the mask, once more. On a CPU bfloat16 and float16 inputs are widened to float32
    first. No host synchronisation.

    References: Schulman et al. 2016 (arXiv 1506.02438).
    """
    return _recurrence(
        "gae", rewards, values, None, None, mask, gamma, lam, cu_seqlens, dones, bootstrap_values, whiten=whiten
    )


def discounted_returns(
    rewards: Tensor,
    mask: Tensor | None = None,
    *,
    gamma: float = 1.0,
    cu_seqlens: Tensor | None = None,
    dones: Tensor | None = None,
    bootstrap_values: Tensor | None = None,
) -> Tensor:
    """Discounted sums of the rewards to come.

        G[t] = r[t] + gamma * G[t+1]

    Behind the last scored token G is the sequence's bootstrap value. Arguments, edge cases, errors and traffic are as
    in `gae`.

    Returns:
        float32 (float64 for float64 rewards), the shape of rewards, 0 where not scored. Not differentiable.
    """
    return _recurrence(
        "discounted_returns", rewards, None, None, None, mask, gamma, 1.0, cu_seqlens, dones, bootstrap_values
    )[1]


def td_lambda(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    *,
    gamma: float = 1.0,
    lam: float = 1.0,
    cu_seqlens: Tensor | None = None,
    dones: Tensor | None = None,
    bootstrap_values: Tensor | None = None,
) -> Tensor:
    """Lambda-returns: every n-step return, weighted by (1 - lam) * lam^(n-1).

        G[t] = r[t] + gamma * ((1 - lam) * v[t+1] + lam * G[t+1])

    Behind the last scored token v and G are the sequence's bootstrap value. Arguments, edge cases, errors and traffic
    are as in `gae`, whose returns these are, but for rounding.

    Returns:
        float32 (float64 for float64 rewards), the shape of rewards, 0 where not scored. Not differentiable.

    References: Sutton 1988, "Learning to predict by the methods of temporal differences".
    """
    return _recurrence("td_lambda", rewards, values, None, None, mask, gamma, lam, cu_seqlens, dones, bootstrap_values)[
        1
    ]


def vtrace(
    logprobs: Tensor,
    behavior_logprobs: Tensor,
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    *,
    gamma: float = 1.0,
    lam: float = 1.0,
    cu_seqlens: Tensor | None = None,
    dones: Tensor | None = None,
    bootstrap_values: Tensor | None = None,
    rho_clip: float = 1.0,
    c_clip: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """V-trace: values of the policy from samples of another, and the advantages that its gradient takes.

        ratio = exp(logprobs - behavior_logprobs),  rho = min(rho_clip, ratio),  c = lam * min(c_clip, ratio)
        vs[t] = v[t] + rho[t] * (r[t] + gamma * v[t+1] - v[t]) + gamma * c[t] * (vs[t+1] - v[t+1])
        A[t]  = rho[t] * (r[t] + gamma * vs[t+1] - v[t])
        returns = vs

    Behind the last scored token v and vs are the sequence's bootstrap value. logprobs (of the policy) and
    behavior_logprobs (of the policy that sampled) have the shape of rewards; rho_clip and c_clip are > 0. All other
    arguments, edge cases, errors and traffic are as in `gae`.

    Returns:
        advantages, returns: float32 (float64 for float64 rewards), the shape of rewards, 0 where not scored. Not
            differentiable.

    References: Espeholt et al. 2018 (IMPALA, arXiv 1802.01561).
    """
    return _recurrence(
        *("vtrace", rewards, values, logprobs, behavior_logprobs, mask, gamma, lam, cu_seqlens, dones),
        bootstrap_values,
        rho_clip=_checks.number("rho_clip", rho_clip, above=0.0, finite=False),
        c_clip=_checks.number("c_clip", c_clip, above=0.0, finite=False),
    )


def _recurrence(
    kind: str,
    rewards: Tensor,
    values: Tensor | None,
    logprobs: Tensor | None,
    behavior_logprobs: Tensor | None,
    mask: Tensor | None,
    gamma: float,
    lam: float,
    cu_seqlens: Tensor | None,
    dones: Tensor | None,
    bootstrap_values: Tensor | None,
    *,
    rho_clip: float = 1.0,
    c_clip: float = 1.0,
    whiten: bool = False,
) -> tuple[Tensor, Tensor]:
    _checks.tensor("rewards", rewards, _checks.FLOATS)
    _checks.no_gradient("rewards", rewards, NOT_DIFFERENTIABLE)
    sequences, cu_seqlens = _checks.sequences("rewards", rewards, cu_seqlens)
    if kind != "discounted_returns":
        _like_rewards("values", values, rewards)
    if kind == "vtrace":
        _like_rewards("logprobs", logprobs, rewards)
        _like_rewards("behavior_logprobs", behavior_logprobs, rewards)
    if mask is not None:
        _checks.mask("mask", mask, "rewards", rewards)
    if dones is not None:
        _checks.mask("dones", dones, "rewards", rewards)
    if bootstrap_values is not None:
        _checks.tensor("bootstrap_values", bootstrap_values, _checks.FLOATS)
        _checks.shape("bootstrap_values", bootstrap_values, (sequences,), because="one a sequence")
        _checks.same_device("bootstrap_values", bootstrap_values, "rewards", rewards)
        _checks.no_gradient("bootstrap_values", bootstrap_values, NOT_DIFFERENTIABLE)
    gamma = _checks.number("gamma", gamma, at_least=0.0, at_most=1.0)
    lam = _checks.number("lam", lam, at_least=0.0, at_most=1.0)

    backend = _backends.select(rewards, kind)
    if cu_seqlens is not None:
        if sequences == 0 and rewards.shape[0] > 0:
            raise ValueError(f"cu_seqlens must end with {rewards.shape[0]}, the number of tokens; got no sequence")
        if _checks.values_in_python(backend, cu_seqlens):
            _checks.cu_seqlens_values(cu_seqlens, rewards.shape[0])
    dtype = _checks.arithmetic(rewards)
    inputs: tuple = (
        *(_checks.numbers(value, backend, dtype) for value in (rewards, values, logprobs, behavior_logprobs)),
        *(_checks.flags(value, backend) for value in (mask, dones)),
        *(cu_seqlens, _checks.numbers(bootstrap_values, backend, dtype)),
    )
    if backend != "reference":
        options = (RECURRENCES.index(kind), gamma, lam, rho_clip, c_clip, whiten)
        return _registry.op("recurrence", backend)(*inputs, *options)
    with torch.no_grad():
        advantages, returns = reference.recurrence(
            *inputs, kind=kind, gamma=gamma, lam=lam, rho_clip=rho_clip, c_clip=c_clip, whiten=whiten
        )
        if cu_seqlens is None:
            return advantages, returns
        valid = _checks.nan_unless_valid(cu_seqlens, rewards.shape[0], returns)
        return advantages * valid, returns * valid


NOT_DIFFERENTIABLE = "advantages and returns are data: gradients do not flow through them"


def _like_rewards(name: str, value: Tensor | None, rewards: Tensor) -> None:
    _checks.tensor(name, value, _checks.FLOATS)
    assert value is not None
    _checks.shape(name, value, tuple(rewards.shape), because="that of rewards")
    _checks.same_device(name, value, "rewards", rewards)
    _checks.no_gradient(name, value, NOT_DIFFERENTIABLE)


def _fake(rewards, values, logprobs, behavior_logprobs, mask, dones, cu_seqlens, bootstrap_values, kind, *rest):
    has_advantages = RECURRENCES[kind] in ("gae", "vtrace")
    return (
        rewards.new_empty(rewards.shape if has_advantages else 0, dtype=torch.float32),
        rewards.new_empty(rewards.shape, dtype=torch.float32),
    )


_registry.define(
    "recurrence",
    "(Tensor rewards, Tensor? values, Tensor? logprobs, Tensor? behavior_logprobs, Tensor? mask, Tensor? dones, "
    "Tensor? cu_seqlens, Tensor? bootstrap_values, int kind, float gamma, float lam, float rho_clip, "
    "float c_clip, bool whiten) -> (Tensor advantages, Tensor returns)",
    _fake,
    part_of="gae",
)
