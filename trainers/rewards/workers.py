"""Calls plain reward functions in worker processes, which can be killed. `functions.RewardFunctions` makes the pool
where `reward_workers` is above 0.

`WorkerPool` and `Worker` run in the training process, and from `_serve` on the functions run in a worker. Calls are
pickled; answers are JSON, since unpickling what user code may have written could run anything.
"""

import contextlib
import fcntl
import json
import math
import multiprocessing
import os
import pickle
import selectors
import signal
import struct
import sys
import time
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection, resource_tracker, util
from typing import Any, BinaryIO

from .calls import Call, Failure, Outcome, Result, RewardError, RewardFunction, failed, run, text_of, too_late
from .process_settings import restored

# Seconds in which a worker must start. Importing the functions' modules takes most of them.
START_LIMIT = 300.0
# Each message begins with the number of its call and its length in bytes.
HEADER = struct.Struct("!QQ")
# The most bytes of an answer, and of one read.
LONGEST, CHUNK = 2**28, 2**20
# Exceptions that reading an answer can raise if something other than `_as_json` wrote it.
NO_ANSWER = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)
# The event that the process has ended; selectors.EVENT_READ and EVENT_WRITE are the pipe's events.
ENDED = 4


@dataclass(eq=False)
class Worker:
    """A worker process, our end of the pipe to it, and its current call. A function may write anything into its end:
    nothing here blocks on the pipe, and only an answer with the number of the current call is accepted."""

    process: Any
    pipe: connection.Connection
    deadline: float
    is_ready: bool = False
    task: int | None = None
    size: int = 0  # number of rows in the call
    number: int = 0  # number of the call; 0 stands for the message that the worker is ready
    unsent: memoryview = field(default_factory=lambda: memoryview(b""))
    received: bytearray = field(default_factory=bytearray)

    @property
    def is_idle(self) -> bool:
        return self.is_ready and self.task is None

    def send(self, message: bytes) -> None:
        self.number += 1
        self.unsent = memoryview(HEADER.pack(self.number, len(message)) + message)
        self.exchange(selectors.EVENT_WRITE)

    def exchange(self, events: int) -> Result | None:
        """Sends and reads without blocking. Returns the answer once it is complete, else None. Raises EOFError or
        OSError if there will be no answer, and one of NO_ANSWER if something else was written."""
        with contextlib.suppress(BlockingIOError):
            if events & selectors.EVENT_WRITE:
                self.unsent = self.unsent[os.write(self.pipe.fileno(), self.unsent) :]
            if events & selectors.EVENT_READ:
                found = os.read(self.pipe.fileno(), CHUNK)
                self.received += found
                if not found:
                    raise EOFError
            elif events & ENDED:  # only when nothing is left to read: an answer written before the end counts
                raise EOFError
        while len(self.received) >= HEADER.size:
            number, length = HEADER.unpack_from(self.received)
            end = HEADER.size + length
            if length > LONGEST:
                raise ValueError(f"an answer of {length} bytes")
            if len(self.received) < end:
                break
            message = bytes(self.received[HEADER.size : end])
            del self.received[:end]
            if number == self.number:
                if self.unsent:
                    raise ValueError("an answer before the question")
                return _result(json.loads(message), self.size)
        return None

    def kill(self) -> None:
        """Kills the worker and every process that it has started."""
        if self.process.pid is not None:
            with contextlib.suppress(OSError):  # the process leads no group yet, or has ended
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.kill()
            self.process.join(5)  # bounded, since a process in an uninterruptible system call ends later
        self.pipe.close()


