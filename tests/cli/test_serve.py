"""``invivo serve`` as a process of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
from tests.waiting import PATIENCE

from invivo.demo.server_process import serving
from invivo.errors import Unavailable

if TYPE_CHECKING:
    from tests.cli.conftest import Invivo


def test_a_server_serves_the_model_its_adapter_and_the_page_until_it_is_stopped(
    invivo: Invivo, tiny: str, adapter: str, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    with serving(tiny, {"odd": Path(adapter)}, 0, log) as url:
        names = [
            model["id"] for model in httpx.get(url + "/v1/models", timeout=PATIENCE).json()["data"]
        ]
        assert len(names) == 2
        assert names[1] == names[0] + ":odd"
        assert "<html" in httpx.get(url, timeout=PATIENCE).text
        command = ("generate", "hello", "-n", "6", "-t", "0", "--url", url)
        assert invivo(*command).code == 0
        assert invivo(*command).out != invivo(*command, "--use", "odd").out
    with pytest.raises(httpx.ConnectError):
        httpx.get(url + "/health", timeout=PATIENCE)
    text = log.read_text(encoding="utf-8")
    assert "/v1/completions" in text
    assert "Traceback" not in text


def test_another_address_than_loopback_needs_a_key(invivo: Invivo, tmp_path: Path) -> None:
    database = f"sqlite:///{tmp_path / 'keys'}"
    ran = invivo("serve", "no-such-model", "--host", "0.0.0.0", "--database", database)
    assert ran.code == 2
    assert "invivo keys add" in ran.err  # asked before the model is even looked for


def test_bad_sizes_are_usage_errors(invivo: Invivo) -> None:
    ran = invivo("serve", "--max-body", "much")
    assert ran.code == 2
    assert "--max-body" in ran.err


def test_a_taken_port_ends_the_server_with_a_reason(tiny: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            [sys.executable, "-m", "invivo.cli", "serve", tiny, "--port", port],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    assert done.returncode != 0
    assert "in use" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    with (
        pytest.raises(Unavailable, match="no such model"),
        serving("no-such-model", {}, 0, tmp_path / "log"),
    ):
        pass
