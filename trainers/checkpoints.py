"""Checkpoints that are whole or not there.

A checkpoint is written into a hidden folder beside its place, sealed with a manifest of its files and their sizes, and
renamed. A process that is killed at any moment leaves the earlier ones as they were; what it leaves besides is
recognised by its name, or by its manifest, and removed when a run goes on there.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from safetensors import SafetensorError
from transformers.utils import logging

logger = logging.get_logger(__name__)

MANIFEST = "manifest.json"
UNFINISHED, REMOVED = "unfinished", "removed"
CONFIGS = ("config.json", "adapter_config.json")

# What libraries raise where a file cannot be written: Python, torch.save, safetensors.
CANNOT_WRITE = (OSError, RuntimeError, SafetensorError)


class CheckpointError(RuntimeError):
    """A checkpoint or a model could not be written. The checkpoints before it are as they were."""


def hidden(folder: Path, state: str) -> Path:
    """Where a folder is while it is written or removed: no glob of checkpoints takes it for one."""
    return folder.with_name(f".{folder.name}.{state}")


def is_hidden(folder: Path) -> bool:
    return folder.name.startswith(".") and folder.suffix == f".{UNFINISHED}"


# What is whole


def fault(folder: Path) -> str | None:
    """What keeps a folder from being a whole checkpoint; None if it is one."""
    if not folder.is_dir():
        return "there is no such folder"
    try:
        files = dict(json.loads((folder / MANIFEST).read_text())["files"])
    except FileNotFoundError:
        return f"it has no {MANIFEST}, which is written last"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its {MANIFEST} cannot be read: {error}"
    for name, size in files.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, not {size}"
    return None


def is_whole(folder: Path) -> bool:
    return fault(folder) is None


def numbered(output_dir: Path) -> list[Path]:
    """The folders named checkpoint-N, whole or not, from the first to the last."""
    found = [folder for folder in output_dir.glob("checkpoint-*") if step_of(folder) is not None and folder.is_dir()]
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int | None:
    number = folder.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() else None


def unlogged_file(folder: Path, process: int) -> Path:
    """What a process has not logged yet: in each checkpoint, unless save_only_model wants the model alone."""
    return folder / f"unlogged_{process}.pth"


def processes(folder: Path) -> int:
    """How many wrote a checkpoint."""
    return len(list(folder.glob("unlogged_*.pth")))


def whole_checkpoints(output_dir: Path) -> list[Path]:
    return [folder for folder in numbered(output_dir) if is_whole(folder)]


def last_checkpoint(output_dir: Path) -> Path | None:
    """The whole one of the latest step. Torn ones behind it are passed over, with a warning."""
    torn = []
    for folder in reversed(numbered(output_dir)):
        why = fault(folder)
        if why is None:
            break
        torn.append(f"{folder} ({why})")
    else:
        folder = None
    if torn:
        logger.warning(f"Passed over, since they are not whole: {'; '.join(torn)}")
    return folder


def check(folder: Path) -> None:
    """A ValueError of one line if it is not a whole checkpoint, or one that no run can go on from."""
    why = fault(folder)
    if why is None and not unlogged_file(folder, process=0).is_file():
        raise ValueError(f"resume_from_checkpoint {folder}: holds the model alone (save_only_model): give it as model")
    if why is not None:
        others = [other for other in whole_checkpoints(folder.parent) if other != folder]
        last = f"; the last whole one is {others[-1]}" if others else ""
        raise ValueError(f"resume_from_checkpoint {folder}: not a whole checkpoint: {why}{last}")


# Writing, replacing, removing


def sync(path: Path) -> None:
    """Until it would outlast a power cut."""
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
    """Lists all that is in it, once that is on the disk."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            sync(path)
            files[path.relative_to(folder).as_posix()] = path.stat().st_size
        else:
            sync_folder(path)
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"written": time.time(), "files": files}, indent=1))
    sync(manifest)
    sync_folder(folder)


def put_in_place(unfinished: Path, folder: Path) -> None:
    """Gives a sealed folder its name. Where there is one of that name already, one of the two is whole at each moment:
    `settle` finds the new one under the name of an unfinished one."""
    old = hidden(folder, REMOVED)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    unfinished.rename(folder)
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def settle(output_dir: Path) -> None:
    """Removes what a killed run left: folders it was writing or removing. One that it had sealed, but not yet renamed,
    is a checkpoint."""
    for unfinished in output_dir.glob(f".checkpoint-*.{UNFINISHED}"):
        if is_whole(unfinished):
            put_in_place(unfinished, output_dir / unfinished.name[1:].removesuffix(f".{UNFINISHED}"))
    for name in (f".checkpoint-*.{UNFINISHED}", f".checkpoint-*.{REMOVED}", f".model.{UNFINISHED}"):
        for folder in output_dir.glob(name):
            shutil.rmtree(folder, ignore_errors=True)


def rotate(output_dir: Path, limit: int | None, kept: Iterable[Path]) -> None:
    """Removes the whole checkpoints that were written first, until `limit` are left; never those of `kept`. Torn ones
    do not count, and stay."""
    if not limit or limit < 1:
        return
    found = sorted(whole_checkpoints(output_dir), key=lambda each: json.loads((each / MANIFEST).read_text())["written"])
    kept = {folder.absolute() for folder in kept}
    removable = [folder for folder in found if folder.absolute() not in kept]
    for folder in removable[: max(len(found) - max(limit, len(kept)), 0)]:
        aside = hidden(folder, REMOVED)
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
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
    if error is not None and not isinstance(error, CANNOT_WRITE):
        raise error
    for why in reasons:
        if why is not None:
            raise cannot_be_written(str(folder), folder.parent, why) from error


def cannot_be_written(what: str, output_dir: Path, why: str) -> CheckpointError:
    whole = whole_checkpoints(output_dir)
    stays = f"{whole[-1]} stays, and resume_from_checkpoint goes on from it" if whole else "there is no checkpoint"
    return CheckpointError(f"{what} could not be written: {why}; {stays}")


def reason(error: Exception, folder: Path) -> str:
    """Of torch.save and safetensors, which hide it, found out by writing one more file."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    probe = folder / "probe"
    try:
        probe.write_bytes(bytes(1 << 24))
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
    except CANNOT_WRITE as error:
        raise cannot_be_written(f"the model in {output_dir}", output_dir, reason(error, unfinished)) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
