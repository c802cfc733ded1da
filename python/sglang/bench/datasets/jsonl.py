"""Reads JSONL and JSON files, gzip-compressed or not."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from typing import Any

import orjson

from sglang.bench.errors import BenchError
from sglang.bench.options import BenchOptions


def required_path(options: BenchOptions) -> str:
    if options.dataset_path is None:
        raise BenchError(
            f"--dataset-name {options.dataset_name} needs --dataset-path; nothing is downloaded"
        )
    return options.dataset_path


def read_rows(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields ("file:line", row) of a JSONL file, empty lines apart."""
    for number, line in enumerate(_read(path).splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise BenchError(f"{where}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise BenchError(f"{where}: not an object")
        yield where, row


def read_list(path: str) -> list[Any]:
    """The top-level list of a JSON file."""
    try:
        rows = orjson.loads(_read(path))
    except orjson.JSONDecodeError as error:
        raise BenchError(f"{path}: not JSON: {error}") from error
    if not isinstance(rows, list):
        raise BenchError(f"{path}: not a list")
    return rows


def _read(path: str) -> bytes:
    try:
        with gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb") as file:
            return file.read()
    except (OSError, EOFError) as error:
        raise BenchError(f"--dataset-path {path}: {error}") from error
