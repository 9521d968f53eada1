"""A vLLM server of .venv-vllm, as a process: for tests and benchmarks."""

import contextlib
import os
import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

PROGRAM = Path(__file__).parents[1] / ".venv-vllm" / "bin" / "vllm"
# Seconds until it serves; on two cores it takes half a minute.
START_TIMEOUT = 300


class Server:
    """Serves a model on a port of this machine, until it is killed."""

    def __init__(self, model: Path, log: Path, *options: str, threads: int = 1) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = log
        self.command = [PROGRAM, "serve", model, "--host", "127.0.0.1", "--port", str(self.port), *options]
        self.command += ["--logprobs-mode", "processed_logprobs", "--generation-config", "vllm"]
        self.environment = os.environ | {
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": str(threads),
        }
        self.environment.pop("PYTHONPATH", None)
        self.process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, wait: bool = True) -> None:
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [str(part) for part in self.command],
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,  # so that its workers can be killed with it
            )
        deadline = time.monotonic() + START_TIMEOUT
        while wait and not self.is_healthy():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"vLLM did not start; {self.log} ends: {self.log.read_text()[-2000:]}")
            time.sleep(0.5)

    def is_healthy(self) -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
            return answer.status == 200
        return False

    def kill(self) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None
