"""token_logprobs with and without entropy, at the vocabularies of SmolLM2 and Qwen2.5."""

import torch

import rlkernels
from suite import Case, Peer

# As many rows as keep the logits near 200 and 300 MB in float32.
SHAPES = [(1024, 49152), (512, 151936)]
CHECKED_ROWS = 8


def make_inputs(shape, dtype):
    def inputs():
        logits = torch.randn(shape).mul_(3).to(dtype)
        sampled = [torch.multinomial(rows.float().softmax(-1), 1)[:, 0] for rows in logits.split(64)]
        return logits, torch.cat(sampled)

    return inputs


def eager(logits, token_ids):
    return logits.log_softmax(-1).gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)


def eager_with_entropy(logits, token_ids):
    logprobs = logits.log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1), entropy


def trl(name):
    def load():
        import trl.trainer.utils

        return getattr(trl.trainer.utils, name)

    return Peer(load)


def case(shape, dtype, *, gradient, entropy):
    size = shape[0] * shape[1] * dtype.itemsize
    parts = ["forward+backward in place" if gradient else "forward", *(["entropy"] if entropy else [])]
    return Case(
        "token_logprobs",
        shape,
        make_inputs(shape, dtype),
        ours=lambda logits, token_ids: rlkernels.token_logprobs(
            logits, token_ids, return_entropy=entropy, inplace_backward=gradient
        ),
        eager=eager_with_entropy if entropy else eager,
        peers={"trl": trl("selective_log_softmax_and_entropy" if entropy else "selective_log_softmax")},
        label=", ".join([*parts, str(dtype).removeprefix("torch.")]),
        gradient=gradient,
        overwrites=gradient,
        moved=3 * size if gradient else size,
        rows=CHECKED_ROWS,
        wanted={"trl": 6} if entropy and gradient and dtype == torch.float32 else {},
    )


CASES = [
    *(
        case(shape, dtype, gradient=gradient, entropy=False)
        for shape in SHAPES
        for dtype in (torch.float32, torch.bfloat16)
        for gradient in (False, True)
    ),
    *(case(SHAPES[0], dtype, gradient=True, entropy=True) for dtype in (torch.float32, torch.bfloat16)),
]


def test_token_logprobs(case, implementation, measure):
    measure(case, implementation)
