"""What OpenAI's own client sees of the chat and completion endpoints."""

from __future__ import annotations

import json
from collections.abc import Iterator
from math import exp
from typing import Any

import openai
import pytest

from sglang.srt.messages import FinishReason

TEXT = "Hello there, General Kenobi!"
HI: Any = [{"role": "user", "content": "Hi"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
NOW: Any = {"type": "function", "function": {"name": "now"}}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
NOW_CALL = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
LIMIT_S = 20.0


@pytest.fixture
def engine(parsing_server: Any) -> Any:
    parsing_server.engine.says(TEXT)
    parsing_server.engine.scheduler.received.clear()
    return parsing_server.engine


@pytest.fixture
def client(parsing_server: Any, engine: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{parsing_server.url}/v1", api_key="none", timeout=LIMIT_S, max_retries=0
    ) as client:
        yield client


def prompt_of(engine: Any) -> str:
    text: str = engine.tokenizer.decode(engine.last_request.input_ids)
    return text


def chat(client: openai.OpenAI, **fields: Any) -> Any:
    return client.chat.completions.create(**{"model": "smollm2", "messages": HI, **fields})


def streamed(client: openai.OpenAI, **fields: Any) -> Any:
    """The completion that the client puts together from a stream."""
    with client.chat.completions.stream(**{"model": "smollm2", "messages": HI, **fields}) as stream:
        return stream.get_final_completion()


ASK = {"whole": chat, "streamed": streamed}


@pytest.fixture(params=sorted(ASK))
def ask(request: pytest.FixtureRequest) -> Any:
    return ASK[request.param]


class TestTools:
    def test_a_call_is_read_out_of_the_text(
        self, client: openai.OpenAI, engine: Any, ask: Any
    ) -> None:
        engine.says(f"One moment.\n{CALL}")
        [choice] = ask(client, tools=[WEATHER, NOW]).choices
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content == "One moment."
        [call] = choice.message.tool_calls
        assert call.type == "function"
        assert call.id.startswith("call_")
        assert call.function.name == "get_weather"
        assert json.loads(call.function.arguments) == {"city": "Paris"}
        assert '"name": "get_weather"' in prompt_of(engine)

    def test_several_calls(self, client: openai.OpenAI, engine: Any, ask: Any) -> None:
        engine.says(f"{CALL}\n{NOW_CALL}")
        [choice] = ask(client, tools=[WEATHER, NOW]).choices
        calls = choice.message.tool_calls
        assert [call.function.name for call in calls] == ["get_weather", "now"]
        assert len({call.id for call in calls}) == 2
        assert not choice.message.content

    def test_a_model_need_not_call(self, client: openai.OpenAI, ask: Any) -> None:
        [choice] = ask(client, tools=[WEATHER]).choices
        assert (choice.message.content, choice.finish_reason) == (TEXT, "stop")
        assert not choice.message.tool_calls

    def test_with_choice_none_no_tool_is_told_of_or_looked_for(
        self, client: openai.OpenAI, engine: Any
    ) -> None:
        engine.says(CALL)
        [choice] = chat(client, tools=[WEATHER], tool_choice="none").choices
        assert (choice.message.content, choice.message.tool_calls) == (CALL, None)
        assert "get_weather" not in prompt_of(engine)

    def test_a_call_that_is_cut_off_ends_by_length(
        self, client: openai.OpenAI, engine: Any
    ) -> None:
        engine.says(CALL[:60], FinishReason(type="length", length=12))
        [choice] = chat(client, tools=[WEATHER]).choices
        assert choice.finish_reason == "length"
        assert choice.message.tool_calls[0].function.arguments == '{"city": "P'

    def test_deltas_name_the_tool_first_and_then_its_arguments(
        self, client: openai.OpenAI, engine: Any
    ) -> None:
        engine.says(CALL)
        engine.scheduler.token_interval_s = 0.002  # so that they do not come all at once
        try:
            chunks = list(chat(client, tools=[WEATHER], stream=True))
        finally:
            engine.scheduler.token_interval_s = 0.0
        deltas = [c for chunk in chunks for c in chunk.choices[0].delta.tool_calls or ()]
        assert deltas[0].function.name == "get_weather"
        assert deltas[0].id
        assert all(d.function.name is None and d.id is None for d in deltas[1:])
        assert len(deltas) > 2
        assert "".join(d.function.arguments for d in deltas) == '{"city": "Paris"}'

    def test_history_reaches_the_template(self, client: openai.OpenAI, engine: Any) -> None:
        function = {"name": "get_weather", "arguments": '{"city": "Paris"}'}
        history = [
            *HI,
            {
                "role": "assistant",
                "content": None,
                "reasoning_content": "Hm.",
                "tool_calls": [{"id": "c1", "type": "function", "function": function}],
            },
            {"role": "tool", "tool_call_id": "c1", "content": "Rain."},
        ]
        chat(client, messages=history, tools=[WEATHER])
        prompt = prompt_of(engine)
        assert '[assistant](Hm.)<call c1 get_weather {"city": "Paris"}>' in prompt
        assert "[tool c1]Rain." in prompt

    def test_special_marks_are_kept_where_a_parser_needs_them(
        self, serve: Any, plain_template: str
    ) -> None:
        with serve(template=plain_template, tool_call_parser="mistral") as served:
            served.engine.says('[TOOL_CALLS][{"name": "now", "arguments": {}}]')
            body = {"messages": HI, "tools": [NOW]}
            got = served.client.post("/v1/chat/completions", json=body).json()
            assert served.engine.last_request.sampling.skip_special_tokens is False
            assert got["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "now"


class TestReasoning:
    THOUGHT = f"<think>\nHm, hm.\n</think>\n\n{TEXT}"

    def test_thoughts_are_apart(self, client: openai.OpenAI, engine: Any, ask: Any) -> None:
        engine.says(self.THOUGHT)
        [choice] = ask(client).choices
        assert choice.message.content == TEXT
        assert choice.message.reasoning_content == "Hm, hm."

    def test_they_are_counted(self, client: openai.OpenAI, engine: Any) -> None:
        engine.says(self.THOUGHT)
        usage = chat(client).usage
        answer = len(engine.tokenizer(TEXT)["input_ids"])
        count = usage.completion_tokens_details.reasoning_tokens
        assert usage.reasoning_tokens == count
        assert 0 < count < usage.completion_tokens - answer

    def test_together_if_asked(self, client: openai.OpenAI, engine: Any) -> None:
        engine.says(self.THOUGHT)
        [choice] = chat(client, extra_body={"separate_reasoning": False}).choices
        assert choice.message.content == self.THOUGHT

    def test_whole_thoughts_if_asked(self, client: openai.OpenAI, engine: Any) -> None:
        engine.says(self.THOUGHT)
        engine.scheduler.token_interval_s = 0.002
        try:
            chunks = list(chat(client, stream=True, extra_body={"stream_reasoning": False}))
        finally:
            engine.scheduler.token_interval_s = 0.0
        deltas = [getattr(c.choices[0].delta, "reasoning_content", None) for c in chunks]
        assert [text for text in deltas if text] == ["Hm, hm."]

    def test_effort_none_tells_the_template_not_to_think(
        self, client: openai.OpenAI, engine: Any
    ) -> None:
        chat(client, reasoning_effort="none")
        assert prompt_of(engine).endswith("[assistant]<think></think>effort=none")

    def test_kwargs_reach_the_template(self, client: openai.OpenAI, engine: Any) -> None:
        kwargs = {"enable_thinking": False, "reasoning_effort": "mine"}
        chat(client, reasoning_effort="low", extra_body={"chat_template_kwargs": kwargs})
        assert prompt_of(engine).endswith("<think></think>effort=mine")


class TestChatExtras:
    def test_input_ids_bypass_the_template(self, client: openai.OpenAI, engine: Any) -> None:
        chat(client, extra_body={"input_ids": [5, 6, 7]})
        assert engine.last_request.input_ids.tolist() == [5, 6, 7]

    def test_developer_messages_reach_templates_that_know_none(
        self, client: openai.OpenAI, engine: Any
    ) -> None:
        chat(client, messages=[{"role": "developer", "content": "Be brief."}, *HI])
        assert "[system]Be brief." in prompt_of(engine)

    def test_token_ids_and_meta_info(self, client: openai.OpenAI, engine: Any) -> None:
        wants = {
            "return_token_ids": True,
            "return_prompt_token_ids": True,
            "return_meta_info": True,
        }
        [choice] = chat(client, extra_body=wants).choices
        assert choice.prompt_token_ids == engine.last_request.input_ids.tolist()
        assert engine.tokenizer.decode(choice.token_ids, skip_special_tokens=True) == TEXT
        assert choice.meta_info["finish_reason"]["type"] == "stop"
        chunks = list(chat(client, stream=True, extra_body=wants))
        ids = [i for chunk in chunks for i in getattr(chunk.choices[0], "token_ids", None) or ()]
        assert ids == choice.token_ids

    def test_usage_tells_of_the_cache(self, client: openai.OpenAI) -> None:
        assert chat(client).usage.prompt_tokens_details.cached_tokens == 0

    def test_both_usages_of_a_stream(self, client: openai.OpenAI) -> None:
        options = {"include_usage": True, "continuous_usage_stats": True}
        *chunks, last = list(chat(client, stream=True, stream_options=options))
        assert last.choices == []
        counts = [chunk.usage.completion_tokens for chunk in chunks]
        assert counts == sorted(counts)
        assert counts[-1] == last.usage.completion_tokens

    def test_priorities(self, client: openai.OpenAI, serve: Any) -> None:
        with pytest.raises(openai.BadRequestError, match="priority"):
            chat(client, extra_body={"priority": 1})
        with serve(enable_priority_scheduling=True) as served:
            served.engine.says(TEXT)
            for path in ("chat/completions", "completions"):
                body = {"messages": HI} if path.startswith("chat") else {"prompt": "Hi"}
                response = served.client.post(f"/v1/{path}", json={**body, "priority": 3})
                response.raise_for_status()
            ranks = [request.rank for request in served.engine.scheduler.received]
        assert ranks == [-3, -3]

    def test_same_as_invocations(self, parsing_server: Any, engine: Any) -> None:
        got = parsing_server.client.post("/invocations", json={"messages": HI}).json()
        assert got["choices"][0]["message"]["content"] == TEXT


class TestLogprobs:
    def test_chat(self, client: openai.OpenAI, ask: Any) -> None:
        [choice] = ask(client, logprobs=True, top_logprobs=2).choices
        entries = choice.logprobs.content
        assert "".join(entry.token for entry in entries) == TEXT
        for entry in entries:
            assert bytes(entry.bytes).decode() == entry.token
            assert entry.logprob < 0
            assert len(entry.top_logprobs) == 2

    def test_completion_with_offsets(self, client: openai.OpenAI) -> None:
        got = client.completions.create(model="smollm2", prompt="Hi", logprobs=2, max_tokens=30)
        [choice] = got.choices
        logprobs = choice.logprobs
        assert choice.text == TEXT
        places = list(zip(logprobs.text_offset, logprobs.tokens, strict=True))
        assert all(TEXT[at:].startswith(token) for at, token in places)
        assert "".join(logprobs.tokens) == TEXT
        tops = zip(logprobs.tokens, logprobs.top_logprobs, strict=True)
        assert all(token in top for token, top in tops)

    @pytest.mark.parametrize("stream", [False, True])
    def test_echo_has_those_of_the_prompt(self, client: openai.OpenAI, stream: bool) -> None:
        got: Any = client.completions.create(
            model="smollm2", prompt="One two", logprobs=1, echo=True, stream=stream, max_tokens=30
        )
        choices = [chunk.choices[0] for chunk in got] if stream else [got.choices[0]]
        text = "".join(choice.text for choice in choices)
        parts = [choice.logprobs for choice in choices if choice.logprobs]
        tokens = [token for part in parts for token in part.tokens]
        values = [value for part in parts for value in part.token_logprobs]
        offsets = [offset for part in parts for offset in part.text_offset]
        assert text == "".join(tokens) == "One two" + TEXT
        assert values[0] is None
        assert all(value < 0 for value in values[1:])
        assert all(text[at:].startswith(t) for at, t in zip(offsets, tokens, strict=True))

    def test_scores(self, parsing_server: Any, engine: Any) -> None:
        body: Any = {"query": "Is it? ", "items": ["yes", "no"], "label_token_ids": [3, 1]}
        got = parsing_server.client.post("/v1/score", json=body).json()
        assert got["object"] == "scoring"
        # As scripted: a token's log-probability is -(id + 1) / 8.
        assert got["scores"] == [pytest.approx([exp(-0.5), exp(-0.25)])] * 2
        texts = [engine.tokenizer.decode(r.input_ids) for r in engine.scheduler.received]
        assert texts == ["Is it? yes", "Is it? no"]
        shares = parsing_server.client.post(
            "/v1/score", json={**body, "apply_softmax": True}
        ).json()
        assert sum(shares["scores"][0]) == pytest.approx(1)
        assert shares["scores"][0][0] / shares["scores"][0][1] == pytest.approx(exp(-0.25))


class TestErrors:
    @pytest.mark.parametrize(
        ("field", "fields"),
        [
            ("tool_choice", {"tools": [WEATHER], "tool_choice": {"type": "function"}}),
            ("tool_choice", {"tool_choice": "required"}),
            ("tool_choice", {"tools": [WEATHER], "tool_choice": "sometimes"}),
            (
                "tool_choice",
                {
                    "tools": [WEATHER],
                    "tool_choice": {"type": "function", "function": {"name": "other"}},
                },
            ),
            ("tools\\[0\\].function.name", {"tools": [{"type": "function", "function": {}}]}),
            ("top_logprobs", {"top_logprobs": 2}),
            ("top_logprobs", {"logprobs": True, "top_logprobs": 21}),
            ("response_format.type", {"response_format": {"type": "yaml"}}),
            ("response_format.json_schema", {"response_format": {"type": "json_schema"}}),
            (
                "response_format",
                {"response_format": {"type": "json_object"}, "extra_body": {"regex": "a"}},
            ),
            ("reasoning_effort", {"reasoning_effort": "extreme"}),
        ],
    )
    def test_bad_requests_name_the_field(
        self, client: openai.OpenAI, field: str, fields: dict[str, Any]
    ) -> None:
        with pytest.raises(openai.BadRequestError, match=field) as caught:
            chat(client, **fields)
        assert caught.value.status_code == 400
        assert chat(client).choices[0].message.content == TEXT

    @pytest.mark.parametrize(
        ("field", "fields"),
        [
            ("suffix", {"suffix": "end"}),
            ("best_of", {"best_of": 3, "n": 2}),
            ("logprobs", {"logprobs": -1}),
        ],
    )
    def test_bad_completions(self, client: openai.OpenAI, field: str, fields: Any) -> None:
        with pytest.raises(openai.BadRequestError, match=field):
            client.completions.create(model="smollm2", prompt="Hi", **fields)

    def test_tools_need_a_parser_unless_a_schema_writes_the_calls(self, server: Any) -> None:
        body = {"messages": HI, "tools": [WEATHER]}
        response = server.client.post("/v1/chat/completions", json=body)
        assert response.status_code == 400
        assert "--tool-call-parser" in response.json()["message"]

    def test_embeddings_are_refused(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.BadRequestError, match="embedding"):
            client.embeddings.create(model="smollm2", input="Hi")

    def test_a_wrong_key(self, serve: Any) -> None:
        with serve(api_key="secret") as served:
            url = f"{served.url}/v1"
            with pytest.raises(openai.AuthenticationError):
                chat(openai.OpenAI(base_url=url, api_key="guess", max_retries=0))
            served.engine.says(TEXT)
            [choice] = chat(openai.OpenAI(base_url=url, api_key="secret")).choices
            assert choice.message.content == TEXT

    def test_an_unknown_model(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("other")

    def test_an_adapter(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.BadRequestError, match="adapter"):
            chat(client, model="smollm2:poet")

    def test_a_full_queue(self, client: openai.OpenAI, engine: Any) -> None:
        engine.refuses(FinishReason(type="abort", message="queue full", status_code=503))
        with pytest.raises(openai.InternalServerError, match="queue full") as caught:
            chat(client)
        assert caught.value.status_code == 503


class TestParseText:
    def test_function_calls(self, parsing_server: Any) -> None:
        body = {"text": f"Well. {CALL}", "tools": [WEATHER], "tool_call_parser": "qwen25"}
        got = parsing_server.client.post("/parse_function_call", json=body).json()
        call = {"tool_index": 0, "name": "get_weather", "parameters": '{"city": "Paris"}'}
        assert got == {"normal_text": "Well.", "calls": [call]}

    def test_reasoning(self, parsing_server: Any) -> None:
        body = {"text": "Hm.</think>Yes.", "reasoning_parser": "deepseek-r1"}
        got = parsing_server.client.post("/separate_reasoning", json=body).json()
        assert got == {"reasoning_text": "Hm.", "text": "Yes."}

    @pytest.mark.parametrize(
        ("path", "field"),
        [("/parse_function_call", "tool_call_parser"), ("/separate_reasoning", "reasoning_parser")],
    )
    def test_unknown_parsers_are_named(self, server: Any, path: str, field: str) -> None:
        for extra in ({}, {field: "nonsense"}):
            response = server.client.post(path, json={"text": "a", **extra})
            assert response.status_code == 400
            assert f"{field}: " in response.json()["error"]["message"]
            assert "one of" in response.json()["error"]["message"]

    def test_model_info_names_the_parsers(self, parsing_server: Any) -> None:
        info = parsing_server.client.get("/model_info").json()
        assert (info["tool_call_parser"], info["reasoning_parser"]) == ("hermes", "qwen3")
