"""Which chat template a model has: by name, or by what its path says."""

from __future__ import annotations

import re
from collections.abc import Callable

from sglang.lang.chat_format import ChatTemplate, ChatTemplateStyle
from sglang.lang.chat_template_table import FAMILIES, TEMPLATES

__all__ = [
    "ChatTemplate",
    "ChatTemplateStyle",
    "get_chat_template",
    "get_chat_template_by_model_path",
    "register_chat_template",
    "register_chat_template_matching_function",
]

_BY_NAME: dict[str, ChatTemplate] = {}
_MATCHERS: list[Callable[[str], str | None]] = []


def register_chat_template(template: ChatTemplate) -> None:
    """Makes it known under its name, in place of one of that name."""
    _BY_NAME[template.name] = template


def register_chat_template_matching_function(
    matches: Callable[[str], str | None],
) -> Callable[[str], str | None]:
    """A function from model path to template name, or None. The last one registered is asked
    first, so that a program can override the table. Usable as a decorator."""
    _MATCHERS.insert(0, matches)
    return matches


def get_chat_template(name: str) -> ChatTemplate:
    """By name; ValueError lists those that exist."""
    if name not in _BY_NAME:
        raise ValueError(f"no chat template named {name!r}; there are {', '.join(_BY_NAME)}")
    return _BY_NAME[name]


def get_chat_template_by_model_path(model_path: str) -> ChatTemplate:
    """The template of the model family that the path speaks of, or `default`."""
    for matches in _MATCHERS:
        name = matches(model_path)
        if name is not None:
            return get_chat_template(name)
    return get_chat_template("default")


def _by_family(model_path: str) -> str | None:
    return next(
        (name for pattern, name in FAMILIES if re.search(pattern, model_path, re.IGNORECASE)),
        None,
    )


for _template in TEMPLATES:
    register_chat_template(_template)
register_chat_template_matching_function(_by_family)
