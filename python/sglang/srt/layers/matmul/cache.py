"""TableCache: tuned tables on disk, so that a second start measures nothing."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sgl_kernel.tile import Tile
from sglang.srt.layers.matmul.choice import Backend, Choice
from sglang.srt.layers.matmul.table import LaneTable, Shape

logger = logging.getLogger(__name__)

# Raised whenever tiles or kernels change: what was fastest may not be any more.
FORMAT = 2
PACKAGES = ("torch", "triton", "sgl-deep-gemm")

Json = dict[str, Any]


def versions() -> dict[str, str]:
    """Of the installed packages whose kernels are compared."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


class TableCache:
    """Tables by key: everything, as JSON, that a table depends on but the lane's SM count.

    Never raises: what cannot be read is tuned anew, what cannot be written is lost.
    """

    def __init__(self, folder: Path, key: Json) -> None:
        self._key = {"format": FORMAT, **key}
        digest = hashlib.sha256(json.dumps(self._key, sort_keys=True).encode()).hexdigest()
        self.path = folder / f"matmul-{digest[:16]}.json"

    def load(self) -> dict[int, LaneTable]:
        """Tables by SM count; those there are."""
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return {}
        except (OSError, UnicodeDecodeError) as error:
            logger.warning("Matmul tables are tuned anew: %s", error)
            return {}
        try:
            file = json.loads(text)
            if file["key"] != self._key:
                raise ValueError("it was made for something else")
            return {int(sms): _table(table) for sms, table in file["lanes"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("Matmul tables are tuned anew: %s is broken: %s", self.path, error)
            return {}

    def store(self, tables: Mapping[int, LaneTable]) -> None:
        """Replaces the file at once: a reader finds the old or the new one, never half of it."""
        lanes = {str(sms): _table_json(table) for sms, table in sorted(tables.items())}
        text = json.dumps({"key": self._key, "lanes": lanes}, indent=1)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(
                "w", encoding="utf-8", dir=self.path.parent, prefix=self.path.stem, delete=False
            ) as file:
                file.write(text)
            os.replace(file.name, self.path)
        except OSError as error:
            logger.warning("Matmul tables are not kept for the next start: %s", error)


def _table_json(table: LaneTable) -> Json:
    return {
        "products": _rows(table.products),
        "fused": _rows(table.fused),
    }


def _rows(choices: Mapping[Shape, Mapping[int, Choice | None]]) -> list[Json]:
    return [
        {
            "n": shape.n,
            "k": shape.k,
            "m": m,
            "backend": None if choice is None else str(choice.backend),
            "tile": None if choice is None or choice.tile is None else choice.tile._asdict(),
        }
        for shape, ladder in choices.items()
        for m, choice in ladder.items()
    ]


def _table(file: Json) -> LaneTable:
    products: dict[Shape, dict[int, Choice]] = {}
    for shape, m, choice in map(_row, file["products"]):
        if choice is None:
            raise ValueError(f"no choice for {shape}")
        products.setdefault(shape, {})[m] = choice
    fused: dict[Shape, dict[int, Choice | None]] = {}
    for shape, m, choice in map(_row, file["fused"]):
        fused.setdefault(shape, {})[m] = choice
    return LaneTable(products, fused)


def _row(row: Json) -> tuple[Shape, int, Choice | None]:
    shape = Shape(int(row["n"]), int(row["k"]))
    if row["backend"] is None:
        return shape, int(row["m"]), None
    backend = Backend(row["backend"])
    tile = None if row["tile"] is None else Tile(**row["tile"])
    if (tile is None) == (backend is Backend.TRITON):
        raise ValueError(f"{backend} with tile {tile}")
    return shape, int(row["m"]), Choice(backend, tile)
