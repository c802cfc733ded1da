"""What this server has, found in its own code: flags, endpoints, bodies, answers, exports, metrics.

Nothing is listed here by hand, so what is added to the code is found when
docs/generate_compatibility.py runs again.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn, TypeGuard, cast

from fastapi import FastAPI

import sglang
from sglang.bench.cli import build_parser
from sglang.bench.unsupported import UNSUPPORTED_FLAGS as BENCH_REFUSED
from sglang.srt import sampling_params
from sglang.srt.entrypoints.app import build_app
from sglang.srt.entrypoints.json_body import BodyForm, form_of
from sglang.srt.entrypoints.openapi import Handler, handlers
from sglang.srt.entrypoints.server_state import ServerState
from sglang.srt.server_args import ServerArgs, make_parser

_ROOT = Path(sglang.__file__).parent
# Engine processes that tell the HTTP process what an endpoint passes on.
_TELLERS = {
    "/server_info": ("sglang.srt.managers.scheduler", "sglang.srt.observability.scheduler_log")
}
_HTTP = "sglang.srt.entrypoints"
_PARAMETER = re.compile(r"\{[^}]*\}")
_MAKES_A_METRIC = re.compile(r"gauge|counter|histogram|summary|Family|Gauge|Counter|Histogram")


def server_actions() -> dict[str, argparse.Action]:
    """Every spelling of every flag of the server."""
    return _actions(make_parser())


def bench_actions() -> dict[str, argparse.Action]:
    """Every spelling of every option of bench_serving that is served, not refused."""
    found = _actions(build_parser())
    return {name: action for name, action in found.items() if name not in BENCH_REFUSED}


def _actions(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return {name: action for action in parser._actions for name in action.option_strings}


@cache
def app() -> FastAPI:
    """The app with all its optional routes; no server runs behind it."""
    args = ServerArgs(model_path="model", enable_metrics=True)
    return build_app(cast(ServerState, SimpleNamespace(args=args)))


@cache
def routes() -> dict[str, list[Handler]]:
    """Handlers by path, names of its parameters left out."""
    found: dict[str, list[Handler]] = {}
    for handler in handlers(app()):
        found.setdefault(without_parameter_names(handler.path), []).append(handler)
    return found


def websockets() -> set[str]:
    return {
        without_parameter_names(route.path)
        for route in app().routes
        if type(route).__name__.endswith("WebSocketRoute")
    }


def without_parameter_names(path: str) -> str:
    return _PARAMETER.sub("{}", path)


def body(path: str) -> BodyForm[Any] | None:
    """What the handler of this path reads; None without such a path or a body."""
    forms = (form_of(handler.endpoint) for handler in routes().get(path, ()))
    return next((form for form in forms if form is not None), None)


@cache
def written(path: str) -> Mapping[str, bool]:
    """Fields that the code behind this path may write: True, or False if always null.

    Keys of dict displays (but not of tables in capitals) and of item assignments, and fields of
    the classes there that are no part of the request.
    """
    form = body(path)
    if form is not None and form.model.model_config.get("extra") == "allow":
        return {}  # it looks at nothing and refuses all
    parts = set() if form is None else set(form.model.model_json_schema().get("$defs", {}))
    own = parts | ({base.__name__ for base in form.model.__mro__} if form else set())
    found: dict[str, bool] = {}
    for module in _modules_of(path):
        for owner, name, filled in _written_in(module):
            if owner not in own:
                found[name] = found.get(name, False) or filled
    return found


@cache
def read(path: str) -> frozenset[str]:
    """Strings in the HTTP layer's code behind this path, and names in the parts of its body."""
    form = body(path)
    schema = {} if form is None else form.model.model_json_schema()
    parts = [
        part["properties"] for part in schema.get("$defs", {}).values() if "properties" in part
    ]
    known = {name for part in parts for name in part}
    for module in _modules_of(path):
        if module.startswith(_HTTP):
            nodes = ast.walk(_tree(module))
            known |= {
                n.value for n in nodes if isinstance(n, ast.Constant) and type(n.value) is str
            }
    only_null = {
        name for part in parts for name, kind in part.items() if kind.get("type") == "null"
    }
    return frozenset(known - only_null)


def _modules_of(path: str) -> set[str]:
    modules = set(_TELLERS.get(path, ()))
    for handler in routes().get(path, ()):
        modules |= _modules_behind(handler.endpoint.__module__)
    return modules


