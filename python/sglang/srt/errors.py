"""The error tree. Three kinds of failure: a bad request, no room, and a bad configuration.

    SglangError
    ├── ConfigError       a flag or file of the operator's: printed, exit code 2
    ├── RequestError      the client's fault: HTTP 400
    │   └── NotFound      HTTP 404
    └── Overloaded        no room now, retry later: HTTP 503

Our own bugs are assertions with the numbers that break them; they take the process down.
"""

from __future__ import annotations


class SglangError(Exception):
    """Base of all errors this package raises on purpose."""


class ConfigError(SglangError):
    """A flag, file or machine does not allow what was asked; the text names the knob."""


class RequestError(SglangError):
    """The request cannot be served as written; `field` names the part at fault."""

    status_code = 400

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class NotFound(RequestError):
    """The named thing does not exist."""

    status_code = 404


class Overloaded(SglangError):
    """The server has no room at present; the client may retry."""

    status_code = 503
