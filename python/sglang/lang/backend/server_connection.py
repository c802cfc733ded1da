"""ServerConnection: JSON and event streams from one server, its errors as BackendError."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import httpx

from sglang.lang.errors import BackendError

CONNECT_LIMIT_S = 10.0
# The longest silence: a request may wait in the server's queue, and says nothing till it is done.
ANSWER_LIMIT_S = 3600.0


class ServerConnection:
    """A pool of connections, safe to share between threads.

    verify: False to accept any certificate, or the path of an authority's. api_key: sent as a
    bearer token. answer_limit_s: the longest silence before a request counts as failed.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        verify: bool | str | None = None,
        answer_limit_s: float = ANSWER_LIMIT_S,
    ) -> None:
        self.base_url = base_url.rstrip("/")
        self._http = httpx.Client(
            base_url=self.base_url,
            headers={"Authorization": f"Bearer {api_key}"} if api_key is not None else {},
            verify=_certificates(verify) if base_url.startswith("https:") else False,
            timeout=httpx.Timeout(answer_limit_s, connect=CONNECT_LIMIT_S),
            limits=httpx.Limits(max_connections=None),  # every running program has one
        )

    def close(self) -> None:
        self._http.close()

    def get(self, path: str, limit_s: float | None = None) -> Any:
        """The JSON answer, or None if the body is empty or no JSON."""
        return self._json("GET", path, None, limit_s)

    def post(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        return self._json("POST", path, body, None)

    def _json(
        self, method: str, path: str, body: Mapping[str, Any] | None, limit_s: float | None
    ) -> Any:
        timeout: Any = httpx.USE_CLIENT_DEFAULT if limit_s is None else limit_s
        with self._naming(method, path):
            response = self._http.request(method, path, json=body, timeout=timeout)
            _raise_for_status(response)
        try:
            return response.json()
        except ValueError:
            return None

    def events(self, path: str, body: Mapping[str, Any]) -> Iterator[Any]:
        """The payloads of an event stream up to its [DONE], without which it has failed."""
        with (
            self._naming("POST", path),
            self._http.stream("POST", path, json=body) as response,
        ):
            if response.is_error:
                response.read()
            _raise_for_status(response)
            for line in response.iter_lines():
                if not line.startswith("data:"):
                    continue
                data = line.removeprefix("data:").strip()
                if data == "[DONE]":
                    return
                yield _checked(json.loads(data))
            raise BackendError("the stream broke off before its end")

    @contextmanager
    def _naming(self, method: str, path: str) -> Iterator[None]:
        """Errors say which call of which server failed."""
        try:
            yield
        except (httpx.HTTPError, BackendError, json.JSONDecodeError) as error:
            problem = str(error) or type(error).__name__
            raise BackendError(f"{method} {self.base_url}{path}: {problem}") from error


def _certificates(verify: bool | str | None) -> Any:
    if isinstance(verify, str):
        import ssl

        return ssl.create_default_context(cafile=verify)
    return True if verify is None else verify


def _raise_for_status(response: httpx.Response) -> None:
    if response.is_success:
        return
    try:
        told = _message_of(response.json())
    except ValueError:
        told = response.text
    raise BackendError(f"HTTP {response.status_code}: {told}")


def _checked(event: Any) -> Any:
    if isinstance(event, dict) and "error" in event:
        raise BackendError(_message_of(event))
    return event


def _message_of(body: Any) -> str:
    """The text of an error in any of the forms that servers use."""
    while isinstance(body, dict):
        for key in ("error", "message", "detail"):
            if body.get(key):
                body = body[key]
                break
        else:
            break
    return str(body)
