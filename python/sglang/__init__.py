"""What SGLang users import. Names are resolved on first use, so importing sglang stays light."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sglang.version import __version__

if TYPE_CHECKING:
    from sglang.srt.entrypoints.engine import Engine
    from sglang.srt.server_args import ServerArgs

__all__ = ["Engine", "ServerArgs", "__version__"]

_HOME = {
    "Engine": "sglang.srt.entrypoints.engine",
    "ServerArgs": "sglang.srt.server_args",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sglang' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
