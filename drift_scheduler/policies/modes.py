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
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from drift_scheduler.dispatcher import Forecast
from drift_scheduler.partition import Partition, PartitionTable
from drift_scheduler.policies.latency_model import LatencyModel
from drift_scheduler.shapes import DecodeShape, PrefillShape

# Tokens of a fused step in all. A step of a multiple of 128 fills the tiles of its products.
FUSED_STEP_TOKENS = (64, 128, 256, 384, 512, 640, 768, 1024, 1280, 1536, 2048)
MIN_FUSED_TOKENS = 32
# Of the sizes of a fused step that meet a deadline the largest has the highest rate, but for how it
# fills tiles: so many are compared.
LOOKED_AT = 2


class Mode(enum.StrEnum):
    SPLIT = "split"
    TURNS = "turns"
    FUSED = "fused"


ALL_MODES = frozenset(Mode)
Riding = Callable[[int], PrefillShape]


class Choice(NamedTuple):
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


class Ways:
    """The ways of sharing the device between one decode step and the prompt tokens to compute.

    prefill: those tokens. riding: the first so many of them, which ride in a fused step; if None,
    an even part of all. indivisible: all layers of the batch are one launch. max_step_tokens: of a
    fused step in all.

    A forecast is made when it is first needed, and kept: a second question costs little. For one
    turn only, since the model learns between turns.
    """

    def __init__(
        self,
        model: LatencyModel,
        table: PartitionTable,
        decode: DecodeShape,
        prefill: PrefillShape,
        num_layers: int,
        modes: frozenset[Mode] = ALL_MODES,
        riding: Riding | None = None,
        *,
        indivisible: bool = False,
        max_step_tokens: int = FUSED_STEP_TOKENS[-1],
    ) -> None:
        self._model = model
        self._splits = table.splits
        self._whole = table.whole
        self._decode = decode
        self._prefill = prefill
        self._num_layers = num_layers
        self._modes = modes
        self._riding = riding or partial(_even_part, prefill)
        self._indivisible = indivisible
        self._max_step_tokens = max_step_tokens
        # Decode steps beside prefill on the first splits, and what of these was looked at closer.
        self._steps: list[Forecast] = []
        self._split_choices: dict[int, Choice] = {}
        self._in_turn: tuple[Forecast, Forecast] | None = None
        self._fused_steps: dict[int, Forecast] = {}

    def best(self, limit_s: float) -> Choice | None:
        """The highest rate among the ways whose decode step ends within limit_s even at worst.

        None if no way is fast enough.
        """
        best: Choice | None = None
        if Mode.SPLIT in self._modes:
            best = self._best_split(limit_s)
        if Mode.TURNS in self._modes:
            best = _faster(best, self._turns(limit_s))
        if Mode.FUSED in self._modes:
            best = _faster(best, self._best_fusing(limit_s))
        return best

    def gentlest_split(self) -> Choice | None:
        """The split with the shortest decode step, whatever the deadline; None without splits."""
        places = range(len(self._splits))
        place = min(places, key=lambda place: self._step_on(place).worst_s, default=None)
        return None if place is None else self._on_split(place)

    def _best_split(self, limit_s: float) -> Choice | None:
        """The first that meets the deadline: further ones leave less to prefill."""
        for place in range(len(self._splits)):
            if self._step_on(place).worst_s <= limit_s:
                return self._on_split(place)
        return None

    def _step_on(self, place: int) -> Forecast:
        """Splits are gone through in order: all before this one have been asked for."""
        if place == len(self._steps):
            step = self._model.decode(self._decode, self._splits[place], self._prefill)
            self._steps.append(step)
        return self._steps[place]

    def _on_split(self, place: int) -> Choice:
        choice = self._split_choices.get(place)
        if choice is None:
            split = self._splits[place]
            batch = self._model.prefill(self._prefill, split, self._decode)
            rate = self._prefill.tokens / batch.expected_s
            layer = batch.times(1 / self._num_layers)
            choice = Choice(Mode.SPLIT, split, rate, self._steps[place], layer)
            self._split_choices[place] = choice
        return choice

    def _turns(self, limit_s: float) -> Choice | None:
        num_layers = self._num_layers
        if self._in_turn is None:
            batch = self._model.prefill(self._prefill, self._whole, None)
            step = self._model.decode(self._decode, self._whole, None)
            self._in_turn = step, batch.times(1 / num_layers)
        step, layer = self._in_turn
        layers = int(min((limit_s - step.worst_s) / layer.worst_s, num_layers))
        if layers < (num_layers if self._indivisible else 1):
            return None
        round_s = step.expected_s + layers * layer.expected_s
        rate = self._prefill.tokens * layers / num_layers / round_s
        return Choice(Mode.TURNS, self._whole, rate, step, layer, layers)

    def _best_fusing(self, limit_s: float) -> Choice | None:
        """Of the largest that meet the deadline: larger steps take longer, and compute more."""
        sizes = self._riding_tokens()
        in_time = bisect_left(
            sizes, True, key=lambda tokens: self._fused_step(tokens).worst_s > limit_s
        )
        best: Choice | None = None
        for tokens in reversed(sizes[max(in_time - LOOKED_AT, 0) : in_time]):
            step = self._fused_step(tokens)
            rate = tokens / step.expected_s
            if best is None or rate > best.rate:
                best = Choice(Mode.FUSED, self._whole, rate, step, fused_tokens=tokens)
        return best

    def _riding_tokens(self) -> list[int]:
        """How many prompt tokens may ride in a step, rising."""
        requests, most = self._decode.requests, self._prefill.tokens
        least = min(MIN_FUSED_TOKENS, most)
        sizes = [
            step_tokens - requests
            for step_tokens in FUSED_STEP_TOKENS
            if step_tokens <= self._max_step_tokens and step_tokens - requests >= least
        ]
        with_room = bisect_left(sizes, most)
        return [*sizes[:with_room], most] if with_room < len(sizes) else sizes

    def _fused_step(self, tokens: int) -> Forecast:
        step = self._fused_steps.get(tokens)
        if step is None:
            step = self._model.fused(self._decode, self._riding(tokens))
            self._fused_steps[tokens] = step
        return step


def _faster(a: Choice | None, b: Choice | None) -> Choice | None:
    """The one with the higher rate; of equals the first."""
    if a is None or (b is not None and b.rate > a.rate):
        return b
    return a


def best_mode(
    model: LatencyModel,
    table: PartitionTable,
    decode: DecodeShape,
    prefill: PrefillShape,
    limit_s: float,
    num_layers: int,
    modes: frozenset[Mode] = ALL_MODES,
) -> Choice | None:
    """What is best for one limit only: see Ways."""
    return Ways(model, table, decode, prefill, num_layers, modes).best(limit_s)


def gentlest_split(
    model: LatencyModel,
    table: PartitionTable,
    decode: DecodeShape,
    prefill: PrefillShape,
    num_layers: int,
) -> Choice | None:
    """See Ways."""
    return Ways(model, table, decode, prefill, num_layers).gentlest_split()


def _even_part(prefill: PrefillShape, tokens: int) -> PrefillShape:
    cached = prefill.cross // prefill.tokens
    return PrefillShape(tokens, tokens * tokens, tokens * cached)
