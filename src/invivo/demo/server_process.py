"""The demo's server: ``invivo serve`` in a process of its own, on a free loopback port."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from invivo.errors import Unavailable

_ADDRESS = re.compile(r" at (http://\S+:\d+), Ctrl-C")  # what `invivo serve` says of itself
_START_SECONDS = 300.0


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
        Unavailable: it ended or was not ready within five minutes.
    """
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
        yield _address_when_ready(process, log)
    finally:
        process.terminate()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _address_when_ready(process: subprocess.Popen[bytes], log: Path) -> str:
    import httpx

    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        ended = process.poll() is not None
        said = log.read_text(encoding="utf-8", errors="replace")
        if ended:
            last = said.strip().splitlines()[-5:]
            raise Unavailable(
                "the server ended before it was ready: " + " | ".join(last),
                remedy=f"Its whole log is {log}",
            )
        if found := _ADDRESS.search(said):
            try:
                if httpx.get(found[1] + "/ready", timeout=10).status_code == 200:
                    return found[1]
            except httpx.TransportError:
                pass
        time.sleep(0.2)
    raise Unavailable(
        f"the server was not ready within {_START_SECONDS:.0f} s", remedy=f"Its log is {log}"
    )
