"""The whole front of the pipeline in one process: real sockets, real tokenizer, scripted engine."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import zmq

from sglang.srt.entrypoints.app import build_app
from sglang.srt.entrypoints.lifecycle import HttpServer
from sglang.srt.entrypoints.server_state import Phase, ServerState
from sglang.srt.ipc import IpcNames, Sender, ipc_directory
from sglang.srt.managers.detokenizer_manager import DetokenizerManager, decode_with
from sglang.srt.managers.prompts import Limits, PromptEncoder
from sglang.srt.managers.request_log import RequestLog
from sglang.srt.managers.scripted_scheduler import ENGINE_INFO, ScriptedScheduler
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.messages import FinishReason, GenerateRequest, Shutdown
from sglang.srt.observability.request_metrics import RequestMetrics
from sglang.srt.served_model import ServedModel
from sglang.srt.server_args import ServerArgs
from sglang.srt.tokenizer import load_tokenizer

VOCAB_SIZE = 49152
CONTEXT_LENGTH = 512
LIMIT_S = 20.0


@pytest.fixture(scope="session")
def tokenizer(smollm2_path: Path) -> Any:
    return load_tokenizer(smollm2_path)


@dataclass
class Engine:
    """A scripted scheduler and a real detokenizer, each in a thread."""

    ipc: IpcNames
    scheduler: ScriptedScheduler
    tokenizer: Any

    def says(self, text: str, finish: FinishReason | None = None) -> None:
        """Every request is answered with this text, then ends; by default with an eos id."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        eos = self.tokenizer.eos_token_id
        ending = finish or FinishReason(type="stop", matched=eos)
        self.scheduler.script = lambda request: [*ids, ending]

    def says_forever(self, text: str, token_interval_s: float = 0.02) -> None:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        self.scheduler.token_interval_s = token_interval_s
        self.scheduler.script = lambda request: itertools.cycle(ids)

    def refuses(self, finish: FinishReason) -> None:
        self.scheduler.script = lambda request: [finish]

    @property
    def last_request(self) -> GenerateRequest:
        return self.scheduler.received[-1]


@contextmanager
def running_engine(tokenizer: Any) -> Iterator[Engine]:
    with ipc_directory() as ipc, zmq.Context() as context:
        decode = None if tokenizer is None else decode_with(tokenizer)
        scheduler = ScriptedScheduler(context, ipc)
        detokenizer = DetokenizerManager(context, ipc, decode)
        threads = [
            threading.Thread(target=part.run, daemon=True) for part in (scheduler, detokenizer)
        ]
        for thread in threads:
            thread.start()
        try:
            yield Engine(ipc, scheduler, tokenizer)
        finally:
            farewell = Sender(context, ipc.scheduler)
            farewell.send(Shutdown())
            farewell.close()
            for thread in threads:
                thread.join(LIMIT_S)
                assert not thread.is_alive()


@pytest.fixture
def engine(tokenizer: Any) -> Iterator[Engine]:
    with running_engine(tokenizer) as engine:
        yield engine


ManagerFor = Callable[..., AbstractContextManager[TokenizerManager]]


@pytest.fixture
def manager_for(engine: Engine) -> Any:
    """`async with manager_for(context_length=...) as manager` on the test's own loop."""

    @asynccontextmanager
    async def started(
        *,
        auto_truncate: bool = False,
        context_length: int = CONTEXT_LENGTH,
        log: RequestLog | None = None,
    ) -> AsyncIterator[TokenizerManager]:
        limits = Limits(VOCAB_SIZE, context_length, auto_truncate)
        manager = TokenizerManager(PromptEncoder(engine.tokenizer, limits), engine.ipc, log=log)
        await manager.start()
        try:
            async with asyncio.timeout(LIMIT_S):
                yield manager
        finally:
            await manager.close()

    return started


