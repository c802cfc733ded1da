"""GET /v1/loads: how busy the engine is, for whoever balances load."""

from __future__ import annotations

import datetime
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse

from sglang.srt.entrypoints.error_forms import JsonResponse
from sglang.srt.entrypoints.server_state import ServerState, state_of
from sglang.srt.errors import RequestError
from sglang.version import __version__

router = APIRouter()

# The last three are asked for by clients of servers that have them; here there is nothing to say.
SECTIONS = ("core", "memory", "queues", "spec", "lora", "disagg", "all")


@router.get("/v1/loads")
async def loads(request: Request) -> Response:
    query = request.query_params
    include = [name.strip() for name in query.get("include", "all").split(",") if name.strip()]
    for name in include:
        if name not in SECTIONS:
            raise RequestError(
                f"include: expected some of {', '.join(SECTIONS)}; got {name!r}", "include"
            )
    if (rank := query.get("dp_rank", "0")) != "0":
        raise RequestError(f"dp_rank: there is rank 0 only, got {rank!r}", "dp_rank")
    shape = query.get("format", "json")
    if shape not in ("json", "prometheus"):
        raise RequestError(f"format: expected json or prometheus, got {shape!r}", "format")
    load = await _load(state_of(request), set(include or ("all",)))
    if shape == "prometheus":
        return PlainTextResponse(_as_prometheus(load), media_type="text/plain; version=0.0.4")
    return JsonResponse(
        {
            "timestamp": datetime.datetime.now(datetime.UTC).isoformat(),
            "version": __version__,
            "dp_rank_count": 1,
            "loads": [load],
            "aggregate": _aggregate(load),
        }
    )


async def _load(state: ServerState, include: set[str]) -> dict[str, Any]:
    engine = (await state.manager.engine_state()).data
    running, waiting = engine["running_requests"], engine["waiting_requests"]
    max_running = state.engine_info["max_running_requests"]
    load: dict[str, Any] = {
        "dp_rank": 0,
        "num_running_reqs": running,
        "num_waiting_reqs": waiting,
        "num_total_reqs": running + waiting,
        "num_used_tokens": engine["used_tokens"],
        "num_total_tokens": engine["used_tokens"] + engine["waiting_tokens"],
        "max_total_num_tokens": state.engine_info["max_total_num_tokens"],
        "token_usage": engine["token_usage"],
        "gen_throughput": engine["last_gen_throughput"],
        "utilization": running / max_running,
        "max_running_requests": max_running,
    }
    memory = engine["memory_usage"]
    if include & {"memory", "all"} and memory:
        load["memory"] = {
            "weight_gb": memory["weight"],
            "kv_cache_gb": memory["kvcache"],
            "token_capacity": memory["token_capacity"],
        }
    if include & {"queues", "all"}:
        load["queues"] = {"waiting": waiting, "paused": waiting if engine["paused"] else 0}
    return load


def _aggregate(load: dict[str, Any]) -> dict[str, Any]:
    return {
        "total_running_reqs": load["num_running_reqs"],
        "total_waiting_reqs": load["num_waiting_reqs"],
        "total_reqs": load["num_total_reqs"],
        "total_used_tokens": load["num_used_tokens"],
        "total_tokens": load["num_total_tokens"],
        "avg_token_usage": load["token_usage"],
        "avg_throughput": load["gen_throughput"],
        "avg_utilization": load["utilization"],
    }


def _as_prometheus(load: dict[str, Any]) -> str:
    lines = []
    for name, value in load.items():
        values = value if isinstance(value, dict) else {"": value}
        for part, number in values.items():
            metric = f"sglang_{name}_{part}" if part else f"sglang_{name}"
            if metric != "sglang_dp_rank":
                lines += [f"# TYPE {metric} gauge", f'{metric}{{dp_rank="0"}} {number}']
    return "\n".join(lines) + "\n"
