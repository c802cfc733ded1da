"""MultiplexPolicy: how prefill and decode share the device, as the flags say it."""

from __future__ import annotations

from dataclasses import dataclass

from sglang.srt.pdmux_config import PdmuxConfig


@dataclass(frozen=True, slots=True)
class MultiplexPolicy:
    """text: a policy as drift_scheduler.policies.names reads it. pdmux: how the device is
    divided; None keeps it whole."""

    text: str
    pdmux: PdmuxConfig | None = None
