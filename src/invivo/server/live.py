"""GET /v1/live and /v1/live/stream: the engine's statistics for the page (and for scripts)."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from starlette.concurrency import run_in_threadpool

from invivo.errors import NotFound
from invivo.lm_jobs import ENDED
from invivo.server.answers import LiveSnapshot
from invivo.server.auth import Principal, needs
from invivo.server.documents import failures, streamed
from invivo.server.services import Services, services_of
from invivo.server.streaming import EventStream, event

router = APIRouter(tags=["watch"])

PERIOD = 1.0  # seconds between two snapshots of a stream
MAX_POINTS = 500  # of a loss curve
_MAX_JOBS = 64  # looked through for those that have not ended
_MAX_CURVES = 8  # jobs shown, besides those that have not ended

Watcher = Annotated[Principal, Depends(needs("metrics"))]


@router.get("/v1/live", response_model=LiveSnapshot, responses=failures())
async def live(request: Request, _principal: Watcher) -> dict[str, Any]:
    """A snapshot of what the engine does; never holds prompts or answers."""
    return await run_in_threadpool(snapshot, services_of(request))


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
        yield event(await run_in_threadpool(snapshot, services))
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
    jobs = _jobs(services, stats["jobs"])
    return _finite(shown | {"state": state, "model": model, "adapters": adapters, "jobs": jobs})


def _jobs(services: Services, running: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The engine's jobs with what the job service knows of them, and its latest others."""
    rows = {job["name"]: job for job in running}
    if services.lm.has_jobs:
        listed = services.jobs.jobs(_MAX_JOBS)
        shown = [job for job in listed if job.status not in ENDED] + listed[:_MAX_CURVES]
        for job in reversed({job.id: job for job in shown}.values()):
            try:
                losses = services.jobs.curve(job.id, MAX_POINTS)
            except NotFound:  # deleted meanwhile
                continue
            row = rows.pop(job.name, {"name": job.name, "state": job.status})
            rows[job.name] = row | {
                "id": job.id,
                "status": job.status,
                "step": job.step,
                "steps": job.n_steps,
                "loss": job.loss,
                "losses": losses,
                "trained_tokens": job.trained_tokens,
                "tokens_per_second": job.tokens_per_second,
                "estimated_finish": job.estimated_finish,
            }
    return list(rows.values())


def _finite(value: Any) -> Any:
    """``value`` with null for numbers that JSON cannot hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return value
