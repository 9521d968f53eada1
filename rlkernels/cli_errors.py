"""Exceptions that `cli.main` turns into one line and an exit code, and what the other cli modules share with it."""

import os


class BadValue(Exception):
    """The user gave a wrong value. It is told in one line; other exceptions keep their traceback."""


class Stopped(Exception):
    """SIGTERM stopped the run, as KeyboardInterrupt says of Ctrl-C. Its arguments are a line and an exit code."""


def local_rank() -> int:
    """This process's rank on its machine, as torchrun and accelerate set it; else 0."""
    return int(os.environ.get("LOCAL_RANK", 0))


def show(error: BaseException) -> str:
    """The error's text, with its type's name except for a plain ValueError, which makes sense without."""
    text = str(error)
    return text if type(error) in (ValueError, FileNotFoundError) and text else f"{type(error).__name__}: {text}"
