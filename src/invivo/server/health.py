"""GET /health (the process lives) and /ready (it can take work). Open to everyone."""

from __future__ import annotations

from fastapi import APIRouter, Request

from invivo.errors import Unavailable
from invivo.server.answers import ErrorAnswer, Health
from invivo.server.services import services_of

router = APIRouter(tags=["health"])


@router.get("/health", response_model=Health)
async def health() -> Health:
    """Alive."""
    return Health(status="ok")


@router.get("/ready", response_model=Health, responses={503: {"model": ErrorAnswer}})
async def ready(request: Request) -> Health:
    """Ready for work; 503 while the server stops or when the engine has failed."""
    services = services_of(request)
    state = "draining" if services.draining else str(services.lm.stats().get("state", "ready"))
    if state != "ready":
        raise Unavailable(f"the server is {state}", remedy="Try again in a moment")
    return Health(status="ready")
