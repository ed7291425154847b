"""What the OpenAPI document says of failures and streams on every route."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from invivo.server.answers import ErrorAnswer

_MEANING = {
    400: "The request cannot be carried out as written",
    401: "No key, or an unknown one",
    403: "The key lacks the scope or the budget, or the origin is not allowed",
    404: "No such model, adapter, file or job",
    409: "It exists already or is in use",
    413: "The body, the prompt or the upload is too large",
    429: "Too many requests; try again after Retry-After seconds",
    500: "The server failed",
    501: "An optional library is missing on the server",
    503: "The server is starting, stopping or has failed",
}


def failures(*more: int) -> dict[int | str, dict[str, Any]]:
    """The ``responses`` of a route: those that every route can give, and ``more``."""
    statuses = sorted({400, 401, 403, 404, 413, 429, 500, 501, 503, *more})
    return {status: {"model": ErrorAnswer, "description": _MEANING[status]} for status in statuses}


def streamed(description: str) -> dict[int | str, dict[str, Any]]:
    """The ``responses`` entry of a route that may answer with events."""
    return {
        200: {
            "description": description,
            # No schema: tools disagree on whether it would be of the text or of each event.
            "content": {"text/event-stream": {}},
        }
    }


def install_document(app: FastAPI) -> None:
    """Gives ``app`` its document without the framework's own 422, which is never sent."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = get_openapi(
                title=app.title,
                version=app.version,
                description=app.description,
                routes=app.routes,
            )
            for path in made["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
            for name in ("HTTPValidationError", "ValidationError"):
                made["components"]["schemas"].pop(name, None)
            app.openapi_schema = made
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]