def _modules_behind(start: str) -> set[str]:
    """The module, what it imports of the HTTP layer (and that imports), and what those import of
    the rest of the runtime."""
    seen: set[str] = set()
    pending = [start]
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        if not name.startswith(_HTTP):
            continue
        for node in ast.walk(_tree(name)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sglang.srt."):
                pending += [m for m in _imported(node) if _file(m) is not None]
    return seen


def _imported(node: ast.ImportFrom) -> Iterator[str]:
    assert node.module is not None
    yield node.module
    yield from (f"{node.module}.{alias.name}" for alias in node.names)


@cache
def _written_in(module: str) -> list[tuple[str, str, bool]]:
    """(class it is in or "", name, whether it may hold anything but null)."""
    found = []
    tree = _tree(module)
    tables = {id(node.value) for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict) and id(node) not in tables:
            pairs = zip(node.keys, node.values, strict=True)
            found += [("", key.value, not _is_null(v)) for key, v in pairs if _is_text(key)]
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
            found += [("", node.slice.value, True)] if _is_text(node.slice) else []
        elif isinstance(node, ast.ClassDef) and module.startswith(_HTTP):
            for part in node.body:
                if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                    found.append((node.name, part.target.id, True))
    return found


def _is_text(node: ast.expr | None) -> TypeGuard[ast.Constant]:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _is_null(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def sampling_fields() -> dict[str, Any]:
    """Name -> default of the parameters that are acted on."""
    struct = sampling_params.SamplingParams
    made = struct()
    return {name: getattr(made, name) for name in struct.__struct_fields__}


def sampling_neutral() -> Mapping[str, tuple[Any, ...]]:
    return getattr(sampling_params, "_NEUTRAL", {})


def export(name: str) -> Any | None:
    """What `sglang` has under this name; a placeholder if its library is not installed here."""
    if name not in sglang.__all__ and not hasattr(sglang, name):
        return None
    try:
        return getattr(sglang, name)
    except ImportError:
        return Ellipsis


def parameters(function: Callable[..., Any]) -> list[str] | None:
    """Names, starred where they take the rest; None for what has no signature."""
    try:
        found = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return [stars.get(parameter.kind, "") + parameter.name for parameter in found]


def only_raises(function: Callable[..., Any]) -> bool:
    """Declared to return never: there so that its error can say why it is not here."""
    return getattr(function, "__annotations__", {}).get("return") in ("NoReturn", NoReturn)


@cache
def program_state() -> type[Any] | None:
    """The class that programs of the frontend language get as `s`."""
    if _file("sglang.lang") is None:
        return None
    package = importlib.import_module("sglang.lang")
    for info in pkgutil.walk_packages(package.__path__, "sglang.lang."):
        found: Any = getattr(_loaded(info.name), "ProgramState", None)
        if isinstance(found, type):
            return found
    return None


def _loaded(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError:  # a backend whose library is not installed
        return None


@cache
def metrics() -> set[str]:
    """Names, without prefix, of the families that the observability package makes."""
    names: set[str] = set()
    for file in sorted((_ROOT / "srt").rglob("*.py")):
        if "observability" not in file.parts and file.stem != "metrics":
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and _MAKES_A_METRIC.search(ast.unparse(node.func)):
                names |= set(map(_text_of, node.args[:1]))
            elif isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Tuple):
                names |= _of_table(node)
    return names - {""}


def _text_of(node: ast.expr) -> str:
    """The text of "x" and of PREFIX + "x"; empty for anything else."""
    node = node.right if isinstance(node, ast.BinOp) else node
    return str(node.value) if _is_text(node) else ""


def _of_table(node: ast.Assign | ast.AnnAssign) -> set[str]:
    """The second column of tables such as _STATE_GAUGES: (key, name, help)."""
    target = node.targets[0] if isinstance(node, ast.Assign) else node.target
    if not re.search("GAUGES|COUNTERS|HISTOGRAMS", ast.unparse(target)):
        return set()
    assert isinstance(node.value, ast.Tuple)
    rows = [row.elts for row in node.value.elts if isinstance(row, ast.Tuple) and len(row.elts) > 1]
    return {_text_of(row[1]) for row in rows}


def _file(module: str) -> Path | None:
    path = _ROOT.joinpath(*module.split(".")[1:])
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


@cache
def _tree(module: str) -> ast.Module:
    file = _file(module)
    assert file is not None, module
    return ast.parse(file.read_text(encoding="utf-8"))
