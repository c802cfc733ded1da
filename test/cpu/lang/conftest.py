"""A server that answers /generate as a test tells it to, and remembers what it was asked."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

import sglang as sgl

LIMIT_S = 20.0
MODEL_INFO = {"model_path": "/models/plain-model"}
Body = dict[str, Any]


class Refusal(Exception):
    """A script raises it to answer with an error: status and body."""

    def __init__(self, status: int, body: Any) -> None:
        super().__init__(status, body)
        self.status = status
        self.body = body


class ScriptedServer(ThreadingHTTPServer):
    """script: from the body of a /generate call to its answer; a list of events if it streams.
    other: from a path to its answer, or to a script for its calls."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.script: Callable[[Body], Any] = lambda body: answer("")
        self.model_info: Any = MODEL_INFO
        self.other: dict[str, Any] = {}
        self.bodies: list[Body] = []
        self.calls: list[tuple[str, str]] = []
        self.headers_seen: list[dict[str, str]] = []
        self.lock = threading.Lock()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is no failure."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def says(self, *texts: str) -> None:
        """Answers with these texts in turn, whatever is asked."""
        left = iter(texts)
        self.script = lambda body: answer("") if is_prefill(body) else answer(next(left))

    def endpoint(self, **options: Any) -> sgl.RuntimeEndpoint:
        return sgl.RuntimeEndpoint(self.url, answer_limit_s=LIMIT_S, **options)

    @property
    def generations(self) -> list[Body]:
        """The bodies that asked for tokens."""
        return [body for body in self.bodies if not is_prefill(body)]

    @property
    def prefills(self) -> list[Body]:
        return [body for body in self.bodies if is_prefill(body)]


def answer(text: str, **meta_info: Any) -> Body:
    """A /generate answer."""
    reason = {"type": "stop", "matched": 2}
    return {"text": text, "meta_info": {"finish_reason": reason, **meta_info}}


def is_prefill(body: Body) -> bool:
    params = body["sampling_params"]
    return isinstance(params, dict) and params.get("max_new_tokens") == 0


class _Handler(BaseHTTPRequestHandler):
    server: ScriptedServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        with self.server.lock:
            self.server.calls.append(("GET", self.path))
            self.server.headers_seen.append(dict(self.headers))
        if self.path == "/get_model_info":
            self._send(200, self.server.model_info)
        elif self.path in self.server.other:
            self._send(200, self.server.other[self.path])
        else:
            self._send(404, {"error": {"message": f"no {self.path}"}})

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with self.server.lock:
            self.server.calls.append(("POST", self.path))
        script = self.server.script
        if self.path in self.server.other:
            script = self.server.other[self.path]
            if not callable(script):
                self._send(200, script)
                return
        body = json.loads(raw)
        with self.server.lock:
            self.server.bodies.append(body)
        try:
            reply = script(body)
        except Refusal as refusal:
            self._send(refusal.status, refusal.body)
            return
        if body.get("stream"):
            self._stream(reply)
        else:
            self._send(200, reply)

    def _send(self, status: int, body: Any) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _stream(self, events: Iterator[Any]) -> None:
        """A string is sent as it is, a pair is an event's name and data, anything else JSON. The
        script sends [DONE] itself."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        try:
            for event in events:
                name, payload = event if isinstance(event, tuple) else (None, event)
                data = payload if isinstance(payload, str) else json.dumps(payload)
                head = f"event: {name}\n" if name is not None else ""
                self.wfile.write(f"{head}data: {data}\n\n".encode())
                self.wfile.flush()
        except (BrokenPipeError, ConnectionResetError):
            pass


class Say:
    """What scripts are written with."""

    answer = staticmethod(answer)
    is_prefill = staticmethod(is_prefill)
    Refusal = Refusal
    LIMIT_S = LIMIT_S

    @staticmethod
    def stream(*pieces: str, **meta_info: Any) -> list[Any]:
        """Cumulative events, one a piece, and the end."""
        texts = ["".join(pieces[: i + 1]) for i in range(len(pieces))]
        return [*(answer(text, **meta_info) for text in texts), "[DONE]"]


@pytest.fixture(scope="session")
def say() -> type[Say]:
    return Say


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    """Running; programs run on it by default. No thread of a program outlives the test."""
    server = ScriptedServer()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    backend = server.endpoint()
    server.calls.clear()
    server.headers_seen.clear()
    sgl.set_default_backend(backend)
    yield server
    for worker in threading.enumerate():
        if worker.name.startswith("sgl-"):
            worker.join(LIMIT_S)
            assert not worker.is_alive(), f"{worker.name} is left behind"
    sgl.global_config.default_backend = None
    backend.shutdown()
    server.shutdown()
    server.server_close()
    thread.join(LIMIT_S)
