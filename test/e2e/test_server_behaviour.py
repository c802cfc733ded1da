"""Requests that end early, odd requests, and many at once, on a real server."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest

GREEDY = {"temperature": 0, "ignore_eos": True}
ENDLESS = {**GREEDY, "max_new_tokens": 3000}
STORY = "The lighthouse keeper climbed the stairs one last time, and"
CONTEXT_LENGTH = 4096
IDLE_LIMIT_S = 60.0


def fresh_ids(count: int, salt: int) -> list[int]:
    """Token ids that no other test has sent, from the ordinary part of the vocabulary."""
    return [100 + (i * 7919 + salt * 104729) % 40000 for i in range(count)]


def in_prefill(client: Any, prompt: list[int]) -> bool:
    """The only request has memory for its uncached prompt, and none for new tokens yet."""
    return bool(client.state()["used_tokens"] == len(prompt))


@contextmanager
def raw_request(client: Any, body: dict[str, Any]) -> Iterator[socket.socket]:
    """A POST /generate whose answer nobody reads. Leaving the block hangs up."""
    address = urlsplit(str(client.http.base_url))
    content = json.dumps(body).encode()
    head = f"POST /generate HTTP/1.1\r\nHost: {address.netloc}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    with socket.create_connection((address.hostname, address.port), timeout=10) as connection:
        connection.sendall(head.encode() + content)
        yield connection


class TestEndingEarly:
    def test_abort_during_prefill(self, client: Any, eventually: Callable[..., None]) -> None:
        prompt = fresh_ids(600, 1)
        body = client.body(prompt, ENDLESS, rid="victim-1")
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(client.http.post, "/generate", json=body)
            eventually(lambda: in_prefill(client, prompt), 30)
            client.abort("victim")
            response = answer.result(30)
        assert response.status_code == 499
        assert "aborted" in response.json()["message"]
        eventually(client.idle, IDLE_LIMIT_S)

    def test_abort_during_decode(self, client: Any, eventually: Callable[..., None]) -> None:
        with client.stream(STORY, ENDLESS, rid="victim-2") as events:
            next(events)
            client.abort("victim-2")
            *_, last = events
        info = last["meta_info"]
        assert info["finish_reason"]["type"] == "abort"
        assert 0 < info["completion_tokens"] < ENDLESS["max_new_tokens"]
        eventually(client.idle, IDLE_LIMIT_S)

    def test_abort_spares_others(self, client: Any) -> None:
        params = {**GREEDY, "max_new_tokens": 24}
        expected = client.generate(STORY, params)["output_ids"]
        with (
            client.stream(STORY, params, rid="bystander") as kept,
            client.stream("Once upon a time", ENDLESS, rid="victim-3") as doomed,
        ):
            next(doomed)
            client.abort("victim-3")
            *_, last = kept
            *_, aborted = doomed
        assert last["output_ids"] == expected
        assert aborted["meta_info"]["finish_reason"]["type"] == "abort"

    def test_client_leaves_during_prefill(
        self, client: Any, eventually: Callable[..., None]
    ) -> None:
        prompt = fresh_ids(600, 2)
        with raw_request(client, client.body(prompt, ENDLESS)):
            eventually(lambda: in_prefill(client, prompt), 30)
        eventually(client.idle, IDLE_LIMIT_S)

    @pytest.mark.parametrize("stream", [True, False])
    def test_client_leaves_during_decode(
        self, client: Any, eventually: Callable[..., None], stream: bool
    ) -> None:
        with raw_request(client, client.body(STORY, ENDLESS, stream=stream)):
            eventually(lambda: client.state()["used_tokens"] > 40, 30)  # STORY has fewer
        eventually(client.idle, IDLE_LIMIT_S)


class TestFlushCache:
    def test_refused_while_busy_done_when_idle(
        self, client: Any, eventually: Callable[..., None]
    ) -> None:
        with client.stream(STORY, ENDLESS) as events:
            next(events)
            refused = client.http.post("/flush_cache")
        assert refused.status_code == 400
        eventually(client.idle, IDLE_LIMIT_S)
        assert client.state()["cached_tokens"] > 0
        assert client.http.post("/flush_cache").status_code == 200
        assert client.state()["cached_tokens"] == 0
        params = {**GREEDY, "max_new_tokens": 1}
        assert client.generate(STORY, params)["meta_info"]["cached_tokens"] == 0

    def test_refused_during_a_prefill(self, client: Any, eventually: Callable[..., None]) -> None:
        prompt = fresh_ids(600, 3)
        with raw_request(client, client.body(prompt, ENDLESS)):
            eventually(lambda: in_prefill(client, prompt), 30)
            assert client.http.post("/flush_cache").status_code == 400
        eventually(client.idle, IDLE_LIMIT_S)

    def test_waits_for_idle_if_told_to(self, client: Any) -> None:
        with client.stream(STORY, {**GREEDY, "max_new_tokens": 24}) as events:
            next(events)
            response = client.http.post("/flush_cache", params={"timeout": 60})
            *_, last = events
        assert response.status_code == 200
        assert last["meta_info"]["completion_tokens"] == 24


class TestSampling:
    def test_a_seed_gives_the_same_tokens_in_any_batch(self, client: Any) -> None:
        params = {"temperature": 1, "ignore_eos": True, "max_new_tokens": 24}
        seeds = [11, 12, 13]

        def ask(seed: int) -> Any:
            return client.generate(STORY, {**params, "sampling_seed": seed})["output_ids"]

        client.flush_cache()
        alone = [ask(seed) for seed in seeds]
        with ThreadPoolExecutor(6) as pool:
            others = [
                pool.submit(client.generate, fresh_ids(40 + 30 * i, 10 + i), params)
                for i in range(3)
            ]
            together = list(pool.map(ask, reversed(seeds)))
            for other in others:
                other.result()
        assert together[::-1] == alone
        assert len({tuple(ids) for ids in alone}) == len(seeds)

    def test_stop_string(self, client: Any) -> None:
        params = {**GREEDY, "max_new_tokens": 32}
        text = client.generate(STORY, params)["text"]
        stop = text[30:38]  # eight characters that begin and end inside tokens as it happens
        before = text[: text.index(stop)]
        for trim, expected in ((False, before), (True, before + stop)):
            answer = client.generate(STORY, {**params, "stop": stop, "no_stop_trim": trim})
            assert answer["text"] == expected
            assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
            assert answer["meta_info"]["completion_tokens"] < 32

    def test_stop_string_in_a_stream_is_never_shown(self, client: Any) -> None:
        params = {**GREEDY, "max_new_tokens": 32}
        text = client.generate(STORY, params)["text"]
        stop = text[30:38]
        with client.stream(STORY, {**params, "stop": [stop]}) as events:
            texts = [event["text"] for event in events]
        before = text[: text.index(stop)]
        assert texts[-1] == before
        assert all(before.startswith(shown) for shown in texts)

    def test_stop_token(self, client: Any) -> None:
        params = {**GREEDY, "max_new_tokens": 32}
        ids = client.generate(STORY, params)["output_ids"]
        token = ids[10]
        answer = client.generate(STORY, {**params, "stop_token_ids": [token]})
        assert answer["output_ids"] == ids[: ids.index(token) + 1]
        assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": token}

    def test_min_new_tokens_holds_back_a_stop_token(self, client: Any) -> None:
        params = {**GREEDY, "max_new_tokens": 16}
        token = client.generate(STORY, params)["output_ids"][2]
        held = {**params, "stop_token_ids": [token], "min_new_tokens": 12}
        answer = client.generate(STORY, held)
        assert answer["meta_info"]["completion_tokens"] >= 12
        assert token not in answer["output_ids"][:11]

    def test_no_new_tokens_only_fills_the_cache(self, client: Any) -> None:
        prompt = fresh_ids(50, 20)
        filled = client.generate(prompt, {"max_new_tokens": 0})
        assert filled["output_ids"] == [] and filled["text"] == ""
        assert filled["meta_info"]["finish_reason"] == {"type": "length", "length": 0}
        answer = client.generate(prompt, {**GREEDY, "max_new_tokens": 1})
        assert answer["meta_info"]["cached_tokens"] == len(prompt) - 1

    def test_three_answers(self, client: Any) -> None:
        params = {"temperature": 1, "n": 3, "sampling_seed": 5, "max_new_tokens": 16}
        first, again = (client.generate(STORY, params) for _ in range(2))
        texts = [answer["text"] for answer in first]
        assert len(texts) == len(set(texts)) == 3
        assert [answer["text"] for answer in again] == texts
        assert len({answer["meta_info"]["id"] for answer in first}) == 3

    def test_a_batch_is_answered_in_its_order(self, client: Any) -> None:
        prompts = ["The capital of Italy is", "2 + 2 =", STORY]
        params = [{**GREEDY, "max_new_tokens": count} for count in (12, 3, 7)]
        alone = [client.generate(*pair)["output_ids"] for pair in zip(prompts, params, strict=True)]
        body = {"text": prompts, "sampling_params": params}
        response = client.http.post("/generate", json=body)
        assert [answer["output_ids"] for answer in response.json()] == alone


def test_a_prompt_near_the_context_limit_streams_and_lets_others_pass(client: Any) -> None:
    client.flush_cache()
    new_tokens = 8
    prompt = fresh_ids(CONTEXT_LENGTH - new_tokens, 30)
    finished: list[str] = []

    def read_long() -> list[Any]:
        with client.stream(prompt, {**GREEDY, "max_new_tokens": new_tokens}) as stream:
            events = [next(stream)]
            finished.append("long prompt")
            return events + list(stream)

    with ThreadPoolExecutor(1) as pool:
        with client.stream(STORY, {**GREEDY, "max_new_tokens": 48}) as short:
            next(short)
            long = pool.submit(read_long)
            *_, last = short
            finished.append("short request")
        events = long.result()
    assert finished == ["short request", "long prompt"]
    assert last["meta_info"]["completion_tokens"] == 48
    counts = [event["meta_info"]["completion_tokens"] for event in events]
    assert counts == sorted(set(counts)) and counts[-1] == new_tokens
    assert len(counts) > 1, "the answer came in one piece"
    assert events[-1]["meta_info"]["prompt_tokens"] == len(prompt)

    refused = client.http.post(
        "/generate", json=client.body([*prompt, 100], {**GREEDY, "max_new_tokens": new_tokens})
    )
    assert refused.status_code == 400


def test_a_burst_of_mixed_requests_completes_and_returns_its_memory(
    client: Any, eventually: Callable[..., None]
) -> None:
    def ask(i: int) -> None:
        length, count = 5 + 23 * (i % 7), 4 + 5 * (i % 5)
        params = {"temperature": (i % 3) / 2, "ignore_eos": True, "max_new_tokens": count}
        prompt = fresh_ids(length, 40 + i % 11)  # some share a prefix, some are the same
        if i % 2:
            with client.stream(prompt, params) as events:
                *_, answer = events
        else:
            answer = client.generate(prompt, params)
        assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": count}
        assert len(answer["output_ids"]) == count

    with ThreadPoolExecutor(30) as pool:
        for done in [pool.submit(ask, i) for i in range(30)]:
            done.result(120)
    eventually(client.idle, IDLE_LIMIT_S)
    assert client.state()["cached_tokens"] > 0


def test_service_levels_are_kept_account_of(client: Any, eventually: Callable[..., None]) -> None:
    def counts(name: str) -> tuple[int, int, int]:
        told = client.state()["slo"]["classes"].get(name, {})
        return told.get("finished", 0), told.get("met_ttft", 0), told.get("met", 0)

    finished, met_ttft, met = counts("custom")
    sampling = {**GREEDY, "max_new_tokens": 4}
    client.generate(STORY, sampling, slo={"ttft_ms": 600_000, "tbt_ms": 600_000})
    client.generate(STORY, sampling, slo={"ttft_ms": 600_000, "tbt_ms": 0.001})
    eventually(lambda: counts("custom")[0] == finished + 2, IDLE_LIMIT_S)
    assert counts("custom") == (finished + 2, met_ttft + 2, met + 1)

    scraped = client.http.get("/metrics").text
    assert "sglang:slo_goodput{" in scraped
    assert 'sglang:phase_busy_seconds_total{model_name="' in scraped
    for told in ('process_cpu_seconds_total{component="scheduler"', "realtime_tokens_total{mode="):
        assert f"sglang:{told}" in scraped
