"""OpenAI: programs on OpenAI's API, or on a server that speaks it, through the official client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from sglang.lang.backend.base_backend import BaseBackend, MetaInfo
from sglang.lang.backend.chat_api import TokenUsage, client_library, conversation
from sglang.lang.chat_format import ChatTemplate
from sglang.lang.chat_template import get_chat_template_by_model_path
from sglang.lang.errors import BackendError
from sglang.lang.sampling_params import SglSamplingParams

if TYPE_CHECKING:
    from sglang.lang.executor import StreamExecutor

_COMPLETION_MODELS = ("babbage-002", "davinci-002", "gpt-3.5-turbo-instruct")
# They think first, and count their thoughts among the tokens that they may generate.
_REASONING_FAMILIES = ("o1", "o3", "o4", "gpt-5")
_PENALTIES = ("frequency_penalty", "presence_penalty")
_SERVED = ("max_new_tokens", "n", "stop", "temperature", "top_p", *_PENALTIES)


class OpenAI(BaseBackend):
    """is_chat_model: whether messages are sent, or text; by default what the model's name says.
    The other arguments are those of the client. `token_usage` counts what was billed.
    """

    def __init__(
        self,
        model_name: str,
        is_chat_model: bool | None = None,
        chat_template: ChatTemplate | None = None,
        is_azure: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        library = client_library("openai")
        self.client = (library.AzureOpenAI if is_azure else library.OpenAI)(*args, **kwargs)
        self.model_name = model_name
        self.is_chat_model = (
            model_name not in _COMPLETION_MODELS if is_chat_model is None else is_chat_model
        )
        self.chat_template = chat_template or get_chat_template_by_model_path(model_name)
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
        if self._is_quoted(sampling_params):
            return self._generate_string(s, sampling_params)
        answer = self._create(**self._request(s, sampling_params))
        texts = [self._text_of(choice) for choice in answer.choices]
        infos = [
            {"finish_reason": choice.finish_reason, "id": answer.id} for choice in answer.choices
        ]
        if answer.usage is not None:
            self.token_usage.add(answer.usage.prompt_tokens, answer.usage.completion_tokens)
        return (texts, infos) if sampling_params.n > 1 else (texts[0], infos[0])

    def generate_stream(
        self, s: StreamExecutor, sampling_params: SglSamplingParams
    ) -> Iterator[tuple[str, MetaInfo]]:
        if self._is_quoted(sampling_params):
            raise ValueError("dtype: does not go with stream=True on the OpenAI backend")
        request = self._request(s, sampling_params)
        chunks = self._create(**request, stream=True, stream_options={"include_usage": True})
        for chunk in chunks:
            if chunk.usage is not None:
                self.token_usage.add(chunk.usage.prompt_tokens, chunk.usage.completion_tokens)
            for choice in chunk.choices:
                text = choice.delta.content if self.is_chat_model else choice.text
                yield text or "", {"finish_reason": choice.finish_reason, "id": chunk.id}

    def _request(self, s: StreamExecutor, params: SglSamplingParams) -> dict[str, Any]:
        """The arguments of the client's call. ValueError for what the API cannot do."""
        served = (*_SERVED, "json_schema") if self.is_chat_model else _SERVED
        params.require_only(served, "OpenAI")
        request: dict[str, Any] = {
            "model": self.model_name,
            "n": params.n,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "frequency_penalty": params.frequency_penalty,
            "presence_penalty": params.presence_penalty,
            self._limit_name(): params.max_new_tokens,
        }
        if params.stop:
            request["stop"] = list(params.stop)
        if self.is_chat_model:
            request["messages"] = conversation(s)
        else:
            request["prompt"] = s.text_
        if params.json_schema is not None:
            form = {"name": "answer", "schema": json.loads(params.json_schema)}
            request["response_format"] = {"type": "json_schema", "json_schema": form}
        return request

    def _limit_name(self) -> str:
        reasons = self.is_chat_model and self.model_name.startswith(_REASONING_FAMILIES)
        return "max_completion_tokens" if reasons else "max_tokens"

    def _create(self, **request: Any) -> Any:
        calls = self.client.chat.completions if self.is_chat_model else self.client.completions
        try:
            return calls.create(**request)
        except client_library("openai").APIError as error:
            raise BackendError(f"{self.model_name}: {error}") from error

    def _text_of(self, choice: Any) -> str:
        return (choice.message.content if self.is_chat_model else choice.text) or ""

    def _is_quoted(self, params: SglSamplingParams) -> bool:
        """A string literal can be had from an API that continues text: it ends at a quote."""
        return params.dtype is str and not self.is_chat_model

    def _generate_string(
        self, s: StreamExecutor, params: SglSamplingParams
    ) -> tuple[str | list[str], MetaInfo | list[MetaInfo]]:
        quoted = {"dtype": None, "stop": ('"',)}
        request = self._request(s, SglSamplingParams(**{**vars(params), **quoted}))
        answer = self._create(**{**request, "prompt": s.text_ + '"'})
        if answer.usage is not None:
            self.token_usage.add(answer.usage.prompt_tokens, answer.usage.completion_tokens)
        texts = [f'"{choice.text}"' for choice in answer.choices]
        infos = [{"finish_reason": choice.finish_reason} for choice in answer.choices]
        return (texts, infos) if params.n > 1 else (texts[0], infos[0])
