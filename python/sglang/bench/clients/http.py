"""Sends one request and takes the times. All wire formats share this path."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import aiohttp
import orjson

from sglang.bench.clients.base import AnswerReader
from sglang.bench.records import Answer
from sglang.bench.sse import DONE, SseSplitter
from sglang.bench.workload import Turn

_ERROR_CHARS = 500  # of a failed response's body, kept for the report


class HttpAsker:
    """Posts JSON bodies with `extra_body` laid over them to paths under `base_url`."""

    def __init__(
        self,
        http: aiohttp.ClientSession,
        base_url: str,
        *,
        stream: bool,
        extra_body: Mapping[str, Any],
    ) -> None:
        self._http = http
        self._base_url = base_url
        self._stream = stream
        self._extra_body = extra_body

    async def ask(
        self, path: str, body: dict[str, Any], reader: AnswerReader, turn: Turn
    ) -> Answer:
        """Times start just before the request is written. See Dialogue.ask for errors."""
        whole = overlay(overlay(body, turn.extra_body), self._extra_body)
        payload = orjson.dumps(whole, option=orjson.OPT_SERIALIZE_NUMPY)
        headers = dict(turn.headers)
        answer = Answer(start_s=time.perf_counter())
        try:
            async with self._http.post(
                self._base_url + path, data=payload, headers=headers
            ) as response:
                if response.status != 200:
                    text = (await response.text(errors="replace"))[:_ERROR_CHARS]
                    answer.error = f"HTTP {response.status}: {text}"
                elif self._stream:
                    await read_stream(
                        response.content.iter_any(), reader, answer, time.perf_counter
                    )
                else:
                    content = await response.read()
                    answer.ttft_s = answer.latency_s = time.perf_counter() - answer.start_s
                    reader.whole(content)
                    reader.fill(answer)
        except (aiohttp.ClientError, TimeoutError, ValueError, KeyError, TypeError) as error:
            # The last three are answers that do not look as the wire format says.
            answer.error = f"{type(error).__name__}: {error}"
        if answer.error:
            answer.latency_s = time.perf_counter() - answer.start_s
        return answer


async def read_stream(
    chunks: AsyncIterator[bytes],
    reader: AnswerReader,
    answer: Answer,
    clock: Callable[[], float],
) -> None:
    """Reads a whole stream into `answer`, whose start_s is set; a chunk's time is read from
    `clock` before the chunk is looked at."""
    splitter = SseSplitter()
    tokens_before = 0
    last_token_s = end_s = answer.start_s
    done = False
    async for chunk in chunks:
        end_s = clock()
        for payload in splitter.feed(chunk):
            if payload == DONE:
                done = True
            else:
                reader.event(payload)
        new_tokens = reader.tokens_seen - tokens_before
        if new_tokens <= 0:
            continue
        if tokens_before == 0:
            answer.ttft_s = end_s - answer.start_s
        else:
            answer.chunk_gaps_s.append(end_s - last_token_s)
            answer.chunk_tokens.append(new_tokens)
        tokens_before = reader.tokens_seen
        last_token_s = end_s
    answer.latency_s = end_s - answer.start_s
    if tokens_before == 0:
        answer.ttft_s = answer.latency_s
    reader.fill(answer)
    if not done and not answer.error:
        answer.error = "the stream ended without [DONE]"


def overlay(body: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """`extra` wins; an object on both sides is merged one level deep."""
    merged = dict(body)
    for name, value in extra.items():
        ours = merged.get(name)
        if isinstance(ours, Mapping) and isinstance(value, Mapping):
            merged[name] = {**ours, **value}
        else:
            merged[name] = value
    return merged
