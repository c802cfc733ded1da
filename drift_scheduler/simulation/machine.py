"""Machine: what a profile tells of a device and a model, as far as a simulation needs it."""

from __future__ import annotations

import copy
import os
import re
from dataclasses import dataclass
from pathlib import Path

from drift_scheduler.latencies import Latencies
from drift_scheduler.partition import Partition, PartitionTable
from drift_scheduler.policies.modes import FUSED_STEP_TOKENS
from drift_scheduler.profile import Profile, ProfileError, Split


@dataclass(frozen=True, slots=True)
class Machine:
    """model: of the times that launches take; it stays as it is. graph_tokens: of the largest
    prefill batch that is one launch, 0 if none is.
    """

    table: PartitionTable
    model: Latencies
    num_layers: int
    graph_tokens: int

    @property
    def max_step_tokens(self) -> int:
        """Of a fused step, as the server limits it."""
        return self.graph_tokens or FUSED_STEP_TOKENS[-1]

    def learner(self) -> Latencies:
        """What a server knows of the machine when it starts, to learn more from what it sees."""
        return copy.deepcopy(self.model)


def load_machine(path: str | os.PathLike[str], num_layers: int | None = None) -> Machine:
    """The machine of a profile, whichever it is: the one that simulates need not be like it.

    num_layers: of the model; None takes what the profile's key says of it. Times are fitted as the
    server fits them, and stay as they are. Raises ProfileError, or EstimatorError where a phase
    was not measured.
    """
    try:
        profile = Profile.from_json(Path(path).read_bytes())
    except OSError as error:
        raise ProfileError(f"profile {path} cannot be read: {error.strerror or error}") from error
    except ProfileError as error:
        raise ProfileError(f"profile {path} is damaged or foreign: {error}") from error
    if num_layers is None:
        found = re.match(r"(\d+) layers\b", profile.key.model)
        if found is None:
            raise ProfileError(
                f"profile {path} does not say how many layers {profile.key.model!r} has: "
                "pass --num-layers"
            )
        num_layers = int(found[1])
    latencies = Latencies.of(profile, num_layers)
    measured = {sample.partition for sample in profile.samples if not sample.partition.exclusive}
    graph_tokens = max(profile.sizes.prefill, default=0)
    return Machine(_table(profile.key.sms, measured), latencies, num_layers, graph_tokens)


def _table(total_sms: int, measured: set[Split]) -> PartitionTable:
    """All splits that were measured; of those with equal decode shares the largest for prefill."""
    by_share = {split.decode_sms: split for split in sorted(measured)}
    splits = (by_share[share] for share in sorted(by_share))
    return PartitionTable(
        total_sms,
        tuple(
            Partition(index, split.prefill_sms, split.decode_sms)
            for index, split in enumerate(splits, start=1)
        ),
    )
