"""Anthropic: programs on Anthropic's API, through the official client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from sglang.lang.backend.base_backend import BaseBackend, MetaInfo
from sglang.lang.backend.chat_api import TokenUsage, client_library, conversation
from sglang.lang.chat_format import ChatTemplate
from sglang.lang.chat_template import get_chat_template
from sglang.lang.errors import BackendError
from sglang.lang.sampling_params import SglSamplingParams

if TYPE_CHECKING:
    from sglang.lang.executor import StreamExecutor

_SERVED = ("max_new_tokens", "stop", "temperature", "top_p", "top_k")


class Anthropic(BaseBackend):
    """The arguments after the model's name are those of the client."""

    is_chat_model = True

    def __init__(self, model_name: str, *args: Any, **kwargs: Any) -> None:
        self.client = client_library("anthropic").Anthropic(*args, **kwargs)
        self.model_name = model_name
        self.chat_template = get_chat_template("claude")
        self.token_usage = TokenUsage()

    def get_model_name(self) -> str:
        return self.model_name

    def get_chat_template(self) -> ChatTemplate:
        return self.chat_template

    def shutdown(self) -> None:
        self.client.close()

    def generate(
        self, s: StreamExecutor, sampling_params: SglSamplingParams
    ) -> tuple[str | list[str], MetaInfo | list[MetaInfo]]:
        request = self._request(s, sampling_params)
        try:
            answer = self.client.messages.create(**request)
        except client_library("anthropic").APIError as error:
            raise BackendError(f"{self.model_name}: {error}") from error
        self.token_usage.add(answer.usage.input_tokens, answer.usage.output_tokens)
        text = "".join(block.text for block in answer.content if block.type == "text")
        return text, {"finish_reason": answer.stop_reason, "id": answer.id}

    def generate_stream(
        self, s: StreamExecutor, sampling_params: SglSamplingParams
    ) -> Iterator[tuple[str, MetaInfo]]:
        request = self._request(s, sampling_params)
        try:
            with self.client.messages.stream(**request) as stream:
                for text in stream.text_stream:
                    yield text, {}
                final = stream.get_final_message()
        except client_library("anthropic").APIError as error:
            raise BackendError(f"{self.model_name}: {error}") from error
        self.token_usage.add(final.usage.input_tokens, final.usage.output_tokens)
        yield "", {"finish_reason": final.stop_reason, "id": final.id}

    def _request(self, s: StreamExecutor, params: SglSamplingParams) -> dict[str, Any]:
        """The arguments of the client's call. ValueError for what the API cannot do.

        The API wants its system prompt apart from the messages, and refuses temperature and top_p
        together: what is at its default is left out.
        """
        params.require_only(_SERVED, "Anthropic")
        messages = conversation(s)
        request: dict[str, Any] = {
            "model": self.model_name,
            "max_tokens": params.max_new_tokens,
            "messages": [message for message in messages if message["role"] != "system"],
        }
        system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
        if system:
            request["system"] = system
        if params.stop:
            request["stop_sequences"] = list(params.stop)
        changed = {
            name: getattr(params, name)
            for name in ("temperature", "top_p", "top_k")
            if getattr(params, name) != getattr(SglSamplingParams, name)
        }
        if changed:  # newer clients have no arguments for them, but older models the fields
            request["extra_body"] = changed
        return request
