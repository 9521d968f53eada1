"""Datasets of the command line. Local files are read here rather than by `load_dataset`, which does not say which line
or row is wrong."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


def load_split(path: str, configuration: str | None, split: str) -> Any:
    """The rows of a split; ValueError or OSError if there are none."""
    file = local_file(Path(path), split)
    if file is None:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError

        try:
            rows = load_dataset(path, configuration, split=split)
        except DatasetsError as error:
            raise ValueError(str(error)) from error
    else:
        try:
            rows = read_rows(file)
        except ValueError as error:
            if file == Path(path):
                raise
            raise ValueError(f"{file.name}: {error}") from error
    if len(rows) == 0:
        raise ValueError(f"the split '{split}' has no rows")
    return rows


def local_file(path: Path, split: str) -> Path | None:
    """The file of a split; None if `load_dataset` is to find it."""
    if path.is_dir():
        named = [path / f"{split}{suffix}" for suffix in SUFFIXES]
        return next((file for file in named if file.is_file()), None)
    if path.is_file():
        if split != "train":
            raise ValueError(
                f"a single file has the split 'train' only, not '{split}'; want a folder with train{path.suffix} and "
                f"{split}{path.suffix}"
            )
        return path
    if path.suffix in SUFFIXES:
        raise FileNotFoundError("no such file")
    return None


def read_rows(file: Path) -> Any:
    from datasets import Dataset

    if file.suffix == ".parquet":
        import pyarrow.parquet

        return Dataset(pyarrow.parquet.read_table(file))
    if file.suffix == ".csv":
        import pandas

        return Dataset.from_pandas(pandas.read_csv(file), preserve_index=False)
    if file.suffix == ".jsonl":
        rows = list(read_lines(file))
    elif file.suffix == ".json":
        rows = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(rows, list):
            raise ValueError(f"want a list of objects; got {kind(rows)}")
        for number, row in enumerate(rows):
            if not isinstance(row, dict):
                raise ValueError(f"row {number}: want an object; got {kind(row)}")
    else:
        raise ValueError(f"want a {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file")
    return to_dataset(rows)


def read_lines(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number}: {error.msg} at column {error.colno}") from error
            if not isinstance(row, dict):
                raise ValueError(f"line {number}: want an object; got {kind(row)}")
            yield row


def to_dataset(rows: list[dict[str, Any]]) -> Any:
    import pyarrow
    from datasets import Dataset

    columns = dict.fromkeys(name for row in rows for name in row)
    try:
        return Dataset.from_dict({name: [row.get(name) for row in rows] for name in columns})
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError):
        for name in columns:
            first = None
            for number, row in enumerate(rows):
                value = row.get(name)
                first = value if first is None else first
                if value is not None and type(value) is not type(first):
                    raise ValueError(
                        f"row {number}: column '{name}' holds {kind(value)}, where rows before hold {kind(first)}"
                    ) from None
        raise


def check_prompts(rows: Any) -> None:
    if "prompt" not in rows.column_names:
        raise ValueError(f"no column 'prompt'; its columns are {', '.join(rows.column_names)}")
    for number, prompt in enumerate(rows["prompt"]):
        if not is_prompt(prompt):
            raise ValueError(f"row {number}: want text, or messages with role and content, as prompt; got {prompt!r}")


def is_prompt(prompt: Any) -> bool:
    if isinstance(prompt, list):
        return bool(prompt) and all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in prompt)
    return isinstance(prompt, str) and prompt != ""


def kind(value: Any) -> str:
    """What JSON calls it."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
