"""POST /v1/completions and /v1/chat/completions, and the chunks both stream."""

from __future__ import annotations

from typing import Any

import orjson

from sglang.bench.clients.http import HttpAsker
from sglang.bench.clients.native import error_text
from sglang.bench.options import BenchOptions
from sglang.bench.records import Answer
from sglang.bench.workload import Messages, Turn


def _common_body(options: BenchOptions, model: str) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": model,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "ignore_eos": options.ignore_eos,
        "stream": options.stream,
    }
    if options.stream:
        # Usage on every chunk tells how many tokens it carries; servers that do not know the
        # second option send it once, and each chunk with text then counts as one token.
        body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    return body


class CompletionClient:
    def __init__(self, asker: HttpAsker, options: BenchOptions, model: str) -> None:
        self._asker = asker
        self._body = _common_body(options, model)

    def open_dialogue(self) -> CompletionDialogue:
        return CompletionDialogue(self)

    async def complete(self, prompt: str, turn: Turn) -> Answer:
        body = {**self._body, "prompt": prompt, "max_tokens": turn.max_tokens}
        return await self._asker.ask("/v1/completions", body, OpenAIReader(), turn)


class CompletionDialogue:
    """The history is the text so far."""

    def __init__(self, client: CompletionClient) -> None:
        self._client = client
        self._text = ""

    async def ask(self, turn: Turn) -> Answer:
        assert isinstance(turn.prompt, str), "the OpenAI backends are given text"
        self._text += turn.prompt
        answer = await self._client.complete(self._text, turn)
        self._text += answer.text
        return answer


class ChatClient:
    def __init__(self, asker: HttpAsker, options: BenchOptions, model: str) -> None:
        self._asker = asker
        self._body = _common_body(options, model)

    def open_dialogue(self) -> ChatDialogue:
        return ChatDialogue(self)

    async def chat(self, messages: Messages, turn: Turn) -> Answer:
        body = {**self._body, "messages": messages, "max_tokens": turn.max_tokens}
        return await self._asker.ask("/v1/chat/completions", body, OpenAIReader(), turn)


class ChatDialogue:
    """The history is the list of messages."""

    def __init__(self, client: ChatClient) -> None:
        self._client = client
        self._messages: Messages = []

    async def ask(self, turn: Turn) -> Answer:
        if isinstance(turn.prompt, list):
            self._messages += turn.prompt
        else:
            assert isinstance(turn.prompt, str), "the OpenAI backends are given text"
            self._messages.append({"role": "user", "content": turn.prompt})
        answer = await self._client.chat(self._messages, turn)
        self._messages.append({"role": "assistant", "content": answer.text})
        return answer


class OpenAIReader:
    """Reads completion and chat payloads. Reasoning counts as tokens but not as answer text."""

    def __init__(self) -> None:
        self.tokens_seen = 0
        self.error = ""
        self._pieces: list[str] = []
        self._usage: dict[str, Any] = {}
        self._finish_reason: str | None = None
        self._any_payload = False

    def event(self, payload: bytes) -> None:
        self._take(orjson.loads(payload), "delta")

    def whole(self, payload: bytes) -> None:
        self._take(orjson.loads(payload), "message")

    def fill(self, answer: Answer) -> None:
        answer.error = self.error
        if self.error:
            return
        if not self._any_payload:
            answer.error = "the answer held no payload"
            return
        usage = self._usage
        answer.prompt_tokens = usage.get("prompt_tokens")
        answer.output_tokens = usage.get("completion_tokens", self.tokens_seen)
        details = usage.get("prompt_tokens_details") or {}
        answer.cached_tokens = details.get("cached_tokens")
        answer.text = "".join(self._pieces)
        if self._finish_reason == "abort":
            answer.error = "aborted by the server"

    def _take(self, data: dict[str, Any], message_key: str) -> None:
        if data.get("error"):
            self.error = error_text(data["error"])
            return
        self._any_payload = True
        usage = data.get("usage")
        if usage:
            # Details may come on the last chunk only, or on all but the last.
            self._usage.update({name: value for name, value in usage.items() if value is not None})
        if not data["choices"]:
            return
        choice = data["choices"][0]
        self._finish_reason = choice.get("finish_reason") or self._finish_reason
        message = choice.get(message_key)
        if message is None:
            text, thought = choice.get("text") or "", ""
        else:
            text, thought = message.get("content") or "", message.get("reasoning_content") or ""
        if text:
            self._pieces.append(text)
        if usage:
            self.tokens_seen = usage["completion_tokens"]
        elif text or thought:
            self.tokens_seen += 1
