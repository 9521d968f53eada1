import torch
from torch import Tensor

from rlkernels.reference._sequences import sequence_of_token
from rlkernels.reference._units import unit_of


def recurrence(
    rewards: Tensor,
    values: Tensor | None,
    logprobs: Tensor | None,
    behavior_logprobs: Tensor | None,
    mask: Tensor | None,
    dones: Tensor | None,
    cu_seqlens: Tensor | None,
    bootstrap_values: Tensor | None,
    *,
    kind: str,
    gamma: float,
    lam: float,
    rho_clip: float,
    c_clip: float,
    whiten: bool,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of padded [B, T] or, with cu_seqlens, packed [N] rewards. kind: "gae",
    "discounted_returns", "td_lambda" or "vtrace"; those without advantages give an empty tensor for them."""
    zero = torch.zeros_like(rewards)
    scored = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    # Unscored tokens may hold anything: they are replaced before any arithmetic.
    rewards = rewards.masked_fill(~scored, 0.0)
    values = zero if values is None else values.masked_fill(~scored, 0.0)
    rho = c = zero
    if logprobs is not None and behavior_logprobs is not None:
        ratio = (logprobs - behavior_logprobs).masked_fill(~scored, 0.0).exp()
        rho, c = ratio.clamp(max=rho_clip), lam * ratio.clamp(max=c_clip)
    sequence, _ = sequence_of_token(rewards, cu_seqlens)
    last = _last_of_sequence(rewards, sequence, cu_seqlens)
    bootstrap = zero if bootstrap_values is None else bootstrap_values[sequence]

    def columns(tensor: Tensor | None) -> tuple[Tensor | None, ...]:
        """[B] for each t, from the last to the first. Packed tokens are one long row, whose sequences start anew."""
        rows = (1 if cu_seqlens is not None else rewards.shape[0], rewards.shape[-1])
        return (None,) * rows[1] if tensor is None else tensor.reshape(rows).unbind(1)[::-1]

    next_value = y = rewards.new_zeros(())
    advantages: list[Tensor] = []
    returns: list[Tensor] = []
    each = map(columns, (rewards, values, rho, c, mask, dones, last, bootstrap))
    for r, v, rho_t, c_t, is_scored, is_done, is_last, start in zip(*each, strict=True):
        if cu_seqlens is not None or not returns:
            next_value = torch.where(is_last, start, next_value)
            y = torch.where(is_last, start if kind in ("discounted_returns", "td_lambda") else 0.0, y)
        if is_done is not None:
            next_value, y = next_value.masked_fill(is_done, 0.0), y.masked_fill(is_done, 0.0)
        if kind == "gae":
            step = advantage = r + gamma * next_value - v + gamma * lam * y
            result = step + v
        elif kind == "discounted_returns":
            step = advantage = result = r + gamma * y
        elif kind == "td_lambda":
            step = advantage = result = r + gamma * ((1 - lam) * next_value + lam * y)
        else:
            step = rho_t * (r + gamma * next_value - v) + gamma * c_t * y
            advantage = rho_t * (r + gamma * (next_value + y) - v)
            result = v + step
        advantages.append(advantage)
        returns.append(result)
        if is_scored is not None:
            v, step = torch.where(is_scored, v, next_value), torch.where(is_scored, step, y)
        next_value, y = v, step

    def tokens(steps: list[Tensor]) -> Tensor:
        return torch.stack(steps[::-1], 1).reshape(rewards.shape).masked_fill(~scored, 0.0) if steps else zero

    if kind in ("discounted_returns", "td_lambda"):
        return zero.new_empty(0), tokens(returns)
    return _whiten(tokens(advantages), scored) if whiten else tokens(advantages), tokens(returns)


def _last_of_sequence(tokens: Tensor, sequence: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    position = torch.arange(tokens.shape[-1], device=tokens.device)
    if cu_seqlens is None:
        return (position == tokens.shape[1] - 1).expand(tokens.shape)
    return position == cu_seqlens[1:].long()[sequence] - 1


def _whiten(advantages: Tensor, scored: Tensor) -> Tensor:
    """(A - mean) / sqrt(variance + 1e-8) over scored tokens, 0 elsewhere and where there are fewer than two."""
    count = scored.sum()
    # Advantages of less than 1 have squares that vanish next to 1e-8.
    unit = unit_of(torch.nn.functional.pad(advantages.flatten().abs(), (0, 1)).amax()).clamp(min=1.0)
    advantages = advantages / unit
    mean = advantages.sum() / count.clamp(min=1)
    squares = (advantages - mean).square().masked_fill(~scored, 0.0)
    variance = squares.sum() / (count - 1).clamp(min=1)
    whitened = (advantages - mean) * torch.rsqrt(variance + 1e-8 / unit / unit)
    return whitened.masked_fill(~scored | (count < 2), 0.0)
