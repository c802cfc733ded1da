"""docs/compatibility.md: every name of SGLang's is on it, judged by what the code has."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

DOCS = Path(__file__).parents[2] / "docs"
UPSTREAM: Mapping[str, Any] = json.loads((DOCS / "data" / "upstream_surface.json").read_text())


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(DOCS)
    import compat_compare

    return compat_compare


def judged(compare: ModuleType, key: str) -> dict[str, Any]:
    [family] = [family for family in compare.families() if family.key == key]
    return {entry.key: entry for entry in family.entries}


def test_every_name_of_the_list_is_judged_once(compare: ModuleType) -> None:
    counts = {family.key: len(family.entries) for family in compare.families()}
    assert counts["flags"] == len(UPSTREAM["flags"]) == 460
    assert counts["endpoints"] == len(UPSTREAM["endpoints"])
    assert counts["request_fields"] == sum(map(len, UPSTREAM["request_fields"].values()))
    for key in ("sampling_params", "frontend", "engine", "program_state", "metrics"):
        assert counts[key] == len(UPSTREAM[key])
    assert counts["bench_serving"] == len(UPSTREAM["bench_serving"]) == 83
    for family in compare.families():
        keys = [entry.key for entry in family.entries]
        assert len(keys) == len(set(keys)), family.key


def test_flags_are_the_same_differ_or_are_missing(compare: ModuleType) -> None:
    flags = judged(compare, "flags")
    assert flags["--context-length"].status == compare.SAME
    assert flags["--sm-group-num"].how == "default decided at start, SGLang's `8`"
    assert flags["--tp-size"].how == "only 1"
    assert flags["--hicache-ratio"].status == compare.NOT_YET


def test_fields_with_a_neutral_value_are_not_called_served(compare: ModuleType) -> None:
    fields = judged(compare, "request_fields")
    assert fields["/generate text"].status == compare.SAME
    assert fields["/generate lora_path"].status == compare.NOT_YET
    assert "refused unless `null`" in fields["/generate lora_path"].how
    assert fields["/generate custom_labels"].how == "taken, changes nothing"
    assert fields["/v1/chat/completions messages"].status == compare.SAME


def test_response_fields_are_found_in_the_code_that_writes_them(compare: ModuleType) -> None:
    fields = judged(compare, "response_fields")
    assert fields["/generate meta_info e2e_latency"].status == compare.SAME
    assert fields["/v1/chat/completions ChatCompletionResponseChoice message"].status == "same"
    assert fields["/v1/models ModelCard parent"].how == "null"


def test_an_endpoint_taken_away_is_no_longer_called_served(
    compare: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert judged(compare, "endpoints")["/flush_cache"].status == compare.SAME
    rest = {path: found for path, found in compare.routes().items() if path != "/flush_cache"}
    monkeypatch.setattr(compare, "routes", lambda: rest)
    assert judged(compare, "endpoints")["/flush_cache"].status == compare.NOT_YET


@pytest.mark.parametrize(
    "notes",
    [
        {"flags": {"--no-such-flag": "x"}},
        {"flags": {"--hicache-ratio": "x"}},  # SGLang's, but not ours
        {"no_such_family": {}},
    ],
)
def test_notes_on_what_is_not_there_are_errors(
    compare: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, notes: dict[str, Any]
) -> None:
    for name, content in (
        ("upstream_surface.json", UPSTREAM),
        ("compatibility_notes.json", notes),
    ):
        (tmp_path / name).write_text(json.dumps(content))
    monkeypatch.setattr(compare, "DATA", tmp_path)
    with pytest.raises(compare.StaleNote):
        compare.families()
