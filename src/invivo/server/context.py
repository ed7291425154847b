"""What belongs to every request: its id, its line in the log, and an answer whatever happens."""

from __future__ import annotations

import contextvars
import logging
import re
import secrets
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger("invivo.server")

_request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="-")
_SAFE_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")


def request_id() -> str:
    """The id of the request being served, "-" outside of one."""
    return _request_id.get()


class RequestContext:
    """ASGI middleware: request id in and out, access log, no exception beyond this point."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"")
        name = given.decode() if _SAFE_ID.fullmatch(given) else secrets.token_hex(12)
        token = _request_id.set(name)
        began = time.perf_counter()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", name.encode()),
                    (b"x-content-type-options", b"nosniff"),
                ]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            log.exception("request %s %s %s failed", name, scope["method"], scope["path"])
            if status == 0:
                await _answer_500(scope, receive, send_with_id)
        finally:
            log.info(
                "%s %s %s %d %.1f ms",
                name,
                scope["method"],
                scope["path"].encode("unicode_escape").decode(),
                status,
                (time.perf_counter() - began) * 1e3,
            )
            _request_id.reset(token)


async def _answer_500(scope: Scope, receive: Receive, send: Send) -> None:
    from invivo.server.errors import error_response, internal_error

    await error_response(internal_error())(scope, receive, send)
