"""Profile: what a machine was measured to do with a model, kept in a file.

A profile holds raw samples, from which an Estimator is fitted anew at every start, and the rows of
a Guard, which are also refined while serving. It is valid for one machine, model and set of
versions: its key.

The file is JSON, one sample or cell to a line.
"""

from __future__ import annotations

import enum
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

import msgspec

from drift_scheduler.partition import Partition
from drift_scheduler.shapes import DecodeShape, PrefillShape

FORMAT = 1

_REMEDY = (
    "pass --drift-profile with a profile of this machine, "
    "or measure one with `python -m sglang.profile_drift`"
)


class ProfileError(ValueError):
    """A profile cannot be read, or is not of this machine and model."""


class Kind(enum.StrEnum):
    """What was timed: a decode step, a prefill batch, or a step in which prompt tokens ride."""

    DECODE = "decode"
    PREFILL = "prefill"
    FUSED = "fused"


class Split(NamedTuple):
    """A partition without its place in a table: a profile outlives the table it was measured in.

    With `exclusive` both counts are the whole device's.
    """

    prefill_sms: int
    decode_sms: int
    exclusive: bool = False

    @classmethod
    def of(cls, partition: Partition) -> Split:
        return cls(partition.prefill_sms, partition.decode_sms, partition.exclusive)

    def __str__(self) -> str:
        return "whole" if self.exclusive else f"p{self.prefill_sms}/d{self.decode_sms}"


@dataclass(frozen=True)
class ProfileKey:
    """What a profile is valid for.

    gpu: the device's name; sms: of the whole device. model: its shape in a few words (layers,
    hidden, heads, kv heads, intermediate, vocab), so that two checkpoints of one shape share a
    profile. tp: GPUs that the model is spread over. versions: of what makes kernels faster or
    slower, by name.
    """

    gpu: str
    sms: int
    model: str
    tp: int
    dtype: str
    versions: Mapping[str, str] = field(default_factory=dict)

    def differences(self, expected: ProfileKey) -> list[str]:
        """ "field: found X, expected Y" for every field that differs; empty if none does."""
        found_values, expected_values = self._flat(), expected._flat()
        return [
            f"{name}: found {_shown(found_values.get(name))}, "
            f"expected {_shown(expected_values.get(name))}"
            for name in dict.fromkeys([*found_values, *expected_values])
            if found_values.get(name) != expected_values.get(name)
        ]

    def _flat(self) -> dict[str, str | int]:
        flat = {item.name: getattr(self, item.name) for item in fields(self)}
        versions = flat.pop("versions")
        return flat | {f"versions.{name}": versions[name] for name in sorted(versions)}


@dataclass(frozen=True, slots=True)
class Sample:
    """One measured time.

    decode, prefill: the work. Both are given for a fused step, and with `beside`, where the other
    phase ran beside the one of `kind` all the while. seconds: of the work of `kind`, for all
    layers of the model even where fewer were timed; the median of several runs, of which the
    slowest took slowest_s, if known. layers: how many were timed, 0 for a decode or fused step,
    which always runs all of them. clock_mhz: of the SMs meanwhile, if known.
    """

    kind: Kind
    partition: Split
    seconds: float
    decode: DecodeShape | None = None
    prefill: PrefillShape | None = None
    layers: int = 0
    beside: bool = False
    clock_mhz: float | None = None
    slowest_s: float | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.seconds) and self.seconds > 0):
            raise ValueError(f"seconds={self.seconds} must be positive and finite")
        if self.slowest_s is not None and not self.seconds <= self.slowest_s < math.inf:
            raise ValueError(f"slowest_s={self.slowest_s} must be at least {self.seconds}")
        if self.clock_mhz is not None and not self.clock_mhz > 0:
            raise ValueError(f"clock_mhz={self.clock_mhz} must be positive")
        if self.beside and self.kind is Kind.FUSED:
            raise ValueError("nothing runs beside a fused step")
        both = self.beside or self.kind is Kind.FUSED
        if (self.decode is not None) != (both or self.kind is Kind.DECODE):
            raise ValueError(f"decode={self.decode} does not fit {self._described()}")
        if (self.prefill is not None) != (both or self.kind is Kind.PREFILL):
            raise ValueError(f"prefill={self.prefill} does not fit {self._described()}")
        if (self.layers > 0) != (self.kind is Kind.PREFILL) or self.layers < 0:
            raise ValueError(f"layers={self.layers} does not fit {self._described()}")

    def _described(self) -> str:
        return f"a {self.kind.value} sample {'beside the other phase' if self.beside else 'alone'}"


