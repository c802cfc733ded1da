"""The outbox: what is reported when, each request in one row of a batch."""

from __future__ import annotations

import pytest

from sglang.srt.managers.outbox import Outbox
from sglang.srt.messages import FinishReason, GenerateRequest, token_ids
from sglang.srt.requests import PROMPT_TAIL_TOKENS, Request
from sglang.srt.sampling_params import SamplingParams


def request(rid: str = "r", prompt_len: int = 3, **sampling) -> Request:
    message = GenerateRequest(
        rid=rid,
        input_ids=token_ids(range(prompt_len)),
        sampling=SamplingParams(**sampling),
        arrival_s=0.0,
    )
    return Request(message, max_new_tokens=20, seed=0, eos_token_ids=frozenset())


def take(outbox: Outbox, item: Request, *tokens: int) -> None:
    for token in tokens:
        item.append(token)
        outbox.note(item)


def test_nothing_new_is_nothing_to_send():
    assert Outbox().flush() is None


def test_a_batch_is_columnar_and_in_order_of_the_first_news():
    outbox = Outbox()
    a, b = request("a", 3), request("b", 5)
    b.cached_tokens, b.retractions = 4, 2
    take(outbox, b, 11)
    take(outbox, a, 12)
    take(outbox, b, 13)
    batch = outbox.flush()
    assert batch.rids == ["b", "a"]
    assert batch.new_ids == [[11, 13], [12]]
    assert batch.finish == [None, None]
    assert batch.prompt_tokens == [5, 3]
    assert batch.cached_tokens == [4, 0]
    assert batch.completion_tokens == [2, 1]
    assert batch.retractions == [2, 0]
    assert outbox.flush() is None


def test_a_request_may_have_a_stream_interval_of_its_own():
    outbox = Outbox(stream_interval=2)
    slow, quick = request("slow", stream_interval=3), request("quick", stream_interval=1)
    sent = []
    for token in range(1, 8):
        for item in (slow, quick):
            take(outbox, item, token)
        sent.append(outbox.flush().rids)
    both, alone = ["slow", "quick"], ["quick"]
    assert sent == [both, alone, alone, both, alone, alone, both]


def test_only_new_tokens_are_sent_and_a_stream_is_opened_once():
    outbox = Outbox()
    item = request(stop=["END"], skip_special_tokens=False)
    take(outbox, item, 1)
    first = outbox.flush()
    assert [options.rid for options in first.opened] == ["r"]
    assert first.opened[0].stop == ["END"]
    assert not first.opened[0].skip_special_tokens
    take(outbox, item, 2, 3)
    second = outbox.flush()
    assert second.opened == []
    assert second.new_ids == [[2, 3]]
    assert second.completion_tokens == [3]


def test_the_detokenizer_gets_the_end_of_the_prompt():
    outbox = Outbox()
    for rid, length in [("short", 3), ("long", 50)]:
        take(outbox, request(rid, length), 1)
    short, long = outbox.flush().opened
    assert short.prompt_tail == [0, 1, 2]
    assert long.prompt_tail == list(range(50 - PROMPT_TAIL_TOKENS, 50))


@pytest.mark.parametrize("interval", [1, 3, 8])
def test_after_the_first_token_news_come_every_interval(interval):
    outbox = Outbox(stream_interval=interval)
    item = request()
    sizes = []
    for token in range(19):
        take(outbox, item, token)
        batch = outbox.flush()
        if batch is not None:
            sizes.append(len(batch.new_ids[0]))
    assert sizes == [1] + [interval] * (18 // interval)


def test_the_end_is_told_at_once_with_what_was_held_back():
    outbox = Outbox(stream_interval=10)
    item = request()
    take(outbox, item, 1)
    outbox.flush()
    take(outbox, item, 2, 3)
    assert outbox.flush() is None
    item.finish = FinishReason(type="stop")
    outbox.note(item)
    batch = outbox.flush()
    assert batch.new_ids == [[2, 3]]
    assert batch.finish == [FinishReason(type="stop")]


def test_a_request_that_ends_without_a_token_is_opened_and_closed():
    outbox = Outbox()
    item = request()
    item.finish = FinishReason(type="length", length=0)
    outbox.note(item)
    batch = outbox.flush()
    assert [options.rid for options in batch.opened] == ["r"]
    assert batch.new_ids == [[]]
    assert batch.finish == [item.finish]
