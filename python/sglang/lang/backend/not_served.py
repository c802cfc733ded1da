"""Backends of SGLang that this library does not have: they say so when they are made."""

from __future__ import annotations

from typing import Any

from sglang.lang.errors import NotServed


class VertexAI:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise NotServed("VertexAI is not served; LiteLLM('vertex_ai/<model>') reaches its models")


class Crusoe:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise NotServed("Crusoe is not served; OpenAI(model, base_url=...) reaches its models")
