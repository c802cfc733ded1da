"""The burst scenario against a small server, and the numbers made of it."""

from __future__ import annotations

import asyncio
import dataclasses
import json

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from benchmark.burst import Burst, Observed, Stream, lane_ms, observe, result, summary
from benchmark.conversation import GenerateError

SLO = {"ttft_ms": 1000.0, "ttft_ms_per_token": 0.5, "tbt_ms": 50.0}
BURST = Burst(
    decoding=2,
    context=12,
    decode_tokens=100_000,
    burst=3,
    prompt=20,
    burst_tokens=2,
    quiet_s=0.05,
    slo=SLO,
    seed=1,
)


class Server:
    """Streams tokens, one event each, every few milliseconds."""

    def __init__(self, refuses=0):
        self.bodies = []
        self.refuses = refuses  # prompts of this length

    async def generate(self, request):
        body = await request.json()
        self.bodies.append(body)
        if len(body["input_ids"]) == self.refuses:
            return web.json_response({"error": {"message": "no room"}}, status=503)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for count in range(1, body["sampling_params"]["max_new_tokens"] + 1):
            event = {"meta_info": {"completion_tokens": count, "finish_reason": None}}
            await response.write(f"data: {json.dumps(event)}\n\n".encode())
            await asyncio.sleep(0.002)
        await response.write(b"data: [DONE]\n\n")
        return response


def hold(burst, server):
    async def run():
        app = web.Application(client_max_size=1 << 24)
        app.router.add_post("/generate", server.generate)
        async with TestServer(app) as served:
            return await observe(str(served.make_url("/")), burst, ordinary_ids=50)

    return asyncio.run(run())


def test_the_burst_comes_while_others_decode():
    server = Server()
    observed = hold(BURST, server)
    sizes = [len(body["input_ids"]) for body in server.bodies]
    assert sizes == [12, 12, 20, 20, 20]
    assert all(body["slo"] == SLO for body in server.bodies)
    assert server.bodies[0]["input_ids"] != server.bodies[1]["input_ids"]
    assert max(max(body["input_ids"]) for body in server.bodies) < 50
    assert observed.quiet_from_s < observed.burst_from_s < observed.burst_to_s
    assert all(stream.finished for stream in observed.burst)
    assert not any(stream.finished for stream in observed.decoding)
    row = result(BURST, observed)
    assert row["ttft_attainment"] == 1.0
    assert len(row["ttft_ms"]) == 3
    assert row["quiet_gaps_ms"]["max"] > 0
    assert row["ended_early"] == 0


def test_decoding_requests_must_outlast_the_quiet_time():
    short = dataclasses.replace(BURST, decode_tokens=9)
    with pytest.raises(ExceptionGroup) as failure:
        hold(short, Server())
    assert failure.group_contains(GenerateError, match="raise --decode-tokens")


@pytest.mark.parametrize("length", [12, 20])
def test_a_refused_request_ends_the_scenario(length):
    with pytest.raises(ExceptionGroup) as failure:
        hold(BURST, Server(refuses=length))
    assert failure.group_contains(GenerateError, match="HTTP 503")


def observed_by_hand():
    """Quiet from 1 to 2 s, the burst from 2 to 3 s."""
    steady = Stream(0.0, [1.0 + 0.02 * i for i in range(101)], 101)
    stalled = Stream(0.0, [1.5, 1.9, 2.1, 2.9, 3.5], 5)
    prompts = [Stream(2.0, [2.4], 1), Stream(2.0, [3.0], 1)]
    return Observed([steady, stalled], prompts, 1.0, 2.0, 3.0)


def test_a_gap_counts_if_the_burst_touches_it():
    row = result(BURST, observed_by_hand())
    assert row["burst_s"] == pytest.approx(1.0)
    assert row["requests"][1]["gaps"] == 3  # 200, 800 and 600 ms; the last one outlasts the burst
    assert row["burst_gaps_ms"]["max"] == pytest.approx(800)
    assert row["burst_gaps_ms"]["p50"] == pytest.approx(20)
    assert row["quiet_gaps_ms"]["max"] == pytest.approx(400)
    assert row["tbt_attainment"] == 0.5
    assert row["ttft_ms"] == pytest.approx([400, 1000])
    assert row["ttft_attainment"] == pytest.approx(1.0)
    assert row["prefill_tokens_per_s"] == pytest.approx(60)


def test_summaries():
    row = {"policy": "adaptive", **result(BURST, observed_by_hand())}
    assert "longest 800.0 ms" in summary(row)
    assert summary({"policy": "table", "error": "x"}) == "table: x"


def test_lane_times_are_added_by_partition():
    runs = [
        {"phase": "decode", "partition": "p84/d48", "start_ms": 1.0, "end_ms": 3.0},
        {"phase": "prefill", "partition": "p84/d48", "start_ms": 0.0, "end_ms": 9.0},
        {"phase": "decode", "partition": "p84/d48", "start_ms": 3.5, "end_ms": 4.0},
    ]
    assert lane_ms({"runs": runs}) == {"decode p84/d48": 2.5, "prefill p84/d48": 9.0}
