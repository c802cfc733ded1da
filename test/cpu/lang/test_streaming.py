"""Reading a program while it runs."""

from __future__ import annotations

import asyncio
import threading

import pytest

import sglang as sgl


@sgl.function
def chat(s):
    s += "Q:" + sgl.gen("first") + "|" + sgl.gen("second")


@pytest.fixture
def streaming(server, say):
    def script(body):
        if "|" in body["text"]:
            return say.stream("x", "y", "z", id="two")
        return say.stream("a", "b", id="one")

    server.script = script
    return server


def test_a_stream_asks_for_one_and_yields_what_is_new(streaming):
    state = chat.run(stream=True)
    pieces = list(state.text_iter())
    assert "".join(pieces) == "Q:ab|xyz"
    assert [body["stream"] for body in streaming.bodies] == [True, True]
    assert state.text() == "Q:ab|xyz" and state["first"] == "ab" and state["second"] == "xyz"
    assert state.get_meta_info("second")["id"] == "two"


def test_pieces_come_before_the_generation_ends(server, say):
    read = threading.Event()

    def script(body):
        yield say.answer("one")
        assert read.wait(say.LIMIT_S)
        yield say.answer("one two")
        yield "[DONE]"

    @sgl.function
    def program(s):
        s += sgl.gen("x")

    server.script = script
    pieces = program.run(stream=True).text_iter("x")
    assert next(pieces) == "one"
    read.set()
    assert list(pieces) == [" two"]


def test_one_variable_can_be_read_by_name(streaming):
    state = chat.run(stream=True)
    assert "".join(state.text_iter("second")) == "xyz"
    assert "".join(state.text_iter("first")) == "ab"


def test_a_variable_that_is_never_set_yields_nothing(streaming):
    assert list(chat.run(stream=True).text_iter("third")) == []


def test_reading_waits_for_what_the_program_has_not_appended_yet(server, say):
    go_on = threading.Event()

    @sgl.function
    def program(s):
        assert go_on.wait(say.LIMIT_S)
        s += "x" + sgl.gen("late")
        return "done"

    server.script = lambda body: say.stream("!")
    state = program.run(stream=True)
    threading.Timer(0.05, go_on.set).start()
    assert state["late"] == "!"
    assert state.text() == "x!" and state.ret_value == "done"


def test_several_readers_see_the_whole_text(streaming):
    state = chat.run(stream=True)
    texts = []
    readers = [
        threading.Thread(target=lambda: texts.append("".join(state.text_iter()))) for _ in range(3)
    ]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(20)
    assert texts == ["Q:ab|xyz"] * 3


def test_async_readers_do_not_block_the_loop(server, say):
    released = threading.Event()

    def script(body):
        yield say.answer("one", id="r")
        assert released.wait(say.LIMIT_S)
        yield say.answer("one two", id="r")
        yield "[DONE]"

    @sgl.function
    def program(s):
        s += sgl.gen("x")

    server.script = script

    async def read():
        state = program.run(stream=True)
        pieces = state.text_async_iter("x", return_meta_data=True)
        first = await anext(pieces)
        waiting = asyncio.ensure_future(anext(pieces))
        await asyncio.sleep(0)  # the reader is parked and the loop still turns
        released.set()
        return [first, await waiting, *[piece async for piece in pieces]]

    told = asyncio.run(asyncio.wait_for(read(), say.LIMIT_S))
    assert [piece for piece, _ in told] == ["one", " two"]
    assert all(info["id"] == "r" for _, info in told)


def test_a_program_that_does_not_stream_yields_all_at_once(server):
    server.says("ab", "xyz")
    state = chat.run()
    assert list(state.text_iter()) == ["Q:ab|xyz"]
    assert list(state.text_iter("second")) == ["xyz"]

    async def read():
        return [piece async for piece in state.text_async_iter()]

    assert asyncio.run(read()) == ["Q:ab|xyz"]


def test_the_program_itself_may_read_while_it_streams(streaming):
    seen = []

    @sgl.function
    def program(s):
        s += "Q:" + sgl.gen("first")
        seen.append("".join(s.text_iter("first")))
        seen.append("".join(s.text_iter()))
        [fork] = s.fork(1)
        fork += "|" + sgl.gen("second")
        seen.append("".join(fork.text_iter("second")))

    assert program.run(stream=True).text() == "Q:ab"
    assert seen == ["ab", "Q:ab", "xyz"]


def test_several_answers_cannot_be_streamed(streaming):
    @sgl.function
    def program(s):
        s += sgl.gen("x", n=2)

    with pytest.raises(ValueError, match="n: a streamed program has one answer"):
        list(program.run(stream=True).text_iter())
