"""--api-key: bearer tokens."""

from __future__ import annotations

import hmac
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from sglang.srt.entrypoints.error_forms import JsonResponse, anthropic_of, flat

# Load balancers and scrapers have no key.
_OPEN_PATHS = ("/health", "/ready", "/metrics")


class BearerAuth:
    """ASGI middleware: 401 unless the request carries the key."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self._app = app
        self._expected = f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._allowed(scope):
            await self._app(scope, receive, send)
        else:
            body: dict[str, Any] = {"error": "Unauthorized"}
            if scope["path"].startswith("/v1/messages"):
                body = anthropic_of(flat("invalid x-api-key", "401", 401))
            await JsonResponse(body, 401)(scope, receive, send)

    def _allowed(self, scope: Scope) -> bool:
        if scope["method"] == "OPTIONS" or scope["path"].startswith(_OPEN_PATHS):
            return True
        headers = Headers(scope=scope)
        given = headers.get("authorization", "")
        if "x-api-key" in headers and scope["path"].startswith("/v1/messages"):
            given = f"Bearer {headers['x-api-key']}"  # where Anthropic's clients put it
        return hmac.compare_digest(given.encode("latin-1"), self._expected)
