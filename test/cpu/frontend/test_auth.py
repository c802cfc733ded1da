"""Who may call what: every route of the server against every combination of keys."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from starlette.responses import PlainTextResponse

from sglang.srt.entrypoints.app import build_app
from sglang.srt.entrypoints.auth import BearerAuth
from sglang.srt.entrypoints.server_state import ServerState
from sglang.srt.ipc import IpcNames
from sglang.srt.managers.prompts import Limits, PromptEncoder
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.served_model import ServedModel
from sglang.srt.server_args import ServerArgs

FOR_ADMINS = {
    "/abort_request",
    "/configure_logging",
    "/continue_generation",
    "/flush_cache",
    "/freeze_gc",
    "/get_weights_by_name",
    "/pause_generation",
    "/release_memory_occupation",
    "/resume_memory_occupation",
    "/set_internal_state",
    "/start_profile",
    "/stop_profile",
    "/update_weight_version",
    "/update_weights_from_disk",
}
OPEN = {"/health", "/health_generate", "/ready", "/metrics"}
GIVEN = {
    "nothing": {},
    "api": {"authorization": "Bearer api"},
    "api, as Anthropic's clients send it": {"x-api-key": "api"},
    "admin": {"authorization": "Bearer admin"},
    "a wrong key": {"authorization": "Bearer nonsense"},
    "no bearer": {"authorization": "api"},
}
# What is configured, and which of GIVEN then opens (ordinary endpoints, those for admins).
API = {"api", "api, as Anthropic's clients send it"}
ALL = set(GIVEN)
RULES: dict[tuple[str | None, str | None], tuple[set[str], set[str]]] = {
    (None, None): (ALL, ALL),
    ("api", None): (API, API),
    (None, "admin"): (ALL, {"admin"}),
    ("api", "admin"): (API, {"admin"}),
}


@pytest.fixture(scope="module")
def routes() -> list[tuple[str, str]]:
    """(method, path) of all that a server has."""
    args = ServerArgs(model_path="m", enable_metrics=True)
    encoder = PromptEncoder(None, Limits(10, 10, False))
    manager = TokenizerManager(encoder, IpcNames("ipc:///a", "ipc:///b", "ipc:///c"))
    app = build_app(ServerState(args, manager, ServedModel(10, 10)))
    return [
        (method.upper(), path.replace("{", "").replace("}", ""))
        for path, methods in app.openapi()["paths"].items()
        for method in (*methods, "options")
    ]


def statuses(
    routes: list[tuple[str, str]], api_key: str | None, admin_api_key: str | None
) -> dict[tuple[str, str, str], int]:
    """(method, path, what was given) -> status, with an application that answers everything."""
    app = BearerAuth(PlainTextResponse("done"), api_key=api_key, admin_api_key=admin_api_key)

    async def ask() -> dict[tuple[str, str, str], int]:
        transport = httpx.ASGITransport(app=app)
        found = {}
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            for method, path in routes:
                for name, headers in GIVEN.items():
                    response = await client.request(method, path, headers=headers)
                    found[method, path, name] = response.status_code
        return found

    return asyncio.run(ask())


@pytest.mark.parametrize("keys", RULES, ids=str)
def test_every_route_takes_the_keys_that_it_should(
    routes: list[tuple[str, str]], keys: tuple[str | None, str | None]
) -> None:
    ordinary, for_admins = RULES[keys]
    for (method, path, given), status in statuses(routes, *keys).items():
        opens = for_admins if path in FOR_ADMINS else ordinary
        if method == "OPTIONS" or path in OPEN or given in opens:
            expected = 200
        else:
            # The API key is a key, if not the right one.
            known = path in FOR_ADMINS and keys == ("api", "admin") and given in API
            expected = 403 if known else 401
        assert status == expected, f"{method} {path} with {given}"


def test_the_routes_of_the_table_exist(routes: list[tuple[str, str]]) -> None:
    paths = {path for _, path in routes}
    assert paths >= FOR_ADMINS | OPEN


def test_a_server_tells_admins_from_others(serve: Any) -> None:
    admin = {"authorization": "Bearer admin"}
    with serve(api_key="api", admin_api_key="admin") as served:
        refused = served.client.post("/flush_cache", headers={"authorization": "Bearer api"})
        assert refused.status_code == 403
        assert refused.json()["error"].startswith("Forbidden")
        assert served.client.post("/flush_cache", headers=admin).status_code == 200
        assert served.client.get("/v1/models", headers=admin).status_code == 401
        info = served.client.get("/server_info", headers={"authorization": "Bearer api"})
        assert "admin_api_key" not in info.json()
