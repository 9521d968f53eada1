"""Restores the settings of this process that training depends on, after user code has run.

`calls`, `functions` and `workers` call reward functions inside `restored`, and the command line imports their modules
inside it.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch


def _folder() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # the folder was removed
        return None


def _set_folder(folder: str | None) -> None:
    if folder is not None:
        os.chdir(folder)


def _set_device(device: torch.device) -> None:
    torch.set_default_device(None)  # a default device slows down every PyTorch call, even if it is the usual one
    if torch.get_default_device() != device:
        torch.set_default_device(device)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _autocast_depth() -> int:
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


def _set_autocast_depth(depth: int) -> None:
    # Autocast caches casts of weights; after the next optimizer step they would be out of date.
    torch.clear_autocast_cache()
    while _autocast_depth() > depth:
        torch.autocast_decrement_nesting()


def _streams() -> tuple:
    """sys.stdout and sys.stderr. A stream that was closed is replaced by a new one on the same file descriptor."""
    found = {1: sys.stdout, 2: sys.stderr}
    for number, stream in found.items():
        if getattr(stream, "closed", False):
            found[number] = os.fdopen(number, "w", buffering=1, errors="backslashreplace", closefd=False)
    return tuple(found.values())


def _set_streams(streams: tuple) -> None:
    sys.stdout, sys.stderr = streams
    sys.stdout, sys.stderr = _streams()


DEVICES = sorted({"cpu", getattr(torch.accelerator.current_accelerator(), "type", "cpu")})
SIGNALS = (signal.SIGINT, signal.SIGTERM)
#: A pair of (read, write) per setting. Settings that no run depends on, such as the locale, are not restored.
SETTINGS: list[tuple[Callable[[], Any], Callable[[Any], Any]]] = [
    (torch.is_grad_enabled, torch.set_grad_enabled),
    *((partial(torch.is_autocast_enabled, each), partial(torch.set_autocast_enabled, each)) for each in DEVICES),
    (_autocast_depth, _set_autocast_depth),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_default_device, _set_device),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (_folder, _set_folder),
    (_umask, os.umask),
    (_streams, _set_streams),
    *((partial(signal.getsignal, each), partial(signal.signal, each)) for each in SIGNALS),
    (partial(signal.pthread_sigmask, signal.SIG_BLOCK, ()), partial(signal.pthread_sigmask, signal.SIG_SETMASK)),
]


@contextlib.contextmanager
def _kept(number: int) -> Iterator[None]:
    """Keeps a file descriptor open. If user code closed it, the next file to be opened would get its number, and with
    it everything that is printed."""
    spare = os.dup(number)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if not _are_same(number, spare):
                os.dup2(spare, number)
            os.close(spare)


def _are_same(number: int, other: int) -> bool:
    try:
        return os.path.sameopenfile(number, other)
    except OSError:  # the descriptor was closed
        return False


@contextlib.contextmanager
def restored() -> Iterator[None]:
    """Restores SETTINGS and the standard streams after the with block."""
    with contextlib.ExitStack() as files:
        for number in (1, 2):
            with contextlib.suppress(OSError):  # the process has no such stream
                files.enter_context(_kept(number))
        with _restored_settings():
            yield


@contextlib.contextmanager
def _restored_settings() -> Iterator[None]:
    before = [read() for read, _ in SETTINGS]
    try:
        # Only leaving an outer inference mode ends one that was begun inside. Entering it also sets the gradient mode.
        with torch.inference_mode(torch.is_inference_mode_enabled()):
            torch.set_grad_enabled(before[0])
            yield
    finally:
        for (read, write), value in zip(SETTINGS, before, strict=True):
            if read() != value:
                with contextlib.suppress(Exception):  # for example, the current folder was removed
                    write(value)
