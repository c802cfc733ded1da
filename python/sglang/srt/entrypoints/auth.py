"""--api-key and --admin-api-key: bearer tokens, and who may do what.

                 no keys   api key only   admin key only   both
open paths       all       all            all              all
other endpoints  all       api key        all              api key
for admins       all       api key        admin key        admin key
"""

from __future__ import annotations

import hmac
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from sglang.srt.entrypoints.error_forms import JsonResponse, anthropic_of, flat

# Load balancers and scrapers have no key.
_OPEN_PATHS = ("/health", "/ready", "/metrics")
# What changes how the server runs, or shows its weights.
_FOR_ADMINS = frozenset(
    {
        "/abort_request",
        "/configure_logging",
        "/continue_generation",
        "/flush_cache",
        "/freeze_gc",
        "/get_weights_by_name",
        "/pause_generation",
        "/release_memory_occupation",
        "/resume_memory_occupation",
        "/set_internal_state",
        "/start_profile",
        "/stop_profile",
        "/update_weight_version",
        "/update_weights_from_disk",
    }
)


class BearerAuth:
    """ASGI middleware: 401 without a key that is any good, 403 with the API key where the admin
    key is asked for."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_key: str | None,
        admin_api_key: str | None,
    ) -> None:
        self._app = app
        self._api_key = api_key
        self._admin_api_key = admin_api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        status_code = self._refusal(scope) if scope["type"] == "http" else None
        if status_code is None:
            await self._app(scope, receive, send)
            return
        error = "Unauthorized" if status_code == 401 else "Forbidden: the admin key is needed"
        body: dict[str, Any] = {"error": error}
        if scope["path"].startswith("/v1/messages"):
            body = anthropic_of(flat("invalid x-api-key", "401", 401))
        await JsonResponse(body, status_code)(scope, receive, send)

    def _refusal(self, scope: Scope) -> int | None:
        if scope["method"] == "OPTIONS" or scope["path"].startswith(_OPEN_PATHS):
            return None
        wanted = self._api_key
        if self._admin_api_key is not None and scope["path"] in _FOR_ADMINS:
            wanted = self._admin_api_key
        if wanted is None or _carries(scope, wanted):
            return None
        known = wanted is not self._api_key and self._api_key and _carries(scope, self._api_key)
        return 403 if known else 401


def _carries(scope: Scope, key: str) -> bool:
    headers = Headers(scope=scope)
    given = headers.get("authorization", "").encode("latin-1")
    short = headers.get("x-api-key", "").encode("latin-1")  # Anthropic's clients
    wanted = key.encode()
    return hmac.compare_digest(given, b"Bearer " + wanted) or hmac.compare_digest(short, wanted)
