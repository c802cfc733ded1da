"""build_app: the HTTP surface around a TokenizerManager."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from sglang.srt.entrypoints import (
    error_forms,
    multiplex,
    native,
    not_generation,
    openapi,
    operations,
    parse_text,
    vertex,
)
from sglang.srt.entrypoints.anthropic import serving_messages
from sglang.srt.entrypoints.auth import BearerAuth
from sglang.srt.entrypoints.ollama import serving as serving_ollama
from sglang.srt.entrypoints.openai import (
    serving_chat,
    serving_completions,
    serving_models,
    serving_score,
    serving_tokenize,
)
from sglang.srt.entrypoints.openai.responses import serving as serving_responses
from sglang.srt.entrypoints.server_state import ServerState
from sglang.srt.observability.http_traffic import CountTraffic, HttpTraffic
from sglang.version import __version__


def build_app(state: ServerState) -> FastAPI:
    """The ASGI app. It starts and ends nothing: `state.manager` must be running."""
    app = FastAPI(title="SGLang", version=__version__)
    app.state.server = state
    for part in (
        operations,
        multiplex,
        native,
        parse_text,
        serving_completions,
        serving_chat,
        serving_models,
        serving_responses,
        serving_messages,
        serving_score,
        serving_tokenize,
        not_generation,
        vertex,
        serving_ollama,
    ):
        app.include_router(part.router)
    if state.args.enable_metrics:
        from sglang.srt.entrypoints import metrics

        app.include_router(metrics.router)
    error_forms.install(app)
    openapi.describe(app)
    if state.args.api_key is not None or state.args.admin_api_key is not None:
        app.add_middleware(
            BearerAuth,
            api_key=state.args.api_key,
            admin_api_key=state.args.admin_api_key,
        )
    app.add_middleware(
        CORSMiddleware, allow_origins=["*"], allow_methods=["*"], allow_headers=["*"]
    )
    if state.args.enable_metrics:
        app.state.traffic = HttpTraffic()
        app.add_middleware(CountTraffic, traffic=app.state.traffic)  # sees what all others answer
    return app
