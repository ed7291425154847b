"""A port for a server that starts later."""

from __future__ import annotations

import socket


def kept_port() -> socket.socket:
    """A socket on a free loopback port that nobody else is given while it is open.

    It does not listen, so a server (which binds with SO_REUSEADDR) can have its port by number.
    """
    kept = socket.socket()
    kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    kept.bind(("127.0.0.1", 0))
    return kept
