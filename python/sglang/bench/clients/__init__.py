"""One wire format a file; `make_client` picks by backend name."""

from __future__ import annotations

import aiohttp

from sglang.bench.clients.base import Client
from sglang.bench.clients.embedding import EmbeddingClient
from sglang.bench.clients.http import HttpAsker
from sglang.bench.clients.native import NativeClient
from sglang.bench.clients.openai import ChatClient, CompletionClient
from sglang.bench.options import BenchOptions


def make_client(http: aiohttp.ClientSession, options: BenchOptions, model: str) -> Client:
    """`model` is the name sent to the OpenAI endpoints; /generate needs none."""
    asker = HttpAsker(http, options.base_url, stream=options.stream, extra_body=options.extra_body)
    if options.speaks_native:
        return NativeClient(asker, options)
    if options.embeds:
        return EmbeddingClient(asker, model)
    if options.speaks_chat:
        return ChatClient(asker, options, model)
    return CompletionClient(asker, options, model)
