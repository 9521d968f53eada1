"""Loads the dataset of a training command, for `cli_train`.

Local files are read here. `datasets.load_dataset` does not say which line or row is wrong, and converts all values of a
column to one type.
"""

import contextlib
import csv
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet
from datasets import Dataset, load_dataset, load_dataset_builder

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
# Objects and lists may be nested this deep, which is far below Python's recursion limit.
DEEPEST = 100


class Rows(Sequence):
    """Rows kept as JSON text and parsed at each access. So columns have no type, and a reward function that changes a
    row's values changes only its own copy. A column that a row lacks is None."""

    def __init__(self, rows: Iterable[tuple[bytes, Iterable[str]]]) -> None:
        self.texts: list[bytes] = []
        names: dict[str, None] = {}
        for text, columns in rows:
            self.texts.append(text)
            names.update(dict.fromkeys(columns))
        self.column_names = list(names)

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: Any) -> Any:
        """A row by its index, or a column by its name, as in a `datasets.Dataset`."""
        if isinstance(index, str):
            return [row[index] for row in self]
        return dict.fromkeys(self.column_names) | json.loads(self.texts[index])


def load_split(path: str, configuration: str | None, split: str) -> Any:
    """The rows of a split. Raises ValueError or OSError if they cannot be read or there are none."""
    if not path:
        raise ValueError(f"want a {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file, a folder or a name; got ''")
    file = local_file(Path(path), split)
    files = files_of_others(Path(path), configuration, split) if file is None else [file]
    if not files:
        try:
            rows = load_dataset(path, configuration, split=split)
        except (OSError, ValueError):
            raise
        except Exception as error:  # file formats raise exceptions of any type
            raise ValueError(f"{type(error).__name__}: {error}") from error
    elif files[0].suffix == ".parquet":
        with naming(files[0], path):
            rows = read_parquet(files[0])
    else:
        rows = Rows(read_texts(files, path))
    if len(rows) == 0:
        raise ValueError(f"the split '{split}' has no rows")
    return rows


def local_file(path: Path, split: str) -> Path | None:
    """The file of a split, or None if `load_dataset` must find it."""
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


def files_of_others(folder: Path, configuration: str | None, split: str) -> list[Path]:
    """The files with other names that `load_dataset` would take for a split of a folder. Empty if `load_dataset` must
    read them: the folder has a dataset card, which may say how, or the files are neither CSV nor JSON."""
    if not folder.is_dir() or configuration is not None or (folder / "README.md").exists():
        return []
    try:
        found = load_dataset_builder(str(folder)).config.data_files or {}
    except Exception:  # `load_dataset` will raise it again
        return []
    files = [Path(file) for name, each in found.items() if str(name) == split for file in each]
    return files if {file.suffix for file in files} <= {".csv", ".json", ".jsonl"} else []


@contextlib.contextmanager
def naming(file: Path, given: str) -> Iterator[None]:
    """Adds the file's name to a ValueError, unless the user named this file."""
    try:
        yield
    except ValueError as error:
        if file == Path(given):
            raise
        raise ValueError(f"{file.name}: {error}") from error


def read_parquet(file: Path) -> Any:
    try:
        return Dataset(pyarrow.parquet.read_table(file))
    except (
        NotImplementedError,
        LookupError,
        TypeError,
    ) as error:  # a column type that datasets does not support
        raise ValueError(f"{type(error).__name__}: {error}") from error


Texts = Iterator[tuple[bytes, Iterable[str]]]
"""For each row its JSON text and the names of its columns."""


def read_texts(files: list[Path], given: str) -> Texts:
    readers = {".jsonl": read_lines, ".json": read_list, ".csv": read_csv}
    for file in files:
        with naming(file, given):
            if file.suffix not in readers:
                raise ValueError(f"want a {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file")
            yield from readers[file.suffix](file)


def read_lines(file: Path) -> Texts:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                row = parse(text) if text else {}
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number}: {error.msg} at column {error.colno}") from error
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"line {number}: want an object; got {kind(row)}")
            if text:
                yield text.encode(), row


def read_list(file: Path) -> Texts:
    """Reads a JSON list of rows, or JSON lines, which many .json files hold."""
    try:
        rows = parse(file.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise
        yield from read_lines(file)
        return
    if not isinstance(rows, list):
        raise ValueError(f"want a list of objects; got {kind(rows)}")
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"row {number}: want an object; got {kind(row)}")
        yield json.dumps(row).encode(), row


def read_csv(file: Path) -> Texts:
    """Reads CSV. All values are text; an empty field is empty text."""
    csv.field_size_limit(sys.maxsize)
    with file.open(encoding="utf-8-sig", newline="") as text:
        lines = csv.reader(text, strict=True)
        try:
            header = next(filter(None, lines), [])
            for fields in filter(None, lines):
                if len(fields) != len(header):
                    raise ValueError(
                        f"line {lines.line_num}: want {len(header)} fields, as in the header; got {len(fields)}"
                    )
                row = once(list(zip(header, fields, strict=True)))
                yield json.dumps(row).encode(), header
        except csv.Error as error:
            raise ValueError(f"line {lines.line_num}: {error}") from error


def parse(text: str) -> Any:
    """Parses JSON. Raises ValueError for a doubled key, a number too large, deep nesting, or half a surrogate pair."""
    try:
        value = json.loads(text, object_pairs_hook=once, parse_float=finite)
        too_deep = text.count("[") + text.count("{") > DEEPEST and depth(value) > DEEPEST
    except RecursionError:
        too_deep = True
    if too_deep:
        raise ValueError(f"want objects and lists at most {DEEPEST} deep in each other; got more")
    if re.search(r"\\u[dD][89a-fA-F]", text):  # only such an escape can make text that UTF-8 cannot encode
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"\\u{ord(error.object[error.start]):04x} is half a character") from error
    return value


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs as a dict. Raises ValueError for a name that stands twice."""
    value = dict(pairs)
    if len(value) < len(pairs):
        ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"'{name}' stands twice in a row or object")
    return value


def finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text[:20]} is too large for a float")
    return value


def depth(value: Any) -> int:
    """How deep objects and lists are nested."""
    level, count = [value], 0
    while level:
        level = [part for each in level for part in (each.values() if isinstance(each, dict) else each)]
        level = [part for part in level if isinstance(part, dict | list)]
        count += 1
    return count


def check_prompts(rows: Any) -> None:
    """Raises ValueError unless every row has a prompt, and all are text or all are messages."""
    if "prompt" not in rows.column_names:
        raise ValueError(f"no column 'prompt'; its columns are {', '.join(rows.column_names)}")
    prompts = rows["prompt"]
    for number, prompt in enumerate(prompts):
        if not is_prompt(prompt):
            raise ValueError(f"row {number}: want text, or messages with role and content, as prompt; got {prompt!r}")
        if type(prompt) is not type(prompts[0]):
            raise ValueError(f"row {number}: want {kind(prompts[0])} as prompt, as in the rows before; got {prompt!r}")


def is_prompt(prompt: Any) -> bool:
    if isinstance(prompt, list):
        return bool(prompt) and all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in prompt)
    return isinstance(prompt, str) and prompt != ""


def kind(value: Any) -> str:
    """What a message calls a JSON value's type."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
