"""The one error of the load generator that its user can mend."""

from __future__ import annotations


class BenchError(Exception):
    """The benchmark cannot run as asked; the text names the flag, file or address at fault."""
