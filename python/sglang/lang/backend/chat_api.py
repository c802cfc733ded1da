"""What the backends of commercial APIs share: messages in, and what they cannot do refused."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sglang.lang.chat_format import Message

if TYPE_CHECKING:
    from sglang.lang.executor import StreamExecutor


@dataclass
class TokenUsage:
    """Tokens that a backend was billed for since it was made, or since `reset`."""

    prompt_tokens: int = 0
    completion_tokens: int = 0

    def add(self, prompt_tokens: int | None, completion_tokens: int | None) -> None:
        self.prompt_tokens += prompt_tokens or 0
        self.completion_tokens += completion_tokens or 0

    def reset(self) -> None:
        self.prompt_tokens = self.completion_tokens = 0


def client_library(name: str) -> Any:
    """The module of this name; ImportError says what to install."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"this backend needs the package {name}: python -m pip install {name}"
        ) from error


def conversation(s: StreamExecutor) -> list[Message]:
    """The messages that a chat API is to answer. A program without roles is one user message.

    ValueError where the API could not go on from: it cannot continue a message that has begun.
    """
    transcript = s.transcript
    if transcript.role is None and not transcript.messages:
        return [{"role": "user", "content": transcript.text}]
    if transcript.role != "assistant":
        raise ValueError(
            "gen: a chat API answers in the assistant's role only: s += sgl.assistant(sgl.gen(...))"
        )
    if transcript.role_text:
        raise ValueError(
            "gen: a chat API cannot go on from text in the assistant's role; put the gen first, or "
            "let one call generate the whole role: @sgl.function(num_api_spec_tokens=128)"
        )
    return list(transcript.messages)
