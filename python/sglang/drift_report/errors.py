"""The one error that the caller can mend."""

from __future__ import annotations


class ReportError(Exception):
    """The report cannot be made as asked; the text names the file, address or flag at fault."""
