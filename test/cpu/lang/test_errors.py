"""Whatever goes wrong reaches whoever runs or reads the program, and nothing hangs."""

from __future__ import annotations

import asyncio
import threading

import pytest

import sglang as sgl
from sglang.lang.backend.base_backend import BaseBackend
from sglang.lang.errors import BackendError


@sgl.function
def two_steps(s, topic="cats"):
    s += topic + sgl.gen("first")
    s += "," + sgl.gen("second")


def failing_second(say):
    """The second generation of a program is refused."""

    def script(body):
        if "," in body["text"]:
            raise say.Refusal(503, {"object": "error", "message": "queue full", "code": 503})
        return say.stream(" pur", "r") if body.get("stream") else say.answer(" purr")

    return script


def test_run_raises_what_the_server_refused(server, say):
    server.script = failing_second(say)
    with pytest.raises(BackendError, match=r"POST http.*/generate: HTTP 503: queue full"):
        two_steps.run()


@pytest.mark.parametrize(
    "body",
    [{"error": {"message": "bad regex"}}, {"error": "bad regex"}, {"detail": "bad regex"}],
)
def test_all_forms_of_a_server_s_errors_are_read(server, say, body):
    def script(_):
        raise say.Refusal(400, body)

    server.script = script
    with pytest.raises(BackendError, match=r"HTTP 400: bad regex$"):
        two_steps.run()


def test_an_aborted_generation_is_an_error(server, say):
    reason = {"type": "abort", "message": "the server is shutting down", "status_code": 503}
    server.script = lambda body: say.answer("half", finish_reason=reason)
    with pytest.raises(BackendError, match="shutting down"):
        two_steps.run()


def test_what_was_generated_before_the_error_can_still_be_read(server, say):
    seen = {}

    @sgl.function
    def program(s):
        s += "cats" + sgl.gen("first")
        s += "," + sgl.gen("second")
        s.sync()
        seen["first"] = s["first"]
        s["second"]

    server.script = failing_second(say)
    with pytest.raises(BackendError):
        program.run()
    assert seen == {"first": " purr"}


def test_a_program_that_handles_its_fork_s_error_goes_on(server, say):
    @sgl.function
    def program(s):
        s += "cats"
        [fork] = s.fork(1)
        fork += "," + sgl.gen("x")
        with pytest.raises(BackendError):
            fork["x"]
        s += sgl.gen("first")

    server.script = failing_second(say)
    assert program.run()["first"] == " purr"


def test_an_error_in_a_fork_that_nobody_asks_about_is_not_lost(server, say):
    @sgl.function
    def program(s):
        s += "cats"
        forks = s.fork(2)
        forks[1] += "," + sgl.gen("x")

    server.script = failing_second(say)
    with pytest.raises(BackendError, match="queue full"):
        program.run()


@pytest.mark.parametrize("mode", ["gather_variable", "concate_and_append"])
def test_a_join_raises_a_fork_s_error(server, say, mode):
    reached = []

    @sgl.function
    def program(s):
        forks = s.fork(2)
        forks += [sgl.gen("ok"), "," + sgl.gen("x")]
        forks.join(mode)
        reached.append("after")

    server.script = failing_second(say)
    with pytest.raises(BackendError, match="queue full"):
        program.run()
    assert reached == []


def test_run_raises_the_program_s_own_error_and_drops_what_is_queued(server, say):
    release = threading.Event()

    @sgl.function
    def program(s):
        for i in range(5):
            s += f"{i}" + sgl.gen(f"x{i}")
        raise LookupError("no such tool")

    def script(body):
        release.wait(say.LIMIT_S)
        return say.answer("ok")

    server.script = script
    with pytest.raises(LookupError, match="no such tool"):
        program.run()
    release.set()
    for worker in threading.enumerate():
        if worker.name == "sgl-state":
            worker.join(say.LIMIT_S)
    assert len(server.bodies) <= 1


def test_nested_roles_are_refused(server):
    @sgl.function
    def program(s):
        s += sgl.user_begin() + "hi" + sgl.assistant("no")

    with pytest.raises(RuntimeError, match="nested roles: assistant begins inside user"):
        program.run()


