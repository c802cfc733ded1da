"""How servers start and end: orderly, by a crash of any process, or not at all.

They serve a tiny random model without a tokenizer, so that a start is mostly imports.
"""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

PROMPT = [5, 6, 7, 8]
LONG = {"temperature": 0, "ignore_eos": True, "max_new_tokens": 2000}
ENDLESS = {**LONG, "max_new_tokens": 60_000}
CRASH_LIMIT_S = 5.0
STOP_LIMIT_S = 30.0
START_LIMIT_S = 120.0


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose decode steps take about a millisecond, with a long context."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder: Path = tmp_path_factory.mktemp("tiny_model")
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=65_536,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def server(launch: Callable[..., Any], tiny_model: Path) -> Any:
    """A fresh one for each test, since none survives its test."""
    flags = ("--enable-pd-multiplex", "--skip-tokenizer-init", "--max-total-tokens=128K")
    return launch(tiny_model, *flags).ready()


def gone(processes: list[psutil.Process]) -> bool:
    """None of them runs; one that waits to be reaped does not."""
    return not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes)


def last_event(server: Any, params: dict[str, Any], started: Future[None]) -> Any:
    """Streams a request to its end; `started` is set at its first token."""
    with server.client.stream(PROMPT, params) as events:
        last = next(events)
        started.set_result(None)
        for event in events:
            last = event
    return last


class TestOrderlyEnd:
    def test_sigterm_lets_requests_finish(
        self, server: Any, eventually: Callable[..., None]
    ) -> None:
        family = server.family()
        started: Future[None] = Future()
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(last_event, server, LONG, started)
            started.result(STOP_LIMIT_S)
            server.send_signal(signal.SIGTERM)
            eventually(lambda: server.client.http.get("/ready").status_code == 503, STOP_LIMIT_S)
            body = server.client.body(PROMPT, LONG)
            refused = server.client.http.post("/generate", json=body)
            assert not answer.done(), "the request was too short for this test"
            info = answer.result(STOP_LIMIT_S)["meta_info"]
        assert refused.status_code == 503
        assert "shutting down" in refused.json()["message"]
        count = LONG["max_new_tokens"]
        assert info["finish_reason"] == {"type": "length", "length": count}
        assert server.exit_code(STOP_LIMIT_S) == 0
        eventually(lambda: gone(family), CRASH_LIMIT_S)
        assert "Traceback" not in server.log()

    def test_sigint_ends_requests(self, server: Any, eventually: Callable[..., None]) -> None:
        family = server.family()
        started: Future[None] = Future()
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(last_event, server, ENDLESS, started)
            started.result(STOP_LIMIT_S)
            server.send_signal(signal.SIGINT)
            last = answer.result(CRASH_LIMIT_S)
        assert "shutting down" in last["error"]["message"]
        assert server.exit_code(CRASH_LIMIT_S) == 0
        eventually(lambda: gone(family), CRASH_LIMIT_S)
        assert "Traceback" not in server.log()


class TestCrash:
    @pytest.mark.parametrize("title", ["sglang::scheduler", "sglang::detokenizer"])
    def test_death_of_a_child_fails_requests_and_ends_the_server(
        self, server: Any, eventually: Callable[..., None], title: str
    ) -> None:
        family = server.family()
        started: Future[None] = Future()
        with ThreadPoolExecutor(2) as pool:
            streamed = pool.submit(last_event, server, ENDLESS, started)
            body = server.client.body(PROMPT, ENDLESS)
            whole = pool.submit(server.client.http.post, "/generate", json=body)
            started.result(STOP_LIMIT_S)
            eventually(lambda: server.client.state()["running_requests"] == 2, STOP_LIMIT_S)
            server.child(title).kill()
            assert server.exit_code(CRASH_LIMIT_S) not in (0, 2)
            eventually(lambda: gone(family), CRASH_LIMIT_S)
            error = streamed.result(CRASH_LIMIT_S)["error"]
            response = whole.result(CRASH_LIMIT_S)
        reason = f"{title} was killed by SIGKILL"
        assert reason in error["message"]
        assert response.status_code == 500
        assert reason in response.json()["message"]
        assert reason in server.log()

    def test_children_do_not_outlive_the_main_process(
        self, server: Any, eventually: Callable[..., None]
    ) -> None:
        family = server.family()
        assert len(family) >= 3
        server.send_signal(signal.SIGKILL)
        eventually(lambda: gone(family), CRASH_LIMIT_S)


class TestNoStart:
    @pytest.mark.parametrize(
        ("flags", "named"),
        [
            (["--mem-fraction-static", "1.5"], "--mem-fraction-static"),
            (["--max-total-tokns", "100"], "--max-total-tokns"),
            (["--page-size", "many"], "--page-size"),
        ],
    )
    def test_a_bad_flag_is_named(
        self, launch: Callable[..., Any], tmp_path: Path, flags: list[str], named: str
    ) -> None:
        server = launch(tmp_path, *flags)
        assert server.exit_code(START_LIMIT_S) == 2
        assert named in server.log()
        assert "Traceback" not in server.log()

    def test_a_port_in_use_is_named(self, launch: Callable[..., Any], tmp_path: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            server = launch(tmp_path, "--port", str(port))
            assert server.exit_code(START_LIMIT_S) == 2
        assert f"--port {port}" in server.log()
        assert "Traceback" not in server.log()

    def test_a_pool_larger_than_memory_is_refused_with_the_flag(
        self, launch: Callable[..., Any], tiny_model: Path, eventually: Callable[..., None]
    ) -> None:
        server = launch(tiny_model, "--skip-tokenizer-init", "--max-total-tokens", "1000000M")
        family = server.family()
        assert server.exit_code(START_LIMIT_S) != 0
        assert "--max-total-tokens" in server.log()
        assert "Traceback" not in server.log()
        eventually(lambda: gone(family), CRASH_LIMIT_S)

    def test_sigterm_while_starting(
        self, launch: Callable[..., Any], tiny_model: Path, eventually: Callable[..., None]
    ) -> None:
        server = launch(tiny_model, "--skip-tokenizer-init")
        eventually(lambda: len(server.family()) >= 3, START_LIMIT_S)
        family = server.family()
        server.send_signal(signal.SIGTERM)
        assert server.exit_code(STOP_LIMIT_S) == 0
        eventually(lambda: gone(family), CRASH_LIMIT_S)
        assert "Traceback" not in server.log()
