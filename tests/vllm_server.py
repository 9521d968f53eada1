"""A server that speaks as vLLM does, for tests: its completions are those of a tiny model, and it fails on demand."""

import contextlib
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from transformers import AutoModelForCausalLM


class FakeServer:
    """One start of it serves at a time. `fail` is asked before each completion, with the number of those asked for
    before; it returns what goes wrong with that one, or None.

    Each start has the weights `model` until others are loaded."""

    def __init__(self, model: Any, dev_mode: bool = True) -> None:
        self.model, self.dev_mode = model, dev_mode
        self.fail = lambda count: None
        self.logprobs_mode = "processed_logprobs"
        self.starts = 0
        self.lock = threading.Lock()
        self.calls: list[tuple[int, str, Any]] = []  # start, path, body
        self.running = self.most_running = 0
        self.delay = 0.0
        self.authorization: str | None = None  # of the latest request
        self.sent = 0  # bytes of replies that never end
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self.starts += 1
        self.served, self.open = self.model, set()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            start = self.starts

            def setup(self) -> None:
                super().setup()
                server.open.add(self.connection)

            def log_message(self, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                self.handle_request(None)

            def do_POST(self) -> None:
                size = int(self.headers.get("content-length") or 0)
                text = self.rfile.read(size)
                if len(text) < size:  # who asked was cut off
                    self.close_connection = True
                    return
                self.handle_request(json.loads(text or "null"))

            def handle_request(self, body: Any) -> None:
                path = self.path.partition("?")[0]
                server.authorization = self.headers.get("authorization")
                with server.lock:
                    count = len(server.of(path))
                    server.calls.append((self.start, path, body))
                status, answer = server.answer(path, body, count, self)
                if self.start != server.starts or status is None:
                    self.close_connection = True
                    return
                text = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                unending = {"drip": (b" ", 0.05), "flood": (b" " * (1 << 16), 0.0)}
                part, pause = unending.get(str(answer), (None, 0.0))
                self.send_header("content-length", str(len(text) if part is None else 1 << 40))
                self.end_headers()
                with contextlib.suppress(OSError):  # who asked has had enough
                    while part is not None:
                        self.wfile.write(part)
                        server.sent += len(part)
                        time.sleep(pause)
                if answer == "cut":
                    text = b""
                    self.close_connection = True
                self.wfile.write(text)

        self.httpd = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.httpd.daemon_threads = True
        self.httpd.handle_error = lambda *args: None  # who asked is gone
        self.port = self.httpd.server_port
        threading.Thread(target=self.httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self) -> None:
        """As kill -9 does: what is under way is cut off."""
        self.httpd.shutdown()
        self.httpd.server_close()
        for connection in list(self.open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def restart(self, after: float) -> None:
        self.stop()
        threading.Timer(after, self.start).start()

    def of(self, path: str) -> list[Any]:
        return [body for _, called, body in self.calls if called == path]

    @property
    def loads(self) -> list[str]:
        return [body["kwargs"]["weights_path"] for body in self.of("/collective_rpc")]

    def answer(self, path: str, body: Any, count: int, handler: Any) -> tuple[int | None, Any]:
        if path == "/health":
            return 200, None
        if path == "/v1/completions":
            return self.complete(body, count)
        if not self.dev_mode:
            return 404, {"detail": "Not Found"}
        if path == "/server_info":
            model = {"logprobs_mode": self.logprobs_mode}
            return 200, {"vllm_config": {"instance_id": str(handler.start), "model_config": model}}
        if path == "/collective_rpc":
            try:
                self.served = AutoModelForCausalLM.from_pretrained(body["kwargs"]["weights_path"])
            except Exception as error:
                return 500, {"error": {"message": f"Call to collective_rpc method failed: {error}"}}
            return 200, {"results": [None]}
        assert path == "/reset_prefix_cache"
        return 200, {"success": True}

    def complete(self, body: dict[str, Any], count: int) -> tuple[int | None, Any]:
        with self.lock:
            self.running += 1
            self.most_running = max(self.running, self.most_running)
        try:
            wrong = self.fail(count)
            time.sleep(self.delay)
            if callable(wrong):
                wrong = wrong()
            if isinstance(wrong, int):
                return wrong, {"error": {"message": f"no luck\nwith {count}"}}
            if wrong == "gone":
                return None, None
            if isinstance(wrong, str | bytes):
                return 200, wrong
            tokens, logprobs = sample(self.served, body)
            choice = {
                "prompt_token_ids": body["prompt"],
                "token_ids": tokens,
                "logprobs": {"token_logprobs": logprobs},
                "finish_reason": "stop" if tokens[-1] in body["stop_token_ids"] else "length",
            }
            return 200, {"choices": [choice | (wrong or {})]}
        finally:
            with self.lock:
                self.running -= 1


@torch.no_grad()
def sample(model: Any, body: dict[str, Any]) -> tuple[list[int], list[float]]:
    generator = torch.Generator().manual_seed(body["seed"])
    tokens, logprobs = list(body["prompt"]), []
    while len(logprobs) < body["max_tokens"] and (not logprobs or tokens[-1] not in body["stop_token_ids"]):
        scores = (model(torch.tensor([tokens])).logits[0, -1] / body["temperature"]).log_softmax(-1)
        tokens.append(int(torch.multinomial(scores.exp(), 1, generator=generator)))
        logprobs.append(scores[tokens[-1]].item())
    return tokens[len(body["prompt"]) :], logprobs
