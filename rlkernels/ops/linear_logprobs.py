from torch import Tensor

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
) -> Tensor | tuple[Tensor, ...]:
    logprobs, entropy, *others = reference.linear_token_logprobs(
        hidden,
        weight,
        token_ids.long(),
        bias,
        adapter,
        temperature=temperature,
        softcap=softcap or 0.0,
        scale=scale,
        ignore_index=ignore_index,
        outputs=tuple(outputs),
    )
    results = (logprobs, *([entropy] if return_entropy else []), *others)
    return results if len(results) > 1 else logprobs
