"""Ours against the lists of docs/data/upstream_surface.json, family by family."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compat_surface import (
    BENCH_REFUSED,
    bench_actions,
    body,
    export,
    metrics,
    only_raises,
    parameters,
    program_state,
    read,
    routes,
    sampling_fields,
    sampling_neutral,
    server_actions,
    websockets,
    without_parameter_names,
    written,
)

from sglang.srt.entrypoints.openai.protocol import SamplingFields
from sglang.srt.entrypoints.openai.sampling import RENAMED
from sglang.srt.server_args import FLAGS
from sglang.srt.upstream_flags import UNSUPPORTED_FLAGS

DATA = Path(__file__).parent / "data"
SAME, DIFFERENT, NOT_YET = "same", "different", "not yet"


@dataclass(frozen=True, slots=True)
class Entry:
    """One name of SGLang's. how: what differs, or what happens to who asks for it. place: the
    endpoint, and part of its body, that a field belongs to; empty elsewhere."""

    name: str
    status: str
    how: str = ""
    place: str = ""

    @property
    def key(self) -> str:
        """What a note is kept under."""
        return f"{self.place} {self.name}".strip()


@dataclass(frozen=True, slots=True)
class Family:
    """ours: names of the same kind that SGLang has not; empty where they are listed elsewhere."""

    key: str
    title: str
    entries: list[Entry]
    ours: tuple[str, ...] = ()


class StaleNote(Exception):
    """A note on a name that SGLang or this server has not."""


def families() -> list[Family]:
    """Every family, notes applied. Raises StaleNote."""
    upstream = json.loads((DATA / "upstream_surface.json").read_text(encoding="utf-8"))
    notes = json.loads((DATA / "compatibility_notes.json").read_text(encoding="utf-8"))
    makers: list[Callable[[Mapping[str, Any]], Family]] = [
        _flags,
        _endpoints,
        _request_fields,
        _request_parts,
        _sampling,
        _response_fields,
        _frontend,
        _engine,
        _program_state,
        _metrics,
        _bench,
    ]
    made = [make(upstream) for make in makers]
    unknown = set(notes) - {family.key for family in made}
    if unknown:
        raise StaleNote(f"compatibility_notes.json: no family is called {sorted(unknown)}")
    return [_annotated(family, notes.get(family.key, {})) for family in made]


def _annotated(family: Family, notes: Mapping[str, str]) -> Family:
    stale = set(notes) - {e.key for e in family.entries if e.status != NOT_YET}
    if stale:
        raise StaleNote(
            f"compatibility_notes.json, {family.key}: SGLang or this server has no {sorted(stale)}"
        )
    entries = [
        replace(entry, status=DIFFERENT, how="; ".join(filter(None, (entry.how, notes[entry.key]))))
        if entry.key in notes
        else entry
        for entry in family.entries
    ]
    return replace(family, entries=entries)


def _judged(name: str, differences: Sequence[str], place: str = "") -> Entry:
    return Entry(name, DIFFERENT if differences else SAME, "; ".join(differences), place)


def _flags(upstream: Mapping[str, Any]) -> Family:
    specs = {name: spec for spec in FLAGS for name in spec.names}
    actions = server_actions()
    entries = []
    for theirs in upstream["flags"]:
        first, *aliases = theirs["names"]
        known = [name for name in theirs["names"] if name in actions]
        if not known:
            refused = any(name in UNSUPPORTED_FLAGS for name in theirs["names"])
            entries.append(Entry(first, NOT_YET, "" if refused else "unknown flag"))
            continue
        differences = [f"no `{n}`" for n in (first, *aliases) if n not in actions]
        spec = specs.get(known[0])
        if spec is not None:
            differences += _of_values(
                theirs, spec.default, spec.choices, takes_value=not spec.is_switch
            )
        entries.append(_judged(first, differences))
    names = {name for theirs in upstream["flags"] for name in theirs["names"]}
    ours = tuple(s.names[0] for s in FLAGS if not names & set(s.names))
    return Family("flags", "Flags of the server", entries, ours)


def _of_values(
    theirs: Mapping[str, Any], default: Any, choices: Sequence[Any] | None, *, takes_value: bool
) -> Iterator[str]:
    if takes_value == theirs.get("switch", False):
        yield "takes a value" if takes_value else "takes no value"
        return
    if takes_value and _plain(default) != _plain(theirs["default"]):
        chosen = "decided at start"
        ours, others = (
            chosen if value is None else f"`{value}`"
            for value in (_plain(default), _plain(theirs["default"]))
        )
        yield f"default {ours}, SGLang's {others}"
    if choices is not None:
        missing = set(theirs.get("choices", ())) - set(map(str, choices))
        if missing or "choices" not in theirs:
            yield f"takes only {', '.join(f'`{choice}`' for choice in choices)}"


def _plain(value: Any) -> str | None:
    if isinstance(value, bool) or value in (None, "", [], {}, "{}"):
        return None if value in (None, "", [], {}, "{}") else str(value)
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def _endpoints(upstream: Mapping[str, Any]) -> Family:
    entries = []
    for path, methods in upstream["endpoints"].items():
        plain = without_parameter_names(path)
        served = {m for handler in routes().get(plain, ()) for m in handler.methods}
        served |= {"WS"} & set(methods) if plain in websockets() else set()
        missing = sorted(set(methods) - served)
        if len(missing) == len(methods):
            entries.append(Entry(path, NOT_YET, "404"))
        else:
            entries.append(_judged(path, [f"no {method}" for method in missing]))
    theirs = {without_parameter_names(path) for path in upstream["endpoints"]}
    return Family("endpoints", "Endpoints", entries, tuple(sorted(set(routes()) - theirs)))


def _request_fields(upstream: Mapping[str, Any]) -> Family:
    entries = [
        _of_body(path, field)
        for path, fields in upstream["request_fields"].items()
        for field in fields
    ]
    return Family("request_fields", "Request fields", entries)


def _of_body(path: str, field: str) -> Entry:
    form = body(path)
    if form is None:
        how = "the body is not described" if path in routes() else "no such endpoint"
        return Entry(field, NOT_YET, how, path)
    parameter = RENAMED.get(field, field)
    if field in form.model.model_fields:
        refused = field in SamplingFields.model_fields and parameter in sampling_neutral()
        how = _only(sampling_neutral()[parameter]) if refused else ""
        return Entry(field, NOT_YET if refused else SAME, how, path)
    values = form.neutral.get(field, ())
    if field in form.informational or (True in values and False in values):
        return Entry(field, DIFFERENT, "taken, changes nothing", path)
    return Entry(field, NOT_YET, _only(values) if values else "refused", path)


def _only(neutral: Sequence[Any]) -> str:
    values = ", ".join(f"`{json.dumps(value)}`" for value in neutral)
    return f"refused unless {values}"


def _request_parts(upstream: Mapping[str, Any]) -> Family:
    entries = []
    for path, parts in upstream["request_parts"].items():
        for part, wanted in parts.items():
            there = _of_body(path, wanted["of"]).status == SAME and (
                wanted["kind"] is None or wanted["kind"] in read(path)
            )
            for field in wanted["fields"]:
                known = there and field.removesuffix("_") in read(path)
                place = f"{path} {part}"
                entries.append(Entry(field, SAME if known else NOT_YET, place=place))
    return Family("request_parts", "Parts of request fields", entries)


def _response_fields(upstream: Mapping[str, Any]) -> Family:
    entries = []
    for path, parts in upstream["response_fields"].items():
        fields_of = written(path)
        for part, wanted in parts.items():
            there = wanted["of"] is None or fields_of.get(wanted["of"], False)
            for field in wanted["fields"]:
                place = f"{path} {part}"
                if there and field in fields_of:
                    entries.append(_judged(field, [] if fields_of[field] else ["null"], place))
                else:
                    how = "" if path in routes() else "no such endpoint"
                    entries.append(Entry(field, NOT_YET, how, place))
    return Family("response_fields", "Response fields", entries)


def _sampling(upstream: Mapping[str, Any]) -> Family:
    ours, neutral = sampling_fields(), sampling_neutral()
    theirs = upstream["sampling_params"]
    entries = []
    for name, default in theirs.items():
        if name in ours:
            same = _plain(ours[name]) == _plain(default) or ours[name] == default
            differences = [] if same else [f"default `{ours[name]}`, SGLang's `{default}`"]
            entries.append(_judged(name, differences))
        else:
            how = _only(neutral[name]) if name in neutral else "refused"
            entries.append(Entry(name, NOT_YET, how))
    return Family(
        "sampling_params", "Sampling parameters", entries, tuple(sorted(set(ours) - set(theirs)))
    )


def _frontend(upstream: Mapping[str, Any]) -> Family:
    entries = []
    for name, wanted in upstream["frontend"].items():
        found = export(name)
        if found is None or only_raises(found):
            entries.append(Entry(name, NOT_YET))
        else:
            entries.append(_judged(name, _of_signature(found, wanted)))
    return Family("frontend", "Exports of `sglang`", entries)


def _engine(upstream: Mapping[str, Any]) -> Family:
    return _methods("engine", "Methods of `sglang.Engine`", export("Engine"), upstream["engine"])


def _program_state(upstream: Mapping[str, Any]) -> Family:
    wanted: dict[str, None] = dict.fromkeys(upstream["program_state"])
    title = "Methods of a program's state, `s`"
    return _methods("program_state", title, program_state(), wanted)


def _methods(key: str, title: str, owner: Any, wanted: Mapping[str, list[str] | None]) -> Family:
    entries = []
    for name, parameters_of in wanted.items():
        method = getattr(owner, name, None) if owner is not None else None
        if method is None or only_raises(method):
            entries.append(Entry(name, NOT_YET))
        else:
            entries.append(_judged(name, _of_signature(method, parameters_of)))
    return Family(key, title, entries)


def _of_signature(function: Any, wanted: Sequence[str] | None) -> list[str]:
    """Parameters of SGLang's that ours has not; one that takes the rest has them all."""
    if wanted is None or not callable(function):
        return []
    ours = parameters(function)
    if ours is None or any(name.startswith("**") for name in ours):
        return []
    names = [parameter.partition("=")[0] for parameter in wanted if not parameter.startswith("*")]
    missing = [name for name in names if name not in ours]
    return [f"no {', '.join(f'`{name}`' for name in missing)}"] if missing else []


