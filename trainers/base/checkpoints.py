"""Checkpoints that are whole or not there.

A checkpoint is written into a hidden folder next to its place, sealed with a manifest of its files, their sizes and
their SHA-256, and renamed. A process that is killed at any moment leaves the earlier ones as they were; what it leaves
besides is recognised by its name, or by its manifest, and removed when a run goes on there. Sizes are compared wherever
a whole checkpoint is looked for, contents where a run is about to read them.
"""

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from safetensors import SafetensorError
from transformers.utils import logging

logger = logging.get_logger(__name__)

MANIFEST = "manifest.json"
UNFINISHED, REMOVED = "unfinished", "removed"
LEFT = re.compile(rf"\.checkpoint-.*\.({UNFINISHED}|{REMOVED})|\.model\.{UNFINISHED}")
CONFIGS = ("config.json", "adapter_config.json")

# The errors of Python, torch.save and safetensors if a file cannot be written.
CANNOT_WRITE = (OSError, RuntimeError, SafetensorError)
# The text of an OSError in errors of libraries written in Rust. tokenizers raises it as a plain Exception.
OS_ERROR = re.compile(r"\(os error (\d+)\)")
# Files that a run would read even if the manifest does not list them. Other files may be added, such as results.
READ = re.compile(
    r"[^.].*\.(safetensors|pt|pth|bin|index\.json)|(config|adapter_config|settings|trainer_state|completions)\.json"
)


class CheckpointError(RuntimeError):
    """A checkpoint or a model could not be written. The checkpoints before it are as they were."""


class BadCheckpoint(ValueError):
    """A run cannot go on from a checkpoint. The message is one line."""

    def __init__(self, folder: str | Path, why: str) -> None:
        super().__init__(f"resume_from_checkpoint {folder}: {why}")
        self.why = why


def hidden(folder: Path, state: str) -> Path:
    """The name of a folder while it is written or removed. No glob for checkpoints matches it."""
    return folder.with_name(f".{folder.name}.{state}")


def is_hidden(folder: Path) -> bool:
    return folder.name.startswith(".") and folder.suffix == f".{UNFINISHED}"


# What is whole


