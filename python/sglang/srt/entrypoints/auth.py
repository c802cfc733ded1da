"""--api-key: bearer tokens."""

from __future__ import annotations

import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from sglang.srt.entrypoints.error_forms import JsonResponse

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
            await JsonResponse({"error": "Unauthorized"}, 401)(scope, receive, send)

    def _allowed(self, scope: Scope) -> bool:
        if scope["method"] == "OPTIONS" or scope["path"].startswith(_OPEN_PATHS):
            return True
        given = Headers(scope=scope).get("authorization", "")
        return hmac.compare_digest(given.encode("latin-1"), self._expected)
