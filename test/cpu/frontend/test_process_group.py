"""Start, stop and sudden death of the real processes. The scheduler in them is scripted."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from sglang.srt.entrypoints import http_server
from sglang.srt.entrypoints.process_group import undisturbed
from sglang.srt.errors import ConfigError
from sglang.srt.server_args import ServerArgs

START_LIMIT_S = 60.0
SCRIPT = Path(__file__).with_name("scripted_server.py")
ROOT = Path(__file__).resolve().parents[3]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def until(condition: Callable[[], Any], limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {limit_s} s in vain"
        time.sleep(0.01)


class Program:
    """The server process, its children, and what it has written."""

    def __init__(self, mode: str, tmp: Path) -> None:
        self.tmp = tmp
        self.port = free_port()
        paths = [str(ROOT / "python"), str(ROOT), str(ROOT / "sgl-kernel")]
        self.process = subprocess.Popen(
            [sys.executable, str(SCRIPT), mode, str(self.port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "TMPDIR": str(tmp), "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,
        )
        self.lines: list[str] = []
        self._children: list[psutil.Process] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.client = httpx.Client(
            base_url=f"http://127.0.0.1:{self.port}", timeout=20, verify=False
        )

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(iter(self.process.stdout.readline, ""))

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def wait_ready(self) -> None:
        until(lambda: "fired up and ready to roll!" in self.output, START_LIMIT_S)

    def children(self) -> dict[str, psutil.Process]:
        """By title; remembers them for `leaves_nothing`."""
        found = {}
        for child in psutil.Process(self.process.pid).children(recursive=True):
            self._children.append(child)
            found[" ".join(child.cmdline()).strip()] = child
        return found

    def exit_code(self, limit_s: float) -> int:
        code = self.process.wait(limit_s)
        self._reader.join(limit_s)
        return code

    def leaves_nothing(self) -> bool:
        _, alive = psutil.wait_procs(self._children, timeout=3)
        return not alive and not list(self.tmp.glob("sglang-ipc-*"))

    def stream(self, tokens: int = 100) -> threading.Thread:
        """Reads a stream in a thread; `lines_of_stream` and `stream_done` tell of it."""
        self.stream_lines: list[str] = []
        started = threading.Event()

        def read() -> None:
            body = {
                "input_ids": [1, 2],
                "stream": True,
                "sampling_params": {"max_new_tokens": tokens},
            }
            with self.client.stream("POST", "/generate", json=body) as response:
                for line in response.iter_lines():
                    if line:
                        self.stream_lines.append(line)
                    started.set()

        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        assert started.wait(20)
        return thread

    def close(self) -> None:
        self.client.close()
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(10)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Program]]:
    programs: list[Program] = []

    def started(mode: str, *, ready: bool = True) -> Program:
        programs.append(Program(mode, tmp_path))
        if ready:
            programs[-1].wait_ready()
        return programs[-1]

    yield started
    for program in programs:
        program.close()


def test_sigterm_finishes_what_is_in_flight(start: Callable[..., Program]) -> None:
    program = start("steady")
    titles = set(program.children())
    assert {"sglang::scheduler", "sglang::detokenizer"} <= titles
    assert program.client.get("/health").status_code == 200
    assert program.client.get("/server_info").json()["max_total_num_tokens"] == 1000

    reader = program.stream(tokens=120)
    os.killpg(program.process.pid, signal.SIGTERM)  # as a service manager does: children get it too
    with httpx.Client(base_url=program.client.base_url, verify=False) as other:
        until(lambda: other.get("/ready").status_code == 503, 2)
        assert other.post("/generate", json={"input_ids": [1]}).status_code == 503
    reader.join(20)
    assert program.stream_lines[-1] == "data: [DONE]"
    assert '"length":120' in program.stream_lines[-2]
    assert program.exit_code(10) == 0
    assert program.leaves_nothing()
    assert "Traceback" not in program.output


def test_sigint_does_not_wait(start: Callable[..., Program]) -> None:
    program = start("steady")
    program.children()
    reader = program.stream(tokens=500)
    began = time.monotonic()
    os.killpg(program.process.pid, signal.SIGINT)  # as a terminal does: children get it too
    assert program.exit_code(8) == 0
    assert time.monotonic() - began < 5
    reader.join(5)
    assert program.stream_lines[-1] == "data: [DONE]"
    assert program.leaves_nothing()
    assert "Traceback" not in program.output


@pytest.mark.parametrize("victim", ["sglang::scheduler", "sglang::detokenizer"])
def test_killed_child_ends_the_server(start: Callable[..., Program], victim: str) -> None:
    program = start("steady")
    child = program.children()[victim]
    reader = program.stream(tokens=500)
    began = time.monotonic()
    child.kill()
    reader.join(5)
    assert f"{victim} was killed by SIGKILL" in program.stream_lines[-2]
    assert program.exit_code(5) == 1
    assert time.monotonic() - began < 5
    assert program.leaves_nothing()


def test_failing_scheduler_ends_the_server(start: Callable[..., Program]) -> None:
    program = start("fails_while_serving")
    program.children()
    body = {"input_ids": [1], "sampling_params": {"max_new_tokens": 13}}
    response = program.client.post("/generate", json=body)
    assert response.status_code == 500
    assert response.json()["message"] == "sglang::scheduler exited with code 1"
    assert program.exit_code(5) == 1
    assert "RuntimeError: tripped by a request" in program.output
    assert program.leaves_nothing()


def test_children_die_with_their_parent(start: Callable[..., Program]) -> None:
    program = start("steady")
    children = list(program.children().values())
    program.process.kill()
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive


def test_configuration_error_is_one_line(start: Callable[..., Program]) -> None:
    program = start("misconfigured", ready=False)
    assert program.exit_code(START_LIMIT_S) == 1
    assert "--mem-fraction-static 0.1 leaves no room for a single token" in program.output
    assert "Traceback" not in program.output
    assert program.leaves_nothing()


def test_bug_while_starting_has_a_traceback(start: Callable[..., Program]) -> None:
    program = start("broken", ready=False)
    assert program.exit_code(START_LIMIT_S) == 1
    assert "Traceback" in program.output
    assert "sglang::scheduler failed: RuntimeError: a bug of ours" in program.output
    assert program.leaves_nothing()


def test_silent_exit_while_starting(start: Callable[..., Program]) -> None:
    program = start("gone", ready=False)
    assert program.exit_code(START_LIMIT_S) == 1
    assert "sglang::scheduler exited with code 7 while starting" in program.output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_while_starting(start: Callable[..., Program], number: signal.Signals) -> None:
    program = start("slow_to_start", ready=False)
    until(lambda: "sglang::scheduler" in program.children(), START_LIMIT_S)
    program.process.send_signal(number)
    assert program.exit_code(5) == 0
    assert program.leaves_nothing()


def test_port_in_use_is_known_at_once() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        args = ServerArgs(model_path="m", port=taken.getsockname()[1])
        with pytest.raises(ConfigError, match="--port"), http_server._listening(args):
            pass


class InterruptedStart(BaseException):
    pass


@pytest.fixture
def interrupted() -> Iterator[None]:
    """SIGTERM raises InterruptedStart, as while a server starts."""

    def interrupt(number: int, frame: object) -> None:
        raise InterruptedStart

    previous = signal.signal(signal.SIGTERM, interrupt)
    yield
    signal.signal(signal.SIGTERM, previous)


@pytest.fixture
def signal_another_thread() -> Iterator[Callable[[], None]]:
    """The kernel gives SIGTERM to a thread that was there before and does not block it."""
    go = threading.Event()

    def take() -> None:
        assert go.wait(10)
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

    thread = threading.Thread(target=take)
    thread.start()

    def send() -> None:
        go.set()
        thread.join()

    yield send
    go.set()
    thread.join()


def steps_taken_though_it_comes(send: Callable[[], None]) -> list[str]:
    steps = []

    def start() -> None:
        with undisturbed():
            send()
            steps.append("after it came")
        steps.append("behind the end")

    with pytest.raises(InterruptedStart):
        start()
    return steps


@pytest.mark.usefixtures("interrupted")
def test_a_signal_waits_for_the_end(signal_another_thread: Callable[[], None]) -> None:
    assert steps_taken_though_it_comes(signal_another_thread) == ["after it came"]


@pytest.mark.usefixtures("interrupted")
def test_one_sent_to_the_thread_itself_waits_too() -> None:
    def send() -> None:
        signal.raise_signal(signal.SIGTERM)

    assert steps_taken_though_it_comes(send) == ["after it came"]


@pytest.mark.usefixtures("interrupted")
def test_afterwards_a_signal_does_what_it_did() -> None:
    handler = signal.getsignal(signal.SIGTERM)
    with undisturbed():
        assert signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert signal.getsignal(signal.SIGTERM) is handler
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with pytest.raises(InterruptedStart):
        signal.raise_signal(signal.SIGTERM)
