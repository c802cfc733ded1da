"""How many layers a prefill slice has."""

from __future__ import annotations

import math

from drift_scheduler.dispatcher import MAX_SLICES_IN_FLIGHT
from drift_scheduler.view import PrefillView

# Launching a layer may take the host half a millisecond, and so long nobody reads a finished step's
# tokens. Slices are polled, so a shorter one costs prefill nothing.
MAX_SLICE_LAYERS = 2


def layers_to_outlast(prefill: PrefillView, decode_s: float | None, layer_s: float | None) -> int:
    """Just enough layers to outlast a decode step: N_PL = ceil(T_d * L / T_p), as in Drift.

    MAX_SLICE_LAYERS at most. None where a time is not known: then one layer, to learn it. 0 while
    slices enough are launched.
    """
    if prefill.slices_in_flight >= MAX_SLICES_IN_FLIGHT:
        return 0
    if decode_s is None or layer_s is None:
        return min(prefill.layers_left, 1)
    enough = max(1, math.ceil(decode_s / max(layer_s, 1e-6)))
    return min(prefill.layers_left, enough, MAX_SLICE_LAYERS)
