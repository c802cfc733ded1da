"""Adaptive: the way of sharing the device is chosen anew at every turn, from the latency model.

    admit      the prompts that can still be in time first; a batch only where a batch is the best
               way to compute them, otherwise they ride in decode steps
    dispatch   the way with the highest prefill rate whose decode step meets the next token
               deadlines at worst, and just as many layers as its decode step outlasts

With one phase absent the other has the whole device and nothing is sliced.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter

from drift_scheduler.backlog import Prompt
from drift_scheduler.dispatcher import MAX_SLICES_IN_FLIGHT, Admission, Plan
from drift_scheduler.partition import Partition, PartitionTable
from drift_scheduler.policies.latency_model import LatencyModel
from drift_scheduler.policies.modes import (
    ALL_MODES,
    FUSED_STEP_TOKENS,
    Choice,
    Mode,
    Riding,
    Ways,
)
from drift_scheduler.policies.order import by_due_time
from drift_scheduler.policies.slices import layers_to_outlast
from drift_scheduler.shapes import PrefillShape
from drift_scheduler.view import LoadView, PrefillView

# A step is launched so long before the one before it ends: late enough to know who joins it, early
# enough that the device does not wait for the host.
LAUNCH_AHEAD_S = 3e-3
# A batch beside decode: long enough to be efficient, short enough that the way can change soon.
BATCH_S = 0.2
MIN_BATCH_TOKENS = 1024
# Of the first waiting prompts, about a batch beside decode: what a way's rate is judged by.
FRONT_TOKENS = 4096
# New tokens, and cached ones, of the two forecasts that say how long waiting prompts take.
SAMPLE = 4096
# Where a request asks for nothing, its tokens are still to flow.
DEFAULT_TBT_S = 0.05

_ONE_SAMPLE = PrefillShape.of([(SAMPLE, 0)])
_SAMPLE_BEHIND_ANOTHER = PrefillShape.of([(SAMPLE, SAMPLE)])
_FUSED = frozenset({Mode.FUSED})
_KEY = attrgetter("key")


@dataclass(slots=True)
class _Queue:
    """The order of the waiting prompts, and the best way to compute the first of them."""

    order: list[Prompt]
    choice: Choice | None


@dataclass(slots=True)
class _Memo:
    """When nobody was admitted, dispatch is given the view that admit was: one look will do."""

    view: LoadView | None = None
    now_s: float = 0.0
    queue: _Queue | None = None


@dataclass(frozen=True, slots=True)
class Adaptive:
    """See the module.

    max_batch_tokens: new tokens of a prefill batch. max_step_tokens: of a fused step, those of
    running requests included. sheds: prompts that cannot have their first
    token in time any more, even alone on the device, are refused instead of served late.

    For ablations: modes, the ways that may be chosen; slices, whether a batch beside decode is
    launched in slices; polls, whether decode goes on while the end of a batch is awaited.
    """

    table: PartitionTable
    model: LatencyModel
    num_layers: int
    max_batch_tokens: int
    decode_depth: int = 2
    max_step_tokens: int = FUSED_STEP_TOKENS[-1]
    sheds: bool = False
    modes: frozenset[Mode] = ALL_MODES
    slices: bool = True
    polls: bool = True
    _memo: _Memo = field(default_factory=_Memo, init=False, repr=False, compare=False)

    def admit(self, view: LoadView, now_s: float) -> Admission | None:
        if view.prefill is not None:
            return self._preempt(view, view.prefill, now_s)
        shed = self._hopeless(view, now_s) if self.sheds else ()
        queue = self._queue(view, now_s)
        choice = queue.choice
        if not queue.order or (choice is not None and choice.mode is Mode.FUSED):
            return Admission(order=(), shed=shed) if shed else None
        tokens = self.max_batch_tokens
        if view.running:
            rate = choice.rate if choice else 0.0
            tokens = min(tokens, max(MIN_BATCH_TOKENS, round(rate * BATCH_S / 128) * 128))
        return Admission(tuple(map(_KEY, queue.order)), tokens, shed=shed)

    def dispatch(self, view: LoadView, now_s: float) -> Plan:
        prefill = view.prefill
        if not view.running:
            if prefill is None:
                return Plan(self.table.whole)
            return Plan(
                self.table.whole, prefill_layers=prefill.layers_left, reason="prefill alone"
            )
        if prefill is None:
            return self._fused(view, now_s) if view.can_fuse else self._decode_alone(view, now_s)
        return self._side_by_side(view, prefill, now_s)

    def _decode_alone(self, view: LoadView, now_s: float) -> Plan:
        step = self.model.decode(view.decode, self.table.whole, None)
        decode, again_s = self._step_due(view, now_s)
        return Plan(
            self.table.whole,
            decode=decode,
            step=step,
            reason="decode alone",
            look_again_s=again_s,
        )

    def _fused(self, view: LoadView, now_s: float) -> Plan:
        decode, again_s = self._step_due(view, now_s)
        if not decode:
            return Plan(self.table.whole, look_again_s=again_s)
        queue = self._queue(view, now_s)
        choice = queue.choice
        if choice is None or choice.mode is not Mode.FUSED:
            return self._decode_alone(view, now_s)
        return Plan(
            self.table.whole,
            decode=True,
            fused_tokens=choice.fused_tokens,
            fused_order=tuple(map(_KEY, queue.order)),
            step=choice.step,
            reason=f"fused: {choice.rate:.0f} prompt tokens/s",
            look_again_s=again_s,
        )

    def _side_by_side(self, view: LoadView, prefill: PrefillView, now_s: float) -> Plan:
        decode, again_s = self._step_due(view, now_s)
        if not self.polls and prefill.layers_left == 0:
            decode = False
        if not decode and prefill.slices_in_flight >= MAX_SLICES_IN_FLIGHT:
            return Plan(self.table.whole, look_again_s=again_s)
        ways = self._ways(view, prefill.shape)
        choice = self._choose(ways, view, now_s)
        if choice is None:
            # No way meets the deadline: decode as fast as it goes without stopping prefill.
            choice = ways.gentlest_split()
            why = "no way in time"
        else:
            why = f"{choice.rate:.0f} prompt tokens/s"
        if choice is None:
            return self._decode_alone(view, now_s)
        layer = choice.layer
        assert layer is not None
        if not self.slices:
            layers = prefill.layers_left
        elif choice.mode is Mode.TURNS:
            # A turn of each: the layers go behind the step that is launched with them.
            layers = min(choice.layers, prefill.layers_left) if decode else 0
        else:
            # Two slices are in flight at most; together they outlast the step.
            layers = layers_to_outlast(prefill, choice.step.expected_s / 2, layer.expected_s)
        return Plan(
            choice.partition,
            decode=decode,
            prefill_layers=layers,
            step=choice.step,
            layer=layer,
            reason=f"{choice.mode}: {why}",
            look_again_s=again_s,
        )

    def _queue(self, view: LoadView, now_s: float) -> _Queue:
        memo = self._memo
        if memo.queue is None or memo.view is not view or memo.now_s != now_s:
            order = self._order(view, now_s)
            choice = None
            if order and view.running:
                riding = partial(_front_of, order, view.backlog.begun is not None)
                ways = self._ways(view, riding(FRONT_TOKENS), riding)
                choice = self._choose(ways, view, now_s)
            memo.view, memo.now_s, memo.queue = view, now_s, _Queue(order, choice)
        return memo.queue

    def _ways(self, view: LoadView, prefill: PrefillShape, riding: Riding | None = None) -> Ways:
        return Ways(
            self.model,
            self.table,
            view.decode,
            prefill,
            self.num_layers,
            self.modes if view.prefill is None else self.modes - _FUSED,
            riding,
            indivisible=view.prefill is not None and view.prefill.indivisible,
            max_step_tokens=self.max_step_tokens,
        )

    def _choose(self, ways: Ways, view: LoadView, now_s: float) -> Choice | None:
        for limit_s in self._limits_s(view, now_s):
            choice = ways.best(limit_s)
            if choice is not None:
                return choice
        return None

    def _limits_s(self, view: LoadView, now_s: float) -> tuple[float, ...]:
        """How long the next decode step may take; then, for where nothing is that fast, how long
        without those who have just joined, and for whom it is too late."""
        tbt_s = view.tbt_s if math.isfinite(view.tbt_s) else DEFAULT_TBT_S
        starts_s = max(now_s, view.decode_ends_s or now_s)
        joined_s = view.joined_due_s - starts_s
        if joined_s < tbt_s:
            return joined_s - view.host_s, tbt_s - view.host_s
        return (tbt_s - view.host_s,)

    def _step_due(self, view: LoadView, now_s: float) -> tuple[bool, float | None]:
        """Whether to launch a decode step now, and if not, when."""
        if not view.takes_step(self.decode_depth):
            return False, None
        if view.decode_in_flight == 0 or view.decode_ends_s is None:
            return True, None
        launch_s = view.decode_ends_s - LAUNCH_AHEAD_S
        return now_s >= launch_s, launch_s

    def _order(self, view: LoadView, now_s: float) -> list[Prompt]:
        partition = self._usual_partition(view)
        beside = None if partition.exclusive else view.decode
        # The queue may be long: two forecasts give the time of all its prompts closely enough.
        first = self.model.prefill(_ONE_SAMPLE, partition, beside).expected_s
        later = self.model.prefill(_SAMPLE_BEHIND_ANOTHER, partition, beside).expected_s
        per_attended_s = (later - first) / SAMPLE**2
        per_token_s = first / SAMPLE - per_attended_s * SAMPLE / 2

        def seconds(prompts: Sequence[Prompt]) -> list[float]:
            return [
                prompt.new * (per_token_s + per_attended_s * (prompt.cached + prompt.new / 2))
                for prompt in prompts
            ]

        return by_due_time(view.backlog, now_s, seconds)

    def _usual_partition(self, view: LoadView) -> Partition:
        """What prompts that wait are likely to run on."""
        splits = self.table.splits
        return splits[len(splits) // 2] if view.running and splits else self.table.whole

    def _hopeless(self, view: LoadView, now_s: float) -> tuple[str, ...]:
        whole = self.table.whole
        return tuple(
            prompt.key
            for prompt in view.backlog.oldest(16)
            if not prompt.begun
            and (
                now_s > prompt.due_s
                or now_s + self.model.prefill(_rest_of(prompt), whole, None).expected_s
                > prompt.due_s
            )
        )

    def _preempt(self, view: LoadView, active: PrefillView, now_s: float) -> Admission | None:
        """The most urgent prompt, if it would be late behind the batch in flight and that batch
        stays in time behind it, or is late anyway."""
        urgent = next(iter(view.backlog.first_due(now_s, 1)), None)
        if urgent is None or urgent.deferred or urgent.begun or active.layer_s is None:
            return None
        rest_s = active.layers_left * active.layer_s
        if urgent.due_s >= now_s + 2 * rest_s or urgent.new > self.max_batch_tokens:
            return None
        partition = self._usual_partition(view)
        beside = None if partition.exclusive else view.decode
        own_s = self.model.prefill(_rest_of(urgent), partition, beside).worst_s
        late_behind = now_s + rest_s + own_s > urgent.due_s
        in_time_before = now_s + own_s <= urgent.due_s
        victim_in_time = now_s + own_s + rest_s <= active.due_s
        victim_late_anyway = now_s + rest_s > active.due_s
        if late_behind and in_time_before and (victim_in_time or victim_late_anyway):
            return Admission((urgent.key,), urgent.new, preempts=True)
        return None


def _front_of(order: Sequence[Prompt], one_is_begun: bool, tokens: int) -> PrefillShape:
    """The first so many new tokens. Before a half-filled prompt no other one is cut."""
    cut_before = one_is_begun
    squares = cross = requests = 0
    left = tokens
    for prompt in order:
        if prompt.begun:
            cut_before = False
        elif cut_before and prompt.new > left:
            continue
        new = min(prompt.new, left)
        left -= new
        squares += new * new
        cross += new * prompt.cached
        requests += 1
        if not left:
            break
    return PrefillShape(tokens - left, squares, cross, requests)


def _rest_of(prompt: Prompt) -> PrefillShape:
    return PrefillShape.of([(prompt.new, prompt.cached)])
