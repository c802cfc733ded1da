"""Logging of our processes: one line format, to stderr."""

from __future__ import annotations

import logging
import sys


def configure_logging(level: str, process: str = "") -> None:
    """Sets up the root logger of this process; `process` marks the lines of a child."""
    mark = f" {process}" if process else ""
    logging.basicConfig(
        level=level.upper(),
        format=f"[%(asctime)s{mark}] %(levelname)s %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
        stream=sys.stderr,
        force=True,
    )
