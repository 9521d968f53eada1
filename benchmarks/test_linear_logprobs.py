"""The LM head with its gradients: of SmolLM2 at the rows of a small step, and of a large vocabulary for its memory.

Memory is counted above the inputs and the gradients that are returned. "GEMMs" are the matrix products that the case
comes down to, of the whole batch at a time, on tensors and buffers that are ready.
"""

import functools
import inspect
import time
from types import SimpleNamespace

import torch
from torch import Tensor

import peer_modules
import rlkernels
from eager_policy_loss import BETA, HIGH, LOW, trl_policy_loss
from suite import Bar, Case, Peer, synchronize

HEAD = (576, 49152)
"""Hidden size and vocabulary of SmolLM2."""
COMPLETIONS = (8, 64)
PROMPT = 49
LARGE = (4096, 1024, 151936)
CHECKED_ROWS = 8
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
LOG_RATIOS = (-0.5, -0.1, 0.1, 0.5)
"""Log-ratios to the old log-probabilities. None is near a bound of the clipping, where rounding decides the side."""


def head(shape: tuple[int, ...], hidden_size: int, vocab_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Hidden states and a weight that give logits with a standard deviation of 3."""
    weight = torch.randn(vocab_size, hidden_size).mul_(3 * hidden_size**-0.5)
    return torch.randn(*shape, hidden_size).to(dtype), weight.to(dtype)


def sample(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens from the distributions that the head gives, and their log-probabilities."""
    token_ids, logprobs = [], []
    for rows in hidden.flatten(0, -2).split(64):
        chosen = (rows @ weight.T).float().log_softmax(-1)
        ids = torch.multinomial(chosen.exp(), 1)
        token_ids.append(ids[:, 0])
        logprobs.append(chosen.gather(-1, ids)[:, 0])
    return torch.cat(token_ids).view(hidden.shape[:-1]), torch.cat(logprobs).view(hidden.shape[:-1])


@functools.cache
def layouts(
    rows: int, hidden_size: int, vocab_size: int, dtype: torch.dtype, device: str
) -> tuple[tuple, tuple, tuple]:
    """For each of the three products, which of its output and the logits' gradient lie by columns where it is
    fastest."""
    with torch.device(device):
        hidden, weight = head((rows,), hidden_size, vocab_size, dtype)
        gradient = torch.randn(rows, vocab_size).to(dtype)

    def seconds(number: int, layout: tuple[bool, bool]) -> float:
        product = products(hidden, weight, gradient, [layout] * 3)[number]
        taken = []
        for _ in range(4):
            synchronize(device)
            begin = time.perf_counter()
            product()
            synchronize(device)
            taken.append(time.perf_counter() - begin)
        return min(taken[1:])

    choices = [(out, by_columns) for out in (False, True) for by_columns in (False, True)]
    first = min([(False, False), (True, False)], key=lambda layout: seconds(0, layout))
    return first, *(min(choices, key=lambda layout, n=number: seconds(n, layout)) for number in (1, 2))


def products(hidden: Tensor, weight: Tensor, gradient: Tensor, chosen: list[tuple[bool, bool]] | tuple) -> list:
    """Logits, and the gradients of hidden and weight from that of the logits."""

    def buffer(rows: int, columns: int, by_columns: bool) -> Tensor:
        return hidden.new_empty(columns, rows).t() if by_columns else hidden.new_empty(rows, columns)

    def laid(by_columns: bool) -> Tensor:
        return gradient.t().contiguous().t() if by_columns else gradient

    (rows, hidden_size), vocab_size = hidden.shape, len(weight)
    (first, _), (second, of_second), (third, of_third) = chosen
    return [
        functools.partial(torch.mm, hidden, weight.t(), out=buffer(rows, vocab_size, first)),
        functools.partial(torch.mm, laid(of_second), weight, out=buffer(rows, hidden_size, second)),
        functools.partial(torch.mm, laid(of_third).t(), hidden, out=buffer(vocab_size, hidden_size, third)),
    ]


def gemms(*, recompute: bool = False):
    """Three products, four where the logits are computed again."""

    def prepare(hidden, weight, token_ids, *_):
        scored = hidden[token_ids != -100]
        gradient = torch.randn(len(scored), len(weight), device=weight.device).to(weight.dtype)
        chosen = layouts(*scored.shape, len(weight), weight.dtype, weight.device.type)
        logits, *of_gradient = products(scored, weight, gradient, chosen)
        work = [logits, *([logits] if recompute else []), *of_gradient]

        def run():
            for product in work:
                product()

        return run

    return prepare


def keeps_logits(rows: int, vocab_size: int, dtype: torch.dtype) -> bool:
    """Whether all logits are within the default budget."""
    budget = inspect.signature(rlkernels.linear_token_logprobs).parameters["logits_budget_mb"].default
    return rows * vocab_size * dtype.itemsize <= budget * 2**20


def naive_logprobs(logits_of):
    """Both ways in which it is written: the softmax in the logits' dtype, or in float32."""

    def function(hidden, weight, token_ids):
        logits = logits_of(hidden, weight)
        return logits.log_softmax(-1).gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)

    return function


