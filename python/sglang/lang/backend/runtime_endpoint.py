"""RuntimeEndpoint: programs on a server, this project's or any that speaks SGLang's /generate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from sglang.global_config import global_config
from sglang.lang.backend.base_backend import BaseBackend, MetaInfo
from sglang.lang.backend.select_scores import logprob_start, mean_logprob, scored_tokens
from sglang.lang.backend.server_connection import ANSWER_LIMIT_S, ServerConnection
from sglang.lang.chat_format import ChatTemplate
from sglang.lang.chat_template import get_chat_template, get_chat_template_by_model_path
from sglang.lang.choices import ChoicesDecision, ChoicesSamplingMethod
from sglang.lang.errors import BackendError, NotServed
from sglang.lang.sampling_params import SglSamplingParams

if TYPE_CHECKING:
    from sglang.lang.executor import StreamExecutor

_INTEGER = r"[-+]?[0-9]+[ \n]*"
_DECIMAL = r"[-+]?[0-9]*\.?[0-9]+[ \n]*"
# Type -> pattern, and strings that end a literal whose pattern alone would let it go on for ever.
_LITERALS: dict[type, tuple[str, tuple[str, ...]]] = {
    int: (_INTEGER, (" ", "\n")),
    float: (_DECIMAL, (" ", "\n")),
    bool: (r"(True|False)", ()),
    str: (r'"[\w\d\s]*"', ()),
}
_PREFILL_ONLY = {"max_new_tokens": 0, "temperature": 0}


class RuntimeEndpoint(BaseBackend):
    """A server at `base_url`; asks it for its model when made.

    verify: False to accept any certificate, or the path of an authority's. chat_template_name: in
    place of the one that the model's path suggests. answer_limit_s: the longest silence of the
    server before a request counts as failed. Everything that fails is a BackendError.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        verify: bool | str | None = None,
        chat_template_name: str | None = None,
        answer_limit_s: float = ANSWER_LIMIT_S,
    ) -> None:
        self.base_url = base_url
        self._server = ServerConnection(base_url, api_key, verify, answer_limit_s)
        try:
            self.model_info: dict[str, Any] = self._server.get("/get_model_info")
            path = self.model_info["model_path"]
            self.chat_template = (
                get_chat_template(chat_template_name)
                if chat_template_name is not None
                else get_chat_template_by_model_path(path)
            )
        except (TypeError, KeyError):
            self._server.close()
            raise BackendError(f"{base_url} does not say which model_path it serves") from None
        except BaseException:
            self._server.close()
            raise

    def get_model_name(self) -> str:
        return str(self.model_info["model_path"])

    def get_chat_template(self) -> ChatTemplate:
        return self.chat_template

    def flush_cache(self) -> bool:
        self._server.post("/flush_cache")
        return True

    def get_server_info(self) -> dict[str, Any]:
        info: dict[str, Any] = self._server.get("/server_info")
        return info

    def start_profile(self) -> None:
        self._server.get("/start_profile")

    def stop_profile(self) -> None:
        self._server.get("/stop_profile")

    def shutdown(self) -> None:
        """Closes the connections; the server goes on."""
        self._server.close()

    def cache_prefix(self, prefix_str: str) -> None:
        self._generate({"text": prefix_str, "sampling_params": {"max_new_tokens": 0}})

    def commit_lazy_operations(self, s: StreamExecutor) -> None:
        self.cache_prefix(s.text_)

    def generate(
        self, s: StreamExecutor, sampling_params: SglSamplingParams
    ) -> tuple[str | list[str], MetaInfo | list[MetaInfo]]:
        answer = self._generate(generate_body(s.text_, sampling_params))
        if isinstance(answer, list):
            return [one["text"] for one in answer], [one["meta_info"] for one in answer]
        return answer["text"], answer["meta_info"]

    def generate_stream(
        self, s: StreamExecutor, sampling_params: SglSamplingParams
    ) -> Iterator[tuple[str, MetaInfo]]:
        body = {**generate_body(s.text_, sampling_params), "stream": True}
        told = ""
        for event in self._server.events("/generate", body):
            _raise_if_aborted(event["meta_info"])
            text: str = event["text"]
            if not text.startswith(told):
                raise BackendError(
                    "the stream does not repeat its text in each event; was the server started "
                    "with --incremental-streaming-output?"
                )
            yield text[len(told) :], event["meta_info"]
            told = text

    def select(
        self,
        s: StreamExecutor,
        choices: list[str],
        temperature: float,
        choices_method: ChoicesSamplingMethod,
    ) -> ChoicesDecision:
        """Scores each choice as the continuation of the state's text, its tokens' mean."""
        if temperature > 1e-5:
            raise NotServed(f"select: temperature must be 0, got {temperature}")
        prompt = self._generate({"text": s.text_, "sampling_params": _PREFILL_ONLY})
        prompt_tokens = prompt["meta_info"]["prompt_tokens"]
        answers = self._generate(
            {
                "text": [s.text_ + choice for choice in choices],
                "sampling_params": _PREFILL_ONLY,
                "return_logprob": True,
                "return_text_in_logprobs": True,
                "logprob_start_len": logprob_start(prompt_tokens),
            }
        )
        infos = [answer["meta_info"] for answer in answers]
        tokens = [
            scored_tokens(info["input_token_logprobs"], s.text_, prompt_tokens, choice)
            for choice, info in zip(choices, infos, strict=True)
        ]
        return choices_method(
            choices=choices,
            normalized_prompt_logprobs=[mean_logprob(row) for row in tokens],
            input_token_logprobs=tokens,
            output_token_logprobs=[info.get("output_token_logprobs") or [] for info in infos],
            unconditional_token_logprobs=(
                self._without_context([[token[1] for token in row] for row in tokens])
                if choices_method.requires_unconditional_logprobs
                else None
            ),
        )

    def _without_context(self, input_ids: list[list[int]]) -> Any:
        answers = self._generate(
            {
                "input_ids": input_ids,
                "sampling_params": _PREFILL_ONLY,
                "return_logprob": True,
                "logprob_start_len": 0,  # left out, a server reports no prompt token at all
            }
        )
        return [answer["meta_info"]["input_token_logprobs"] for answer in answers]

    def _generate(self, body: Mapping[str, Any]) -> Any:
        """The answer, or answers, to a /generate call that was served to its end."""
        answer = self._server.post("/generate", body)
        for one in answer if isinstance(answer, list) else [answer]:
            _raise_if_aborted(one["meta_info"])
        return answer


