"""The state that a checkpoint keeps: a file for each part of a run."""

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import checkpoints


@dataclass(frozen=True)
class State:
    """What has state: an object of this class, or any other with these two methods.

    state_dict: gives the state; None if there is none to keep at present. Every process calls it.
    load_state_dict: takes it back; None if a checkpoint has none.
    """

    state_dict: Callable[[], Any]
    load_state_dict: Callable[[Any], Any]


@dataclass(frozen=True)
class Kept:
    """A file of a checkpoint and the owner of its state.

    file: its name. `.json` is JSON, `.pth` a file of torch, anything else text. With `{process}` in it every process
        has a file of its own, else the process that saves writes one for all.
    what: what it holds, for the message about a checkpoint that cannot be loaded: "its metrics".
    """

    file: str
    owner: Any
    what: str

    def save(self, folder: Path, process: int, writes: bool) -> None:
        state = self.owner.state_dict()
        file = folder / self.file.format(process=process)
        if state is None or not (writes or "{process}" in self.file):
            return
        if file.suffix == ".json":
            file.write_text(json.dumps(state, default=str))
        elif file.suffix == ".pth":
            torch.save(state, file)
        else:
            file.write_text(state)

    def load(self, folder: Path, process: int) -> None:
        # If fewer ranks saved, reuse another rank's file.
        file = folder / self.file.format(process=process % checkpoints.processes(folder))
        state = None
        if file.is_file():
            if file.suffix == ".json":
                state = json.loads(file.read_text())
            elif file.suffix == ".pth":
                # The name of a device such as "cpu:0", which a process of several has, is unknown to torch.
                state = torch.load(file, map_location="cpu", weights_only=True)
            else:
                state = file.read_text()
        self.owner.load_state_dict(state)


@contextlib.contextmanager
def reading(folder: str | Path, what: str) -> Iterator[None]:
    """Whatever is raised inside is a BadCheckpoint of one line."""
    try:
        yield
    except checkpoints.BadCheckpoint:
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise checkpoints.BadCheckpoint(folder, f"{what} cannot be loaded: {why}") from error
