"""What a chat template of the client side is: the text around a message, by role.

A program is rendered piece by piece, before anyone knows what comes next; so a template here is a
prefix and a suffix for each role, not a Jinja program.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto

Message = dict[str, str]
Affixes = tuple[str, str]


class ChatTemplateStyle(Enum):
    """PLAIN: a role looks the same wherever it stands. LLAMA2: the system prompt is put inside
    the first user message."""

    PLAIN = auto()
    LLAMA2 = auto()


@dataclass(frozen=True)
class ChatTemplate:
    """One model family's format.

    role_prefix_and_suffix: for system, user and assistant.
    stop_str: strings at which the model's own turn is over.
    """

    name: str
    default_system_prompt: str | None
    role_prefix_and_suffix: Mapping[str, Affixes]
    stop_str: tuple[str, ...] = ()
    style: ChatTemplateStyle = ChatTemplateStyle.PLAIN

    def get_prefix_and_suffix(self, role: str, hist_messages: Sequence[Message]) -> Affixes:
        """The text around a message of `role` that follows these; ValueError for another role."""
        if role not in self.role_prefix_and_suffix:
            known = ", ".join(self.role_prefix_and_suffix)
            raise ValueError(f"the chat template {self.name} has no role {role!r}, only {known}")
        prefix, suffix = self.role_prefix_and_suffix[role]
        if self.style is ChatTemplateStyle.LLAMA2:
            if role == "system" and not hist_messages:
                prefix = self.role_prefix_and_suffix["user"][0] + prefix
            elif role == "user" and [m["role"] for m in hist_messages] == ["system"]:
                prefix = ""  # the system prompt has opened this message
        return prefix, suffix

    def get_prompt(self, messages: Sequence[Message]) -> str:
        """The text of a whole conversation, which ends after its last message."""
        text = ""
        for i, message in enumerate(messages):
            role, content = message["role"], message.get("content", "")
            if role == "system" and not content and self.default_system_prompt is not None:
                content = self.default_system_prompt
            prefix, suffix = self.get_prefix_and_suffix(role, messages[:i])
            text += prefix + content + suffix
        return text
