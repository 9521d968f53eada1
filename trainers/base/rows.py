"""Checks on the rows of a dataset, and samplers that decide in which order optimizer steps see them."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices


def check_columns(name: str, dataset: Any, *columns: str) -> None:
    """Raises TypeError or ValueError unless `dataset` is a sequence of rows with these columns."""
    if isinstance(dataset, dict) or not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise TypeError(f"{name} must be a sequence of rows; got {type(dataset).__name__}")
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty")
    present = list(getattr(dataset, "column_names", None) or dataset[0])
    for column in columns:
        if column not in present:
            raise ValueError(f"{name} has no column '{column}'; its columns are {', '.join(present)}")


def each_part(eval_dataset: Any, function: Callable[[str, Any], Any]) -> Any:
    """Applies function(name, dataset) to an evaluation set, or to each in a dict of them. None stays None."""
    if isinstance(eval_dataset, dict):
        return {key: function(f"eval_dataset['{key}']", part) for key, part in eval_dataset.items()}
    return None if eval_dataset is None else function("eval_dataset", eval_dataset)


class NumberedRows(Dataset):
    """A dataset whose rows hold their index as `_row_id`, unless they already have one."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"_row_id": index, **self.rows[index]}


class LengthGroupedSampler(Sampler[int]):
    """Random indices, with rows of similar length in each batch. The order depends only on the seed and the epoch, so
    that it is the same in a resumed run and on every process. transformers' own sampler does not ensure that."""

    def __init__(self, lengths: list[int], batch_size: int, seed: int, epoch: Callable[[], int]) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch())
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))
