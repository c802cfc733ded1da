"""Shared by the end-to-end tests: real servers as child processes, and a client for them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from benchmark.greedy import Reference
from benchmark.server_process import ServerProcess
from benchmark.smollm2 import model_path

ROOT = Path(__file__).parents[2]
START_LIMIT_S = 240.0
STOP_LIMIT_S = 60.0
ANSWER_LIMIT_S = 240.0
# Enough for every test here; small, because a pool is written once when it is made.
SERVER_FLAGS = [
    "--enable-pd-multiplex",
    "--dtype=float32",
    "--context-length=4096",
    "--max-total-tokens=24K",
    "--enable-cache-report",
    "--enable-metrics",
    "--tool-call-parser=hermes",
]


class Server(ServerProcess):
    """A ServerProcess that can be looked into, and hurt."""

    def __init__(self, model: Path, flags: list[str]) -> None:
        super().__init__(model, flags)
        self.client = Client(self.base_url)

    def ready(self, limit_s: float = START_LIMIT_S) -> Server:
        """Waits until it serves; an error shows what it printed."""
        try:
            asyncio.run(self.wait_ready(limit_s, lambda: None))
        except Exception:
            print(self.log())
            raise
        return self

    def log(self) -> str:
        """Everything that it has printed."""
        return Path(self._log.name).read_text(encoding="utf-8", errors="replace")

    def family(self) -> list[psutil.Process]:
        """The main process and all its descendants."""
        main = psutil.Process(self._process.pid)
        return [main, *main.children(recursive=True)]

    def child(self, title: str) -> psutil.Process:
        """The one descendant with this title."""
        [found] = [p for p in self.family()[1:] if p.cmdline() and title in p.cmdline()[0]]
        return found

    def send_signal(self, number: signal.Signals) -> None:
        """To the main process alone."""
        self._process.send_signal(number)

    def exit_code(self, limit_s: float) -> int:
        """Waits for the main process to leave."""
        return self._process.wait(limit_s)

    def kill(self) -> None:
        """Ends all of it, whatever its state, and removes the log."""
        family = self.family() if self._process.poll() is None else []
        self.client.close()
        super().kill()
        for process in family[1:]:
            with suppress(psutil.NoSuchProcess):
                process.kill()


class Client:
    """The native API. Safe to share between threads."""

    def __init__(self, base_url: str) -> None:
        self.http = httpx.Client(
            base_url=base_url, timeout=ANSWER_LIMIT_S, limits=httpx.Limits(max_connections=None)
        )

    def close(self) -> None:
        self.http.close()

    def generate(
        self, prompt: str | list[int], sampling_params: Mapping[str, Any], **fields: Any
    ) -> Any:
        """The whole answer of a request, which must succeed."""
        response = self.http.post("/generate", json=self.body(prompt, sampling_params, **fields))
        assert response.status_code == 200, response.text
        return response.json()

    @contextmanager
    def stream(
        self, prompt: str | list[int], sampling_params: Mapping[str, Any], **fields: Any
    ) -> Iterator[Iterator[Any]]:
        """An open stream's events as they come. Leaving the block hangs up."""
        body = self.body(prompt, sampling_params, stream=True, **fields)
        with self.http.stream("POST", "/generate", json=body) as response:
            if response.status_code != 200:
                response.read()
            assert response.status_code == 200, response.text
            yield _events(response)

    @staticmethod
    def body(
        prompt: str | list[int], sampling_params: Mapping[str, Any], **fields: Any
    ) -> dict[str, Any]:
        """The JSON object of a /generate call."""
        name = "text" if isinstance(prompt, str) else "input_ids"
        return {name: prompt, "sampling_params": dict(sampling_params), **fields}

    def state(self) -> Any:
        """The scheduler's internal state."""
        response = self.http.get("/server_info")
        assert response.status_code == 200, response.text
        [state] = response.json()["internal_states"]
        return state

    def idle(self) -> bool:
        """No request is in the engine and no memory is held but for the prefix cache."""
        state = self.state()
        counts = [state[k] for k in ("running_requests", "waiting_requests", "used_tokens")]
        return counts == [0, 0, 0]

    def flush_cache(self) -> None:
        """Empties the prefix cache, as soon as the server is idle."""
        response = self.http.post("/flush_cache", params={"timeout": 60})
        assert response.status_code == 200, response.text

    def abort(self, rid: str) -> None:
        self.http.post("/abort_request", json={"rid": rid}).raise_for_status()


def _events(response: httpx.Response) -> Iterator[Any]:
    """The payloads of a stream, which must end in [DONE]."""
    ended = False
    for line in response.iter_lines():
        if line:
            assert not ended, f"after [DONE]: {line}"
            data = line.removeprefix("data: ")
            if data == "[DONE]":
                ended = True
            else:
                yield json.loads(data)
    assert ended, "the stream broke off"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct."""
    try:
        return model_path()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def tokenizer(smollm2: Path) -> Any:
    """The reference tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)


@pytest.fixture(scope="session")
def reference(smollm2: Path) -> Reference:
    """The model in transformers."""
    return Reference(smollm2)


@pytest.fixture(scope="session")
def server_env(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Servers import what this process does, installed or not, and leave no files in /tmp."""
    parts = [str(ROOT / folder) for folder in ("python", "", "sgl-kernel")]
    if "PYTHONPATH" in os.environ:
        parts.append(os.environ["PYTHONPATH"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(parts))
        patch.setenv("TMPDIR", str(tmp_path_factory.mktemp("ipc")))  # a killed one cannot tidy up
        yield


@pytest.fixture(scope="session")
def server(smollm2: Path, server_env: None) -> Iterator[Server]:
    """SmolLM2 in float32, multiplexed. Leaving on SIGTERM with code 0 is part of the test."""
    server = Server(smollm2, SERVER_FLAGS)
    try:
        yield server.ready()
        server.stop(STOP_LIMIT_S)
    finally:
        server.kill()


@pytest.fixture
def client(server: Server, eventually: Callable[..., None]) -> Client:
    """The session server's client; the server is idle when the test starts."""
    eventually(server.client.idle, 60)
    return server.client


@pytest.fixture
def launch(server_env: None) -> Iterator[Callable[..., Server]]:
    """launch(model, *flags) starts a server of the test's own; it is gone when the test ends."""
    started: list[Server] = []

    def start(model: Path, *flags: str) -> Server:
        started.append(Server(model, list(flags)))
        return started[-1]

    yield start
    for server in started:
        server.kill()


@pytest.fixture(scope="session")
def eventually() -> Callable[..., None]:
    """eventually(condition, limit_s) polls until the condition holds; fails after the limit."""

    def wait(condition: Callable[[], bool], limit_s: float) -> None:
        deadline_s = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < deadline_s, f"not so after {limit_s:g} s"
            time.sleep(0.02)

    return wait


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """A failed test shows what the session's server has printed."""
    report = yield
    server = getattr(item, "funcargs", {}).get("server")
    if report.failed and isinstance(server, Server):
        report.sections.append(("server log", server.log_tail()))
    return report
