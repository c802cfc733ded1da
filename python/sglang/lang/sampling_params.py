"""SglSamplingParams: how one `gen` wants its tokens chosen, whatever the backend."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

# `gen` names two parameters as OpenAI does.
GEN_NAMES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}


@dataclass(frozen=True)
class SglSamplingParams:
    """A program's defaults, or those of one generation after `overridden`.

    The three stop fields are tuples. dtype: int, float, bool or str constrains the answer to a
    literal of that type. The log-prob fields are sent only if they are not None.
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    stop_regex: tuple[str, ...] = ()
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    ignore_eos: bool = False
    return_logprob: bool | None = None
    logprob_start_len: int | None = None
    top_logprobs_num: int | None = None
    return_text_in_logprobs: bool | None = None
    dtype: type | None = None
    regex: str | None = None
    json_schema: str | None = None

    def overridden(self, values: Mapping[str, Any]) -> SglSamplingParams:
        """With these values in place of its own; None changes nothing.

        A stop field takes one string or several. Raises TypeError for a name it does not have.
        """
        given = {name: value for name, value in values.items() if value is not None}
        for name in ("stop", "stop_token_ids", "stop_regex"):
            if name in given:
                given[name] = _several(given[name])
        return dataclasses.replace(self, **given)

    def also_stopping_at(self, stops: Iterable[str]) -> SglSamplingParams:
        """Ends at these strings too."""
        new = [stop for stop in stops if stop not in self.stop]
        return dataclasses.replace(self, stop=(*self.stop, *new)) if new else self

    def require_only(self, served: Collection[str], backend: str) -> None:
        """Raises ValueError naming a parameter that was set although `backend` cannot honour it."""
        for field in dataclasses.fields(self):
            if field.name in served or getattr(self, field.name) == field.default:
                continue
            name = GEN_NAMES.get(field.name, field.name)
            raise ValueError(f"{name}: the {backend} backend has no such parameter")


def _several(value: Any) -> tuple[Any, ...]:
    return (value,) if isinstance(value, str | int) else tuple(value)
