"""Server-sent events, and work that ends when its client goes."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from invivo.errors import InvivoError
from invivo.server.context import request_id
from invivo.server.errors import ClientGone, error_body, internal_error

log = logging.getLogger("invivo.server")

DONE = "[DONE]"
# JSON leaves these as they are, and some clients end a line at them.
_LINE_ENDS = str.maketrans({"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"})
T = TypeVar("T")


def event(data: BaseModel | dict[str, Any] | str) -> bytes:
    """One event with ``data`` as its JSON; fields never set are left out."""
    if isinstance(data, BaseModel):
        text = data.model_dump_json(exclude_unset=True, by_alias=True)
    elif isinstance(data, dict):
        text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    else:
        text = data
    return b"data: " + text.translate(_LINE_ENDS).encode() + b"\n\n"


async def until_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Runs ``work`` and returns its result; cancels it when the client goes.

    Raises:
        ClientGone: the client went first.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        await _cancel(task, watcher)


class EventStream(Response):
    """A response of events from an async generator, which is closed however the response ends."""

    media_type = "text/event-stream"

    def __init__(self, first: bytes | None, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._first = first
        self._events = events

    @classmethod
    async def open(cls, request: Request, events: AsyncGenerator[bytes, None]) -> EventStream:
        """Waits for the first event, so that a refusal still gets its own status.

        Raises:
            ClientGone: the client went before the first event.
            InvivoError: what the generator raised.
        """
        try:
            first = await until_disconnect(request, _next(events))
        except BaseException:
            await events.aclose()
            raise
        return cls(first, events)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events):
            sender = asyncio.ensure_future(self._send(send))
            watcher = asyncio.ensure_future(_disconnected(receive))
            try:
                await asyncio.wait((sender, watcher), return_when=asyncio.FIRST_COMPLETED)
                if sender.done():
                    sender.result()
            finally:
                await _cancel(sender, watcher)

    async def _send(self, send: Send) -> None:
        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
        )

        async def write(body: bytes) -> None:
            await send({"type": "http.response.body", "body": body, "more_body": True})

        try:
            if self._first is not None:
                await write(self._first)
            async for piece in self._events:
                await write(piece)
        except InvivoError as error:
            log.error("request %s failed in its stream: %s", request_id(), error, exc_info=error)
            await write(event(error_body(error)))
        except Exception as error:
            log.error("request %s failed in its stream", request_id(), exc_info=error)
            await write(event(error_body(internal_error())))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def merged(
    streams: list[AsyncGenerator[T, None]], place: Callable[[int, T], T]
) -> AsyncGenerator[T, None]:
    """Items of several streams as they come, each passed through ``place(stream number, item)``.

    The first failure ends all of them.
    """
    queue: asyncio.Queue[T | BaseException | None] = asyncio.Queue()

    async def drain(number: int, stream: AsyncGenerator[T, None]) -> None:
        try:
            async with aclosing(stream):
                async for item in stream:
                    queue.put_nowait(place(number, item))
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.ensure_future(drain(i, stream)) for i, stream in enumerate(streams)]
    try:
        running = len(tasks)
        while running:
            item = await queue.get()
            if item is None:
                running -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield item
    finally:
        await _cancel(*tasks)


async def _next(events: AsyncGenerator[bytes, None]) -> bytes | None:
    return await anext(events, None)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: asyncio.Future[Any]) -> None:
    """Cancels and waits, so that what the tasks hold is released before going on."""
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.exception()  # seen: an error after the client has gone concerns nobody
