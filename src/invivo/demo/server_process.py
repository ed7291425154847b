"""The demo's server: ``invivo serve`` in a process of its own, on a free loopback port."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from invivo.errors import Unavailable


def free_port() -> int:
    """A port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(
    model: str, adapters: dict[str, Path], port: int, log: Path, options: Sequence[str] = ()
) -> Iterator[str]:
    """Run the server for the length of a ``with`` block.

    Args:
        port: 0 takes a free one.
        log: file for what the server writes.
        options: more of ``invivo serve``.

    Yields:
        The server's address, once it is ready.

    Raises:
        Unavailable: it ended or was not ready within two minutes.
    """
    port = port or free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "invivo.cli", "serve", model, "--port", str(port), *options]
    for name, folder in adapters.items():
        command += ["--adapter", f"{name}={folder}"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
            start_new_session=True,  # Ctrl-C is the demo's to answer
        )
    try:
        _wait_until_ready(process, url, log)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    import httpx

    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if process.poll() is not None:
            last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-5:]
            raise Unavailable(
                "the server ended before it was ready: " + " | ".join(last),
                remedy=f"Its whole log is {log}",
            )
        try:
            if httpx.get(url + "/ready", timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise Unavailable("the server was not ready within 120 s", remedy=f"Its log is {log}")
