"""Reward functions in processes of their own, which can be killed."""

import contextlib
import fcntl
import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing import connection, resource_tracker, util
from typing import Any

from .reward_calls import Call, Failure, Result, RewardError, RewardFunction, failed, run, too_late

# Seconds that a worker may take to start, most of which the modules of the functions take to be imported.
START_LIMIT = 300.0


@dataclass(eq=False)
class Worker:
    """A process, the pipe to it, and the number of the call that it is at."""

    process: Any
    pipe: connection.Connection
    deadline: float
    is_ready: bool = False
    task: int | None = None

    @property
    def is_idle(self) -> bool:
        return self.is_ready and self.task is None

    def kill(self) -> None:
        """With all that it has started."""
        if self.process.pid is not None:
            with contextlib.suppress(OSError):  # it leads no group yet, or has ended
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.kill()
            self.process.join(5)  # the kernel may hold it for longer
        self.pipe.close()


class WorkerPool:
    """`count` processes that call reward functions, given as (name, function). One that crashes, or is at a call for
    more than `limit` seconds, is killed and replaced.

    Each has a pipe of its own, so that it can damage no other's, and leads a process group, so that what a function has
    started is killed with it. They are forked from a server, never from this process, which has threads and may hold a
    GPU. They end with this process, also if it is killed (on Linux; elsewhere as soon as their call returns).
    """

    def __init__(self, functions: Sequence[tuple[str, RewardFunction]], count: int, limit: float | None) -> None:
        self.count, self.limit = count, limit
        self._functions = [(name, _pickled(name, function)) for name, function in functions]
        if getattr(multiprocessing.current_process(), "_inheriting", False):
            # The script runs again, in a worker that starts: the process that waits for it tells the user.
            raise SystemExit(1)
        self._context: Any = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__, "transformers.trainer_callback"])
        self._workers: list[Worker] = []
        # Also at exit, before multiprocessing waits there for its processes.
        util.Finalize(self, _kill, args=(self._workers,), exitpriority=100)
        try:
            self._fill()
            while not all(worker.is_ready for worker in self._workers):
                self._receive([])
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Kills them. A later call starts new ones."""
        _kill(self._workers)

    def run(self, calls: Sequence[tuple[int, dict[str, list], dict[str, Any]]]) -> list[Result]:
        """What comes of calls of (number of a function, rows, shared), as many at once as there are workers."""
        results: list[Any] = [None] * len(calls)
        waiting = deque(range(len(calls)))
        try:
            while True:
                self._fill()
                for worker in [each for each in self._workers if each.is_idle]:
                    if waiting:
                        self._send(worker, waiting, calls, results)
                if not waiting and all(worker.task is None for worker in self._workers):
                    return results
                self._receive(results)
        finally:
            for worker in [each for each in self._workers if each.task is not None]:
                self._drop(worker)

    def _fill(self) -> None:
        while len(self._workers) < self.count:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(theirs, self._functions), name="reward_worker")
            worker = Worker(process, ours, time.monotonic() + START_LIMIT)
            # Before it starts, so that none is left after an interrupt, which multiprocessing would wait for at exit.
            self._workers.append(worker)
            try:
                with _uninterrupted_start():
                    process.start()
            except BaseException as error:
                self._drop(worker)
                if isinstance(error, OSError | EOFError):
                    raise RewardError(f"reward_workers: a worker process could not be started: {error}") from error
                raise
            theirs.close()

    def _drop(self, worker: Worker) -> None:
        self._workers.remove(worker)
        worker.kill()

    def _send(self, worker: Worker, waiting: deque, calls: Sequence, results: list) -> None:
        task = waiting.popleft()
        try:
            message = pickle.dumps(calls[task])
        except Exception as error:
            results[task] = _ungiven(error)
            return
        try:
            worker.pipe.send_bytes(message)
        except OSError:  # it ended while there was nothing to do
            self._drop(worker)
            waiting.appendleft(task)
            return
        worker.task, worker.deadline = task, time.monotonic() + (self.limit or float("inf"))

    def _receive(self, results: list) -> None:
        """Waits for a worker to say something, to end or to be late."""
        active = [worker for worker in self._workers if not worker.is_idle]
        if not active:
            return
        left = min(worker.deadline for worker in active) - time.monotonic()
        handles = [handle for worker in active for handle in (worker.pipe, worker.process.sentinel)]
        ready = connection.wait(handles, None if left == float("inf") else max(left, 0))
        for worker in active:
            # What it said before it ended counts.
            if worker.pipe in ready or worker.process.sentinel in ready:
                try:
                    message = worker.pipe.recv_bytes() if worker.pipe.poll() else None
                except (EOFError, OSError):
                    message = None
                self._take(worker, message, results)
            elif time.monotonic() >= worker.deadline:
                self._drop(worker)
                if worker.task is None:
                    raise RewardError(f"reward_workers: a worker process did not start within {START_LIMIT:g} s")
                results[worker.task] = too_late(self.limit)

    def _take(self, worker: Worker, message: bytes | None, results: list) -> None:
        if message is None:
            worker.process.join(1)
            how = _ending(worker.process.exitcode)
            self._drop(worker)
            if worker.task is None:
                raise RewardError(
                    f"reward_workers: a worker process ended while it started ({how}); workers import the script that "
                    'was run, which must do nothing then: put what it does under `if __name__ == "__main__":`'
                )
            results[worker.task] = Failure(f"ended its worker process ({how})")
            return
        try:
            content = pickle.loads(message)
        except Exception as error:
            content = _unlogged(error)
        if worker.task is not None:
            results[worker.task], worker.task = content, None
        elif content is not None:
            self._drop(worker)
            raise RewardError(content)
        worker.is_ready = True


def _kill(workers: list[Worker]) -> None:
    while workers:
        workers.pop().kill()


def _ending(code: int | None) -> str:
    if code is None:
        return "it closed its pipe"
    return f"exit code {code}" if code >= 0 else str(signal.strsignal(-code))


def _pickled(name: str, function: RewardFunction) -> bytes:
    try:
        return pickle.dumps(function)
    except Exception as error:
        raise RewardError(_unsendable(name, error)) from error


def _unsendable(name: str, error: BaseException) -> str:
    return (
        f"reward_workers: reward function '{name}' cannot be sent to a worker process: {failed(error).reason}; define "
        "it at the top level of a module, or set reward_workers to 0"
    )


@contextlib.contextmanager
def _uninterrupted_start() -> Iterator[None]:
    """Ctrl-C goes to every process in the terminal: it must not reach those that are being started, which it would end
    in a traceback each."""
    resource_tracker.ensure_running()  # its start, else part of the first, lets signals through again
    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier)


# In the worker


def _serve(pipe: connection.Connection, pickled: Sequence[tuple[str, bytes]]) -> None:
    os.setpgid(0, 0)
    _end_with_parent()
    # A Ctrl-C from before there was a group of its own is forgotten.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    signal.signal(signal.SIGINT, signal.default_int_handler)
    functions = []
    for name, content in pickled:
        try:
            functions.append(pickle.loads(content))
        except BaseException as error:
            pipe.send_bytes(pickle.dumps(_unsendable(name, error)))
            return
    pipe.send_bytes(pickle.dumps(None))
    while True:
        try:
            message = pipe.recv_bytes()
        except EOFError:
            return
        answer = _answer(functions, message)
        sys.stdout.flush()  # it may be killed later
        pipe.send_bytes(answer)


def _end_with_parent() -> None:
    """The kernel kills the group when the parent is gone and so its end of this pipe: no thread of ours could, while a
    function in C keeps the interpreter to itself."""
    sentinel = multiprocessing.parent_process().sentinel
    if hasattr(fcntl, "F_SETSIG"):
        fcntl.fcntl(sentinel, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(sentinel, fcntl.F_SETOWN, -os.getpid())
        fcntl.fcntl(sentinel, fcntl.F_SETFL, fcntl.fcntl(sentinel, fcntl.F_GETFL) | os.O_ASYNC)
    if connection.wait([sentinel], 0):  # gone before that
        os._exit(1)


def _answer(functions: Sequence[RewardFunction], message: bytes) -> bytes:
    try:
        index, rows, shared = pickle.loads(message)
    except BaseException as error:
        return pickle.dumps(_portable(_ungiven(error)))
    try:
        result = run(Call(functions[index], rows, shared))
    except KeyboardInterrupt as error:  # nobody's here
        result = failed(error)
    try:
        return pickle.dumps(_portable(result))
    except BaseException as error:
        return pickle.dumps(_portable(_unlogged(error)))


def _portable(result: Result) -> Result:
    """Without the exception, which may not be what can be sent, but with what is to be read of it."""
    if isinstance(result, Failure) and result.error is not None:
        text = "".join(traceback.format_exception(result.error))
        return replace(result, error=RuntimeError(f"in a worker process:\n{text}"))
    return result


def _ungiven(error: BaseException) -> Failure:
    return Failure(f"could not be given its arguments in a worker process: {failed(error).reason}", error)


def _unlogged(error: BaseException) -> Failure:
    return Failure(f"logged what a worker process cannot send: {failed(error).reason}", error)