def _metrics(upstream: Mapping[str, Any]) -> Family:
    ours = metrics()
    plain = {name: name.removeprefix("sglang:") for name in upstream["metrics"]}
    entries = [
        Entry(name, SAME if {short, short.removesuffix("_total")} & ours else NOT_YET)
        for name, short in plain.items()
    ]
    theirs = {short for full in plain.values() for short in (full, full.removesuffix("_total"))}
    added = tuple(f"sglang:{name}" for name in sorted(ours - theirs))
    return Family("metrics", "Metrics", entries, added)


def _bench(upstream: Mapping[str, Any]) -> Family:
    actions = bench_actions()
    entries = []
    for theirs in upstream["bench_serving"]:
        name = theirs["names"][0]
        action = actions.get(name)
        if action is None:
            entries.append(Entry(name, NOT_YET, BENCH_REFUSED.get(name, "unknown option")))
            continue
        choices = tuple(action.choices) if action.choices is not None else None
        differences = _of_values(theirs, action.default, choices, takes_value=action.nargs != 0)
        free = "choices" not in theirs
        entries.append(_judged(name, [d for d in differences if not (free and "only" in d)]))
    names = {name for theirs in upstream["bench_serving"] for name in theirs["names"]}
    ours = {action.option_strings[0] for action in actions.values()} - names - {"-h"}
    return Family("bench_serving", "Options of `bench_serving`", entries, tuple(sorted(ours)))
