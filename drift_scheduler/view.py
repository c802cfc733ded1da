"""What a dispatcher may know: a frozen view of the load, made anew at every turn."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from drift_scheduler.backlog import Backlog
from drift_scheduler.host_delay import START_S
from drift_scheduler.shapes import NOTHING_RUNNING, DecodeShape, PrefillShape


@dataclass(frozen=True, slots=True)
class PrefillView:
    """A prefill batch in flight.

    layers_launched counts from the bottom. layer_s: measured mean time of its finished layers,
    None before the first has finished. due_s: when the first of its prompts is to have its first
    token; infinity if none of them gets one from this batch. indivisible: all its layers are one
    launch.
    """

    shape: PrefillShape
    layers_launched: int
    layers_total: int
    slices_in_flight: int
    layer_s: float | None
    due_s: float = math.inf
    indivisible: bool = False

    @property
    def tokens(self) -> int:
        """New tokens of the batch."""
        return self.shape.tokens

    @property
    def layers_left(self) -> int:
        return self.layers_total - self.layers_launched


@dataclass(frozen=True, slots=True)
class LoadView:
    """The load of one engine.

    waiting: prompts that a launch could take up, the half-filled one included; waiting_tokens:
    their tokens that no launch has taken yet, prefixes that may be cached counted too.

    decode: the next step's requests and what they attend to. decode_step_s: time of the last
    settled step without prompt tokens, if any. decode_ends_s: when the launched steps are
    expected to end, None without any. tbt_s: the strictest of the running requests.
    joined_due_s: when the first of those that have joined since the last launch wants its next
    token; infinity if none has. awaits_tokens: no step can be launched before those in flight have
    settled, since what it may yield depends on their tokens. host_s: what the host may add to the
    time between two tokens.

    prefill: the batch whose layers are launched now; parked: one that it has pre-empted.
    """

    waiting: int
    running: int
    decode_in_flight: int
    prefill: PrefillView | None
    decode_step_s: float | None = None
    waiting_tokens: int = 0
    decode: DecodeShape = NOTHING_RUNNING
    decode_ends_s: float | None = None
    tbt_s: float = math.inf
    joined_due_s: float = math.inf
    awaits_tokens: bool = False
    parked: PrefillView | None = None
    host_s: float = START_S
    backlog: Backlog = field(default_factory=Backlog)

    @property
    def can_fuse(self) -> bool:
        """Whether a step launched now could carry prompt tokens."""
        return self.waiting > 0 and self.prefill is None

    def takes_step(self, decode_depth: int) -> bool:
        """Whether a step could be launched now; decode_depth: how many may be in flight."""
        return self.decode_in_flight < decode_depth and not self.awaits_tokens
