"""HTTP on one private event loop in a thread: used from any thread and from any other loop."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from typing import Any, TypeVar

import httpx

from invivo.errors import Overloaded, Unavailable
from invivo.wire import JsonBody, error_of

T = TypeVar("T")

_CONNECT_SECONDS = 10.0
_AT_ONCE = 32  # requests of one batch on the way together


class Transport:
    """Requests and event streams to one server; failures are the typed errors.

    Args:
        url: of the server, without ``/v1``.
        key: bearer key, None = none.
        timeout: seconds that the server may be silent during a request.
    """

    def __init__(self, url: str, *, key: str | None, timeout: float) -> None:
        self._url = url
        self._timeout = timeout
        self._loop = asyncio.new_event_loop()
        self._client = httpx.AsyncClient(
            base_url=url,
            headers={} if key is None else {"Authorization": f"Bearer {key}"},
            timeout=httpx.Timeout(timeout, connect=_CONNECT_SECONDS, pool=None),
            limits=httpx.Limits(max_connections=256),
        )
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="invivo-remote", daemon=True
        )
        self._thread.start()
        self._lock = threading.Lock()
        self._closed = False

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs ``work`` on the private loop; an interrupted wait cancels it."""
        future = self._submit(work)
        try:
            return future.result()
        except CancelledError:  # by close, from another thread
            raise _closed() from None
        except BaseException:
            future.cancel()
            raise

    async def hop(self, work: Coroutine[Any, Any, T]) -> T:
        """:meth:`wait` from another event loop; a cancelled caller cancels ``work``."""
        future = self._submit(work)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise _closed() from None

    async def request(self, method: str, path: str, **content: Any) -> JsonBody:
        """The JSON answer to one request.

        Raises:
            Unavailable: no answer.
            InvivoError: the server's own error, as its class.
        """
        try:
            response = await self._client.request(method, path, **content)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        return _checked(response)

    async def fetch(self, path: str) -> bytes:
        """The body of an answer that is no JSON; errors as :meth:`request`."""
        try:
            response = await self._client.get(path)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        if response.status_code >= 400:
            _checked(response)
        return response.content

    async def post(self, path: str, body: JsonBody) -> JsonBody:
        return await self.request("POST", path, json=body)

    async def post_all(
        self, path: str, bodies: list[JsonBody], *, progress: bool = False
    ) -> list[JsonBody]:
        """Answers to several requests in their order; the first failure cancels the others.

        A batch waits for a busy server, as one in this process waits for its engine.
        """
        send = self._patiently if len(bodies) > 1 else self.post
        places = asyncio.Semaphore(_AT_ONCE)
        with _bar(len(bodies), shown=progress) as advance:

            async def one(body: JsonBody) -> JsonBody:
                async with places:
                    answer = await send(path, body)
                advance()
                return answer

            tasks = [asyncio.ensure_future(one(body)) for body in bodies]
            try:
                return list(await asyncio.gather(*tasks))
            finally:
                for task in tasks:
                    task.cancel()

    async def _patiently(self, path: str, body: JsonBody) -> JsonBody:
        deadline = time.monotonic() + self._timeout
        pause = 0.1
        while True:
            try:
                return await self.post(path, body)
            except Overloaded:
                if time.monotonic() + pause > deadline:
                    raise
            await asyncio.sleep(pause)
            pause = min(1.5 * pause, 2.0)

    def stream(self, path: str, body: JsonBody) -> Generator[JsonBody, None, None]:
        """Events of a streamed answer; closing the generator closes the connection."""
        pump = _Pump(self._loop)
        self.wait(pump.start(self._events(path, body)))
        try:
            while (item := self.wait(pump.next())) is not None:
                yield item
        finally:
            if not self._closed:
                self.wait(pump.stop())

    async def astream(self, path: str, body: JsonBody) -> AsyncGenerator[JsonBody, None]:
        """:meth:`stream` for another event loop."""
        pump = _Pump(self._loop)
        await self.hop(pump.start(self._events(path, body)))
        try:
            while (item := await self.hop(pump.next())) is not None:
                yield item
        finally:
            if not self._closed:
                await self.hop(pump.stop())

    def close(self) -> None:
        """Cancels what runs; calling it twice is harmless."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        with self._lock:  # what is on its way before close is also cancelled by it
            if not self._closed:
                return asyncio.run_coroutine_threadsafe(work, self._loop)
        work.close()
        raise _closed()

    async def _events(self, path: str, body: JsonBody) -> AsyncGenerator[JsonBody, None]:
        try:
            async with self._client.stream("POST", path, json=body | {"stream": True}) as response:
                if response.status_code != 200:
                    await response.aread()
                    _checked(response)
                async for line in response.aiter_lines():
                    if not line.startswith("data: "):
                        continue
                    if line == "data: [DONE]":
                        return
                    item = json.loads(line[6:])
                    if "error" in item:
                        raise error_of(item, 500)
                    yield item
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error

    async def _end(self) -> None:
        tasks = asyncio.all_tasks(self._loop) - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.aclose()

    def _unreachable(self, error: httpx.HTTPError) -> Unavailable:
        if isinstance(error, httpx.TimeoutException):
            return Unavailable(
                f"the server at {self._url} took too long",
                field="timeout",
                remedy="Connect with a longer timeout, or ask for less",
            )
        return Unavailable(
            f"no answer from {self._url}: {error or type(error).__name__}",
            field="url",
            remedy="Check the address, and that `invivo serve` runs there",
        )


class _Pump:
    """Reads a generator in one task, so that stopping it at any moment is one cancellation."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._items: asyncio.Queue[JsonBody | Exception | None] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None

    async def start(self, events: AsyncGenerator[JsonBody, None]) -> None:
        self._task = self._loop.create_task(self._run(events))

    async def next(self) -> JsonBody | None:
        """The next item, None at the end; raises what the generator raised."""
        item = await self._items.get()
        if isinstance(item, Exception):
            raise item
        return item

    async def stop(self) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _run(self, events: AsyncGenerator[JsonBody, None]) -> None:
        try:
            async for item in events:
                self._items.put_nowait(item)
            self._items.put_nowait(None)
        except Exception as error:
            self._items.put_nowait(error)
        finally:
            await events.aclose()


def _closed() -> Unavailable:
    return Unavailable("the connection is closed", remedy="Connect again")


@contextmanager
def _bar(total: int, *, shown: bool) -> Iterator[Callable[[], None]]:
    """A progress bar over a batch, where one is wanted; gives a function that advances it."""
    if not shown:
        yield lambda: None
        return
    from rich.progress import Progress

    with Progress(transient=True) as progress:
        task = progress.add_task("requests", total=total)
        yield lambda: progress.advance(task)


def _checked(response: httpx.Response) -> JsonBody:
    try:
        body = response.json()
    except ValueError:
        body = None
    if response.status_code >= 400 or not isinstance(body, dict):
        raise error_of(body, response.status_code)
    return body
