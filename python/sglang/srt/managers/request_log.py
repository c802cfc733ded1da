"""--log-requests: one line when a call arrives, one when an answer ends."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from sglang.srt.managers.answers import Answer
from sglang.srt.managers.prompts import Prompt

logger = logging.getLogger(__name__)

_EXCERPT_CHARS = 2048


class RequestLog:
    """level: 0 ids and counts, 1 sampling parameters too, 2 the beginning of texts, 3 all."""

    def __init__(self, level: int) -> None:
        self._level = level

    def received(self, rids: Sequence[str], prompts: Sequence[Prompt]) -> None:
        parts = [f"rids={list(rids)}", f"prompts={len(prompts)}"]
        if self._level >= 1:
            parts.append(f"sampling={[prompt.sampling for prompt in prompts]}")
        if self._level >= 2:
            shown = [self._excerpt(p.text or str(p.input_ids)) for p in prompts]
            parts.append(f"input={shown}")
        logger.info("Receive: %s", ", ".join(parts))

    def finished(self, answer: Answer) -> None:
        parts = [
            f"rid={answer.rid}",
            f"finish={answer.finish.type if answer.finish else None}",
            f"prompt_tokens={answer.prompt_tokens}",
            f"cached_tokens={answer.cached_tokens}",
            f"completion_tokens={answer.completion_tokens}",
            f"e2e_latency_s={answer.e2e_latency_s or 0:.3f}",
        ]
        if self._level >= 2:
            parts.append(f"output={self._excerpt(answer.text)!r}")
        logger.info("Finish: %s", ", ".join(parts))

    def _excerpt(self, text: str) -> str:
        return text if self._level >= 3 else text[:_EXCERPT_CHARS]