def as_they_are(hidden, weight):
    return hidden @ weight.T


def in_float32(hidden, weight):
    return (hidden @ weight.T).float()


def naive_policy_loss(logits_of):
    logprobs = naive_logprobs(logits_of)

    def function(hidden, weight, token_ids, *rest):
        return trl_policy_loss(logprobs(hidden, weight, token_ids), *rest)

    return function


def naive(make, dtype) -> dict[str, Peer]:
    peers = {"naive": Peer(lambda: make(as_they_are))}
    if dtype != FLOAT32:
        peers["naive float32"] = Peer(lambda: make(in_float32))
    return peers


def trl_head():
    """TRL's patch of a model's head, called as GRPOTrainer does: in which it only logs the entropy."""
    from trl.trainer.utils import add_fused_lm_head

    config = SimpleNamespace()
    config.get_text_config = lambda: config

    class Model(torch.nn.Module):
        """Its hidden states are there already."""

        def base_model(self, hidden, use_cache):
            return SimpleNamespace(last_hidden_state=hidden)

        def get_output_embeddings(self):
            return self.head

        def forward(self):
            raise NotImplementedError

    model = Model()
    model.config = config
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))

    def function(hidden, weight, token_ids):
        model.head = SimpleNamespace(weight=weight, bias=None)
        outputs = model(hidden, shift_labels=token_ids, fused_lm_head=True)
        return outputs.log_probs, outputs.entropy.detach()

    return function


def liger_policy_loss():
    options = dict(beta=BETA, epsilon_low=LOW, epsilon_high=HIGH, loss_type="bnpo")
    function = peer_modules.liger().LigerFusedLinearGRPOLoss(**options)

    def loss(hidden, weight, token_ids, old_logprobs, advantages, mask, ref_logprobs):
        inputs = (hidden, weight, token_ids, mask, advantages)
        return function(*inputs, ref_per_token_logps=ref_logprobs, old_per_token_logps=old_logprobs)[0]

    return loss


def torch_cross_entropy(**options):
    def load():
        chunking = torch.nn.LinearCrossEntropyOptions(**options)

        def loss(hidden, weight, token_ids):
            inputs = (hidden.flatten(0, 1), weight, token_ids.flatten())
            return torch.nn.functional.linear_cross_entropy(*inputs, options=chunking)

        return loss

    return Peer(load)


def our_logprobs(**options):
    return functools.partial(rlkernels.linear_token_logprobs, **options)


def our_logprobs_and_entropy(hidden, weight, token_ids):
    logprobs, entropy = rlkernels.linear_token_logprobs(hidden, weight, token_ids, return_entropy=True)
    return logprobs, entropy.detach()


def our_policy_loss(hidden, weight, token_ids, old_logprobs, advantages, mask, ref_logprobs):
    options = dict(ref_logprobs=ref_logprobs, clip_low=LOW, clip_high=HIGH, kl_coef=BETA, kl_estimator="k3")
    return rlkernels.linear_policy_loss(hidden, weight, token_ids, old_logprobs, advantages, mask, **options)


def our_cross_entropy(hidden, weight, token_ids):
    """reinforce with advantage 1: minus the mean of the log-probabilities."""
    advantages = torch.ones(len(hidden), device=hidden.device)
    return rlkernels.linear_policy_loss(hidden, weight, token_ids, None, advantages, objective="reinforce")[0]


def loss_and_gradients(outputs):
    """Not every implementation has metrics."""
    return outputs[0], *outputs[-2:]


def case(op: str, shape: tuple[int, ...], dtype: torch.dtype, label: str, inputs, **options) -> Case:
    """A gradient of hidden is a sum over the vocabulary, whose rounding in float32 is far more than that of its
    result. In bfloat16 the logits are rounded, each by up to half an ulp."""
    options = dict(gradient=2, with_reference=False, precision=dtype, ulps=256 if dtype == FLOAT32 else 8) | options
    parts = [label, "forward+backward", str(dtype).removeprefix("torch.")]
    return Case(op, shape, inputs, label=", ".join(filter(None, parts)), **options)


