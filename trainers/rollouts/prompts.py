"""The prompts of a run: in which order steps see them, and whether they can be completed."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..base.limits import Limits
from ..base.rows import check_columns
from ..data import check_prompts
from ..rewards.model import RewardModel
from .config import OnlineConfig
from .engine import end_tokens

# What reward functions get from the trainer, and the trainer's own number of a row: no names of columns.
REFUSED = ("prompts", "completions", "trainer_state", "log_extra", "log_metric", "_row_id")


class GroupSampler(Sampler[int]):
    """Indices of prompts: each is repeated `num_generations` times in a row, and each block of `prompts` prompts is
    repeated `repeats` times.

    The order depends only on the seed and the epoch, so that a resumed run sees the same prompts.
    """

    def __init__(
        self, size: int, prompts: int, num_generations: int, repeats: int, seed: int | None, epoch: Callable[[], int]
    ) -> None:
        self.size, self.prompts, self.num_generations, self.repeats = size, prompts, num_generations, repeats
        self.seed, self.epoch = seed, epoch

    def __len__(self) -> int:
        return self.size // self.prompts * self.prompts * self.num_generations * self.repeats

    def __iter__(self) -> Iterator[int]:
        order = self._order(self.epoch())
        for start in range(0, self.size - self.prompts + 1, self.prompts):
            yield from self._batch(order, start) * self.repeats

    def of_step(self, step: int) -> list[int]:
        """The indices of one optimizer step, counted over the whole run."""
        epoch, step = divmod(step, self.size // self.prompts * self.repeats)
        return self._batch(self._order(epoch), step // self.repeats * self.prompts)

    def _order(self, epoch: int) -> list[int]:
        if self.seed is None:
            return list(range(self.size))
        return torch.randperm(self.size, generator=torch.Generator().manual_seed(self.seed + epoch)).tolist()

    def _batch(self, order: list[int], start: int) -> list[int]:
        return [index for index in order[start : start + self.prompts] for _ in range(self.num_generations)]


def check_prompt_columns(name: str, dataset: Any) -> None:
    """Refuses a dataset without prompts, and columns that would hide what the trainer gives to reward functions."""
    check_columns(name, dataset, "prompt")
    rows = dataset if isinstance(dataset, list | tuple) else ()  # which may differ
    columns = set(getattr(dataset, "column_names", None) or dataset[0]).union(*rows)
    for column in REFUSED:
        if column in columns:
            raise ValueError(
                f"{name} has a column '{column}', the name of something else that reward functions or the trainer get; "
                "rename it"
            )


def check_readable(
    datasets: dict[str, Any],
    policy: PreTrainedModel,
    readers: Iterable[Any],
    reward_models: Iterable[RewardModel],
    tokenizer: PreTrainedTokenizerBase,
    args: OnlineConfig,
) -> Limits:
    """Whether all models can read every prompt and the longest completion: a ValueError that names dataset and row if
    one cannot. Nothing has been sampled yet.

    Args:
        datasets: by the name that an error gives them; None for one that there is not.
        policy: the model that completes the prompts.
        readers: further models that read prompts and completions in the policy's tokens: reference, value.
        reward_models: they read these too, in the policy's tokens or their own.

    Returns:
        The limits that all models that read the policy's tokens have in common.
    """
    reward_models = list(reward_models)
    limits = Limits.of(policy, *readers, *(each.model for each in reward_models if each.own_tokenizer is None))
    ends = end_tokens(policy, tokenizer)
    if ends and min(ends) >= limits.vocab_size:
        raise ValueError(
            f"processing_class: its end-of-sequence token is {min(ends)}, beyond the {limits.vocab_size} rows "
            "of the model's embedding, so that no completion could end; resize_token_embeddings makes room"
        )
    others = [model.check_prompt for model in reward_models if not model.fits]
    for name, dataset in datasets.items():
        if dataset is not None:
            check_prompts(
                name, dataset, tokenizer, limits, args.max_completion_length, args.chat_template_kwargs, others
            )
    return limits
