"""A small server that speaks the wire formats, and a way to run a benchmark against it."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from sglang import bench_serving

LIMIT_S = 30


@dataclass
class FakeServer:
    """Answers token i with id 100 + i and the word "w<i> ".

    A prompt is a list of tokens: its ids, or the words of its text. Cached tokens are the longest
    prefix shared with an earlier prompt and its answer. before_token is awaited before each one.
    """

    model_info: dict[str, Any] = field(default_factory=dict)
    status: Callable[[int], int] = lambda request_number: 200
    before_token: Callable[[], Awaitable[None]] = lambda: asyncio.sleep(0)
    reports_cache: bool = True
    port: int = 0
    bodies: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    flushes: list[int] = field(default_factory=list)  # requests seen before each flush
    profile_calls: list[tuple[str, dict[str, Any], int]] = field(default_factory=list)
    profile_status: int = 200
    in_flight: int = 0
    max_in_flight: int = 0
    seen: list[list[Any]] = field(default_factory=list)

    def app(self) -> web.Application:
        app = web.Application(client_max_size=1 << 26)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/model_info", self._model_info)
        app.router.add_get("/server_info", self._server_info)
        app.router.add_post("/flush_cache", self._flush)
        app.router.add_post("/v1/embeddings", self._embed)
        for path in ("/start_profile", "/stop_profile"):
            app.router.add_post(path, self._profile)
        for path in ("/generate", "/v1/completions", "/v1/chat/completions"):
            app.router.add_post(path, self._generate)
        return app

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "fake-model"}]})

    async def _model_info(self, request: web.Request) -> web.Response:
        return web.json_response(self.model_info)

    async def _server_info(self, request: web.Request) -> web.Response:
        states = [{"avg_spec_accept_length": 2.5}]
        return web.json_response({"version": "fake", "internal_states": states})

    async def _flush(self, request: web.Request) -> web.Response:
        self.flushes.append(len(self.bodies))
        self.seen.clear()
        return web.Response(text="Cache flushed.")

    async def _profile(self, request: web.Request) -> web.Response:
        call = (request.path, json.loads(await request.read()), len(self.bodies))
        self.profile_calls.append(call)
        return web.Response(status=self.profile_status, text="no profiler")

    async def _embed(self, request: web.Request) -> web.Response:
        body = json.loads(await request.read())
        self.bodies.append((request.path, body))
        data = [{"index": 0, "embedding": [0.5, 0.25]}]
        usage = {"prompt_tokens": len(body["input"].split()), "total_tokens": 0}
        return web.json_response({"object": "list", "data": data, "usage": usage})

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.read())
        self.bodies.append((request.path, body))
        self.headers.append(dict(request.headers))
        status = self.status(len(self.bodies))
        if status != 200:
            return web.json_response({"error": {"message": "no room"}}, status=status)
        self.in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self.in_flight)
        try:
            return await self._answer(request, body)
        finally:
            self.in_flight -= 1

    async def _answer(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        native = request.path == "/generate"
        prompt = _prompt_tokens(body)
        cached = max((_shared(prompt, earlier) for earlier in self.seen), default=0)
        count = body["sampling_params"]["max_new_tokens"] if native else body["max_tokens"]
        words = [f"w{i} " for i in range(count)]
        by_ids = "input_ids" in body
        self.seen.append(
            prompt + ([100 + i for i in range(count)] if by_ids else "".join(words).split())
        )
        chat = request.path.endswith("chat/completions")

        def payload(first: int, last: int) -> dict[str, Any]:
            if native:
                meta = {"completion_tokens": last, "prompt_tokens": len(prompt)}
                reason = {"type": "length", "length": count} if last == count else None
                return {
                    "text": "".join(words[:last]),
                    "output_ids": [100 + i for i in range(last)],
                    "meta_info": {**meta, "cached_tokens": cached, "finish_reason": reason},
                }
            usage: dict[str, Any] = {"prompt_tokens": len(prompt), "completion_tokens": last}
            if self.reports_cache:
                usage["prompt_tokens_details"] = {"cached_tokens": cached}
            text = "".join(words[first:last])
            key = "delta" if body["stream"] else "message"
            choice = {key: {"content": text}} if chat else {"text": text}
            reason_text = "length" if last == count else None
            return {"choices": [{**choice, "finish_reason": reason_text}], "usage": usage}

        if not body["stream"]:
            return web.json_response(payload(0, count))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for i in range(count):
            await self.before_token()
            data = json.dumps(payload(i, i + 1)).encode()
            await response.write(b"data: " + data + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response


def _prompt_tokens(body: dict[str, Any]) -> list[Any]:
    if "messages" in body:
        return " ".join(message["content"] for message in body["messages"]).split()
    if "input_ids" in body:
        return list(body["input_ids"])
    return str(body.get("text") or body["prompt"]).split()


def _shared(a: list[Any], b: list[Any]) -> int:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FakeServer]:
    """Serves from a thread, because a benchmark runs an event loop of its own."""
    empty = tmp_path / "no_tokenizer"
    empty.mkdir()
    fake = FakeServer(model_info={"tokenizer_path": str(empty), "model_path": str(empty)})
    loop = asyncio.new_event_loop()
    ready = threading.Event()

    async def start() -> web.AppRunner:
        runner = web.AppRunner(fake.app(), shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        fake.port = runner.addresses[0][1]
        return runner

    def serve() -> None:
        asyncio.set_event_loop(loop)
        runner = loop.run_until_complete(start())
        ready.set()
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=serve)
    thread.start()
    assert ready.wait(LIMIT_S)
    yield fake
    loop.call_soon_threadsafe(loop.stop)
    thread.join(LIMIT_S)
    assert not thread.is_alive()


@pytest.fixture
def bench(server: FakeServer, tmp_path: Path) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Runs a benchmark against `server`: (exit code, result)."""

    def run(*flags: str) -> tuple[int, dict[str, Any]]:
        output = tmp_path / "result.jsonl"
        argv = ["--host", "127.0.0.1", "--port", str(server.port), "--disable-tqdm"]
        code = bench_serving.main([*argv, "--output-file", str(output), *flags])
        if not output.exists():
            return code, {}
        return code, json.loads(output.read_text().splitlines()[-1])

    return run
