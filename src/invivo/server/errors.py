"""Every failure as one shape: {"error": {message, type, param, code, remedy, request_id}}."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from invivo.errors import (
    Forbidden,
    InvalidRequest,
    InvivoError,
    NotFound,
    TooLarge,
    Unauthorized,
)
from invivo.server.context import request_id
from invivo.wire import error_code

log = logging.getLogger("invivo.server")

RETRY_SECONDS = 1

_REMEDY = "The accepted values are described in /openapi.json"
_ROLES = {"system", "developer", "user", "assistant", "tool"}
_TYPE_TAGS = {"str", "int", "float", "bool", "dict", "list", "none"}
_REMEDIES = {
    "missing": "Add the field",
    "extra_forbidden": "Remove the field or check its spelling",
    "json_invalid": "Send valid JSON with the header Content-Type: application/json",
    "model_attributes_type": "Send a JSON object with the header Content-Type: application/json",
}


class ClientGone(Exception):
    """The client closed its connection before the answer was ready."""


def error_body(error: InvivoError) -> dict[str, Any]:
    """The body for ``error``; text that is not valid Unicode is replaced."""
    message = error.message
    if error.given is not None:
        shown = repr(error.given)
        message += f" (given {shown if len(shown) <= 120 else shown[:117] + '...'})"
    return {
        "error": {
            "message": _clean(message),
            "type": error.kind,
            "param": _clean(error.field),
            "code": error_code(type(error)),
            "remedy": _clean(error.remedy or _REMEDY),
            "request_id": request_id(),
        }
    }


def error_response(error: InvivoError) -> JSONResponse:
    """The whole answer for ``error``, with the headers that its status asks for."""
    headers: dict[str, str] = {}
    if error.status in (429, 503):
        headers["Retry-After"] = str(RETRY_SECONDS)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_body(error), error.status, headers)


def internal_error() -> InvivoError:
    """What a client learns of a bug of ours; the log has the rest under the request's id."""
    return InvivoError(
        "the server failed on this request",
        remedy="Try again; the server's log has the reason under this request id",
    )


def install_error_handlers(app: FastAPI) -> None:
    """Makes ``app`` answer every failure in the common shape."""
    app.add_exception_handler(InvivoError, _invivo)
    app.add_exception_handler(RequestValidationError, _validation)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(ClientGone, _gone)
    app.add_exception_handler(ClientDisconnect, _gone)


async def _invivo(_request: Request, error: Exception) -> Response:
    assert isinstance(error, InvivoError)
    if error.status >= 500:
        log.error("request %s failed: %s", request_id(), error, exc_info=error)
    return error_response(error)


async def _validation(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return error_response(from_validation(error.errors()))


async def _http(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    kind = {404: NotFound, 413: TooLarge, 401: Unauthorized, 403: Forbidden}.get(
        error.status_code, InvalidRequest
    )
    remedy = {
        404: "The routes are listed in /openapi.json",
        405: "The methods are listed in /openapi.json",
        400: "Send a well-formed body of the right content type",
    }.get(error.status_code)
    body = error_body(kind(str(error.detail), remedy=remedy))
    return JSONResponse(body, error.status_code, error.headers)


async def _gone(_request: Request, _error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it; the access log does


def from_validation(errors: Sequence[Mapping[str, Any]]) -> InvalidRequest:
    """The first of pydantic's errors as ours, naming the field as a path."""
    first = errors[0]
    kind = str(first["type"])
    message = str(first["msg"])
    message = message.removeprefix("Value error, ")
    if len(errors) > 1 and kind in ("missing", "extra_forbidden"):
        message += f" (and {len(errors) - 1} more)"
    field = None if kind == "json_invalid" else _path(first["loc"])
    forms = {str(one["msg"]): None for one in errors if _path(one["loc"]) == field}
    if field is not None and len(forms) > 1:  # a union: each of its members complains
        message = "; or ".join(forms)
    if kind == "value_error" and field is None and ": " in message:
        field, message = message.split(": ", 1)  # from a check of several fields together
    remedy = _REMEDIES.get(kind, _REMEDY)
    return InvalidRequest(message, field=field, remedy=remedy)


def _path(loc: Sequence[str | int]) -> str | None:
    """("body", "messages", 0, "user", "content", "str") -> messages[0].content"""
    path = ""
    before: str | int = ""
    for part in loc[1:]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not _is_tag(part, before):
            path += f".{part}" if path else part
        before = part
    return path or None


def _is_tag(part: str, before: str | int) -> bool:
    """Whether ``part`` names a member of a union and not a field."""
    if isinstance(before, int) and part in _ROLES:
        return True
    return before == "response_format" or part in _TYPE_TAGS or any(c in part for c in "[(-")


def _clean(text: str | None) -> str | None:
    return None if text is None else text.encode("utf-8", "replace").decode()