@dataclass
class Manifest:
    """The files of a sealed folder, by path."""

    written: float
    sizes: dict[str, int]
    sha256: dict[str, str] | None  # None in checkpoints of versions that did not hash

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Reads it; raises a ValueError of one line if it is malformed."""
        try:
            content = json.loads((folder / MANIFEST).read_text())
        except RecursionError as error:
            raise ValueError("it is nested too deeply") from error
        if not isinstance(content, dict):
            raise ValueError(f"want a JSON object; got a {type(content).__name__}")
        written, sizes, hashes = (content.get(name) for name in ("written", "files", "sha256"))
        if type(written) not in (int, float) or not 0 <= written < 1e12:
            raise ValueError(f"'written' must be a time in seconds; got {_short(written)}")
        if not isinstance(sizes, dict) or not sizes:
            raise ValueError(f"'files' must be an object of sizes by path; got {_short(sizes)}")
        for name, size in sizes.items():
            if not name.isprintable() or Path(name).is_absolute() or ".." in Path(name).parts:
                raise ValueError(f"'files' has {_short(name)}, which is no path within the folder")
            if type(size) is not int or size < 0:
                raise ValueError(f"'files' must give the size of {name}; got {_short(size)}")
        if "sha256" in content:
            if not isinstance(hashes, dict) or hashes.keys() != sizes.keys():
                raise ValueError(f"'sha256' must be an object with the paths of 'files'; got {_short(hashes)}")
            if wrong := [name for name, value in hashes.items() if not isinstance(value, str)]:
                raise ValueError(f"'sha256' must give text for {wrong[0]}; got {_short(hashes[wrong[0]])}")
        return cls(written, sizes, hashes)


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def fault(folder: Path, contents: bool = False) -> str | None:
    """Why a folder is not a whole checkpoint; None if it is. With `contents` every byte is read."""
    if not os.path.isdir(folder):  # Path.is_dir raises if the path is too long
        return "there is no such folder"
    if not (folder / MANIFEST).is_file():
        return f"it has no {MANIFEST}, which is written last"
    try:
        manifest = Manifest.read(folder)
    except (OSError, ValueError) as error:
        return f"its {MANIFEST} cannot be read: {error}"
    try:
        return _other_files(folder, manifest) or (_other_contents(folder, manifest) if contents else None)
    except OSError as error:
        return f"it cannot be read: {error.strerror}: {_short(error.filename)}"


def _other_files(folder: Path, manifest: Manifest) -> str | None:
    for name, size in manifest.sizes.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, not {size}"
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if READ.fullmatch(path.name) and path.is_file() and name not in {*manifest.sizes, MANIFEST}:
            return f"{_short(name)} is not in its {MANIFEST}"
    return None


def _other_contents(folder: Path, manifest: Manifest) -> str | None:
    if manifest.sha256 is None:
        logger.warning(f"{folder} was written before contents were sealed: the sizes of its files alone are checked")
        return None
    with ThreadPoolExecutor() as threads:
        found = threads.map(lambda name: sha256(folder / name), manifest.sha256)
        for (name, expected), actual in zip(manifest.sha256.items(), found, strict=True):
            if actual != expected:
                return f"the content of {name} is not what was written (SHA-256)"
    return None


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def is_whole(folder: Path) -> bool:
    return fault(folder) is None


def numbered(output_dir: Path) -> list[Path]:
    """The folders named checkpoint-N, whole or not, from the first to the last."""
    found = output_dir.glob("checkpoint-*") if os.path.isdir(output_dir) else ()
    return sorted((folder for folder in found if step_of(folder) is not None and folder.is_dir()), key=step_of)


def step_of(folder: Path) -> int | None:
    number = folder.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() else None


def unlogged_file(folder: Path, process: int) -> Path:
    """The file of what a process has not logged yet. Every checkpoint has it, unless save_only_model is set."""
    return folder / f"unlogged_{process}.pth"


def processes(folder: Path) -> int:
    """The number of processes that wrote a checkpoint."""
    return len(list(folder.glob("unlogged_*.pth")))


def whole_checkpoints(output_dir: Path) -> list[Path]:
    return [folder for folder in numbered(output_dir) if is_whole(folder)]


def last_checkpoint(output_dir: Path, contents: bool = False) -> Path | None:
    """The whole checkpoint of the latest step. A warning names later ones that are torn; with `contents`, also those in
    which a byte has changed."""
    torn = []
    for folder in reversed(numbered(output_dir)):
        why = fault(folder, contents)
        if why is None:
            break
        torn.append(f"{folder} ({why})")
    else:
        folder = None
    if torn:
        logger.warning(f"Passed over, since they are not whole: {'; '.join(torn)}")
    return folder


def check(folder: Path, contents: bool = False) -> None:
    """Raises BadCheckpoint if the folder is not a whole checkpoint, or if it holds a model alone."""
    why = fault(folder, contents)
    if why is None and not unlogged_file(folder, process=0).is_file():
        raise BadCheckpoint(folder, "holds the model alone (save_only_model): give it as model")
    if why is not None:
        others = [other for other in whole_checkpoints(folder.parent) if other != folder]
        last = f"; the last whole one is {others[-1]}" if others else ""
        raise BadCheckpoint(folder, f"not a whole checkpoint: {why}{last}")


# Writing, replacing, removing


def sync(path: Path) -> None:
    """Returns when the file or folder would survive a power cut."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def sync_folder(folder: Path) -> None:
    try:
        sync(folder)
    except OSError:  # folders cannot be opened everywhere
        return


