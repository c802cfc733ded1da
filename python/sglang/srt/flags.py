"""Command-line flags from a dataclass: each field declares its flag once, the rest is derived.

`flag(...)` marks a field, `build_parser` makes the argparse parser, `read_config_file` reads the
same flags from YAML. Nothing here knows which flags a server has.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import re
import shutil
import textwrap
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml

from sglang.srt.errors import ConfigError

_METADATA_KEY = "flag"
MIN_COLUMNS = 50
MAX_COLUMNS = 120  # longer lines are hard to follow
_SUFFIX_FACTOR = {
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "K": 2**10,
    "M": 2**20,
    "G": 2**30,
}


def token_count(text: str) -> int:
    """Reads "4096", "4K" (binary: 4096), "4k" (decimal: 4000) or "1.5k"; ValueError otherwise."""
    match = re.fullmatch(r"(-?\d+(?:\.\d+)?)([kmgKMG]?)", text.strip())
    if match is not None:
        count = Fraction(match[1]) * _SUFFIX_FACTOR.get(match[2], 1)
        if count.denominator == 1:
            return int(count)
    raise ValueError(f"expected a whole count such as 4096, 4K, 4k or 1M, got {text!r}")


def json_object(text: str) -> dict[str, Any]:
    """Reads a JSON object; ValueError otherwise."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"expected a JSON object: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {text!r}")
    return value


@dataclass(frozen=True, slots=True)
class Flag:
    """How one field looks on the command line.

    names: "--port" first, then aliases. choices: the allowed values, or None for any.
    is_switch: takes no value, its presence means true. default: shown in help.
    """

    field: str
    names: tuple[str, ...]
    help: str
    group: str
    parse: Callable[[str], Any]
    choices: tuple[Any, ...] | None
    is_switch: bool
    default: Any

    @property
    def metavar(self) -> str:
        """What stands for the value in help."""
        if self.choices is not None:
            return "{" + ",".join(str(choice) for choice in self.choices) + "}"
        return {int: "N", float: "X", token_count: "TOKENS", json_object: "JSON"}.get(
            self.parse, "TEXT"
        )


def flag(
    default: Any,
    help: str,
    *,
    group: str,
    aliases: Sequence[str] = (),
    parse: Callable[[str], Any] | None = None,
) -> Any:
    """A dataclass field with a command-line flag named after it.

    parse: text to value; derived from the annotation when None. A mutable default is copied.
    """
    metadata = {_METADATA_KEY: (default, help, group, tuple(aliases), parse)}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def flags_of(cls: type[Any]) -> list[Flag]:
    """The flags of a dataclass in order of declaration."""
    hints = typing.get_type_hints(cls)
    return [
        _describe(field, hints[field.name])
        for field in dataclasses.fields(cls)
        if _METADATA_KEY in field.metadata
    ]


def _describe(field: dataclasses.Field[Any], annotation: Any) -> Flag:
    default, help_text, group, aliases, parse = field.metadata[_METADATA_KEY]
    value_type = annotation
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        (value_type,) = (arm for arm in typing.get_args(annotation) if arm is not type(None))
    choices: tuple[Any, ...] | None = None
    if typing.get_origin(value_type) is Literal:
        choices = typing.get_args(value_type)
        value_type = type(choices[0])
    return Flag(
        field=field.name,
        names=("--" + field.name.replace("_", "-"), *aliases),
        help=help_text,
        group=group,
        parse=parse or value_type,
        choices=choices,
        is_switch=value_type is bool,
        default=default,
    )


