"""Programs that start in a blink: to import what the trainers need takes seconds, so each is forked from a process that
has imported it and computed nothing.

`[*FORKED, script or "-m", ...]` stands for `[sys.executable, script or "-m", ...]`: it is a process with the program's
output and exit code, and passes signals on; where it is killed the program is, too. `run_together` starts a group of
them with the variables that `torchrun` sets; it does nothing else of what `torchrun` does."""

import atexit
import contextlib
import gc
import importlib
import json
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

FORKED = [sys.executable, "-I", "-S", __file__]
ADDRESS = "RLKERNELS_TESTS_FORK_FROM"
IMPORTED = (
    "accelerate",
    "datasets",
    "pyarrow.parquet",
    "torch.distributed.fsdp",
    "transformers.models.llama.modeling_llama",
    *(f"rlkernels.trainers.{name}" for name in ("dpo", "grpo", "ppo", "reward", "sft")),
    "rlkernels.cli_train",
)


@contextlib.contextmanager
def server():
    """While it is there programs can be forked; imports are made in the background."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        address = f"{folder}/socket"
        listener.bind(address)
        listener.listen()
        single = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment = {**os.environ, **single, "PYTHONPATH": os.pathsep.join(sys.path)}
        number = listener.fileno()
        command = [sys.executable, __file__, "serve", str(number)]
        # It ends with its input, also where this process is killed.
        with subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, pass_fds=[number]) as process:
            listener.close()
            os.environ[ADDRESS] = address
            yield
            del os.environ[ADDRESS]
            process.terminate()


def run_together(processes: int, *arguments: str, cwd: Path | None = None) -> tuple[int, str]:
    """The program in each of some processes of a group; the first that fails ends the others. Returns the exit code and
    what was printed."""
    from torch.distributed import TCPStore

    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    group = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "localhost"}
    group |= {"MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
    with tempfile.TemporaryFile("w+") as output:
        started = []
        for rank in range(processes):
            environment = {name: str(value) for name, value in (group | {"RANK": rank, "LOCAL_RANK": rank}).items()}
            environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
            command = [*FORKED, *arguments]
            started.append(subprocess.Popen(command, cwd=cwd, env=environment, stdout=output, stderr=output))
        codes = [None]
        while None in codes and not any(codes):
            time.sleep(0.01)
            codes = [process.poll() for process in started]
        for process in started:
            process.terminate()
        for process in started:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        output.seek(0)
        return next((code for code in codes if code), 0), output.read()


def program() -> list[str]:
    """In the server: waits for what is to be run, and returns its arguments in a process of its own."""
    import numpy

    for name in IMPORTED:
        with contextlib.suppress(ImportError):  # the op tests run without the trainers' packages
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # what is collected later is not copied for it
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(fileno=int(sys.argv[2])) as listener:
        while True:
            if sys.stdin in select.select([listener, sys.stdin], [], [])[0]:
                os._exit(0)
            connection, _ = listener.accept()
            if not os.fork():
                break
            connection.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    message, files, _, _ = socket.recv_fds(connection, 2**20, 3)
    child = os.fork()
    if child:
        ended = os.pidfd_open(child)
        with contextlib.suppress(OSError):
            connection.sendall(f"{child}\n".encode())
        if ended not in select.select([connection, ended], [], [])[0]:  # the relay is gone
            os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with contextlib.suppress(OSError):
            connection.sendall(f"{code}\n".encode())
        os._exit(0)
    connection.close()
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    asked = json.loads(message)
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    random.seed()
    numpy.random.seed()
    path = os.environ.get("PYTHONPATH")
    sys.path[:0] = path.split(os.pathsep) if path else []
    return asked["arguments"]


def relay() -> int:
    """In the process that a test starts: has the program run, and waits for it."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.environ[ADDRESS])
        asked = {"arguments": sys.argv[1:], "cwd": os.getcwd(), "environment": dict(os.environ)}
        socket.send_fds(connection, [json.dumps(asked).encode()], [0, 1, 2])
        answers = connection.makefile()
        child = int(answers.readline())
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: os.kill(child, number))
        code = int(answers.readline())
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


def run(arguments: list[str]) -> int:
    """As the interpreter does, but for the seconds in which it would take down all that was imported."""
    sys.argv = arguments[arguments[0] == "-m" :]
    sys.path.insert(0, os.getcwd() if arguments[0] == "-m" else os.path.dirname(arguments[0]))
    code = 0
    try:
        if arguments[0] == "-m":
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if error.code is not None and not isinstance(error.code, int):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    return code


if __name__ == "__main__":
    os._exit(run(program()) if sys.argv[1] == "serve" else relay())
