"""Running the application: in the foreground, or in a thread beside other work."""

from __future__ import annotations

import gc
import logging
import socket
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import uvicorn
from fastapi import FastAPI

from invivo.errors import InvalidRequest, Unavailable
from invivo.lm import LM
from invivo.server.app import create_app
from invivo.server.settings import Settings

_START_SECONDS = 120.0  # only ends a hang
_log = logging.getLogger("invivo.server")


def run(
    lm: LM, settings: Settings | None = None, told: Callable[[int], None] = lambda port: None
) -> None:
    """Serves until a stop signal; running requests get ``shutdown_seconds`` to finish.

    Args:
        settings: ``port = 0`` takes a free one.
        told: hears the port as soon as it is taken.

    Raises:
        InvalidRequest: the settings would expose the server without any key, or the address
            cannot be had.
    """
    settings = settings or Settings()
    app = create_app(lm, settings)
    app.state.services.local.programs.check_sites()  # here, so that no request waits for it
    server = _server(app, settings)
    # What stands now stays: to look through it again would stop every stream for 0.1 s at times.
    gc.collect()
    gc.freeze()
    address = bound(settings)
    told(address.getsockname()[1])
    server.run([address])


class ServerThread:
    """A server in a thread of its own, for demos, notebooks and tests; a context manager.

    Args:
        settings: ``port = 0`` takes a free one; ``url`` has it.
    """

    def __init__(self, lm: LM, settings: Settings | None = None) -> None:
        self.settings = settings or Settings(port=0)
        self.app = create_app(lm, self.settings)
        self._server = _server(self.app, self.settings)
        self._socket = bound(self.settings)
        self.port: int = self._socket.getsockname()[1]
        host = self.settings.host
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.port}"
        self._thread = threading.Thread(
            target=self._server.run, args=([self._socket],), name="invivo-http", daemon=True
        )

    def start(self) -> ServerThread:
        """Returns when requests are answered. Raises Unavailable when that does not happen."""
        self._thread.start()
        deadline = time.monotonic() + _START_SECONDS
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                raise Unavailable("the server did not start", remedy="See the log")
            time.sleep(0.01)
        return self

    def stop(self) -> None:
        """Ends the server after its running requests, at most ``shutdown_seconds`` later."""
        self.app.state.services.draining = True
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()

    def __enter__(self) -> ServerThread:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


class _Server(uvicorn.Server):
    """Tells the application of a stop signal at once, so that endless streams end."""

    def __init__(self, config: uvicorn.Config, app: FastAPI) -> None:
        super().__init__(config)
        self._app = app

    def handle_exit(self, sig: int, frame: Any) -> None:
        self._app.state.services.draining = True
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        _log.info(
            "stopping; running requests have %d s, a second signal ends them now",
            self.config.timeout_graceful_shutdown,
        )
        await super().shutdown(sockets)


def _server(app: FastAPI, settings: Settings) -> _Server:
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        access_log=False,  # context.py writes one with the request's id
        log_config=None,
        ws="none",
        server_header=False,
        proxy_headers=False,  # who asks is who connects
        timeout_graceful_shutdown=max(1, round(settings.shutdown_seconds)),
    )
    return _Server(config, app)


def bound(settings: Settings) -> socket.socket:
    """A socket that listens where to serve. Raises InvalidRequest when that cannot be had."""
    host, port = settings.host, settings.port
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        # "localhost" has two addresses; clients try both, IPv4 is there everywhere.
        family, kind, protocol, _, address = min(found, key=lambda one: one[0] != socket.AF_INET)
        made = socket.socket(family, kind, protocol)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(address)
            made.listen()  # before that, another server may have bound the same address
        except OSError:
            made.close()
            raise
    except OSError as error:
        raise InvalidRequest(
            f"cannot serve at {host}:{port}: {error.strerror or error}",
            field="port",
            given=port,
            remedy="Stop what uses it, or choose another host or port",
        ) from error
    return made
