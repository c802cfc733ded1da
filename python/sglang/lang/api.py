"""The functions of `import sglang as sgl` that programs are written with."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NoReturn, overload

from sglang.global_config import global_config
from sglang.lang.backend.base_backend import BaseBackend
from sglang.lang.choices import ChoicesSamplingMethod, token_length_normalized
from sglang.lang.errors import NotServed
from sglang.lang.function import SglFunction
from sglang.lang.ir import (
    SglExpr,
    SglExprList,
    SglGen,
    SglRoleBegin,
    SglRoleEnd,
    SglSelect,
    SglSeparateReasoning,
    as_expr,
)
from sglang.lang.reasoning import reasoning_format

_TYPES: dict[Any, type] = {
    spelling: kind for kind in (int, float, bool, str) for spelling in (kind, kind.__name__)
}


@overload
def function(func: Callable[..., Any], num_api_spec_tokens: int | None = None) -> SglFunction: ...


@overload
def function(
    func: None = None, num_api_spec_tokens: int | None = None
) -> Callable[[Callable[..., Any]], SglFunction]: ...


def function(
    func: Callable[..., Any] | None = None, num_api_spec_tokens: int | None = None
) -> SglFunction | Callable[[Callable[..., Any]], SglFunction]:
    """Makes a program of a function whose first argument is named s. A decorator."""
    if func is not None:
        return SglFunction(func, num_api_spec_tokens)
    return lambda func: SglFunction(func, num_api_spec_tokens)


def set_default_backend(backend: BaseBackend) -> None:
    """Where programs run that are given no backend."""
    global_config.default_backend = backend


def flush_cache(backend: BaseBackend | None = None) -> bool:
    """Empties the backend's prefix cache; False if there is no backend, or it has none."""
    endpoint = _endpoint(backend)
    return endpoint.flush_cache() if endpoint is not None else False


def get_server_info(backend: BaseBackend | None = None) -> dict[str, Any] | None:
    """What the backend's server says of itself; None if there is none."""
    endpoint = _endpoint(backend)
    return endpoint.get_server_info() if endpoint is not None else None


def _endpoint(backend: BaseBackend | None) -> BaseBackend | None:
    chosen = backend or global_config.default_backend
    endpoint: BaseBackend | None = getattr(chosen, "endpoint", chosen)
    return endpoint


