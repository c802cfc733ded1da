"""The benchmarks of the host side: that they measure what they say."""

from __future__ import annotations

import asyncio
import json

import pytest

from benchmark import host_cost, message_path


def test_a_step_of_the_engine_thread_is_measured_by_part() -> None:
    us = host_cost.measure(host_cost.Case(requests=5, prompt_tokens=20, page_size=4, steps=30))
    assert set(us) == {"total", *host_cost.PARTS}
    assert all(0 < part["p50_us"] <= part["p99_us"] for part in us.values())
    assert max(part["p50_us"] for part in us.values()) == us["total"]["p50_us"]


@pytest.mark.parametrize("size", [1, 7, 64, 10_000])
def test_a_stream_counts_tokens_and_delays_however_it_is_cut(
    monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Events of 1, 2 and 4 tokens, sent at 100, 200 and 300 us, all received at 1000 us."""
    monkeypatch.setattr(message_path, "now_us", lambda: 1000)
    events = [
        {"text": "x", "meta_info": {"completion_tokens": made, "cached_tokens": sent_us}}
        for made, sent_us in [(0, 50), (1, 100), (3, 200), (7, 300)]
    ]
    data = b"".join(
        b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n" for event in events
    )

    async def receive() -> message_path.Received:
        received = message_path.Received()
        stream = message_path.Stream(received)
        for at in range(0, len(data), size):
            stream.data_received(data[at : at + size])
        assert stream.started.done()
        return received

    received = asyncio.run(receive())
    assert received.tokens == 7
    assert received.events == 3
    assert received.bytes == len(data)
    assert received.delays_us == [900, 800, 700]


@pytest.mark.parametrize("endpoint", message_path.ENDPOINTS)
def test_answers_outlast_the_measurement(endpoint: str) -> None:
    case = message_path.Case(endpoint, streams=1, tokens_per_s=50, seconds=10)
    path, body = case.request()
    limit = body.get("max_tokens") or body["sampling_params"]["max_new_tokens"]
    assert path.startswith("/")
    assert body["stream"]
    assert limit > 50 * 10