@dataclass
class Served:
    """A live HTTP server; `client` is bound to it."""

    client: httpx.Client
    url: str
    engine: Engine
    state: ServerState
    loop: asyncio.AbstractEventLoop

    def call(self, function: Callable[..., Any], *args: Any) -> None:
        """Runs a function on the server's loop."""
        done = threading.Event()

        def run() -> None:
            function(*args)
            done.set()

        self.loop.call_soon_threadsafe(run)
        assert done.wait(LIMIT_S)


@contextmanager
def serving(tokenizer: Any, **flags: Any) -> Iterator[Served]:
    args = ServerArgs(**{"model_path": "smollm2", **flags})
    model = ServedModel(
        VOCAB_SIZE,
        CONTEXT_LENGTH,
        model_type="llama",
        architectures=("LlamaForCausalLM",),
        tokenizer=tokenizer,
        chat_defaults={"temperature": 0.25} if args.sampling_defaults == "model" else {},
    )
    with running_engine(tokenizer) as engine, socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        ready: Any = threading.Event()
        made: list[tuple[ServerState, asyncio.AbstractEventLoop, HttpServer]] = []

        async def main() -> None:
            limits = Limits(VOCAB_SIZE, CONTEXT_LENGTH, args.allow_auto_truncate)
            manager = TokenizerManager(
                PromptEncoder(tokenizer, limits),
                engine.ipc,
                metrics=RequestMetrics() if args.enable_metrics else None,
            )
            await manager.start()
            state = ServerState(args, manager, model, ENGINE_INFO)
            state.phase = Phase.SERVING
            server = HttpServer(build_app(state), "warning")
            made.append((state, asyncio.get_running_loop(), server))
            serve = asyncio.create_task(server.serve([listener]))
            await server.listening.wait()
            ready.set()
            await serve
            await manager.close()

        thread = threading.Thread(target=asyncio.run, args=(main(),), daemon=True)
        thread.start()
        assert ready.wait(LIMIT_S)
        [(state, loop, server)] = made
        with httpx.Client(base_url=url, timeout=LIMIT_S, verify=False) as client:
            try:
                yield Served(client, url, engine, state, loop)
            finally:
                server.should_exit = True
                with contextlib.suppress(RuntimeError):
                    thread.join(LIMIT_S)
                assert not thread.is_alive()


@pytest.fixture(scope="session")
def plain_template() -> str:
    """A chat template that writes everything it is given, for tests that look at the prompt."""
    path = Path(__file__).parents[1] / "data" / "plain_chat_template.jinja"
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def parsing_server(serve: Any, plain_template: str) -> Iterator[Served]:
    """A server that looks for calls of tools and for thoughts, shared by a module."""
    with serve(
        template=plain_template,
        tool_call_parser="hermes",
        reasoning_parser="qwen3",
        enable_cache_report=True,
    ) as served:
        yield served


@pytest.fixture(scope="session")
def serve(tokenizer: Any) -> Callable[..., AbstractContextManager[Served]]:
    """`with serve(api_key=...) as served`: a server with the given flags.

    template: the text of a chat template instead of the model's own.
    """

    def start(
        *, skip_tokenizer: bool = False, template: str | None = None, **flags: Any
    ) -> AbstractContextManager[Served]:
        mine = tokenizer
        if template is not None:
            mine = copy(tokenizer)
            mine.chat_template = template
        return serving(None if skip_tokenizer else mine, **flags)

    return start


@pytest.fixture(scope="module")
def _shared_server(tokenizer: Any) -> Iterator[Served]:
    with serving(tokenizer) as served:
        yield served


@pytest.fixture
def server(_shared_server: Served) -> Iterator[Served]:
    """A server with default flags, shared by a module; its engine counts up unless told."""
    scheduler = _shared_server.engine.scheduler
    _shared_server.engine.says("Hello there, General Kenobi!")
    scheduler.token_interval_s = 0.0
    scheduler.received.clear()
    scheduler.aborted.clear()
    scheduler.stopped.clear()
    yield _shared_server
    assert _shared_server.state.manager.in_flight == 0
