"""What a process keeps for life is walked by no garbage collection."""

from __future__ import annotations

import atexit
import gc


def freeze_what_is_here() -> None:
    """Model, tokenizer and libraries stay: to walk them again would only stop all streams.

    At exit they are collected nevertheless. Extension modules count what is left of them then,
    and say so at length.
    """
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)
