"""num_api_spec_tokens: fewer calls of an API that has no prefix cache.

One call generates further than a single `gen` asks for. What it says beyond is kept as long as the
program goes on to append the same text, and serves the next `gen` without a call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from sglang.lang.errors import BackendError, NotServed

if TYPE_CHECKING:
    from sglang.lang.backend.base_backend import BaseBackend, MetaInfo
    from sglang.lang.executor import StreamExecutor
    from sglang.lang.sampling_params import SglSamplingParams

ATTEMPTS = 5


class ApiSpeculation(Protocol):
    """What an executor asks while it speculates."""

    def fill(self, s: StreamExecutor, text: str) -> bool:
        """Told of constant text; True if the text is not to be appended before the role ends."""

    def generate(
        self, s: StreamExecutor, name: str | None, params: SglSamplingParams
    ) -> tuple[str | list[str], MetaInfo | list[MetaInfo]] | None:
        """The answer, or None if it will be known when the role ends."""

    def end_role(self, s: StreamExecutor) -> Iterator[tuple[str | None, str, MetaInfo]]:
        """What was put off: (variable or None, text, what is known of it) in order."""

    def refuse_select(self) -> None: ...


def speculation_for(backend: BaseBackend, num_api_spec_tokens: int | None) -> ApiSpeculation | None:
    """Nothing is speculated without `num_api_spec_tokens`."""
    if num_api_spec_tokens is None:
        return None
    if num_api_spec_tokens < 1:
        raise ValueError(f"num_api_spec_tokens: must be at least 1, got {num_api_spec_tokens}")
    if backend.is_chat_model:
        return ChatSpeculation(num_api_spec_tokens)
    return TextSpeculation(num_api_spec_tokens)


class TextSpeculation:
    """For backends that continue text.

    An answer that is cut out of a longer one ends at the first stop string. If none is in there,
    the call is made again as the program asked for it, with its own limit.
    """

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens
        self._ahead = ""
        self._after = ""  # the text that _ahead goes on from
        self._meta_info: MetaInfo = {}

    def fill(self, s: StreamExecutor, text: str) -> bool:
        same = self._ahead.startswith(text) and self._after == s.text_
        self._ahead = self._ahead[len(text) :] if same else ""
        self._after = s.text_ + text
        return False

    def generate(
        self, s: StreamExecutor, name: str | None, params: SglSamplingParams
    ) -> tuple[str | list[str], MetaInfo | list[MetaInfo]] | None:
        _require_plain(s, params)
        if not params.stop:
            self._ahead = ""
            return s.backend.generate(s, params)
        if not self._ahead or self._after != s.text_:
            longer = dataclasses.replace(
                params, stop=(), max_new_tokens=max(params.max_new_tokens, self._num_tokens)
            )
            ahead, meta_info = s.backend.generate(s, longer)
            assert isinstance(ahead, str) and isinstance(meta_info, dict)
            self._ahead, self._meta_info = ahead, meta_info
        end = first_stop(self._ahead, params.stop)
        if end is None:
            self._ahead = ""
            return s.backend.generate(s, params)
        answer, self._ahead = self._ahead[:end], self._ahead[end:]
        self._after = s.text_ + answer
        return answer, self._meta_info

    def end_role(self, s: StreamExecutor) -> Iterator[tuple[str | None, str, MetaInfo]]:
        return iter(())

    def refuse_select(self) -> None:
        """A choice is made by calls of its own."""


@dataclass(frozen=True)
class _Blank:
    """A generation whose text is between two constants of the role."""

    name: str | None
    params: SglSamplingParams


class ChatSpeculation:
    """For chat APIs, which cannot continue a text that has begun.

    What the program puts into the assistant's role, constants and blanks, is collected. When the
    role ends, one call generates all of it, and the blanks are read off. An answer without the
    constants is asked for again, ATTEMPTS times.
    """

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens
        self._parts: list[str | _Blank] = []

    def fill(self, s: StreamExecutor, text: str) -> bool:
        if s.transcript.role != "assistant":
            return False
        self._parts.append(text)
        return True

    def generate(
        self, s: StreamExecutor, name: str | None, params: SglSamplingParams
    ) -> tuple[str | list[str], MetaInfo | list[MetaInfo]] | None:
        _require_plain(s, params)
        if s.transcript.role != "assistant":
            raise ValueError("gen: a chat API generates in the assistant's role only")
        self._parts.append(_Blank(name, params))
        return None

    def end_role(self, s: StreamExecutor) -> Iterator[tuple[str | None, str, MetaInfo]]:
        parts, self._parts = self._parts, []
        blanks = [part for part in parts if isinstance(part, _Blank)]
        if not blanks:
            yield from ((None, part, {}) for part in parts if isinstance(part, str))
            return
        params = dataclasses.replace(blanks[0].params, stop=(), max_new_tokens=self._num_tokens)
        for _ in range(ATTEMPTS):
            answer, meta_info = s.backend.generate(s, params)
            assert isinstance(answer, str) and isinstance(meta_info, dict)
            texts = read_off(parts, answer)
            if texts is not None:
                break
        else:
            raise BackendError(
                f"{ATTEMPTS} answers without the role's own text, such as {answer!r}"
            )
        for part, text in zip(parts, texts, strict=True):
            yield (part.name if isinstance(part, _Blank) else None), text, meta_info

    def refuse_select(self) -> None:
        raise NotServed("select: a chat API gives no log-probabilities of given text")


def read_off(parts: list[str | _Blank], answer: str) -> list[str] | None:
    """The text of each part in an answer that follows the pattern; None if it does not.

    A blank ends at its first stop string or where the next constant begins, whichever is first.
    """
    texts: list[str] = []
    position = 0
    for i, part in enumerate(parts):
        if isinstance(part, str):
            constant = part if i else part.lstrip()  # models begin without white space
            start = answer.find(constant, position)
            if start < 0 or answer[position:start].strip():
                return None
            texts.append(part)
            position = start + len(constant)
        else:
            following = parts[i + 1] if i + 1 < len(parts) else ""
            stops = part.params.stop + ((following,) if isinstance(following, str) else ())
            end = first_stop(answer[position:], stops)
            texts.append(answer[position:] if end is None else answer[position : position + end])
            position += len(texts[-1])
    return texts


def first_stop(text: str, stops: tuple[str, ...]) -> int | None:
    """Where the first of the stop strings begins; empty ones do not count."""
    found = [at for stop in stops if stop and (at := text.find(stop)) >= 0]
    return min(found, default=None)


def _require_plain(s: StreamExecutor, params: SglSamplingParams) -> None:
    if s.stream:
        raise ValueError("num_api_spec_tokens: does not go with stream=True")
    if params.n > 1:
        raise ValueError(f"n: must be 1 with num_api_spec_tokens, got {params.n}")
