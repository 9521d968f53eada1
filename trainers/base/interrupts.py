"""Ctrl-C and SIGTERM: what they ask of a run, and what must not be broken off by them."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

# With what Python does of itself. A program that handles them in a way of its own keeps it.
DEFAULTS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


class Terminated(SystemExit):
    """SIGTERM stopped a run, as Ctrl-C does by KeyboardInterrupt. Not caught, it ends in exit code 143."""

    def __init__(self, message: str = "terminated") -> None:
        super().__init__(message)
        self.code = 128 + signal.SIGTERM


def stopped_by(number: int, message: str) -> BaseException:
    return Terminated(message) if number == signal.SIGTERM else KeyboardInterrupt(message)


class StopRequest:
    """Whether a run was asked to stop. The first signal is noted, for the run to act on, and answered by a line on
    stderr; a second one stops it at once, unless something is being finished, which a third does not wait for."""

    def __init__(self) -> None:
        self.number = 0  # the signal that this process got; 0: none
        self.agreed = 0  # that any process got, once they have told each other
        self.doing = ""
        self.listens = self.tells = False
        self._process = 0
        self._finishes = ""
        self._late = 0

    @contextlib.contextmanager
    def listening(self, tells: bool = True) -> Iterator[None]:
        """A run that looks at `number` as it goes. Of several processes one tells of a signal that all get."""
        self.number, self.agreed, self.tells = 0, 0, tells
        with self._handlers():
            self.listens = True
            try:
                yield
            finally:
                self.listens = False

    @contextlib.contextmanager
    def while_doing(self, what: str) -> Iterator[None]:
        """Something that may take minutes, to be told to who waits for it."""
        earlier, self.doing = self.doing, what
        try:
            yield
        finally:
            self.doing = earlier

    @contextlib.contextmanager
    def finishing(self, what: str) -> Iterator[None]:
        """Something that is not to be broken off."""
        with self._handlers(), self.while_doing(f"writing {what}"):
            self._finishes = what
            try:
                yield
            finally:
                late, self._late, self._finishes = self._late, 0, ""
            if late:
                raise stopped_by(late, f"stopped when {what} was written")

    @contextlib.contextmanager
    def _handlers(self) -> Iterator[None]:
        earlier, self._process = {}, os.getpid()
        if threading.current_thread() is threading.main_thread():  # no other may set them
            for number, default in DEFAULTS.items():
                if signal.getsignal(number) == default:
                    earlier[number] = signal.signal(number, self._receive)
        try:
            yield
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: Any) -> None:
        if os.getpid() != self._process:  # a worker of a DataLoader, forked from it, which ends it by SIGTERM
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        if self.listens and not self.number:
            self.number = number
            now = f" (now {self.doing})" if self.doing else ""
            if self.tells:
                tell(f"{name}: the run is saved and stops after this optimizer step{now}; once more stops it at once")
        elif self._finishes and not self._late:
            self._late = number
            tell(f"{name}: {self._finishes} is finished first; once more stops it at once")
        else:
            raise stopped_by(number, "stopped at once")


def tell(line: str) -> None:
    # The signal may have come amid a write to sys.stderr, which cannot be entered twice.
    os.write(2, f"\n{line}\n".encode())
