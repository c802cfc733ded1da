"""Endpoints of models that embed, rank or classify: a model that generates refuses them."""

from __future__ import annotations

import pydantic
from fastapi import APIRouter, Request, Response

from sglang.srt.entrypoints.json_body import BodyForm, takes
from sglang.srt.errors import RequestError

router = APIRouter()


class _AnyBody(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="allow")


_ANY = BodyForm(_AnyBody)


@router.post("/v1/embeddings")
@router.post("/v1/classify")
@router.api_route("/v1/rerank", methods=["POST", "PUT"])
@router.api_route("/encode", methods=["POST", "PUT"])
@router.api_route("/classify", methods=["POST", "PUT"])
@takes(_ANY)
async def refuse(request: Request) -> Response:
    await _ANY.read(request)
    path = request.url.path
    raise RequestError(f"{path} needs an embedding, ranking or reward model; this one generates")
