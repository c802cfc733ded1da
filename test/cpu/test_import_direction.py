"""Arrows between packages point one way, and importing sglang is light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SGLANG = ROOT / "python" / "sglang"
CLIENT_SIDE = ("lang", "bench", "drift_report", "bench_serving.py", "bench_one_batch_server.py")


def python_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def client_files() -> list[Path]:
    """What speaks to a server over HTTP only."""
    paths = [SGLANG / name for name in CLIENT_SIDE if (SGLANG / name).exists()]
    return [file for path in paths for file in (python_files(path) if path.is_dir() else [path])]


def imports(tree: ast.AST, *, at_import: bool = False) -> Iterator[str]:
    """Dotted names of imported modules, "from a import b" as "a.b".

    at_import: leave out those inside functions and under `if TYPE_CHECKING`.
    """
    if isinstance(tree, ast.Import):
        yield from (alias.name for alias in tree.names)
    elif isinstance(tree, ast.ImportFrom):
        assert tree.level == 0, f"line {tree.lineno}: relative imports hide the direction"
        yield from (f"{tree.module}.{alias.name}" for alias in tree.names)
    elif at_import and isinstance(tree, ast.FunctionDef | ast.AsyncFunctionDef):
        return
    else:
        children = list(ast.iter_child_nodes(tree))
        if at_import and isinstance(tree, ast.If) and "TYPE_CHECKING" in ast.unparse(tree.test):
            children = list(tree.orelse)
        for child in children:
            yield from imports(child, at_import=at_import)


def offences(
    files: list[Path], forbidden: tuple[str, ...], *, at_import: bool = False
) -> list[str]:
    """ "file imports name" for each import of a forbidden module or of something inside it."""
    return [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in files
        for name in imports(ast.parse(file.read_text(encoding="utf-8")), at_import=at_import)
        if any(f"{name}.".startswith(f"{module}.") for module in forbidden)
    ]


def test_imports_are_found_wherever_they_are():
    tree = ast.parse(
        "import a.b\n"
        "if TYPE_CHECKING:\n    import c\nelse:\n    import d\n"
        "def f():\n    from e import g\n"
        "class K:\n    import h\n"
        "try:\n    import i\nexcept ImportError:\n    pass\n"
    )
    assert list(imports(tree)) == ["a.b", "c", "d", "e.g", "h", "i"]
    assert list(imports(tree, at_import=True)) == ["a.b", "d", "h", "i"]


def test_drift_scheduler_knows_no_engine():
    files = python_files(ROOT / "drift_scheduler")
    assert files
    assert offences(files, ("sglang", "sgl_kernel")) == []


def test_only_lanes_touch_torch_in_drift_scheduler():
    files = [
        file for file in python_files(ROOT / "drift_scheduler") if not file.name.startswith("lane_")
    ]
    assert offences(files, ("torch", "triton")) == []


def test_drift_scheduler_loads_without_torch():
    assert not loaded_after("import drift_scheduler", "torch")


def test_kernels_know_neither_engine_nor_scheduler():
    files = python_files(ROOT / "sgl-kernel" / "sgl_kernel")
    assert files
    assert offences(files, ("sglang", "drift_scheduler")) == []


def test_clients_know_nothing_of_the_runtime():
    forbidden = ("sglang.srt", "drift_scheduler", "sgl_kernel")
    assert offences(client_files(), forbidden) == []


def test_clients_do_not_load_torch_when_imported():
    assert offences(client_files(), ("torch",), at_import=True) == []


def loaded_after(statement: str, module: str) -> bool:
    """Whether a fresh interpreter holds `module` after `statement`."""
    program = f"import sys; {statement}; print({module!r} in sys.modules)"
    path = [str(SGLANG.parent), str(ROOT / "sgl-kernel"), str(ROOT)]
    program = f"import sys; sys.path[:0] = {path!r}; {program}"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout.split()[-1] == "True"


@pytest.mark.parametrize(
    "statement",
    [
        "import sglang; sglang.ServerArgs",
        "import sglang.launch_server",
        "import sglang.srt.server_args as s; s.make_parser().format_help()",
    ],
)
def test_sglang_and_its_flags_load_without_torch(statement):
    assert not loaded_after(statement, "torch")


def test_the_probe_sees_a_loaded_module():
    assert loaded_after("import json", "json")
