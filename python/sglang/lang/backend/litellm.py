"""LiteLLM: programs on any API that the package litellm reaches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from sglang.lang.backend.base_backend import BaseBackend, MetaInfo
from sglang.lang.backend.chat_api import client_library, conversation
from sglang.lang.chat_format import ChatTemplate
from sglang.lang.chat_template import get_chat_template_by_model_path
from sglang.lang.errors import BackendError
from sglang.lang.sampling_params import SglSamplingParams

if TYPE_CHECKING:
    from sglang.lang.executor import StreamExecutor

_OPTIONAL = ("temperature", "top_p", "top_k", "frequency_penalty", "presence_penalty")
_SERVED = ("max_new_tokens", "stop", *_OPTIONAL)


class LiteLLM(BaseBackend):
    """The arguments after chat_template are those of litellm.completion; None leaves one out."""

    is_chat_model = True

    def __init__(
        self,
        model_name: str,
        chat_template: ChatTemplate | None = None,
        api_key: str | None = None,
        organization: str | None = None,
        base_url: str | None = None,
        timeout: float | None = 600,
        max_retries: int | None = None,
        default_headers: dict[str, str] | None = None,
    ) -> None:
        self._litellm = client_library("litellm")
        self.model_name = model_name
        self.chat_template = chat_template or get_chat_template_by_model_path(model_name)
        client = {
            "api_key": api_key,
            "organization": organization,
            "base_url": base_url,
            "timeout": timeout,
            "num_retries": max_retries,
            "extra_headers": default_headers,
        }
        self._client = {name: value for name, value in client.items() if value is not None}

    def get_model_name(self) -> str:
        return self.model_name

    def get_chat_template(self) -> ChatTemplate:
        return self.chat_template

    def generate(
        self, s: StreamExecutor, sampling_params: SglSamplingParams
    ) -> tuple[str | list[str], MetaInfo | list[MetaInfo]]:
        answer = self._complete(s, sampling_params)
        [choice] = answer.choices
        return choice.message.content or "", {"finish_reason": choice.finish_reason}

    def generate_stream(
        self, s: StreamExecutor, sampling_params: SglSamplingParams
    ) -> Iterator[tuple[str, MetaInfo]]:
        for chunk in self._complete(s, sampling_params, stream=True):
            for choice in chunk.choices:
                yield choice.delta.content or "", {"finish_reason": choice.finish_reason}

    def _complete(self, s: StreamExecutor, params: SglSamplingParams, **more: Any) -> Any:
        params.require_only(_SERVED, "LiteLLM")
        sampling: dict[str, Any] = {"max_tokens": params.max_new_tokens}
        if params.stop:
            sampling["stop"] = list(params.stop)
        for name in _OPTIONAL:
            if getattr(params, name) != getattr(SglSamplingParams, name):
                sampling[name] = getattr(params, name)
        messages = conversation(s)
        try:
            return self._litellm.completion(
                model=self.model_name, messages=messages, **self._client, **sampling, **more
            )
        except Exception as error:  # litellm maps the errors of each provider to its own classes
            raise BackendError(f"{self.model_name}: {error}") from error
