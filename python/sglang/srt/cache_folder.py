"""Where results of one start are kept for the next: tuned kernels, latencies, tokenizers."""

from __future__ import annotations

import os
from pathlib import Path


def default_folder() -> Path:
    """~/.cache/sglang-drift, or its like under XDG_CACHE_HOME."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "sglang-drift"
