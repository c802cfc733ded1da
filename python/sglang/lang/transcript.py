"""Transcript: the text of a program's state and the chat messages that it amounts to."""

from __future__ import annotations

from sglang.lang.chat_format import ChatTemplate, Message


class Transcript:
    """Text so far, finished messages, and the role that is open (None between roles)."""

    def __init__(self, template: ChatTemplate) -> None:
        self.template = template
        self.text = ""
        self.messages: list[Message] = []
        self.role: str | None = None
        self.role_start = 0

    def copy(self) -> Transcript:
        """A transcript that goes on by itself from here."""
        twin = Transcript(self.template)
        twin.text = self.text
        twin.messages = list(self.messages)
        twin.role = self.role
        twin.role_start = self.role_start
        return twin

    def append(self, text: str) -> None:
        self.text += text

    @property
    def role_text(self) -> str:
        """What has been said in the open role."""
        return self.text[self.role_start :]

    def begin_role(self, role: str) -> None:
        """The first message of a conversation brings the template's system prompt along."""
        if self.role is not None:
            raise RuntimeError(f"nested roles: {role} begins inside {self.role}")
        system_prompt = self.template.default_system_prompt
        if system_prompt and not self.messages and role != "system":
            self.begin_role("system")
            self.append(system_prompt)
            self.end_role("system")
        prefix, _ = self.template.get_prefix_and_suffix(role, self.messages)
        self.append(prefix)
        self.role, self.role_start = role, len(self.text)

    def end_role(self, role: str) -> None:
        if self.role != role:
            raise RuntimeError(f"{role} ends, but the open role is {self.role}")
        message: Message = {"role": role, "content": self.role_text.lstrip()}
        _, suffix = self.template.get_prefix_and_suffix(role, self.messages)
        self.append(suffix)
        self.messages.append(message)
        self.role = None
