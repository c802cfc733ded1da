"""From a request's `priority` to its rank among those that wait."""

from __future__ import annotations

from sglang.srt.errors import RequestError
from sglang.srt.server_args import ServerArgs

LAST = 2**63 - 1  # of requests that name no priority where others may


def rank_of(priority: int | None, args: ServerArgs) -> int:
    """Lower ranks go first. Raises RequestError."""
    if priority is None:
        return LAST if args.enable_priority_scheduling else 0
    if not args.enable_priority_scheduling:
        raise RequestError(
            "priority: this server runs without --enable-priority-scheduling", "priority"
        )
    if not -LAST <= priority <= LAST:
        raise RequestError(f"priority: must be in [{-LAST}, {LAST}]", "priority")
    return priority if args.schedule_low_priority_values_first else -priority
