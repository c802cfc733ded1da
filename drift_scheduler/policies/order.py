"""In which order waiting prompts are computed, so that most of them have their first token in time.

Prompts that can still be in time go first, by due time; where not all of them can, the longest is
given up, again and again (Moore and Hodgson's rule, which leaves the fewest late). Those given up
come last, by arrival; but now and then it is their turn, so that nobody waits for ever. All this
among prompts of one rank: those of a lower rank go in front.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import heappush, heappushpop
from itertools import compress
from operator import attrgetter, not_

from drift_scheduler.backlog import Backlog, Prompt

# Prompts looked at: the most urgent ones that are not late yet, and the oldest of all.
LOOK_AHEAD = 20
LOOK_BACK = 8
# One in LATE_TURN slots of this length begins with prompts that have been given up.
SLOT_S = 1.0
LATE_TURN = 5
# A prompt of so many new tokens at most may be computed in front of a half-filled one.
WHOLE_TOKENS = 512
# A prompt that has waited so long after its due time takes part in those turns.
PATIENCE_S = 10.0

Seconds = Callable[[Sequence[Prompt]], Sequence[float]]
_ARRIVAL = attrgetter("arrival_s")
_RANK = attrgetter("rank")


def by_due_time(backlog: Backlog, now_s: float, seconds: Seconds) -> list[Prompt]:
    """The prompts to compute next, first to last. seconds: how long each takes alone."""
    urgent = [prompt for prompt in backlog.first_due(now_s, LOOK_AHEAD) if not prompt.deferred]
    oldest = [prompt for prompt in backlog.oldest(LOOK_BACK) if not prompt.deferred]
    in_time, given_up = fewest_late(urgent, now_s, seconds(urgent))
    late = sorted([*given_up, *oldest], key=_ARRIVAL)
    begun = backlog.begun
    order = [*in_time, *([begun] if begun else []), *late]
    if int(now_s / SLOT_S) % LATE_TURN == 0:
        order = [prompt for prompt in oldest if _overdue(prompt, now_s)] + order
    order = sorted({prompt.key: prompt for prompt in order}.values(), key=_RANK)
    return _begun_first(order) if begun else order


def _begun_first(order: list[Prompt]) -> list[Prompt]:
    """The half-filled prompt before all that cannot be computed whole in front of it.

    Only one prompt is half filled at a time, so a long one named before it would have to wait for
    it anyway.
    """
    place = next((i for i, prompt in enumerate(order) if prompt.begun), 0)
    if place == 0:
        return order
    short = [prompt for prompt in order[:place] if prompt.new <= WHOLE_TOKENS]
    long = [prompt for prompt in order[:place] if prompt.new > WHOLE_TOKENS]
    return [*short, *order[place : place + 1], *long, *order[place + 1 :]]


def _overdue(prompt: Prompt, now_s: float) -> bool:
    """A prompt that is never due is not to wait for ever either."""
    return now_s - min(prompt.due_s, prompt.arrival_s + PATIENCE_S) > PATIENCE_S


def fewest_late(
    prompts: Sequence[Prompt], now_s: float, took_s: Sequence[float]
) -> tuple[list[Prompt], list[Prompt]]:
    """(those that can be in time, by due time; those given up). prompts: by due time, each of which
    takes took_s.

    Moore, "An n job, one machine sequencing algorithm for minimizing the number of late jobs",
    Management Science 15 (1968).
    """
    longest: list[tuple[float, int]] = []  # (-seconds, position) of those kept
    keeps = [True] * len(prompts)
    end_s = now_s
    for position, (prompt, seconds) in enumerate(zip(prompts, took_s, strict=True)):
        end_s += seconds
        if end_s > prompt.due_s:
            minus_s, given_up = heappushpop(longest, (-seconds, position))
            end_s += minus_s
            keeps[given_up] = False
        else:
            heappush(longest, (-seconds, position))
    return list(compress(prompts, keeps)), list(compress(prompts, map(not_, keeps)))
