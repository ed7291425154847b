"""Bodies are bounded while they are read, whatever their headers promise."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from invivo.errors import TooLarge
from invivo.server.errors import error_response


class BodyLimit:
    """ASGI middleware: answers 413 as soon as a body is, or says that it is, too large.

    Args:
        max_body_bytes: for every path that is not in ``uploads``.
        uploads: path -> largest body there.
    """

    def __init__(self, app: ASGIApp, *, max_body_bytes: int, uploads: Mapping[str, int]) -> None:
        self._app = app
        self._max_body = max_body_bytes
        self._uploads = uploads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = self._uploads.get(scope["path"], self._max_body)
        said = dict(scope["headers"]).get(b"content-length", b"0")
        if said.isdigit() and int(said[:20]) > limit:
            await _refuse(limit)(scope, receive, send)
            return
        taken = 0
        refused = False
        started = False

        async def counted() -> Message:
            nonlocal taken, refused
            if refused:
                return {"type": "http.disconnect"}
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > limit and not started:
                refused = True
                await _refuse(limit)(scope, receive, send)
                return {"type": "http.disconnect"}
            return message

        async def unless_refused(message: Message) -> None:
            nonlocal started
            started = True
            if not refused:
                await send(message)

        await self._app(scope, counted, unless_refused)


def _refuse(limit: int) -> ASGIApp:
    response = error_response(
        TooLarge(
            f"the body is larger than {limit} bytes",
            field="body",
            remedy="Send less, or raise the server's limit",
        )
    )
    response.headers["Connection"] = "close"  # the rest of the body is not read
    return response
