"""Service levels: what a request asks of time, from flags, the config file and its own `slo`.

Milliseconds are what people write, here and at every edge; inside, an Slo has seconds. A part that
a request leaves open is its class's, a part that a class leaves open is the server's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from drift_scheduler.slo import Slo
from sglang.srt.errors import RequestError

# Names under which requests are counted that name no class; "default" may be asked for, too.
DEFAULT = "default"
CUSTOM = "custom"

KEYS = ("ttft_ms", "ttft_ms_per_token", "tbt_ms")
_SHORTEST_MS, _LONGEST_MS = 1e-6, 1e12

LimitsMs = Mapping[str, float | None]


@dataclass(frozen=True, slots=True)
class ServiceLevel:
    """An SLO and the name of the class that it is counted in."""

    slo: Slo = field(default_factory=Slo)
    class_name: str = DEFAULT


NOTHING_ASKED = ServiceLevel()
# Of the server's own requests, such as health checks; what has no name is not counted.
OWN_REQUEST = ServiceLevel(class_name="")


class ServiceLevels:
    """The server's levels: milliseconds by key, and by class and key as of `checked_classes`."""

    def __init__(self, default_ms: LimitsMs, classes_ms: Mapping[str, LimitsMs]) -> None:
        self._default_ms = default_ms
        self.default = ServiceLevel(slo_of(default_ms))
        self._by_name = {DEFAULT: self.default} | {
            name: ServiceLevel(slo_of(default_ms, limits_ms), name)
            for name, limits_ms in classes_ms.items()
        }

    def resolve(self, asked: object, where: str = "slo") -> ServiceLevel:
        """The level of a request: None, the name of a class, or an object of some of KEYS.

        where: the field it came from. Raises RequestError naming it.
        """
        match asked:
            case None:
                return self.default
            case str():
                return self._named(asked, where)
            case dict():
                return self._custom(asked, where)
            case _:
                problem = f"must be an object or the name of a class, got {asked!r}"
                raise RequestError(f"{where}: {problem}", where)

    def _named(self, name: str, where: str) -> ServiceLevel:
        level = self._by_name.get(name)
        if level is None:
            known = ", ".join(self._by_name)
            raise RequestError(f"{where}: no class {name!r}, this server has {known}", where)
        return level

    def _custom(self, limits_ms: dict[Any, Any], where: str) -> ServiceLevel:
        for key, value in limits_ms.items():
            problem = problem_of(key, value)
            if problem is not None:
                raise RequestError(f"{where}.{key}: {problem}", f"{where}.{key}")
        slo = slo_of(self._default_ms, limits_ms)
        return self.default if slo == self.default.slo else ServiceLevel(slo, CUSTOM)


def slo_of(*layers_ms: LimitsMs) -> Slo:
    """The limits as an SLO; those of a later layer replace those of an earlier one."""
    limits_s = {
        key: limit_ms / 1000
        for layer_ms in layers_ms
        for key, limit_ms in layer_ms.items()
        if limit_ms is not None
    }
    none_asked = Slo()
    per_token_s = limits_s.get("ttft_ms_per_token", none_asked.ttft_per_token_s)
    return Slo(
        # Of the two limits of the first token the longer one holds. Where one for each token is
        # the only one, the other is that of a single token, which no prompt goes below.
        ttft_s=limits_s.get("ttft_ms", per_token_s or none_asked.ttft_s),
        ttft_per_token_s=per_token_s,
        tbt_s=limits_s.get("tbt_ms", none_asked.tbt_s),
    )


def problem_of(key: object, value: object) -> str | None:
    """What is wrong with a limit in milliseconds, None if nothing is. None leaves it open."""
    if key not in KEYS:
        return f"is not a known limit; known are {', '.join(KEYS)}"
    if value is None:
        return None
    if isinstance(value, int | float) and not isinstance(value, bool):
        if _SHORTEST_MS <= value <= _LONGEST_MS:
            return None
        if value > 0:
            return f"must be within {_SHORTEST_MS:g} and {_LONGEST_MS:g} milliseconds, got {value}"
    return f"must be a number of milliseconds greater than 0, got {value!r}"


def checked_classes(value: object) -> dict[str, dict[str, float]]:
    """`slo_classes` of a config file: {name: {key: milliseconds}}.

    Raises ValueError that says which class, which key and what is wrong.
    """
    if not isinstance(value, dict):
        raise ValueError(f"expected a mapping of class names to limits, got {value!r}")
    return {name: _checked_class(name, limits) for name, limits in value.items()}


def _checked_class(name: object, limits: object) -> dict[str, float]:
    if not isinstance(name, str) or not name:
        raise ValueError(f"{name!r}: the name of a class must be text")
    if name in (DEFAULT, CUSTOM):
        raise ValueError(f"{name}: this name is taken, requests without a class go by it")
    if not isinstance(limits, dict):
        raise ValueError(f"{name}: expected a mapping of limits, got {limits!r}")
    for key, value in limits.items():
        problem = problem_of(key, value)
        if problem is not None:
            raise ValueError(f"{name}: {key} {problem}")
    return {key: float(value) for key, value in limits.items() if value is not None}
