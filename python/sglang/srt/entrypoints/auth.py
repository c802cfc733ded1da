"""--api-key and --admin-api-key: bearer tokens, and who may do what.

                 no keys   api key only   admin key only   both
open paths       all       all            all              all
other endpoints  all       api key        all              api key
for admins       all       api key        admin key        admin key
"""

from __future__ import annotations

import hmac
from collections.abc import Callable
from typing import Any, TypeVar

from starlette.datastructures import Headers
from starlette.routing import Match
from starlette.types import ASGIApp, Receive, Scope, Send

from sglang.srt.entrypoints.error_forms import JsonResponse

F = TypeVar("F", bound=Callable[..., Any])

# Load balancers and scrapers have no key.
_OPEN_PATHS = ("/health", "/ready", "/metrics")
_MARK = "_sglang_for_admins"


def for_admins(handler: F) -> F:
    """Marks an endpoint that changes how the server runs."""
    setattr(handler, _MARK, True)
    return handler


class BearerAuth:
    """ASGI middleware around `app`, whose `routes` say what an endpoint is.

    401 without a key that is any good, 403 with the API key where the admin key is asked for.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        routes: Callable[[], list[Any]],
        api_key: str | None,
        admin_api_key: str | None,
    ) -> None:
        self._app = app
        self._routes = routes
        self._api_key = api_key
        self._admin_api_key = admin_api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        status_code = self._refusal(scope) if scope["type"] == "http" else None
        if status_code is None:
            await self._app(scope, receive, send)
            return
        error = "Unauthorized" if status_code == 401 else "Forbidden: the admin key is needed"
        await JsonResponse({"error": error}, status_code)(scope, receive, send)

    def _refusal(self, scope: Scope) -> int | None:
        if scope["method"] == "OPTIONS" or scope["path"].startswith(_OPEN_PATHS):
            return None
        wanted = self._api_key
        if self._admin_api_key is not None and self._is_for_admins(scope):
            wanted = self._admin_api_key
        if wanted is None or _carries(scope, wanted):
            return None
        known = wanted is not self._api_key and self._api_key and _carries(scope, self._api_key)
        return 403 if known else 401

    def _is_for_admins(self, scope: Scope) -> bool:
        for route in self._routes():
            match, _ = route.matches(scope)
            if match is not Match.NONE:
                return getattr(getattr(route, "endpoint", None), _MARK, False)
        return False


def _carries(scope: Scope, key: str) -> bool:
    headers = Headers(scope=scope)
    given = headers.get("authorization", "").encode("latin-1")
    short = headers.get("x-api-key", "").encode("latin-1")  # Anthropic's clients
    wanted = key.encode()
    return hmac.compare_digest(given, b"Bearer " + wanted) or hmac.compare_digest(short, wanted)
