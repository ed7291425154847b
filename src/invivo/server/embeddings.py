"""POST /v1/embeddings."""

from __future__ import annotations

import base64
from typing import Annotated

import numpy as np
from fastapi import APIRouter, Depends, Request
from starlette.concurrency import run_in_threadpool

from invivo.errors import InvalidRequest
from invivo.server.admission import admit
from invivo.server.answers import Embedding, EmbeddingList, Usage
from invivo.server.auth import Principal, needs
from invivo.server.documents import failures
from invivo.server.ownership import seen_by
from invivo.server.prompts import prompts_of
from invivo.server.schemas import EmbeddingRequest
from invivo.server.services import Services, services_of
from invivo.server.streaming import until_disconnect

router = APIRouter(tags=["measure"])


@router.post(
    "/v1/embeddings",
    response_model=EmbeddingList,
    response_model_exclude_unset=True,
    responses=failures(),
)
async def create_embeddings(
    body: EmbeddingRequest,
    request: Request,
    principal: Annotated[Principal, Depends(needs("score"))],
) -> EmbeddingList:
    """Pooled final hidden states of each input."""
    services = services_of(request)
    size = services.info.hidden_size
    if body.dimensions not in (None, size):
        raise InvalidRequest(
            "this model's embeddings cannot be shortened",
            field="dimensions",
            given=body.dimensions,
            remedy=f"Leave it out or give {size}",
        )
    return await until_disconnect(request, _embed(body, services, principal))


async def _embed(body: EmbeddingRequest, services: Services, principal: Principal) -> EmbeddingList:
    adapter = services.adapter_of(body.model, seen_by(principal))
    async with admit(services, principal) as ticket:
        prompts = await run_in_threadpool(prompts_of, services, body.input)
        await ticket.prompt(prompts.sizes)
        total = sum(prompts.sizes)
        ticket.ran(total)
        vectors: list[list[float]] = await services.lm.aembed(
            [list(one.ids) for one in prompts.marked],
            pooling=body.pooling,
            normalize=body.normalize,
            adapter=adapter,
            salt=principal.salt(body.cache_salt),
        )
    written = _base64 if body.encoding_format == "base64" else list[float]
    return EmbeddingList(
        object="list",
        data=[
            Embedding(index=i, object="embedding", embedding=written(vector))
            for i, vector in enumerate(vectors)
        ],
        model=body.model or services.model_name,
        usage=Usage(prompt_tokens=total, total_tokens=total),
    )


def _base64(vector: list[float]) -> str:
    """Little-endian float32, as the API's clients decode it."""
    return base64.b64encode(np.asarray(vector, dtype="<f4").tobytes()).decode()
