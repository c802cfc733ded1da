"""Endpoints for whoever runs the server, by concern."""

from __future__ import annotations

from fastapi import APIRouter

from sglang.srt.entrypoints.operations import (
    generation,
    health,
    information,
    loads,
    memory,
    profile,
    settings,
    weights,
)

router = APIRouter()
for part in (health, information, loads, generation, profile, weights, memory, settings):
    router.include_router(part.router)
