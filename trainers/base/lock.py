"""One run in a folder: the lock on a folder that a run writes into."""

import contextlib
import os
import platform
from pathlib import Path
from typing import Any
from weakref import WeakSet

from accelerate import PartialState
from transformers.utils import logging

from . import checkpoints

logger = logging.get_logger(__name__)


class FolderInUse(checkpoints.CheckpointError):
    """Another run writes into the folder."""


class Lock:
    """A lock on the folder that a run writes into. One run holds it at a time, and may take it again. The operating
    system releases it however the run ends."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / ".lock"
        self._held: int | None = None
        self._count = 0
        LOCKS.add(self)

    def __enter__(self) -> None:
        if self._count == 0:
            self._held = self._take()
        self._count += 1

    def __exit__(self, *_: Any) -> None:
        self._count -= 1
        if self._count == 0 and self._held is not None:
            self.file.unlink(missing_ok=True)
            self.forget()

    def _take(self) -> int | None:
        try:
            import fcntl

            self.folder.mkdir(parents=True, exist_ok=True)
            while True:
                number = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o644)
                try:
                    fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if _is_open_as(number, self.file):  # if not, its holder has removed it meanwhile
                        with contextlib.suppress(OSError):  # a full disk
                            os.ftruncate(number, 0)
                            os.write(number, f"process {os.getpid()} on {platform.node()}".encode())
                        return number
                except BlockingIOError as error:
                    holder = " ".join(os.pread(number, 200, 0).decode(errors="replace").split())
                    os.close(number)
                    raise FolderInUse(f"output_dir {self.folder}: another run writes there ({holder})") from error
                except OSError:
                    os.close(number)
                    raise
                os.close(number)
        except (OSError, ImportError) as error:
            why = getattr(error, "strerror", None) or str(error)
            logger.warning(f"{self.folder} cannot be locked ({why}): see to it that no other run writes there")
            return None

    def forget(self) -> None:
        if self._held is not None:
            with contextlib.suppress(OSError):  # code of the user has closed all open files
                os.close(self._held)
            self._held = None


LOCKS: WeakSet[Lock] = WeakSet()


def _forget_locks() -> None:
    for lock in LOCKS:
        lock.forget()


# A process forked from a run may outlive it.
os.register_at_fork(after_in_child=_forget_locks)


def _is_open_as(number: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(number), file.stat())
    except FileNotFoundError:
        return False


def settle(args: Any, lock: Lock | None = None) -> None:
    """The process that writes settles the output folder (`checkpoints.settle`); the others wait. A `FolderInUse` if
    another run writes there, which may be amid a checkpoint."""
    state = PartialState()
    try:
        if args.should_save and os.path.isdir(args.output_dir):
            folder = Path(args.output_dir)
            with lock or Lock(folder):
                checkpoints.settle(folder)
    finally:
        state.wait_for_everyone()
