"""How a run reacts to Ctrl-C and SIGTERM. `BaseTrainer` owns a `StopRequest`.

The first signal lets the run finish its optimizer step and save; another stops it at once, but not amid a write.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

# Python's default handlers. A program that has replaced one keeps its own.
DEFAULTS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


class Terminated(SystemExit):
    """SIGTERM stopped a run, as KeyboardInterrupt says that Ctrl-C did. If not caught, the process exits with 143."""

    def __init__(self, message: str = "terminated") -> None:
        super().__init__(message)
        self.code = 128 + signal.SIGTERM


def stopped_by(number: int, message: str) -> BaseException:
    return Terminated(message) if number == signal.SIGTERM else KeyboardInterrupt(message)


class StopRequest:
    """Whether a run was asked to stop. The first signal is noted for the run to act on, with a line on stderr. A second
    one stops the run at once, or when the current write is finished; a third one does not wait for the write."""

    def __init__(self) -> None:
        self.number = 0  # the signal that this process got; 0 means none
        self.agreed = 0  # the signal that any process got, once the processes have exchanged theirs
        self.doing = ""
        self.listens = self.tells = False
        self._process = 0
        self._finishes = ""
        self._late = 0

    @contextlib.contextmanager
    def listening(self, tells: bool = True) -> Iterator[None]:
        """Handles signals during a run that reads `number` as it goes. Set `tells` on one process only: all processes
        get the signal, and one line about it is enough."""
        self.number, self.agreed, self.tells = 0, 0, tells
        with self._handlers():
            self.listens = True
            try:
                yield
            finally:
                self.listens = False

    @contextlib.contextmanager
    def while_doing(self, what: str) -> Iterator[None]:
        """Names an activity that may take minutes, for the line that answers a signal."""
        earlier, self.doing = self.doing, what
        try:
            yield
        finally:
            self.doing = earlier

    @contextlib.contextmanager
    def finishing(self, what: str) -> Iterator[None]:
        """Writes `what` to the end before a signal stops the run; another signal stops it at once."""
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
        if threading.current_thread() is threading.main_thread():  # only it may set handlers
            for number, default in DEFAULTS.items():
                if signal.getsignal(number) == default:
                    earlier[number] = signal.signal(number, self._receive)
        try:
            yield
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: Any) -> None:
        if os.getpid() != self._process:  # a forked DataLoader worker, which the DataLoader ends with SIGTERM
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
    # The signal may have come during a write to sys.stderr, which is not reentrant.
    os.write(2, f"\n{line}\n".encode())
