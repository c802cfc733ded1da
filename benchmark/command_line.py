"""The command line of a benchmark."""

from __future__ import annotations

import argparse


def command_line(module: str, description: str | None) -> argparse.ArgumentParser:
    """Of `python -m benchmark.<module>`; the description is shown as it was written."""
    return argparse.ArgumentParser(
        prog=f"python -m benchmark.{module}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
