"""BaseBackend: where a program's generations happen. Backends are shared by threads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from sglang.lang.chat_format import ChatTemplate
from sglang.lang.chat_template import get_chat_template
from sglang.lang.choices import ChoicesDecision, ChoicesSamplingMethod
from sglang.lang.errors import NotServed
from sglang.lang.sampling_params import SglSamplingParams

if TYPE_CHECKING:
    from sglang.lang.executor import StreamExecutor

MetaInfo = dict[str, Any]


class BaseBackend:
    """What a backend may do. The default is to do nothing, or to say that it cannot.

    is_chat_model: takes messages, with the roles of an API; otherwise it takes text.
    """

    is_chat_model = False

    def get_model_name(self) -> str:
        raise NotServed(f"{type(self).__name__} does not know its model's name")

    def get_chat_template(self) -> ChatTemplate:
        return get_chat_template("default")

    def cache_prefix(self, prefix_str: str) -> None:
        """Computes a text that requests will begin with, if the backend has a prefix cache."""

    def commit_lazy_operations(self, s: StreamExecutor) -> None:
        """Computes the state's text, if the backend has a prefix cache: forks will share it."""

    def generate(
        self, s: StreamExecutor, sampling_params: SglSamplingParams
    ) -> tuple[str | list[str], MetaInfo | list[MetaInfo]]:
        """The answer to the state's text or messages, and what is known of it; lists if n > 1."""
        raise NotServed(f"{type(self).__name__} cannot generate")

    def generate_stream(
        self, s: StreamExecutor, sampling_params: SglSamplingParams
    ) -> Iterator[tuple[str, MetaInfo]]:
        """The answer piece by piece, with what is known of it so far."""
        raise NotServed(f"{type(self).__name__} cannot stream")

    def select(
        self,
        s: StreamExecutor,
        choices: list[str],
        temperature: float,
        choices_method: ChoicesSamplingMethod,
    ) -> ChoicesDecision:
        raise NotServed(
            f"select: {type(self).__name__} does not give log-probabilities of given text"
        )

    def flush_cache(self) -> bool:
        """Empties the prefix cache; whether there was one and it is empty now."""
        return False

    def get_server_info(self) -> dict[str, Any] | None:
        return None

    def shutdown(self) -> None:
        """Gives up what the backend holds."""
