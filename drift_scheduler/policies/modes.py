"""Which way of sharing the device computes the most prompt tokens within a decode deadline.

    split   two lanes on disjoint SMs: prefill layers beside a decode step
    turns   the whole device for a decode step, then for prefill layers, and so on
    fused   prompt tokens ride in the decode step, on the whole device

Close to the decode step's own time splitting wins, with slack fusing does; the latency model says
where they meet.
"""

from __future__ import annotations

import enum
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from drift_scheduler.dispatcher import Forecast
from drift_scheduler.partition import Partition, PartitionTable
from drift_scheduler.policies.latency_model import LatencyModel
from drift_scheduler.shapes import DecodeShape, PrefillShape

# Tokens of a fused step in all. A step of a multiple of 128 fills the tiles of its products.
FUSED_STEP_TOKENS = (64, 128, 256, 384, 512, 640, 768, 1024, 1280, 1536, 2048)
MIN_FUSED_TOKENS = 32
# Of the splits, and of the sizes of a fused step, that meet a deadline the first has the highest
# rate, but for how it fills tiles: so many are compared.
LOOKED_AT = 2


class Mode(enum.StrEnum):
    SPLIT = "split"
    TURNS = "turns"
    FUSED = "fused"


ALL_MODES = frozenset(Mode)
Riding = Callable[[int], PrefillShape]


@dataclass(frozen=True, slots=True)
class Choice:
    """One way of sharing. rate: prompt tokens a second that it computes.

    step: the decode step. layer: one prefill layer; None when fused. layers: between two decode
    steps when taking turns, else 0. fused_tokens: prompt tokens in a step, else 0.
    """

    mode: Mode
    partition: Partition
    rate: float
    step: Forecast
    layer: Forecast | None = None
    layers: int = 0
    fused_tokens: int = 0


def best_mode(
    model: LatencyModel,
    table: PartitionTable,
    decode: DecodeShape,
    prefill: PrefillShape,
    limit_s: float,
    num_layers: int,
    modes: frozenset[Mode] = ALL_MODES,
    riding: Riding | None = None,
    *,
    indivisible: bool = False,
    max_step_tokens: int = FUSED_STEP_TOKENS[-1],
) -> Choice | None:
    """The highest rate among the ways whose decode step ends within limit_s even at worst.

    prefill: the prompt tokens to compute. riding: the first so many of them, which ride in a fused
    step; if None, an even part of all. indivisible: all layers of the batch are one launch.
    max_step_tokens: of a fused step in all. None if no way is fast enough.
    """
    choices: list[Choice] = []
    if Mode.SPLIT in modes:
        choices += _splits(model, table, decode, prefill, limit_s, num_layers)
    if Mode.TURNS in modes:
        least = num_layers if indivisible else 1
        choices += _turns(model, table, decode, prefill, limit_s, num_layers, least)
    if Mode.FUSED in modes:
        part = riding or partial(_even_part, prefill)
        sizes = _riding_tokens(decode.requests, prefill.tokens, max_step_tokens)
        choices += _fusings(model, table, decode, part, sizes, limit_s)
    return max(choices, key=lambda choice: choice.rate, default=None)


def gentlest_split(
    model: LatencyModel,
    table: PartitionTable,
    decode: DecodeShape,
    prefill: PrefillShape,
    num_layers: int,
) -> Choice | None:
    """The split with the shortest decode step, whatever the deadline; None without splits."""
    steps = [(split, model.decode(decode, split, prefill)) for split in table.splits]
    if not steps:
        return None
    split, step = min(steps, key=lambda found: found[1].worst_s)
    return _split(model, split, decode, prefill, step, num_layers)


def _splits(
    model: LatencyModel,
    table: PartitionTable,
    decode: DecodeShape,
    prefill: PrefillShape,
    limit_s: float,
    num_layers: int,
) -> Iterator[Choice]:
    """The first of those that meet the deadline: further ones leave less to prefill."""
    left = LOOKED_AT
    for split in table.splits:
        step = model.decode(decode, split, prefill)
        if step.worst_s <= limit_s:
            yield _split(model, split, decode, prefill, step, num_layers)
            left -= 1
            if not left:
                return


def _split(
    model: LatencyModel,
    split: Partition,
    decode: DecodeShape,
    prefill: PrefillShape,
    step: Forecast,
    num_layers: int,
) -> Choice:
    batch = model.prefill(prefill, split, decode)
    return Choice(
        Mode.SPLIT,
        split,
        rate=prefill.tokens / batch.expected_s,
        step=step,
        layer=batch.times(1 / num_layers),
    )


def _turns(
    model: LatencyModel,
    table: PartitionTable,
    decode: DecodeShape,
    prefill: PrefillShape,
    limit_s: float,
    num_layers: int,
    least: int,
) -> Iterator[Choice]:
    """least: layers that are launched together."""
    step = model.decode(decode, table.whole, None)
    layer = model.prefill(prefill, table.whole, None).times(1 / num_layers)
    room_s = limit_s - step.worst_s
    layers = int(min(room_s / layer.worst_s, num_layers))
    if layers >= least:
        round_s = step.expected_s + layers * layer.expected_s
        rate = prefill.tokens * layers / num_layers / round_s
        yield Choice(Mode.TURNS, table.whole, rate, step, layer, layers=layers)


def _riding_tokens(requests: int, most: int, max_step_tokens: int) -> list[int]:
    """How many prompt tokens may ride in a step of so many requests, rising."""
    sizes: list[int] = []
    for step_tokens in FUSED_STEP_TOKENS:
        tokens = min(step_tokens - requests, most)
        if step_tokens <= max_step_tokens and tokens >= min(MIN_FUSED_TOKENS, most):
            sizes.append(tokens)
    return sorted(set(sizes))


def _fusings(
    model: LatencyModel,
    table: PartitionTable,
    decode: DecodeShape,
    riding: Riding,
    sizes: list[int],
    limit_s: float,
) -> Iterator[Choice]:
    """The largest of those that meet the deadline: larger steps take longer, and compute more."""
    steps: dict[int, Forecast] = {}

    def too_slow(tokens: int) -> bool:
        steps[tokens] = model.fused(decode, riding(tokens))
        return steps[tokens].worst_s > limit_s

    for tokens in reversed(sizes[: bisect_left(sizes, True, key=too_slow)][-LOOKED_AT:]):
        step = steps.get(tokens) or model.fused(decode, riding(tokens))
        yield Choice(Mode.FUSED, table.whole, tokens / step.expected_s, step, fused_tokens=tokens)


def _even_part(prefill: PrefillShape, tokens: int) -> PrefillShape:
    cached = prefill.cross // prefill.tokens
    return PrefillShape(tokens, tokens * tokens, tokens * cached)