def gen(
    name: str | None = None,
    max_tokens: int | None = None,
    min_tokens: int | None = None,
    n: int | None = None,
    stop: str | list[str] | None = None,
    stop_token_ids: list[int] | None = None,
    stop_regex: str | list[str] | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    frequency_penalty: float | None = None,
    presence_penalty: float | None = None,
    ignore_eos: bool | None = None,
    return_logprob: bool | None = None,
    logprob_start_len: int | None = None,
    top_logprobs_num: int | None = None,
    return_text_in_logprobs: bool | None = None,
    dtype: type | str | None = None,
    choices: list[str] | None = None,
    choices_method: ChoicesSamplingMethod | None = None,
    regex: str | None = None,
    json_schema: str | None = None,
) -> SglGen | SglSelect:
    """Generates; the text becomes the variable `name`. What is None is the run's default.

    dtype: int, float, bool or str, or its name: a literal of that type, as text. regex,
    json_schema: the whole answer matches it. choices: the answer is one of them, see `select`.
    """
    if choices is not None:
        return select(
            name,
            choices,
            0.0 if temperature is None else temperature,
            token_length_normalized if choices_method is None else choices_method,
        )
    constraints = {"dtype": dtype, "regex": regex, "json_schema": json_schema}
    given = [key for key, value in constraints.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{given[0]}: does not go with {' and '.join(given[1:])}")
    if dtype is not None and dtype not in _TYPES:
        raise ValueError(f"dtype: expected int, float, bool or str, got {dtype!r}")
    if regex is not None:
        try:
            re.compile(regex)
        except re.error as error:
            raise ValueError(f"regex: {regex!r} is not valid: {error}") from error
    return SglGen(
        name,
        {
            "max_new_tokens": max_tokens,
            "min_new_tokens": min_tokens,
            "n": n,
            "stop": stop,
            "stop_token_ids": stop_token_ids,
            "stop_regex": stop_regex,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "min_p": min_p,
            "frequency_penalty": frequency_penalty,
            "presence_penalty": presence_penalty,
            "ignore_eos": ignore_eos,
            "return_logprob": return_logprob,
            "logprob_start_len": logprob_start_len,
            "top_logprobs_num": top_logprobs_num,
            "return_text_in_logprobs": return_text_in_logprobs,
            "dtype": None if dtype is None else _TYPES[dtype],
            "regex": regex,
            "json_schema": json_schema,
        },
    )


def gen_int(
    name: str | None = None,
    max_tokens: int | None = None,
    n: int | None = None,
    stop: str | list[str] | None = None,
    stop_token_ids: list[int] | None = None,
    stop_regex: str | list[str] | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    frequency_penalty: float | None = None,
    presence_penalty: float | None = None,
    ignore_eos: bool | None = None,
    return_logprob: bool | None = None,
    logprob_start_len: int | None = None,
    top_logprobs_num: int | None = None,
    return_text_in_logprobs: bool | None = None,
) -> SglGen | SglSelect:
    """`gen` of a whole number; the variable holds its text."""
    return gen(**locals(), dtype=int)


def gen_string(
    name: str | None = None,
    max_tokens: int | None = None,
    n: int | None = None,
    stop: str | list[str] | None = None,
    stop_token_ids: list[int] | None = None,
    stop_regex: str | list[str] | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    frequency_penalty: float | None = None,
    presence_penalty: float | None = None,
    ignore_eos: bool | None = None,
    return_logprob: bool | None = None,
    logprob_start_len: int | None = None,
    top_logprobs_num: int | None = None,
    return_text_in_logprobs: bool | None = None,
) -> SglGen | SglSelect:
    """`gen` of a string in double quotes; the variable holds the quotes too."""
    return gen(**locals(), dtype=str)


def select(
    name: str | None = None,
    choices: list[str] | None = None,
    temperature: float = 0.0,
    choices_method: ChoicesSamplingMethod = token_length_normalized,
) -> SglSelect:
    """Appends the most probable of the choices, which becomes the variable `name`."""
    if not choices:
        raise ValueError("choices: select needs at least one")
    for choice in choices:
        if not isinstance(choice, str) or not choice:
            raise ValueError(f"choices: expected text that is not empty, got {choice!r}")
    return SglSelect(name, list(choices), temperature, choices_method)


def system(expr: SglExpr | str | None = None) -> SglExprList:
    """A message of the system."""
    return _role("system", expr)


def user(expr: SglExpr | str | None = None) -> SglExprList:
    """A message of the user."""
    return _role("user", expr)


def assistant(expr: SglExpr | str | None = None) -> SglExprList:
    """A message of the assistant, which is where generations usually stand."""
    return _role("assistant", expr)


def _role(name: str, expr: SglExpr | str | None) -> SglExprList:
    inside = [] if expr is None else [as_expr(expr)]
    return SglExprList([SglRoleBegin(name), *inside, SglRoleEnd(name)])


def system_begin() -> SglRoleBegin:
    return SglRoleBegin("system")


def system_end() -> SglRoleEnd:
    return SglRoleEnd("system")


def user_begin() -> SglRoleBegin:
    return SglRoleBegin("user")


def user_end() -> SglRoleEnd:
    return SglRoleEnd("user")


def assistant_begin() -> SglRoleBegin:
    return SglRoleBegin("assistant")


def assistant_end() -> SglRoleEnd:
    return SglRoleEnd("assistant")


def separate_reasoning(
    expr: SglExpr | None = None, model_type: str | None = None
) -> SglSeparateReasoning | SglExprList:
    """A reasoning model's `gen`, whose thoughts become the variable `<name>_reasoning_content`
    and stay out of the text. model_type: its format, as in --reasoning-parser."""
    if expr is None or model_type is None:
        raise ValueError("separate_reasoning: needs an expression and a model_type")
    reasoning_format(model_type)
    if isinstance(expr, SglExprList):
        return SglExprList(
            [
                _separated(part, model_type) if isinstance(part, SglGen) else part
                for part in expr.expr_list
            ]
        )
    return _separated(expr, model_type)


def _separated(expr: SglExpr, model_type: str) -> SglSeparateReasoning:
    if not isinstance(expr, SglGen) or expr.name is None:
        raise ValueError(f"separate_reasoning: needs a gen with a name, got {expr!r}")
    return SglSeparateReasoning(model_type, expr)


def image(expr: SglExpr | str) -> NoReturn:
    """Refused: there is no model here that sees."""
    raise NotServed("image: models that see are not served")


def video(path: str, num_frames: int) -> NoReturn:
    """Refused: there is no model here that sees."""
    raise NotServed("video: models that see are not served")
