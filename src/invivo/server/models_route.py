"""GET /v1/models: the base model and each loaded adapter as "base:adapter"."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request

from invivo.server.answers import Model, ModelList
from invivo.server.auth import Principal, needs
from invivo.server.documents import failures
from invivo.server.ownership import seen_by
from invivo.server.services import Services, services_of

router = APIRouter(tags=["models"])


@router.get("/v1/models", response_model=ModelList, responses=failures())
def list_models(request: Request, _principal: Annotated[Principal, Depends(needs())]) -> ModelList:
    """What can be asked for as ``model``."""
    services = services_of(request)
    adapters = [adapter.name for adapter in services.lm.adapters()]
    return ModelList(
        object="list",
        data=[_model(services, None), *(_model(services, name) for name in adapters)],
    )


@router.get("/v1/models/{model:path}", response_model=Model, responses=failures())
def get_model(
    model: str,
    request: Request,
    principal: Annotated[Principal, Depends(needs())],
) -> Model:
    """One model by its name."""
    services = services_of(request)
    return _model(services, services.adapter_of(model, seen_by(principal)))


def _model(services: Services, adapter: str | None) -> Model:
    base, info = services.model_name, services.info
    return Model(
        id=base if adapter is None else f"{base}:{adapter}",
        object="model",
        created=info.created,
        owned_by="invivo",
        root=base,
        parent=None if adapter is None else base,
        max_model_len=info.max_model_len,
        family=info.family,
        n_parameters=info.n_parameters,
        dtype=info.dtype,
        device=info.device,
        vocab_size=info.vocab_size,
        hidden_size=info.hidden_size,
        fingerprint=info.fingerprint,
        has_chat_template=info.has_chat_template,
        sites=info.sites,
    )
