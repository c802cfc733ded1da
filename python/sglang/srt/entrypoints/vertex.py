"""POST /vertex_generate: /generate in the envelope of Google's Vertex AI."""

from __future__ import annotations

from typing import Any

import pydantic
from fastapi import APIRouter, Request, Response

from sglang.srt.entrypoints.error_forms import JsonResponse
from sglang.srt.entrypoints.json_body import BodyForm, takes
from sglang.srt.entrypoints.native import Generation
from sglang.srt.entrypoints.server_state import state_of
from sglang.srt.entrypoints.streaming import unless_client_leaves
from sglang.srt.errors import RequestError

router = APIRouter()


class VertexBody(pydantic.BaseModel):
    """instances: each with `text` or all with `input_ids`. parameters: further fields of
    /generate, the same for all."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    instances: list[dict[str, Any]]
    parameters: dict[str, Any] | None = None


_BODY = BodyForm(VertexBody)


@router.post("/vertex_generate")
@takes(_BODY)
async def vertex_generate(request: Request) -> Response:
    body = await _BODY.read(request)
    if not body.instances:
        return JsonResponse({"predictions": []})
    inputs: dict[str, list[Any]] = {}
    for i, instance in enumerate(body.instances):
        if set(instance) not in ({"text"}, {"input_ids"}):
            field = f"instances[{i}]"
            raise RequestError(f"{field}: must have text or input_ids, and nothing else", field)
        for name, value in instance.items():
            inputs.setdefault(name, []).append(value)
    parameters = dict(body.parameters or {})
    if parameters.pop("stream", False):
        raise RequestError("parameters.stream: predictions are not streamed", "parameters.stream")
    generation = Generation(state_of(request), {**parameters, **inputs})
    predictions = await unless_client_leaves(request, generation.collect())
    return JsonResponse({"predictions": predictions})
