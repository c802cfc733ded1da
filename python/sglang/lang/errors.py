"""What the frontend language raises beside Python's own errors.

RuntimeError
├── BackendError    a server or API refused, failed or did not answer
└── ProgramEnded    text was appended to a state whose program is over
TypeError
└── TracingError    a traced program looked into a value that is not known yet
NotImplementedError
└── NotServed       a feature of SGLang's language that this library does not have
"""

from __future__ import annotations


class BackendError(RuntimeError):
    """A server or API refused, failed or did not answer in time."""


class ProgramEnded(RuntimeError):
    """Something was appended to a state whose program is over."""


class TracingError(TypeError):
    """A traced program looked into a value that is not known yet."""


class NotServed(NotImplementedError):
    """A feature of SGLang's language that this library does not have."""