def test_streaming_yields_what_there_was_and_then_raises(server, say):
    server.script = failing_second(say)
    state = two_steps.run(stream=True)
    seen = []
    with pytest.raises(BackendError, match="queue full"):
        seen.extend(state.text_iter())
    assert "".join(seen) == "cats purr,"
    assert isinstance(state.error(), BackendError)
    with pytest.raises(BackendError):
        state.text()


def test_streaming_one_variable_raises_only_if_it_was_cut_short(server, say):
    server.script = failing_second(say)
    state = two_steps.run(stream=True)
    assert "".join(state.text_iter("first")) == " purr"
    with pytest.raises(BackendError):
        list(state.text_iter("second"))
    with pytest.raises(BackendError):
        state["second"]


def test_async_streaming_raises_too(server, say):
    server.script = failing_second(say)

    async def read():
        return [piece async for piece in two_steps.run(stream=True).text_async_iter()]

    with pytest.raises(BackendError, match="queue full"):
        asyncio.run(asyncio.wait_for(read(), say.LIMIT_S))


def test_a_streaming_program_s_own_error_reaches_the_reader(server, say):
    @sgl.function
    def program(s):
        s += "a"
        raise LookupError("no such tool")

    state = program.run(stream=True)
    with pytest.raises(LookupError):
        list(state.text_iter())
    with pytest.raises(LookupError):
        state.messages()


@pytest.mark.parametrize(
    ("events", "problem"),
    [
        ([{"error": {"message": "too long", "code": 400}}, "[DONE]"], "too long"),
        (["{broken"], "POST"),
        ([], "broke off"),
        ([{"text": "b", "meta_info": {}}, "[DONE]"], "--incremental-streaming-output"),
    ],
)
def test_a_broken_stream_is_an_error(server, say, events, problem):
    server.script = lambda body: [say.answer("a"), *events]
    state = two_steps.run(stream=True)
    seen = []
    with pytest.raises(BackendError, match=problem):
        seen.extend(state.text_iter("first"))
    assert seen == ["a"]


def test_an_abort_while_streaming_is_an_error(server, say):
    reason = {"type": "abort", "message": "retracted"}
    server.script = lambda body: [say.answer("", finish_reason=reason), "[DONE]"]
    with pytest.raises(BackendError, match="retracted"):
        list(two_steps.run(stream=True).text_iter())


def test_a_batch_raises_the_first_failure_and_starts_no_more(server, say):
    started = []

    def script(body):
        if say.is_prefill(body):
            return say.answer("")
        started.append(body["text"])
        raise say.Refusal(400, {"error": "no"})

    server.script = script
    batch = [{"topic": f"topic {i}"} for i in range(50)]
    with pytest.raises(BackendError, match="HTTP 400: no"):
        two_steps.run_batch(batch, num_threads=2)
    assert 1 <= len(started) <= 6


def test_a_bug_in_a_backend_is_raised_like_any_error():
    class Buggy(BaseBackend):
        def generate(self, s, sampling_params):
            raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError):
        two_steps.run(backend=Buggy())


def test_a_server_that_is_not_there_is_named():
    with pytest.raises(BackendError, match=r"GET http://127.0.0.1:1/get_model_info"):
        sgl.RuntimeEndpoint("http://127.0.0.1:1")


@pytest.mark.parametrize("info", [{}, [], {"error": "x"}])
def test_a_server_that_does_not_say_its_model_is_refused(server, info):
    server.model_info = info
    with pytest.raises(BackendError, match="which model_path it serves"):
        server.endpoint()


def test_silence_beyond_the_limit_is_an_error(server, say):
    release = threading.Event()

    def script(body):
        release.wait(say.LIMIT_S)
        return say.answer("late")

    server.script = script
    impatient = sgl.RuntimeEndpoint(server.url, answer_limit_s=0.05)
    with pytest.raises(BackendError, match="timed out"):
        two_steps.run(backend=impatient)
    release.set()
    impatient.shutdown()
