"""How the command line ends other than well: `cli.main` turns these exceptions into one line and an exit code."""

import os


class BadValue(Exception):
    """A value given by the user, told in one line; everything else keeps its traceback."""


class Stopped(Exception):
    """SIGTERM, as which Ctrl-C is a KeyboardInterrupt: a line, and an exit code."""


def local_rank() -> int:
    """Of this process on its machine, under torchrun and accelerate."""
    return int(os.environ.get("LOCAL_RANK", 0))


def show(error: BaseException) -> str:
    """An error of the standard library rarely makes sense without its type's name; a plain ValueError does."""
    text = str(error)
    return text if type(error) in (ValueError, FileNotFoundError) and text else f"{type(error).__name__}: {text}"
