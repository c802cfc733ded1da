"""What the HTTP server has been asked and has answered, by endpoint."""

from __future__ import annotations

from collections import Counter

from starlette.types import ASGIApp, Message, Receive, Scope, Send

_UNKNOWN = "Unknown"  # SGLang's word for a path that is no endpoint


class HttpTraffic:
    """Counts since the start. An endpoint is its route's path, so paths with names in them are one.

    requests: by (endpoint, method). responses: by (endpoint, status, method), when their headers
    are sent. active: by method, until their last byte is sent; the endpoint of a request is not
    known before it is handled.
    """

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, str]] = Counter()
        self.responses: Counter[tuple[str, str, str]] = Counter()
        self.active: Counter[str] = Counter()


class CountTraffic:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, traffic: HttpTraffic) -> None:
        self._app = app
        self._traffic = traffic

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        method = scope["method"]

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                endpoint = _endpoint(scope)
                self._traffic.requests[endpoint, method] += 1
                self._traffic.responses[endpoint, str(message["status"]), method] += 1
            await send(message)

        self._traffic.active[method] += 1
        try:
            await self._app(scope, receive, counted)
        finally:
            self._traffic.active[method] -= 1


def _endpoint(scope: Scope) -> str:
    return getattr(scope.get("route"), "path", None) or _UNKNOWN