def seal(folder: Path) -> None:
    """Writes the manifest of a folder, once all its files are on the disk."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            files[path.relative_to(folder).as_posix()] = path
        else:
            sync_folder(path)
    with ThreadPoolExecutor() as threads:  # hashing releases Python's lock
        hashes = dict(zip(files, threads.map(sha256, files.values()), strict=True))
    for path in files.values():
        sync(path)
    sizes = {name: path.stat().st_size for name, path in files.items()}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"written": time.time(), "files": sizes, "sha256": hashes}, indent=1))
    sync(manifest)
    sync_folder(folder)


def put_in_place(unfinished: Path, folder: Path) -> None:
    """Gives a sealed folder its final name. If a folder of that name exists, one of the two is whole at each moment:
    `settle` finds the new one under its unfinished name."""
    old = hidden(folder, REMOVED)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    unfinished.rename(folder)
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def settle(output_dir: Path) -> None:
    """Removes folders that a killed run was writing or removing. A folder that it had sealed, but not yet renamed,
    becomes a checkpoint."""
    for unfinished in output_dir.glob(f".checkpoint-*.{UNFINISHED}"):
        if is_whole(unfinished):
            folder = output_dir / unfinished.name[1:].removesuffix(f".{UNFINISHED}")
            try:
                put_in_place(unfinished, folder)
            except OSError as error:
                raise cannot_be_written(str(folder), output_dir, reason(error, output_dir)) from error
    for folder in output_dir.iterdir():
        if LEFT.fullmatch(folder.name):
            shutil.rmtree(folder, ignore_errors=True)


def rotate(output_dir: Path, limit: int | None, kept: Iterable[Path]) -> None:
    """Removes the oldest whole checkpoints until `limit` are left, but never one of `kept`. Torn checkpoints do not
    count and stay."""
    if not limit or limit < 1:
        return
    found = sorted(whole_checkpoints(output_dir), key=lambda each: Manifest.read(each).written)
    kept = {folder.absolute() for folder in kept}
    removable = [folder for folder in found if folder.absolute() not in kept]
    for folder in removable[: max(len(found) - max(limit, len(kept)), 0)]:
        aside = hidden(folder, REMOVED)
        shutil.rmtree(aside, ignore_errors=True)
        try:
            folder.rename(aside)
        except OSError as error:
            logger.warning(f"{folder} could not be removed (save_total_limit): {error.strerror}")
            continue
        shutil.rmtree(aside, ignore_errors=True)


def write(folder: Path, parts: list[Callable[[str], Any]], args: Any) -> None:
    """Every process calls each of `parts` with the folder to write into, which is then sealed and renamed. Where one
    cannot write, none goes on: a CheckpointError on all of them, and nothing is left of the folder.

    A process leaves no part before all have done it, so that a part may be collective."""
    unfinished = hidden(folder, UNFINISHED)

    def begin(_: str) -> None:
        if args.should_save:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)

    def finish(_: str) -> None:
        if args.should_save:
            seal(unfinished)
            put_in_place(unfinished, folder)

    try:
        for part in (begin, *parts, finish):
            together(part, unfinished, folder, args.world_size)
    except BaseException:
        if args.should_save:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise


def together(part: Callable[[str], Any], unfinished: Path, folder: Path, processes: int) -> None:
    error: Exception | None = None
    try:
        part(str(unfinished))
    except Exception as raised:
        error = raised
    reasons = [None if error is None else reason(error, unfinished)]
    if processes > 1:
        reasons = gather_object(reasons)
    if error is not None and not is_of_writing(error):
        raise error
    for why in reasons:
        if why is not None:
            raise cannot_be_written(str(folder), folder.parent, why) from error


def cannot_be_written(what: str, output_dir: Path, why: str) -> CheckpointError:
    whole = whole_checkpoints(output_dir)
    stays = f"{whole[-1]} stays, and resume_from_checkpoint goes on from it" if whole else "there is no checkpoint"
    return CheckpointError(f"{what} could not be written: {why}; {stays}")


def is_of_writing(error: Exception) -> bool:
    return isinstance(error, CANNOT_WRITE) or OS_ERROR.search(str(error)) is not None


def reason(error: Exception, folder: Path) -> str:
    """Why a file could not be written. torch.save and safetensors hide it, so that one more file is tried."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if number := OS_ERROR.search(str(error)):
        return os.strerror(int(number[1]))
    probe = folder / "probe"
    try:
        probe.write_bytes(bytes(1 << 24))
    except FileNotFoundError:  # nothing was written yet
        pass
    except OSError as found:
        return found.strerror
    finally:
        probe.unlink(missing_ok=True)
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def write_model(output_dir: Path, save: Callable[[str], Any], writes: bool) -> None:
    """Writes a model aside and moves it into a folder that may hold other things, a file at a time; its config comes
    last, and an older one's goes first. So a folder with a config always holds one whole model; a process killed while
    it moves leaves one without, and the checkpoints.

    Every process calls it, since `save` may be collective; one that does not write leaves the folders alone."""
    unfinished = output_dir / f".model.{UNFINISHED}"
    if not writes:
        save(str(unfinished))
        return
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        save(str(unfinished))
        files = [path for path in unfinished.rglob("*") if path.is_file()]
        for file in files:
            sync(file)
        is_config = {file: file.parent == unfinished and file.name in CONFIGS for file in files}
        for name in CONFIGS:
            (output_dir / name).unlink(missing_ok=True)
        for file in sorted(files, key=is_config.__getitem__):
            target = output_dir / file.relative_to(unfinished)
            target.parent.mkdir(parents=True, exist_ok=True)
            file.replace(target)
        sync_folder(output_dir)
    except Exception as error:
        if not is_of_writing(error):
            raise
        raise cannot_be_written(f"the model in {output_dir}", output_dir, reason(error, unfinished)) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