@dataclass(frozen=True, slots=True)
class GuardCell:
    """One row of a Guard: how much slower than predicted such work runs.

    tokens, cached, requests, context: log2 buckets of the shapes (see guard.py); None where there
    was no such phase. worst, expected: factors on the solo prediction. clock_mhz: of the SMs when
    the row was last refined, if known. observations: how many it has seen.
    """

    kind: Kind
    partition: Split
    tokens: int | None
    cached: int | None
    requests: int | None
    context: int | None
    worst: float
    expected: float
    observations: int = 0
    clock_mhz: float | None = None

    def __post_init__(self) -> None:
        for name in ("worst", "expected"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}={value} must be positive and finite")


@dataclass(frozen=True, slots=True)
class PaddedSizes:
    """What batches are padded to before they run, rising; beyond the last one nothing is padded.

    decode: requests of a decode step. prefill: tokens of a prefill batch or fused step.
    """

    decode: tuple[int, ...] = ()
    prefill: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Profile:
    """samples: to fit; checked: others, to see how well the fit does. cells: of a guard that has
    served. sizes: as the engine that was measured pads them."""

    key: ProfileKey
    samples: Sequence[Sample]
    cells: Sequence[GuardCell] = ()
    sizes: PaddedSizes = PaddedSizes()
    checked: Sequence[Sample] = ()

    def to_json(self) -> str:
        """The same text for the same content: rows are sorted."""
        return (
            "{\n"
            f'"format": {FORMAT},\n'
            f'"key": {_json(self.key)},\n'
            f'"sizes": {_json(self.sizes)},\n'
            f'"samples": {_rows(self.samples)},\n'
            f'"checked": {_rows(self.checked)},\n'
            f'"cells": {_rows(self.cells)}\n'
            "}\n"
        )

    @classmethod
    def from_json(cls, text: str | bytes) -> Profile:
        """Raises ProfileError with the place of what is wrong."""
        try:
            found = msgspec.json.decode(text, type=_Head).format
            if found != FORMAT:
                raise ProfileError(f"format: found {found}, expected {FORMAT}; {_REMEDY}")
            file = msgspec.json.decode(text, type=_File)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ProfileError(f"{error}; {_REMEDY}") from error
        return cls(file.key, file.samples, file.cells, file.sizes, file.checked)

    def save(self, path: str | os.PathLike[str]) -> None:
        """All or nothing: a reader, or a crash half way, sees the old file or the new one."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f"{target.name}.", dir=target.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(self.to_json())
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str], key: ProfileKey) -> Profile:
        """The profile in a file, which must be of `key`.

        Raises ProfileError if the file cannot be read, is damaged or has another key.
        """
        try:
            text = Path(path).read_bytes()
        except OSError as error:
            reason = error.strerror or str(error)
            raise ProfileError(f"profile {path} cannot be read: {reason}; {_REMEDY}") from error
        try:
            profile = cls.from_json(text)
        except ProfileError as error:
            raise ProfileError(f"profile {path} is damaged or foreign: {error}") from error
        differences = profile.key.differences(key)
        if differences:
            raise ProfileError(
                f"profile {path} is not of this machine and model: "
                f"{'; '.join(differences)}; {_REMEDY}"
            )
        return profile


class _Head(msgspec.Struct):
    format: int


class _File(msgspec.Struct):
    key: ProfileKey
    samples: tuple[Sample, ...]
    cells: tuple[GuardCell, ...] = ()
    sizes: PaddedSizes = PaddedSizes()
    checked: tuple[Sample, ...] = ()


def _shown(value: str | int | None) -> str:
    return "nothing" if value is None else repr(value)


def _json(value: object) -> str:
    return msgspec.json.encode(value, order="deterministic").decode()


def _rows(values: Sequence[object]) -> str:
    rows = sorted(_json(value) for value in values)
    return "[\n" + ",\n".join(rows) + "\n]" if rows else "[]"