class _HelpFormatter(argparse.HelpFormatter):
    """As wide as the terminal, within reason. Names all spellings of a flag before its value,
    which argparse would repeat for each, and breaks no flag in two."""

    def __init__(self, prog: str) -> None:
        columns = min(max(shutil.get_terminal_size().columns, MIN_COLUMNS), MAX_COLUMNS)
        super().__init__(prog, max_help_position=min(30, columns // 3), width=columns)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        return f"{', '.join(action.option_strings)} {action.metavar}"


class _Parser(argparse.ArgumentParser):
    """Raises ConfigError where argparse would print its usage and leave."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message.removeprefix("argument "))


def build_parser(
    flags: Sequence[Flag], *, prog: str, usage: str, description: str
) -> argparse.ArgumentParser:
    """A parser with one help section a group. Flags left out are absent from its namespace."""
    parser = _Parser(
        prog=prog, usage=usage, description=description, formatter_class=_HelpFormatter
    )
    groups: dict[str, Any] = {}
    for spec in flags:
        if spec.group not in groups:
            groups[spec.group] = parser.add_argument_group(spec.group)
        options: dict[str, Any] = {
            "dest": spec.field,
            "default": argparse.SUPPRESS,
            "help": help_line(spec).replace("%", "%%"),
        }
        if spec.is_switch:
            options["action"] = "store_true"
        else:
            options |= {"type": _argparse_type(spec), "metavar": spec.metavar}
        groups[spec.group].add_argument(*spec.names, **options)
    return parser


def help_line(spec: Flag) -> str:
    """Help text followed by the default, where there is one to speak of."""
    if spec.is_switch or spec.default is None or spec.default in ("", {}):
        return spec.help
    return f"{spec.help} (default: {spec.default})"


def _argparse_type(spec: Flag) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        try:
            return parse_value(spec, text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def parse_value(spec: Flag, text: str) -> Any:
    """Turns the text after a flag into its value; ValueError says what was expected."""
    try:
        value = spec.parse(text)
    except ValueError:
        if spec.parse in (int, float):
            kind = "an integer" if spec.parse is int else "a number"
            raise ValueError(f"expected {kind}, got {text!r}") from None
        raise
    if spec.choices is not None and value not in spec.choices:
        raise ValueError(f"expected one of {', '.join(map(str, spec.choices))}; got {text!r}")
    return value


def parse_known(
    parser: argparse.ArgumentParser,
    argv: Sequence[str],
    flags: Sequence[Flag],
    foreign: Collection[str],
) -> dict[str, Any]:
    """Parses a command line into {field: value} of the flags that were given.

    foreign: names that users know from elsewhere and that are not served here.
    Raises ConfigError for anything unknown, saying which of the two it is.
    """
    given, rest = parser.parse_known_args(list(argv))
    unknown = [word.partition("=")[0] for word in rest if word.startswith("--")]
    for name in unknown or rest:
        raise unknown_flag(name, flags, foreign)
    return vars(given)


def unknown_flag(name: str, flags: Sequence[Flag], foreign: Collection[str]) -> ConfigError:
    """The error for a flag that is not among `flags`."""
    if name in foreign:
        return ConfigError(f"known in SGLang but not supported by this server yet: {name}")
    if not name.startswith("-"):
        return ConfigError(f"unexpected argument: {name}")
    names = [alias for spec in flags for alias in spec.names]
    near = difflib.get_close_matches(name, names, n=1)
    return ConfigError(f"unknown flag: {name}" + (f" (did you mean {near[0]}?)" if near else ""))


def read_config_file(
    path: Path,
    flags: Sequence[Flag],
    foreign: Collection[str],
    tables: Mapping[str, Callable[[Any], Any]],
) -> dict[str, Any]:
    """Reads {field: value} from a YAML mapping of flag names, with dashes or underscores.

    tables: fields that have no flag, with what makes their value of the YAML, or ValueError.
    A null leaves the default. Raises ConfigError naming the file and the key.
    """
    content = read_yaml_mapping(path)
    by_name = {name: spec for spec in flags for name in spec.names}
    values: dict[str, Any] = {}
    for key, value in content.items():
        name = "--" + str(key).replace("_", "-")
        field = name[2:].replace("-", "_")
        if name not in by_name and field not in tables:
            raise ConfigError(f"{path}: {unknown_flag(name, flags, foreign)}")
        if value is None:
            continue
        spec = by_name.get(name)
        if spec is not None:
            field = spec.field
        if field in values:
            raise ConfigError(f"{path}: {key}: given twice, see --{field.replace('_', '-')}")
        try:
            values[field] = tables[field](value) if spec is None else _from_yaml(spec, value)
        except ValueError as error:
            raise ConfigError(f"{path}: {key}: {error}") from None
    return values


def _from_yaml(spec: Flag, value: Any) -> Any:
    if spec.is_switch or isinstance(value, bool):
        if spec.is_switch and isinstance(value, bool):
            return value
        raise ValueError(f"expected {'true or false' if spec.is_switch else 'a value'}: {value!r}")
    if isinstance(value, dict | list):
        if spec.parse is not json_object:
            raise ValueError(f"expected a single value, got {value!r}")
        return parse_value(spec, json.dumps(value))
    return parse_value(spec, str(value))


def read_yaml_mapping(path: Path) -> dict[Any, Any]:
    """The top-level mapping of a YAML file, {} when it is empty; ConfigError naming the file."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path} is not valid YAML: {reason}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a mapping of names to values")
    return content
