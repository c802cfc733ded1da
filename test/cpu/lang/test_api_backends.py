"""Programs on commercial APIs, through their official clients, and on litellm."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import sglang as sgl
from sglang.lang.errors import BackendError, NotServed

CHAT, COMPLETIONS, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/messages"
USAGE = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}


def chat_answer(*texts: str) -> dict[str, Any]:
    return {
        "id": "c1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [
            {
                "index": i,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": text},
            }
            for i, text in enumerate(texts)
        ],
        "usage": USAGE,
    }


def text_answer(text: str) -> dict[str, Any]:
    choice = {"index": 0, "finish_reason": "stop", "text": text, "logprobs": None}
    return {
        "id": "t1",
        "object": "text_completion",
        "created": 1,
        "model": "m",
        "choices": [choice],
        "usage": USAGE,
    }


def messages_answer(text: str) -> dict[str, Any]:
    return {
        "id": "m1",
        "type": "message",
        "role": "assistant",
        "model": "claude",
        "content": [{"type": "text", "text": text}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {"input_tokens": 5, "output_tokens": 2},
    }


@pytest.fixture
def openai(server):
    made = []

    def make(model: str = "gpt-4o", **options: Any) -> sgl.OpenAI:
        client = {"base_url": f"{server.url}/v1", "api_key": "k", "max_retries": 0, "timeout": 20}
        made.append(sgl.OpenAI(model, **client, **options))
        sgl.set_default_backend(made[-1])
        return made[-1]

    yield make
    for backend in made:
        backend.shutdown()


@pytest.fixture
def claude(server):
    backend = sgl.Anthropic("claude-3", base_url=server.url, api_key="k", max_retries=0, timeout=20)
    sgl.set_default_backend(backend)
    yield backend
    backend.shutdown()


@sgl.function
def chat(s):
    s += sgl.system("Be brief.")
    s += sgl.user("Hi")
    s += sgl.assistant(sgl.gen("one", max_tokens=9, stop=["\n"]))
    s += sgl.user("Bye")
    s += sgl.assistant(sgl.gen("two", temperature=0))


def test_a_chat_api_gets_the_messages(server, openai):
    backend = openai()
    answers = iter([chat_answer("Hello!"), chat_answer("Goodbye.")])
    server.other[CHAT] = lambda body: next(answers)
    state = chat.run(frequency_penalty=0.5)
    shared = {"model": "gpt-4o", "n": 1, "top_p": 1.0, "presence_penalty": 0.0}
    opening = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert server.bodies == [
        {
            **shared,
            "messages": opening,
            "max_tokens": 9,
            "temperature": 1.0,
            "stop": ["\n"],
            "frequency_penalty": 0.5,
        },
        {
            **shared,
            "messages": [
                *opening,
                {"role": "assistant", "content": "Hello!"},
                {"role": "user", "content": "Bye"},
            ],
            "max_tokens": 128,
            "temperature": 0,
            "frequency_penalty": 0.5,
        },
    ]
    assert state["one"] == "Hello!" and state["two"] == "Goodbye."
    assert (backend.token_usage.prompt_tokens, backend.token_usage.completion_tokens) == (10, 4)


def test_a_program_without_roles_is_one_user_message(server, openai):
    openai()

    @sgl.function
    def program(s):
        s += "1+1=" + sgl.gen("x", n=2)

    server.other[CHAT] = lambda body: chat_answer("2", "two")
    assert program.run()["x"] == ["2", "two"]
    assert server.bodies[0]["messages"] == [{"role": "user", "content": "1+1="}]


def test_reasoning_models_are_limited_in_another_field(server, openai):
    openai("o3-mini")
    server.other[CHAT] = lambda body: chat_answer("ok")
    chat.run()
    assert server.bodies[0]["max_completion_tokens"] == 9
    assert "max_tokens" not in server.bodies[0]


def test_a_completion_api_gets_the_text(server, openai):
    openai("gpt-3.5-turbo-instruct")

    @sgl.function
    def program(s):
        s += "1+1=" + sgl.gen("x") + " name:" + sgl.gen_string("s", max_tokens=4)

    answers = iter([text_answer("2"), text_answer("Ann")])
    server.other[COMPLETIONS] = lambda body: next(answers)
    state = program.run()
    assert [body["prompt"] for body in server.bodies] == ["1+1=", '1+1=2 name:"']
    assert server.bodies[1]["stop"] == ['"']
    assert state["s"] == '"Ann"' and state.text() == '1+1=2 name:"Ann"'


def test_a_schema_becomes_the_chat_api_s_response_format(server, openai):
    openai()

    @sgl.function
    def program(s):
        s += sgl.user("?") + sgl.assistant(sgl.gen("x", json_schema='{"type": "object"}'))

    server.other[CHAT] = lambda body: chat_answer("{}")
    program.run()
    assert server.bodies[0]["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": {"type": "object"}},
    }


def test_chat_streams(server, openai):
    backend = openai()

    def chunk(delta: dict[str, Any], **more: Any) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": None}
        head = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
        return {**head, "choices": [choice], **more}

    server.other[CHAT] = lambda body: [
        chunk({"role": "assistant", "content": ""}),
        chunk({"content": "Hel"}),
        chunk({"content": "lo"}),
        chunk({}, choices=[], usage=USAGE),
        "[DONE]",
    ]
    state = chat.run(stream=True)
    assert "".join(state.text_iter("one")) == "Hello"
    assert state["two"] == "Hello" and backend.token_usage.completion_tokens == 4


@pytest.mark.parametrize(
    ("gen", "problem"),
    [
        (sgl.gen("x", top_k=5), "top_k: the OpenAI backend"),
        (sgl.gen("x", regex="a"), "regex: the OpenAI backend"),
        (sgl.gen("x", min_tokens=1), "min_tokens: the OpenAI backend"),
        (sgl.gen_int("x"), "dtype: the OpenAI backend"),
        (sgl.gen("x", return_logprob=True), "return_logprob: the OpenAI backend"),
        ("So: " + sgl.gen("x"), "num_api_spec_tokens"),
    ],
)
def test_what_a_chat_api_cannot_do_is_refused(server, openai, gen, problem):
    openai()

    @sgl.function
    def program(s):
        s += sgl.user("?") + sgl.assistant(gen)

    with pytest.raises(ValueError, match=problem):
        program.run()
    assert server.bodies == []


def test_select_on_an_api_is_refused(server, openai):
    openai()

    @sgl.function
    def program(s):
        s += sgl.user("?") + sgl.assistant(sgl.select("x", ["a", "b"]))

    with pytest.raises(NotServed, match="select: OpenAI"):
        program.run()


def test_an_api_s_error_is_a_backend_error(server, openai, say):
    openai()

    def refuse(body):
        raise say.Refusal(429, {"error": {"message": "slow down", "type": "rate_limit"}})

    server.other[CHAT] = refuse
    with pytest.raises(BackendError, match=r"gpt-4o: .*slow down"):
        chat.run()


def test_one_call_generates_a_whole_role_and_its_blanks_are_read_off(server, openai):
    openai()

    @sgl.function(num_api_spec_tokens=64)
    def program(s):
        s += sgl.user("Describe a cat.")
        s += sgl.assistant(
            "Name: " + sgl.gen("name", stop="\n") + "\nAge: " + sgl.gen("age", stop=" ")
        )

    answers = iter([chat_answer("A cat called Tom"), chat_answer("Name: Tom\nAge: 3 years")])
    server.other[CHAT] = lambda body: next(answers)
    state = program.run()
    assert state["name"] == "Tom" and state["age"] == "3"
    assert state.messages()[-1]["content"] == "Name: Tom\nAge: 3"
    assert len(server.bodies) == 2  # the first answer did not follow the pattern
    assert server.bodies[0]["max_tokens"] == 64 and "stop" not in server.bodies[0]


def test_answers_that_never_follow_the_pattern_are_an_error(server, openai):
    openai()

    @sgl.function(num_api_spec_tokens=64)
    def program(s):
        s += sgl.user("?") + sgl.assistant("Name: " + sgl.gen("name"))

    server.other[CHAT] = lambda body: chat_answer("no")
    with pytest.raises(BackendError, match="5 answers without the role's own text"):
        program.run()
    assert len(server.bodies) == 5


def test_a_blank_cannot_be_read_before_its_role_ends(server, openai):
    openai()

    @sgl.function(num_api_spec_tokens=64)
    def program(s):
        s += sgl.user("?") + sgl.assistant_begin() + sgl.gen("name")
        s["name"]

    with pytest.raises(RuntimeError, match="name is not known before its role ends"):
        program.run()


def test_text_generated_ahead_serves_the_next_gen_without_a_call(server, openai):
    openai("gpt-3.5-turbo-instruct")

    @sgl.function(num_api_spec_tokens=64)
    def program(s):
        s += "Name:" + sgl.gen("name", stop="\n") + "\nAge:" + sgl.gen("age", stop="\n")
        s += "\nHome:" + sgl.gen("home", stop="\n")

    answers = iter([text_answer(" Tom\nAge: 3\nCity: Rome\n"), text_answer(" Oslo\n.")])
    server.other[COMPLETIONS] = lambda body: next(answers)
    state = program.run()
    assert [state[name] for name in ("name", "age", "home")] == [" Tom", " 3", " Oslo"]
    assert [body["prompt"] for body in server.bodies] == [
        "Name:",
        "Name: Tom\nAge: 3\nHome:",
    ]
    assert all(body["max_tokens"] == 128 and "stop" not in body for body in server.bodies)


def test_text_ahead_is_not_used_in_another_role(server, openai):
    openai("gpt-3.5-turbo-instruct")

    @sgl.function(num_api_spec_tokens=64)
    def program(s):
        s += "Hi" + sgl.gen("a", stop="\n")
        s += sgl.user("?") + sgl.assistant(sgl.gen("b", stop="\n"))

    answers = iter([text_answer(" Tom\nold\n"), text_answer("new\n")])
    server.other[COMPLETIONS] = lambda body: next(answers)
    assert program.run()["b"] == "new"
    assert server.bodies[1]["prompt"] == "Hi TomUSER:?\nASSISTANT:"


def test_text_ahead_without_a_stop_is_asked_for_again_with_the_program_s_limit(server, openai):
    openai("gpt-3.5-turbo-instruct")

    @sgl.function(num_api_spec_tokens=64)
    def program(s):
        s += "Name:" + sgl.gen("name", stop="\n", max_tokens=3)

    answers = iter([text_answer(" Tom and so on and on"), text_answer(" Tom and")])
    server.other[COMPLETIONS] = lambda body: next(answers)
    assert program.run()["name"] == " Tom and"
    assert [body["max_tokens"] for body in server.bodies] == [64, 3]
    assert server.bodies[1]["stop"] == ["\n"]


@pytest.mark.parametrize("options", [{"stream": True}, {"n": 2}])
def test_speculation_refuses_what_it_cannot_be_combined_with(server, openai, options):
    openai("gpt-3.5-turbo-instruct")

    @sgl.function(num_api_spec_tokens=64)
    def program(s):
        s += sgl.gen("x", stop="\n")

    with pytest.raises(ValueError, match="num_api_spec_tokens"):
        list(program.run(**options).text_iter())


def test_anthropic_gets_its_system_prompt_apart(server, claude):
    server.other[MESSAGES] = lambda body: messages_answer("Hello!")
    state = chat.run(top_k=3)
    assert server.bodies[0] == {
        "model": "claude-3",
        "max_tokens": 9,
        "system": "Be brief.",
        "messages": [{"role": "user", "content": "Hi"}],
        "stop_sequences": ["\n"],
        "top_k": 3,
    }
    assert server.bodies[1]["temperature"] == 0
    assert state["one"] == "Hello!" and claude.token_usage.prompt_tokens == 10


def test_anthropic_streams(server, claude):
    def piece(text: str) -> tuple[str, Any]:
        delta = {"type": "text_delta", "text": text}
        return "content_block_delta", {"type": "content_block_delta", "index": 0, "delta": delta}

    start = {**messages_answer(""), "content": [], "stop_reason": None}
    block = {
        "type": "content_block_start",
        "index": 0,
        "content_block": {"type": "text", "text": ""},
    }
    end = {"stop_reason": "end_turn", "stop_sequence": None}
    server.other[MESSAGES] = lambda body: [
        ("message_start", {"type": "message_start", "message": start}),
        ("content_block_start", block),
        piece("Hel"),
        piece("lo"),
        ("content_block_stop", {"type": "content_block_stop", "index": 0}),
        ("message_delta", {"type": "message_delta", "delta": end, "usage": {"output_tokens": 2}}),
        ("message_stop", {"type": "message_stop"}),
    ]
    state = chat.run(stream=True)
    assert "".join(state.text_iter("one")) == "Hello"
    assert state.get_meta_info("two")["finish_reason"] == "end_turn"
    assert claude.token_usage.completion_tokens == 4


def test_anthropic_refuses_what_it_has_no_parameter_for(server, claude):
    with pytest.raises(ValueError, match="presence_penalty: the Anthropic backend"):
        chat.run(presence_penalty=1.0)


def test_litellm_is_called_with_messages_and_only_what_was_set(monkeypatch):
    asked = []

    def completion(**arguments: Any) -> Any:
        asked.append(arguments)
        message = SimpleNamespace(content="Hello!")
        return SimpleNamespace(choices=[SimpleNamespace(message=message, finish_reason="stop")])

    module = ModuleType("litellm")
    monkeypatch.setattr(module, "completion", completion, raising=False)
    monkeypatch.setitem(sys.modules, "litellm", module)
    state = chat.run(backend=sgl.LiteLLM("groq/llama", api_key="k", max_retries=2))
    assert state["two"] == "Hello!"
    assert asked[0] == {
        "model": "groq/llama",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        "api_key": "k",
        "timeout": 600,
        "num_retries": 2,
        "max_tokens": 9,
        "stop": ["\n"],
    }
    assert asked[1]["temperature"] == 0


@pytest.mark.parametrize(
    ("make", "package"),
    [
        (lambda: sgl.LiteLLM("m"), "litellm"),
        (lambda: sgl.OpenAI("m"), "openai"),
        (lambda: sgl.Anthropic("m"), "anthropic"),
    ],
)
def test_a_missing_client_library_is_named(monkeypatch, make, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"python -m pip install {package}"):
        make()
