"""POST /generate: text or token ids in, cumulative text and counts out."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import orjson

from sglang.bench.clients.http import HttpAsker
from sglang.bench.options import BenchOptions
from sglang.bench.records import Answer
from sglang.bench.workload import TokenIds, Turn

_COMPLETION_TOKENS = b'"completion_tokens":'
_INTEGER = re.compile(rb"\s*(\d+)")


class NativeClient:
    def __init__(self, asker: HttpAsker, options: BenchOptions) -> None:
        self._asker = asker
        self._stream = options.stream
        self._logprobs = {} if options.logprobs is None else options.logprobs.as_body()
        self._sampling = {
            "temperature": options.temperature,
            "top_p": options.top_p,
            "ignore_eos": options.ignore_eos,
        }

    def open_dialogue(self) -> NativeDialogue:
        return NativeDialogue(self)

    async def generate(self, prompt: str | TokenIds, turn: Turn) -> Answer:
        body: dict[str, Any] = {
            "text" if isinstance(prompt, str) else "input_ids": prompt,
            "sampling_params": {**self._sampling, "max_new_tokens": turn.max_tokens},
            "stream": self._stream,
            **self._logprobs,
        }
        return await self._asker.ask("/generate", body, NativeReader(), turn)


class NativeDialogue:
    """The history grows in the form of its prompts: text by text, token ids by token ids, so
    that with ids the next prompt begins with exactly the tokens the server has cached."""

    def __init__(self, client: NativeClient) -> None:
        self._client = client
        self._text = ""
        self._ids: list[TokenIds] = []

    async def ask(self, turn: Turn) -> Answer:
        if isinstance(turn.prompt, str):
            self._text += turn.prompt
            answer = await self._client.generate(self._text, turn)
            self._text += answer.text
            return answer
        assert isinstance(turn.prompt, np.ndarray), "messages are for the chat backends"
        self._ids.append(turn.prompt)
        answer = await self._client.generate(np.concatenate(self._ids), turn)
        if answer.output_ids is not None:
            self._ids.append(np.asarray(answer.output_ids, dtype=np.int32))
        elif not answer.error:
            answer.error = "/generate returned no output_ids, so the conversation cannot go on"
        return answer


class NativeReader:
    """Reads streams whose text is cumulative (the default) and those that send deltas.

    A cumulative payload grows with the answer, so parsing each would cost a client of hundreds
    of streams most of its time. Once the second payload has shown which kind this is, only the
    token count is picked out of a cumulative payload, and the last one is parsed in full.
    """

    def __init__(self) -> None:
        self.tokens_seen = 0
        self.error = ""
        self._last: dict[str, Any] | bytes | None = None
        self._cumulative: bool | None = None  # None: not known yet
        self._text = ""
        self._ids: list[int] | None = None

    def event(self, payload: bytes) -> None:
        if self._cumulative:
            tokens = scan_completion_tokens(payload)
            if tokens is not None:
                self.tokens_seen = tokens
                self._last = payload
                return
        self._take(orjson.loads(payload))

    def whole(self, payload: bytes) -> None:
        self._take(orjson.loads(payload))

    def fill(self, answer: Answer) -> None:
        if isinstance(self._last, bytes):
            self._take(orjson.loads(self._last))
        answer.error = self.error
        if self.error:
            return
        if self._last is None:
            answer.error = "the answer held no payload"
            return
        assert isinstance(self._last, dict)
        meta = self._last["meta_info"]
        answer.prompt_tokens = meta.get("prompt_tokens")
        answer.cached_tokens = meta.get("cached_tokens")
        answer.output_tokens = self.tokens_seen
        answer.text = self._text
        answer.output_ids = self._ids
        reason = meta.get("finish_reason") or {}
        if reason.get("type") == "abort":
            answer.error = f"aborted: {reason.get('message')}"

    def _take(self, data: dict[str, Any]) -> None:
        if "error" in data:
            self.error = error_text(data["error"])
            return
        tokens = data["meta_info"]["completion_tokens"]
        ids = data.get("output_ids")
        if self._cumulative is None and self.tokens_seen > 0:
            self._cumulative = ids is None or len(ids) == tokens
        text = data.get("text") or ""
        if self._cumulative is False:
            self._text += text
            self._ids = (self._ids or []) + (ids or [])
        else:
            self._text, self._ids = text, ids
        self.tokens_seen = tokens
        self._last = data


def scan_completion_tokens(payload: bytes) -> int | None:
    """meta_info.completion_tokens without parsing the JSON; None if it is not there.

    Generated text cannot imitate the key: a quote inside a JSON string is always escaped.
    """
    at = payload.rfind(_COMPLETION_TOKENS)
    if at < 0:
        return None
    number = _INTEGER.match(payload, at + len(_COMPLETION_TOKENS))
    return int(number[1]) if number else None


def error_text(error: object) -> str:
    """The message of an error object of any of the server's shapes."""
    message = error.get("message") if isinstance(error, dict) else error
    return f"server error: {message}"
