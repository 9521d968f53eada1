import torch
from torch import Tensor

from rlkernels.ops.lm_head.head import Head
from rlkernels.ops.lm_head.tiles import Rows, working_dtype
from rlkernels.reference.logprobs import token_logprobs_join

OUTPUTS = ("log_sum_sq_probs", "mean_logit", "is_top1")


class Outputs:
    """The results that `outputs` names, collected while the tiles come one by one."""

    def __init__(self, head: Head, rows: Rows, names: tuple[str, ...]) -> None:
        self.head, self.rows, self.names = head, rows, names
        self.token_ids = head.local_ids(rows)
        nothing = rows.hidden.new_full((len(rows),), float("-inf"), dtype=working_dtype(rows.hidden))
        self.total = torch.zeros_like(nothing)
        self.before, self.target, self.after = nothing, nothing.clone(), nothing.clone()
        # The sums of p^2, a softmax at half the temperature up to a factor: max, sum, and two that stay empty.
        self.squares = torch.stack([nothing, self.total, self.total, nothing + float("nan")])

    def __call__(self, tile: Tensor, block: slice, vocab: slice) -> None:
        softcap = self.head.softcap
        y = tile.to(self.total.dtype)
        if softcap > 0:
            y = softcap * torch.tanh(y / softcap)
        if "mean_logit" in self.names:
            self.total[block] += y.sum(-1)
        if "log_sum_sq_probs" in self.names:
            top = y.amax(-1)
            below = (y - top.masked_fill(top.isneginf(), 0.0).unsqueeze(-1)) * (2 / self.head.temperature)
            zero = torch.zeros_like(top)
            part = torch.stack([top, below.exp().sum(-1), zero, zero + float("nan")])
            self.squares[:, block] = token_logprobs_join(
                torch.stack([self.squares[:, block], part]), self.head.temperature / 2
            )
        if "is_top1" in self.names:
            tokens = torch.arange(vocab.start, vocab.stop, device=tile.device)
            token = self.token_ids[block].unsqueeze(-1)
            for largest, chosen in (
                (self.before, tokens < token),
                (self.target, tokens == token),
                (self.after, tokens > token),
            ):
                of_tile = y.masked_fill(~chosen, float("-inf")).amax(-1)
                largest[block] = torch.maximum(largest[block], of_tile)

    def results(self, row_stats: Tensor) -> list[Tensor]:
        """One tensor [R] for each name, from row_stats of the whole vocabulary."""
        temperature, gather = self.head.temperature, self.head.all_gather
        vocab_size = self.head.weight.shape[0] if self.head.share is None else self.head.share[1]
        found = {}
        if "mean_logit" in self.names:
            found["mean_logit"] = gather(self.total).sum(0) / temperature / vocab_size
        if "log_sum_sq_probs" in self.names:
            top, total, *_ = token_logprobs_join(gather(self.squares), temperature / 2)
            found["log_sum_sq_probs"] = total.log() + 2 * ((top - row_stats[0]) / temperature - row_stats[1])
        if "is_top1" in self.names:
            before, target, after = (gather(value).amax(0) for value in (self.before, self.target, self.after))
            found["is_top1"] = ((target > before) & (target >= after)).to(self.total.dtype)
        return [found[name] for name in self.names]
