"""A control reply as an HTTP response."""

from __future__ import annotations

from typing import Any

from fastapi import Response

from sglang.srt.entrypoints.error_forms import JsonResponse
from sglang.srt.messages import ControlReply


def outcome(reply: ControlReply, more: dict[str, Any] | None = None) -> Response:
    """200 or 400 with `success`, `message` and what else the reply holds; `more` on success."""
    body = {"success": reply.ok, "message": reply.message, **reply.data}
    if reply.ok:
        body |= more or {}
    return JsonResponse(body, 200 if reply.ok else 400)
