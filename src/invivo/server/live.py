"""GET /v1/live and /v1/live/stream: the engine's statistics for the page (and for scripts)."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response

from invivo.server.answers import LiveSnapshot
from invivo.server.auth import Principal, needs
from invivo.server.documents import failures, streamed
from invivo.server.services import Services, services_of
from invivo.server.streaming import EventStream, event

router = APIRouter(tags=["watch"])

PERIOD = 1.0  # seconds between two snapshots of a stream

Watcher = Annotated[Principal, Depends(needs("metrics"))]


@router.get("/v1/live", response_model=LiveSnapshot, responses=failures())
async def live(request: Request, _principal: Watcher) -> dict[str, Any]:
    """A snapshot of what the engine does; never holds prompts or answers."""
    return snapshot(services_of(request))


@router.get(
    "/v1/live/stream",
    response_class=Response,
    responses=failures() | streamed("A snapshot a second, the first at once"),
)
async def live_stream(request: Request, _principal: Watcher) -> EventStream:
    """Snapshots as events, one a second."""
    return await EventStream.open(request, _events(services_of(request)))


async def _events(services: Services) -> AsyncGenerator[bytes, None]:
    while not services.draining:
        yield event(snapshot(services))
        await asyncio.sleep(PERIOD)


def snapshot(services: Services) -> dict[str, Any]:
    """The live snapshot of docs/architecture.md: the engine's part, the model's name, the state."""
    stats = services.lm.stats()
    info = services.info
    model = {
        "name": services.model_name,
        "parameters": info.n_parameters,
        "dtype": info.dtype,
        "device": info.device,
        "max_model_len": info.max_model_len,
        "has_chat_template": info.has_chat_template,
    }
    adapters = [asdict(adapter) for adapter in services.lm.adapters()]
    state = "draining" if services.draining else stats.get("state", "ready")
    shown = {name: value for name, value in stats.items() if name != "histograms"}
    return _finite(shown | {"state": state, "model": model, "adapters": adapters})


def _finite(value: Any) -> Any:
    """``value`` with null for numbers that JSON cannot hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return value
