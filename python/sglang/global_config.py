"""Settings that all programs of a process share: `sgl.global_config`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang.lang.backend.base_backend import BaseBackend


@dataclass
class GlobalConfig:
    """The one instance is `global_config`; programs read it when they run.

    verbosity: at 2 a finished program prints its text.
    default_backend: where programs run that are given none.
    enable_precache_with_tracing: `run_batch` first caches what all its programs begin with.
    """

    verbosity: int = 0
    default_backend: BaseBackend | None = None
    skip_special_tokens_in_output: bool = True
    spaces_between_special_tokens_in_out: bool = True
    enable_precache_with_tracing: bool = True


global_config = GlobalConfig()