class WorkerPool:
    """`count` processes that call reward functions, given as (name, function). A worker that crashes, or takes longer
    than `limit` seconds for a call, is killed and replaced.

    Each worker has its own pipe, so that it cannot damage another's, and leads a process group, so that whatever a
    function starts is killed with it. Workers are forked from a fork server, never from this process, which has threads
    and may hold a GPU. They end with this process, even if it is killed (on Linux; elsewhere when their call returns).
    """

    def __init__(self, functions: Sequence[tuple[str, RewardFunction]], count: int, limit: float | None) -> None:
        self.count, self.limit = count, limit
        self._functions = [(name, _pickled(name, function)) for name, function in functions]
        if getattr(multiprocessing.current_process(), "_inheriting", False):
            # A starting worker imports the user's script, and the script came here. The process that waits for the
            # worker tells the user.
            raise SystemExit(1)
        self._context: Any = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__, "transformers.trainer_callback"])
        self._workers: list[Worker] = []
        # At exit too, and before multiprocessing joins its processes.
        util.Finalize(self, _kill, args=(self._workers,), exitpriority=100)
        try:
            self._fill()
            while not all(worker.is_ready for worker in self._workers):
                self._receive([])
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Kills the workers. A later call starts new ones."""
        _kill(self._workers)

    def run(self, calls: Sequence[tuple[int, dict[str, list], dict[str, Any]]]) -> list[Result]:
        """Results of calls, each given as (number of the function, rows, shared). As many run at once as there are
        workers."""
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
            os.set_blocking(ours.fileno(), False)
            worker = Worker(process, ours, time.monotonic() + START_LIMIT)
            # Listed before it starts: after an interrupt here, multiprocessing would wait at exit for an unlisted one.
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
            results[task] = _arguments_failed(error)
            return
        try:
            worker.send(message)
        except OSError:  # the worker ended while it was idle
            self._drop(worker)
            waiting.appendleft(task)
            return
        worker.task, worker.size = task, len(calls[task][1]["prompts"])
        worker.deadline = time.monotonic() + (self.limit or math.inf)

    def _receive(self, results: list) -> None:
        """Waits until a worker reads, answers, ends or exceeds its time limit, and handles each that did."""
        active = [worker for worker in self._workers if not worker.is_idle]
        if not active:
            return
        left = min(worker.deadline for worker in active) - time.monotonic()
        events = dict.fromkeys(active, 0)
        with selectors.DefaultSelector() as selector:
            for worker in active:
                writes = selectors.EVENT_WRITE if worker.unsent else 0
                selector.register(worker.pipe, selectors.EVENT_READ | writes, worker)
                selector.register(worker.process.sentinel, selectors.EVENT_READ, worker)
            for key, ready in selector.select(None if left == math.inf else max(left, 0)):
                events[key.data] |= ready if key.fileobj is key.data.pipe else ENDED
        for worker in active:
            self._take(worker, events[worker], results)

    def _take(self, worker: Worker, events: int, results: list) -> None:
        """Stores the result of a worker's call if it is known now. A worker that ended, wrote something that is no
        answer, or is late is dropped."""
        failure = None
        try:
            result = worker.exchange(events)
        except (EOFError, OSError):
            worker.process.join(1)
            how = _ending(worker.process.exitcode)
            failure = Failure(f"ended its worker process ({how})")
            at_start = (
                f"ended while it started ({how}); workers import the script that was run, so its code must stand under "
                '`if __name__ == "__main__":`'
            )
        except NO_ANSWER:
            failure = Failure("wrote something other than an answer into the pipe of its worker process")
            at_start = "wrote something other than an answer into its pipe while it started"
        else:
            if result is None and time.monotonic() >= worker.deadline:
                failure, at_start = too_late(self.limit or math.inf), f"did not start within {START_LIMIT:g} s"
        if failure is not None:
            self._drop(worker)
            if worker.task is None:
                raise RewardError(f"reward_workers: a worker process {at_start}")
            results[worker.task] = failure
        elif worker.task is not None and result is not None:
            results[worker.task], worker.task = result, None
        elif isinstance(result, Failure):
            self._drop(worker)
            raise RewardError(result.reason)
        elif result is not None:
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
    """Keeps Ctrl-C, which the terminal sends to every process, from workers that are starting: each would print a
    traceback."""
    resource_tracker.ensure_running()  # starting the first worker would start it, and that unblocks signals
    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier)


# In the worker


def _serve(pipe: connection.Connection, pickled: Sequence[tuple[str, bytes]]) -> None:
    os.setpgid(0, 0)
    _end_with_parent()
    # Discards a Ctrl-C that came before this process had its own group.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    signal.signal(signal.SIGINT, signal.default_int_handler)
    functions = []
    with open(pipe.fileno(), "rb", closefd=False) as questions, open(pipe.fileno(), "wb", closefd=False) as answers:
        for name, content in pickled:
            try:
                functions.append(pickle.loads(content))
            except BaseException as error:
                _write(answers, 0, _as_json(Failure(_unsendable(name, error))))
                return
        _write(answers, 0, _as_json(Outcome([], {}, {}, [])))
        while header := questions.read(HEADER.size):
            number, length = HEADER.unpack(header)
            answer = _answer(functions, questions.read(length))
            with contextlib.suppress(Exception):
                sys.stdout.flush()  # what the function printed would be lost if this process were killed later
            _write(answers, number, answer)


def _write(answers: BinaryIO, number: int, answer: dict) -> None:
    message = json.dumps(answer).encode()
    if len(message) > LONGEST:
        message = json.dumps(_as_json(Failure(f"logged more than {LONGEST} bytes"))).encode()
    answers.write(HEADER.pack(number, len(message)) + message)
    answers.flush()


def _end_with_parent() -> None:
    """Makes the kernel kill this process group when the parent ends, which closes its end of the sentinel pipe. A
    thread could not do it while C code holds the interpreter lock."""
    sentinel = multiprocessing.parent_process().sentinel
    if hasattr(fcntl, "F_SETSIG"):
        fcntl.fcntl(sentinel, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(sentinel, fcntl.F_SETOWN, -os.getpid())
        fcntl.fcntl(sentinel, fcntl.F_SETFL, fcntl.fcntl(sentinel, fcntl.F_GETFL) | os.O_ASYNC)
    if connection.wait([sentinel], 0):  # the parent had ended before
        os._exit(1)


def _answer(functions: Sequence[RewardFunction], message: bytes) -> dict:
    try:
        index, rows, shared = pickle.loads(message)
    except BaseException as error:
        return _as_json(_arguments_failed(error))
    try:
        with restored():
            return _as_json(run(Call(functions[index], rows, shared)))
    except BaseException as error:  # KeyboardInterrupt, which no user meant for this process
        return _as_json(failed(error))


def _as_json(result: Result) -> dict:
    """The result as JSON values. An exception becomes its traceback's text."""
    if isinstance(result, Outcome):
        return vars(result)
    error = result.error
    trace = None if error is None else text_of(error, lambda _: "".join(traceback.format_exception(error)))
    return {"reason": result.reason, "trace": trace, "of_the_batch": result.of_the_batch}


def _result(answer: dict, size: int) -> Result:
    """The inverse of `_as_json`. Raises one of NO_ANSWER if something else wrote the answer."""
    if "reason" in answer:
        trace = answer["trace"]
        error = None if trace is None else RuntimeError(f"in a worker process:\n{trace}")
        return Failure(str(answer["reason"]), error, of_the_batch=bool(answer["of_the_batch"]))
    rewards = [float(reward) for reward in answer["rewards"]]
    wrong = {range(size)[int(row)]: str(reason) for row, reason in answer["wrong"].items()}
    extra = {column: list(values) for column, values in answer["extra"].items()}
    metrics = [(str(name), float(value)) for name, value in answer["metrics"]]
    if len(rewards) != size:
        raise ValueError(f"{len(rewards)} rewards")
    return Outcome(rewards, wrong, extra, metrics)


def _arguments_failed(error: BaseException) -> Failure:
    return Failure(f"could not be given its arguments in a worker process: {failed(error).reason}", error)
