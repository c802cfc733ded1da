"""Another engine's frontiers, to compare with: prompt tokens/s by decode step time."""

from __future__ import annotations

from bisect import bisect_left
from pathlib import Path

import msgspec

from sglang.srt.errors import ConfigError


class Baseline(msgspec.Struct, frozen=True):
    """what: whose, on what. prefill: of the frontiers, as the benchmark's flag writes it.
    frontiers: by decode batch, (step_ms, rate) with rising steps."""

    what: str
    prefill: str
    frontiers: dict[str, list[tuple[float, float]]]

    @classmethod
    def load(cls, path: Path) -> Baseline:
        """Raises ConfigError naming the file and what is wrong with it."""
        try:
            found = msgspec.json.decode(path.read_bytes(), type=cls)
        except OSError as error:
            raise ConfigError(f"--baseline {path}: {error.strerror}") from error
        except msgspec.DecodeError as error:
            raise ConfigError(f"--baseline {path}: {error}") from error
        for decode, points in found.frontiers.items():
            if not points or points != sorted(points):
                raise ConfigError(f"--baseline {path}: {decode}: steps must rise")
        return found

    def rate(self, decode: str, step_ms: float) -> float | None:
        """Between two points on the line through them, behind the last one no more than there.
        None where it has no step so short, or has not measured the batch."""
        points = self.frontiers.get(decode)
        if points is None or step_ms < points[0][0]:
            return None
        place = bisect_left(points, (step_ms,))
        if place == len(points):
            return points[-1][1]
        if place == 0:
            return points[0][1]
        (before_ms, before), (after_ms, after) = points[place - 1 : place + 1]
        return before + (after - before) * (step_ms - before_ms) / (after_ms - before_ms)
