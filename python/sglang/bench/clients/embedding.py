"""POST /v1/embeddings: a prompt in, a vector and the prompt's length out."""

from __future__ import annotations

from typing import Any

import orjson

from sglang.bench.clients.http import HttpAsker
from sglang.bench.clients.native import error_text
from sglang.bench.records import Answer
from sglang.bench.workload import Turn


class EmbeddingClient:
    def __init__(self, asker: HttpAsker, model: str) -> None:
        self._asker = asker
        self._model = model

    def open_dialogue(self) -> EmbeddingClient:
        """Nothing is remembered from one prompt to the next."""
        return self

    async def ask(self, turn: Turn) -> Answer:
        body = {"model": self._model, "input": turn.prompt}
        return await self._asker.ask("/v1/embeddings", body, EmbeddingReader(), turn)


class EmbeddingReader:
    """An answer without tokens, which fails unless it holds a vector."""

    def __init__(self) -> None:
        self.tokens_seen = 0
        self.error = ""
        self._usage: dict[str, Any] = {}

    def event(self, payload: bytes) -> None:
        self.error = "an embedding was streamed"

    def whole(self, payload: bytes) -> None:
        data = orjson.loads(payload)
        if data.get("error"):
            self.error = error_text(data["error"])
        elif not data["data"][0]["embedding"]:
            self.error = "the answer holds no embedding"
        else:
            self._usage = data.get("usage") or {}

    def fill(self, answer: Answer) -> None:
        answer.error = self.error
        answer.prompt_tokens = self._usage.get("prompt_tokens")
