"""Completion scripts, generated from the declared flags: `eval "$(sglang completion bash)"`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from sglang.srt.flags import Flag
from sglang.srt.server_args import FLAGS

_PATH_FIELDS = re.compile(r".*_(path|dir)|chat_template|drift_profile")


class _Option(NamedTuple):
    """A flag as a shell knows it. values: () for any; takes_path: completed from the disk."""

    names: tuple[str, ...]
    help: str
    takes_value: bool
    values: tuple[str, ...] = ()
    takes_path: bool = False


def _options() -> Iterator[_Option]:
    yield _Option(("--help",), "Show the flags and what they mean.", takes_value=False)
    yield _Option(("--version",), "Show the version.", takes_value=False)
    yield _Option(("--config",), "YAML file of flags.", takes_value=True, takes_path=True)
    yield from map(_option, FLAGS)


def _option(spec: Flag) -> _Option:
    return _Option(
        spec.names,
        spec.help,
        takes_value=not spec.is_switch,
        values=tuple(map(str, spec.choices or ())),
        takes_path=_PATH_FIELDS.fullmatch(spec.field) is not None,
    )


def bash() -> str:
    """A function `_sglang`, and what binds it to the command."""
    options = list(_options())
    cases = []
    for option in options:
        if option.takes_value:
            names = "|".join(option.names)
            words = " ".join(option.values)
            done = "compgen -f" if option.takes_path else f"compgen -W '{words}'"
            cases.append(f'                {names}) COMPREPLY=($({done} -- "$word")); return ;;')
    flags = " ".join(name for option in options for name in option.names)
    return f"""\
_sglang() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}}
    # The shell takes --flag=value for three words.
    if [[ $word == "=" ]]; then
        word=
    elif [[ $before == "=" ]]; then
        before=${{COMP_WORDS[COMP_CWORD-2]}}
    fi
    COMPREPLY=()
    if (( COMP_CWORD == 1 )); then
        COMPREPLY=($(compgen -W '{_commands()}' -- "$word"))
        return
    fi
    case ${{COMP_WORDS[1]}} in
        completion) COMPREPLY=($(compgen -W '{" ".join(SCRIPTS)}' -- "$word")) ;;
        serve)
            case $before in
{chr(10).join(cases)}
            esac
            COMPREPLY=($(compgen -W '{flags}' -- "$word")) ;;
    esac
}}
complete -o filenames -F _sglang sglang
"""


def zsh() -> str:
    """A completion function for the #compdef system; `eval` works too, after compinit."""
    lines = []
    for option in _options():
        text = _quoted(option.help.replace("[", r"\[").replace("]", r"\]").replace(":", r"\:"))
        others = f"({' '.join(option.names)})" if len(option.names) > 1 else ""
        value = ""
        if option.takes_value:
            choice = " ".join(option.values)
            value = ":value:" + ("_files" if option.takes_path else f"({choice})" if choice else "")
        lines += [f"            '{others}{name}[{text}]{value}'" for name in option.names]
    arguments = " \\\n".join(lines)
    return f"""\
#compdef sglang
_sglang() {{
    if (( CURRENT == 2 )); then
        compadd {_commands()}
        return
    fi
    case $words[2] in
        completion) compadd {" ".join(SCRIPTS)} ;;
        serve)
            shift words
            (( CURRENT-- ))
            _arguments -s \\
{arguments}
            ;;
    esac
}}
compdef _sglang sglang
"""


def fish() -> str:
    """One `complete` line a flag."""
    lines = [
        "complete -c sglang -f",
        f"complete -c sglang -n __fish_use_subcommand -a '{_commands()}'",
        f"complete -c sglang -n '__fish_seen_subcommand_from completion' -a '{' '.join(SCRIPTS)}'",
    ]
    for option in _options():
        names = " ".join(f"-l {name.removeprefix('--')}" for name in option.names)
        value = ""
        if option.takes_value:
            value = " -r -F" if option.takes_path else " -x"
        if option.values:
            value += f" -a '{' '.join(option.values)}'"
        text = option.help.replace("\\", "\\\\").replace("'", r"\'")
        lines.append(
            f"complete -c sglang -n '__fish_seen_subcommand_from serve' {names}{value} -d '{text}'"
        )
    return "\n".join(lines) + "\n"


SCRIPTS: dict[str, Callable[[], str]] = {"bash": bash, "zsh": zsh, "fish": fish}


def _commands() -> str:
    from sglang.cli.main import COMMANDS

    return " ".join(COMMANDS)


def _quoted(text: str) -> str:
    """For inside single quotes."""
    return text.replace("'", r"'\''")
