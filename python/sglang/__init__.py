"""What SGLang users import. Names are resolved on first use, so importing sglang stays light."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Not looked up lazily: Python binds the name to the module of that name once it is imported.
from sglang.global_config import global_config
from sglang.version import __version__

if TYPE_CHECKING:
    from sglang.lang.api import (
        assistant,
        assistant_begin,
        assistant_end,
        flush_cache,
        function,
        gen,
        gen_int,
        gen_string,
        get_server_info,
        image,
        select,
        separate_reasoning,
        set_default_backend,
        system,
        system_begin,
        system_end,
        user,
        user_begin,
        user_end,
        video,
    )
    from sglang.lang.backend.anthropic import Anthropic
    from sglang.lang.backend.litellm import LiteLLM
    from sglang.lang.backend.not_served import Crusoe, VertexAI
    from sglang.lang.backend.openai import OpenAI
    from sglang.lang.backend.runtime import Runtime
    from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint
    from sglang.lang.choices import (
        greedy_token_selection,
        token_length_normalized,
        unconditional_likelihood_normalized,
    )
    from sglang.srt.entrypoints.engine import Engine
    from sglang.srt.server_args import ServerArgs

__all__ = [
    "Anthropic",
    "Crusoe",
    "Engine",
    "LiteLLM",
    "OpenAI",
    "Runtime",
    "RuntimeEndpoint",
    "ServerArgs",
    "VertexAI",
    "__version__",
    "assistant",
    "assistant_begin",
    "assistant_end",
    "flush_cache",
    "function",
    "gen",
    "gen_int",
    "gen_string",
    "get_server_info",
    "global_config",
    "greedy_token_selection",
    "image",
    "select",
    "separate_reasoning",
    "set_default_backend",
    "system",
    "system_begin",
    "system_end",
    "token_length_normalized",
    "unconditional_likelihood_normalized",
    "user",
    "user_begin",
    "user_end",
    "video",
]

_HOME = {
    "Anthropic": "sglang.lang.backend.anthropic",
    "Crusoe": "sglang.lang.backend.not_served",
    "Engine": "sglang.srt.entrypoints.engine",
    "LiteLLM": "sglang.lang.backend.litellm",
    "OpenAI": "sglang.lang.backend.openai",
    "Runtime": "sglang.lang.backend.runtime",
    "RuntimeEndpoint": "sglang.lang.backend.runtime_endpoint",
    "ServerArgs": "sglang.srt.server_args",
    "VertexAI": "sglang.lang.backend.not_served",
    "assistant": "sglang.lang.api",
    "assistant_begin": "sglang.lang.api",
    "assistant_end": "sglang.lang.api",
    "flush_cache": "sglang.lang.api",
    "function": "sglang.lang.api",
    "gen": "sglang.lang.api",
    "gen_int": "sglang.lang.api",
    "gen_string": "sglang.lang.api",
    "get_server_info": "sglang.lang.api",
    "greedy_token_selection": "sglang.lang.choices",
    "image": "sglang.lang.api",
    "select": "sglang.lang.api",
    "separate_reasoning": "sglang.lang.api",
    "set_default_backend": "sglang.lang.api",
    "system": "sglang.lang.api",
    "system_begin": "sglang.lang.api",
    "system_end": "sglang.lang.api",
    "token_length_normalized": "sglang.lang.choices",
    "unconditional_likelihood_normalized": "sglang.lang.choices",
    "user": "sglang.lang.api",
    "user_begin": "sglang.lang.api",
    "user_end": "sglang.lang.api",
    "video": "sglang.lang.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sglang' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
