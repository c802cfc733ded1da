"""`sglang serve | version | completion`."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Sequence

from sglang.version import __version__

EXIT_BAD_REQUEST = 2


def serve(argv: Sequence[str]) -> int:
    """Serve a language model over HTTP; `sglang serve --help` lists its flags."""
    from sglang import launch_server

    return launch_server.main(argv, prog="sglang serve")


def version(argv: Sequence[str]) -> int:
    """Print the version."""
    if argv:
        return _refuse(f"version: unexpected argument: {argv[0]}")
    print(f"sglang {__version__}")
    return 0


def completion(argv: Sequence[str]) -> int:
    """Print a script that completes commands and flags: completion bash | zsh | fish."""
    from sglang.cli.completion import SCRIPTS

    if len(argv) != 1 or argv[0] not in SCRIPTS:
        return _refuse(f"completion: expected one of {', '.join(SCRIPTS)}")
    print(SCRIPTS[argv[0]](), end="")
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "serve": serve,
    "version": version,
    "completion": completion,
}


def main(argv: Sequence[str] | None = None) -> int:
    """The command's exit code; 2 for one that there is not."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words:
        print(_usage(), end="", file=sys.stderr)
        return EXIT_BAD_REQUEST
    name, rest = words[0], words[1:]
    if name in ("-h", "--help", "help"):
        print(_usage(), end="")
        return 0
    if name in ("-V", "--version"):
        return version(rest)
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        return _refuse(f"unknown command: {name}{hint}; see sglang --help")
    return COMMANDS[name](rest)


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {_first_line(run)}" for name, run in COMMANDS.items()]
    return "\n".join(["usage: sglang COMMAND [argument ...]", "", "commands:", *lines, ""])


def _first_line(command: Callable[..., int]) -> str:
    return (command.__doc__ or "").partition("\n")[0]


def _refuse(problem: str) -> int:
    print(f"sglang: error: {problem}", file=sys.stderr)
    return EXIT_BAD_REQUEST
