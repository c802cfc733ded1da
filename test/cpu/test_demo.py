"""The parts of the demo that need no model: prompts, timing, the stream and the verdict."""

from __future__ import annotations

import asyncio
import io
import json

import pytest
from aiohttp import ClientSession, web
from aiohttp.test_utils import TestServer

from benchmark.conversation import (
    GenerateError,
    Script,
    Turn,
    ask,
    follow_up_ids,
    opening_ids,
    parse_event,
    percentile,
    reusable_tokens,
    token_gaps_ms,
)
from benchmark.demo import Progress, broken_promises, render_conversation, render_lanes, scripts

LANES = {
    "prefill_busy_s": 2.0,
    "decode_busy_s": 3.0,
    "both_busy_s": 1.0,
    "partitions": [
        {"prefill_sms": 2, "decode_sms": 2, "exclusive": True, "launches": 7},
        {"prefill_sms": 1, "decode_sms": 1, "exclusive": False, "launches": 9},
    ],
}


class CharTokenizer:
    """One id a character; "<u>" "<a>" open a turn and "$" ends it."""

    def apply_chat_template(self, conversation, *, tokenize, add_generation_prompt):
        assert not tokenize
        assert add_generation_prompt
        turns = [f"<{message['role'][0]}>{message['content']}$" for message in conversation]
        return "".join(turns) + "<a>"

    def encode(self, text, *, add_special_tokens):
        assert not add_special_tokens
        return [ord(char) for char in text]


def ids(text):
    return [ord(char) for char in text]


def talk(first_output="yes$", cached_tokens=None):
    """Two finished turns; turn 2 found everything reusable unless told otherwise."""
    first = Turn("hi", ids("<u>hi$<a>"), answer="yes", output_ids=ids(first_output))
    second = Turn("why?", follow_up_ids(CharTokenizer(), first, "why?"), answer="so")
    second.output_ids = ids("so$")
    second.cached_tokens = reusable_tokens(first) if cached_tokens is None else cached_tokens
    return first, second


@pytest.mark.parametrize("output", ["yes$", "yes"])
def test_second_prompt_continues_the_first_whether_or_not_the_model_ended_its_turn(output):
    first, second = talk(output)
    assert opening_ids(CharTokenizer(), "hi") == first.prompt_ids
    assert second.prompt_ids == ids("<u>hi$<a>yes$<u>why?$<a>")


def test_reusable_tokens_leave_out_the_last_generated_one():
    first, second = talk()
    reusable = reusable_tokens(first)
    assert reusable == len("<u>hi$<a>yes$") - 1
    assert second.prompt_ids[:reusable] == (first.prompt_ids + first.output_ids)[:reusable]


def test_percentile_is_a_value_of_the_sample():
    assert percentile([30.0, 10.0, 20.0], 50) == 20.0
    assert percentile(list(range(1, 201)), 99) == 198
    assert percentile([7.0], 99) == 7.0
    assert percentile([], 50) == 0.0


def test_gaps_spread_an_event_of_several_tokens_and_skip_one_of_none():
    ttft_ms, gaps_ms = token_gaps_ms([(0.5, 1), (0.6, 3), (0.7, 3), (0.9, 4)])
    assert ttft_ms == pytest.approx(500)
    assert gaps_ms == pytest.approx([50, 50, 300])


def test_events_are_told_from_the_rest_of_the_stream():
    assert parse_event(b'data: {"text": "a"}\n') == {"text": "a"}
    assert parse_event(b"data: [DONE]\n") is None
    assert parse_event(b"\n") is None
    with pytest.raises(GenerateError, match="too long"):
        parse_event(b'data: {"error": {"message": "too long"}}\n')


def test_promises_kept():
    assert broken_promises([("A", talk())], LANES) == []


def test_each_broken_promise_is_named():
    first, second = talk(cached_tokens=3)
    first.answer = " "
    problems = broken_promises([("A", (first, second))], LANES | {"both_busy_s": 0.0})
    assert problems == [
        "A, turn 1: the answer is empty",
        f"A, turn 2: 3 tokens came from the cache, expected at least {reusable_tokens(first)}",
        "prefill and decode never ran at the same time",
    ]


def test_report_shows_questions_answers_and_reuse_but_not_the_document():
    first, second = talk()
    text = render_conversation(Script("Bakery", "hi", "why?", document="long text"), first, second)
    assert "Bakery (about a document of 2 words)" in text
    assert "You:     why?" in text
    assert "Model:   so" in text
    assert (
        f"{second.cached_tokens} from the cache (at least {reusable_tokens(first)} expected)"
        in text
    )
    assert "long text" not in text


def test_report_shows_busy_times_and_partitions():
    lines = render_lanes(LANES).splitlines()
    assert lines[0] == "Prefill lane busy 2.00 s, decode lane 3.00 s, both at once 1.00 s."
    assert "one phase alone on all 2 SMs or cores: 7 launches" in lines[1]
    assert "prefill on 1, decode on 1 SMs or cores: 9 launches" in lines[2]


def test_there_are_at_least_four_conversations_and_a_document_among_them():
    everyone = scripts()
    assert len(everyone) >= 4
    assert any(len(script.document.split()) > 300 for script in everyone)


def test_progress_off_a_terminal_prints_a_line_now_and_then():
    out, now_s = io.StringIO(), [100.0]
    progress = Progress(out, clock=lambda: now_s[0])
    for elapsed_s in (0, 1, 4, 5, 6, 11):
        now_s[0] = 100.0 + elapsed_s
        progress.show(f"after {elapsed_s} s")
    assert out.getvalue() == "after 0 s ...\nafter 5 s ...\nafter 11 s ...\n"


def ask_server(events, status=200):
    """Runs `ask` against a server that streams `events`; returns the turn, the counts it saw and
    the body the server got."""
    bodies, counts = [], []

    async def generate(request):
        bodies.append(await request.json())
        lines = [f"data: {json.dumps(event)}\n\n" for event in events] + ["data: [DONE]\n\n"]
        return web.Response(status=status, text="".join(lines), content_type="text/event-stream")

    async def run():
        app = web.Application()
        app.router.add_post("/generate", generate)
        turn = Turn("hi", [5, 6])
        async with TestServer(app) as server, ClientSession(str(server.make_url("/"))) as session:
            await ask(session, turn, max_new_tokens=4, on_token=counts.append)
        return turn

    return asyncio.run(run()), counts, bodies


def event(text, output_ids, finish_reason=None):
    return {
        "text": text,
        "output_ids": output_ids,
        "meta_info": {
            "completion_tokens": len(output_ids),
            "cached_tokens": 1,
            "finish_reason": finish_reason,
        },
    }


def test_ask_takes_the_last_event_of_a_cumulative_stream():
    events = [event("a", [1]), event("abc", [1, 2, 3], {"type": "length", "length": 3})]
    turn, counts, bodies = ask_server(events)
    assert (turn.answer, turn.output_ids, turn.cached_tokens) == ("abc", [1, 2, 3], 1)
    assert counts == [1, 2]
    assert len(turn.tbt_ms) == 2
    assert turn.ttft_ms > 0
    assert bodies[0]["input_ids"] == [5, 6]
    assert bodies[0]["stream"] is True


@pytest.mark.parametrize("last", [None, {"type": "abort", "message": "shutting down"}])
def test_ask_refuses_a_stream_without_an_end(last):
    with pytest.raises(GenerateError, match="without an answer"):
        ask_server([event("a", [1], last)])


def test_ask_reports_a_refusal_in_the_servers_words():
    with pytest.raises(GenerateError, match="HTTP 400"):
        ask_server([], status=400)
