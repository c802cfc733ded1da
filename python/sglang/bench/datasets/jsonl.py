"""Reads JSONL and JSON files, gzip-compressed or not."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from typing import Any, TypeVar

import orjson

from sglang.bench.errors import BenchError
from sglang.bench.options import BenchOptions

Row = TypeVar("Row")


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
    rows = read_json(path)
    if not isinstance(rows, list):
        raise BenchError(f"{path}: not a list")
    return rows


def read_json(path: str) -> Any:
    try:
        return orjson.loads(_read(path))
    except orjson.JSONDecodeError as error:
        raise BenchError(f"{path}: not JSON: {error}") from error


def read_rows_or_list(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """As read_rows, of a JSONL file or of a JSON file with a list of objects."""
    if not _read(path).lstrip().startswith(b"["):
        yield from read_rows(path)
        return
    for number, row in enumerate(read_list(path)):
        if not isinstance(row, dict):
            raise BenchError(f"{path}: entry {number} is not an object")
        yield f"{path}: entry {number}", row


def rotated(rows: list[Row], offset: int) -> list[Row]:
    """From the row `offset` on, then those before it; it counts round and round."""
    at = offset % len(rows) if rows else 0
    return rows[at:] + rows[:at]


def checked_messages(where: str, messages: Any) -> list[dict[str, Any]]:
    """Raises BenchError unless it is a list of messages, each with a role."""
    if not isinstance(messages, list) or not messages:
        raise BenchError(f"{where}: needs a list `messages`")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise BenchError(f"{where}: every message needs a string `role`")
    return messages


def _read(path: str) -> bytes:
    try:
        with gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb") as file:
            return file.read()
    except (OSError, EOFError) as error:
        raise BenchError(f"--dataset-path {path}: {error}") from error
