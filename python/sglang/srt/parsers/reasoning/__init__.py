"""Ways of thinking by the names that --reasoning-parser takes."""

from __future__ import annotations

from sglang.srt.parsers.reasoning.think_tags import ThinkTags

REASONING_PARSERS: dict[str, ThinkTags] = {
    "deepseek-r1": ThinkTags(thinks_first=True),
    "qwen3": ThinkTags(thinks_first=False),
    "qwen3-thinking": ThinkTags(thinks_first=True),
}