def generate_body(text: str, params: SglSamplingParams) -> dict[str, Any]:
    """The JSON object of POST /generate."""
    regex, stop = params.regex, params.stop
    if params.dtype is not None:
        regex, ends = _LITERALS[params.dtype]
        stop += ends
    body: dict[str, Any] = {
        "text": text,
        "sampling_params": {
            "skip_special_tokens": global_config.skip_special_tokens_in_output,
            "spaces_between_special_tokens": global_config.spaces_between_special_tokens_in_out,
            "max_new_tokens": params.max_new_tokens,
            "min_new_tokens": params.min_new_tokens,
            "n": params.n,
            "stop": stop,
            "stop_token_ids": params.stop_token_ids,
            "stop_regex": params.stop_regex,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "min_p": params.min_p,
            "frequency_penalty": params.frequency_penalty,
            "presence_penalty": params.presence_penalty,
            "ignore_eos": params.ignore_eos,
            "regex": regex,
            "json_schema": params.json_schema,
        },
    }
    for name in (
        "return_logprob",
        "logprob_start_len",
        "top_logprobs_num",
        "return_text_in_logprobs",
    ):
        if getattr(params, name) is not None:
            body[name] = getattr(params, name)
    return body


def _raise_if_aborted(meta_info: MetaInfo) -> None:
    reason = meta_info.get("finish_reason")
    if isinstance(reason, dict) and reason.get("type") == "abort":
        raise BackendError(f"the server gave the request up: {reason.get('message')}")
