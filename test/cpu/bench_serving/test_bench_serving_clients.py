"""The wire formats, on scripted streams with a scripted clock."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from sglang.bench.clients.base import AnswerReader
from sglang.bench.clients.http import overlay, read_stream
from sglang.bench.clients.native import NativeReader, scan_completion_tokens
from sglang.bench.clients.openai import OpenAIReader
from sglang.bench.records import Answer
from sglang.bench.sse import SseSplitter

DONE = b"data: [DONE]\n\n"
Script = list[tuple[float, bytes]]


def event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"


def read(script: Script, reader: AnswerReader, start_s: float = 0.0) -> Answer:
    """Plays (arrival time, bytes) pairs."""
    now_s = start_s

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal now_s
        for arrival_s, chunk in script:
            now_s = arrival_s
            yield chunk

    answer = Answer(start_s=start_s)
    asyncio.run(read_stream(chunks(), reader, answer, lambda: now_s))
    return answer


def native(
    tokens: int, *, delta_from: int | None = None, finish: dict[str, Any] | None = None
) -> bytes:
    """The payload when `tokens` are out: cumulative, or only those from `delta_from` on."""
    first = 0 if delta_from is None else delta_from
    return event(
        {
            "text": "".join(f"w{i} " for i in range(first, tokens)),
            "output_ids": list(range(first, tokens)),
            "meta_info": {
                "id": "r",
                "prompt_tokens": 12,
                "cached_tokens": 8,
                "completion_tokens": tokens,
                "finish_reason": finish,
            },
        }
    )


LENGTH = {"type": "length", "length": 6}


def test_sse_splitter_joins_what_the_network_split() -> None:
    splitter = SseSplitter()
    stream = b": comment\n\ndata: one\n\ndata:two\r\n\r\nevent: x\ndata: three\n\n"
    for size in (1, 2, 7, len(stream)):
        pieces = [stream[i : i + size] for i in range(0, len(stream), size)]
        payloads = [payload for piece in pieces for payload in splitter.feed(piece)]
        assert payloads == [b"one", b"two", b"three"]


def test_native_stream_times_and_counts() -> None:
    script: Script = [
        (10.5, native(1)),
        (10.6, native(2)),
        (10.9, native(5)),
        (11.0, native(6, finish=LENGTH) + DONE),
    ]
    answer = read(script, NativeReader(), start_s=10.0)
    assert answer.error == ""
    assert answer.ttft_s == pytest.approx(0.5)
    assert answer.latency_s == pytest.approx(1.0)
    assert answer.chunk_gaps_s == pytest.approx([0.1, 0.3, 0.1])
    assert answer.chunk_tokens == [1, 3, 1]
    assert (answer.prompt_tokens, answer.output_tokens, answer.cached_tokens) == (12, 6, 8)
    assert answer.text == "w0 w1 w2 w3 w4 w5 "
    assert answer.output_ids == [0, 1, 2, 3, 4, 5]


def test_native_deltas_are_put_together() -> None:
    chunks = [native(2, delta_from=0), native(3, delta_from=2), native(6, delta_from=3)]
    chunks.append(native(6, delta_from=6, finish=LENGTH))
    answer = read([*((i, c) for i, c in enumerate(chunks)), (9, DONE)], NativeReader())
    assert answer.output_ids == [0, 1, 2, 3, 4, 5]
    assert answer.text == "w0 w1 w2 w3 w4 w5 "
    assert answer.chunk_tokens == [1, 3]


def test_events_that_arrive_together_are_one_chunk() -> None:
    answer = read([(1.0, native(1)), (2.0, native(2) + native(3) + DONE)], NativeReader())
    assert answer.chunk_gaps_s == [1.0]
    assert answer.chunk_tokens == [2]


def test_an_event_cut_in_two_counts_when_it_is_complete() -> None:
    whole = native(2)
    script: Script = [(1.0, native(1)), (1.1, whole[:40]), (1.4, whole[40:]), (1.5, DONE)]
    answer = read(script, NativeReader())
    assert answer.chunk_gaps_s == pytest.approx([0.4])
    assert answer.latency_s == pytest.approx(1.5)


def test_generated_text_cannot_pose_as_the_token_count() -> None:
    text = 'he said "completion_tokens":99 and "completion_tokens": 98'
    payload = json.dumps({"meta_info": {"completion_tokens": 3}, "text": text}).encode()
    assert scan_completion_tokens(payload) == 3
    assert scan_completion_tokens(json.dumps({"text": text}).encode()) is None


@pytest.mark.parametrize(
    ("tail", "problem"),
    [
        (native(2), "without \\[DONE\\]"),
        (event({"error": {"message": "no room", "code": 503}}) + DONE, "no room"),
        (native(2, finish={"type": "abort", "message": "gone"}) + DONE, "aborted: gone"),
    ],
)
def test_native_streams_that_fail(tail: bytes, problem: str) -> None:
    answer = read([(1.0, native(1)), (2.0, tail)], NativeReader())
    with pytest.raises(AssertionError, match=problem):
        assert not answer.error


def test_an_empty_stream_is_a_failure() -> None:
    assert read([(1.0, DONE)], NativeReader()).error == "the answer held no payload"
    assert read([(1.0, DONE)], OpenAIReader()).error == "the answer held no payload"


def test_an_answer_without_tokens_has_its_latency_as_ttft() -> None:
    answer = read([(2.5, native(0, finish={"type": "length", "length": 0}) + DONE)], NativeReader())
    assert (answer.error, answer.output_tokens, answer.ttft_s) == ("", 0, 2.5)


def chat(
    text: str | None, tokens: int | None, *, role: str | None = None, finish: str | None = None
) -> bytes:
    delta = {"role": role, "content": text}
    usage = None if tokens is None else {"prompt_tokens": 20, "completion_tokens": tokens}
    return event(
        {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}], "usage": usage}
    )


def usage_chunk(tokens: int, cached: int) -> bytes:
    usage = {"prompt_tokens": 20, "completion_tokens": tokens}
    return event(
        {"choices": [], "usage": {**usage, "prompt_tokens_details": {"cached_tokens": cached}}}
    )


@pytest.mark.parametrize("continuous", [True, False])
def test_chat_stream_times_and_counts(continuous: bool) -> None:
    def at(tokens: int) -> int | None:
        return tokens if continuous else None

    script: Script = [
        (0.1, chat("", at(0), role="assistant")),
        (0.4, chat("he", at(1))),
        (0.6, chat("llo", at(3))),
        (0.7, chat("", at(3), finish="stop")),
        (0.8, usage_chunk(3, 16) + DONE),
    ]
    answer = read(script, OpenAIReader())
    assert answer.error == ""
    assert answer.ttft_s == pytest.approx(0.4)  # not the chunk that only carries the role
    assert answer.latency_s == pytest.approx(0.8)
    assert answer.chunk_gaps_s == pytest.approx([0.2])
    assert answer.chunk_tokens == [2 if continuous else 1]
    assert (answer.prompt_tokens, answer.output_tokens, answer.cached_tokens) == (20, 3, 16)
    assert answer.text == "hello"


def test_tokens_without_text_are_seen_through_usage() -> None:
    script: Script = [(1, chat("a", 1)), (2, chat("", 2)), (3, chat("é", 3)), (4, DONE)]
    assert read(script, OpenAIReader()).chunk_gaps_s == [1, 1]


def test_completion_stream_and_its_abort() -> None:
    def completion(text: str, finish: str | None = None) -> bytes:
        return event({"choices": [{"index": 0, "text": text, "finish_reason": finish}]})

    answer = read([(1, completion("a")), (2, completion("b", "length") + DONE)], OpenAIReader())
    assert (answer.text, answer.output_tokens, answer.cached_tokens) == ("ab", 2, None)
    aborted = read([(1, completion("a")), (2, completion("", "abort") + DONE)], OpenAIReader())
    assert aborted.error == "aborted by the server"


def test_overlay_merges_objects_one_level_deep() -> None:
    body = {"stream": True, "sampling_params": {"temperature": 0, "top_p": 1}}
    merged = overlay(body, {"priority": 2, "sampling_params": {"temperature": 1}})
    assert merged == {
        "stream": True,
        "priority": 2,
        "sampling_params": {"temperature": 1, "top_p": 1},
    }
    assert body["sampling_params"] == {"temperature": 0, "top_p": 1}
