"""Bodies are bounded while they are read, whatever their headers promise."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from invivo.errors import TooLarge
from invivo.server.errors import error_response

UPLOAD_PATH = "/v1/adapters/upload"


class BodyLimit:
    """ASGI middleware: answers 413 as soon as a body is, or says that it is, too large."""

    def __init__(self, app: ASGIApp, *, max_body_bytes: int, max_upload_bytes: int) -> None:
        self._app = app
        self._max_body = max_body_bytes
        self._max_upload = max_upload_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = self._max_upload if scope["path"] == UPLOAD_PATH else self._max_body
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
