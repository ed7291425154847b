"""A client that goes takes its work with it."""

from __future__ import annotations

import json
import socket

import httpx
import pytest
from tests.waiting import PATIENCE, held_after, held_until_cancelled, wait_for

LONG = {"max_tokens": 900, "ignore_eos": True, "temperature": 0}
ROUTES = {
    "/v1/completions": LONG | {"prompt": "the cat", "n": 4},
    "/v1/chat/completions": LONG | {"messages": [{"role": "user", "content": "hello"}], "n": 4},
}


def send(server, path: str, body: dict) -> socket.socket:
    """Sends a request and leaves the answer to come."""
    content = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.sendall(
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n".encode()
        + content
    )
    return connection


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ROUTES)
def test_a_closed_connection_cancels(server, lm, idle, path, stream):
    before = idle()["totals"]
    with held_until_cancelled(lm.engine):
        connection = send(server, path, ROUTES[path] | {"stream": stream})
        wait_for(lambda: lm.stats()["running"] > 0)
        connection.close()
        after = idle()["totals"]
    assert after["cancelled"] == before["cancelled"] + 1
    assert after["decode"] - before["decode"] < 4 * 900
    wait_for(lambda: server.app.state.services.gate.taken == 0)


def test_a_request_that_only_waits_is_cancelled_too(server, lm, idle):
    before = idle()["totals"]["cancelled"]
    inbox = lm.engine._inbox
    with held_after(lm.engine, 0, until=lambda: len(set(inbox.aborted)) == 4):
        connections = [
            send(server, path, body | {"stream": True})
            for path, body in ROUTES.items()
            for _ in "ab"
        ]
        wait_for(lambda: len(inbox.live) == 4)
        for connection in connections:
            connection.close()
        after = idle()["totals"]
    assert after["cancelled"] - before == 4
    wait_for(lambda: server.app.state.services.gate.taken == 0)


def test_a_watcher_of_the_live_stream_leaves_nothing_behind(server):
    with httpx.stream("GET", f"{server.url}/v1/live/stream", timeout=PATIENCE) as stream:
        line = next(stream.iter_lines())
        assert json.loads(line.removeprefix("data: "))["state"] == "ready"


def test_a_stopping_server_ends_its_streams(lm):
    from invivo.server.run import ServerThread
    from invivo.server.settings import Settings

    server = ServerThread(lm, Settings(port=0, shutdown_seconds=PATIENCE)).start()
    with httpx.stream("GET", f"{server.url}/v1/live/stream", timeout=PATIENCE) as stream:
        lines = stream.iter_lines()
        next(lines)
        server.stop()  # returns although the stream has no end of its own
        list(lines)