def cases(dtype: torch.dtype, completions=COMPLETIONS, prompt=PROMPT, size=HEAD) -> list[Case]:
    rows = completions[0] * completions[1]

    def scored():
        """All rows are of completions."""
        hidden, weight = head(completions, *size, dtype)
        return hidden, weight, sample(hidden, weight)[0]

    def with_prompts():
        batch, length = completions
        hidden, weight = head((batch, prompt + length), *size, dtype)
        token_ids, _ = sample(hidden, weight)
        token_ids[:, :prompt] = -100
        return hidden, weight, token_ids

    def policy():
        hidden, weight = head(completions, *size, dtype)
        token_ids, logprobs = sample(hidden, weight)
        old = logprobs - torch.tensor(LOG_RATIOS)[torch.randint(len(LOG_RATIOS), completions)]
        reference = logprobs + 0.3 * torch.randn(completions)
        return hidden, weight, token_ids, old, 1 + torch.randn(completions[0]), torch.ones(completions), reference

    full = dtype == FLOAT32
    of_gemms = {"GEMMs": Bar(time=1.25)}
    return [
        case(
            "linear_token_logprobs",
            (completions[0] * (prompt + completions[1]), *size),
            dtype,
            f"{rows} scored, entropy",
            with_prompts,
            ours=our_logprobs_and_entropy,
            peers={"trl": Peer(trl_head)},
            bars={"trl": Bar(time=1 / 2.5 if full else 1 / 5, memory=1 / 5)} | of_gemms,
            floors={"GEMMs": gemms(recompute=not keeps_logits(rows, size[1], dtype))},
        ),
        case(
            "linear_token_logprobs",
            (rows, *size),
            dtype,
            "recomputing",
            scored,
            ours=our_logprobs(logits_budget_mb=0),
            peers=naive(naive_logprobs, dtype),
            bars={"naive": Bar(time=1.15 if full else 0.75, memory=1 / 4)} | of_gemms,
            floors={"GEMMs": gemms(recompute=True)},
        ),
        case(
            "linear_token_logprobs",
            (rows, *size),
            dtype,
            "logits within the budget",
            scored,
            ours=our_logprobs(logits_budget_mb=1024),
            peers=naive(naive_logprobs, dtype),
            bars={"naive": Bar(time=0.85 if full else 0.6)} | of_gemms,
            floors={"GEMMs": gemms()},
        ),
        case(
            "linear_policy_loss",
            (rows, *size),
            dtype,
            "KL, metrics",
            policy,
            ours=our_policy_loss,
            peers=naive(naive_policy_loss, dtype) | {"liger": Peer(liger_policy_loss)},
            compared=loss_and_gradients,
            bars={"naive": Bar(time=0.85 if full else 0.6, memory=1 / 4), "liger": Bar(time=1, memory=1)} | of_gemms,
            floors={"GEMMs": gemms()},
        ),
        case(
            "linear_policy_loss",
            (rows, *size),
            dtype,
            "reinforce, advantage 1",
            scored,
            ours=our_cross_entropy,
            peers={
                "torch chunked, auto": torch_cross_entropy(),
                "torch chunked, 128": torch_cross_entropy(batch_chunk_size=128),
            },
            compared=loss_and_gradients,
            bars={"torch": Bar(time=1, memory=1)} | of_gemms,
            floors={"GEMMs": gemms()},
        ),
    ]


def large(rows: int, *size: int) -> Case:
    def inputs():
        hidden, weight = head((rows,), *size, BFLOAT16)
        return hidden, weight, torch.randint(size[1], (rows,))

    return case(
        "linear_token_logprobs",
        (rows, *size),
        BFLOAT16,
        "",
        inputs,
        ours=our_logprobs(),
        peers={"naive": Peer(lambda: naive_logprobs(as_they_are))},
        # The gradient of the weight is a sum over all rows.
        compared=lambda outputs: outputs[:2],
        rows=CHECKED_ROWS,
        whole=(1,),
        bars={"naive": Bar(memory=1 / 4)},
        most_bytes=10**9,
        once=True,
    )


CASES = [*cases(FLOAT32), *cases(BFLOAT16), large(*LARGE)]


def test_linear_logprobs(case, implementation, measure):
    measure(case, implementation)
