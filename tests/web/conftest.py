"""A headless Chromium on the live page of a real server with a tiny model."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import tiny_model_folder
from tests.waiting import PATIENCE

import invivo
from invivo.local import LocalLM
from invivo.server.run import ServerThread
from invivo.server.settings import Settings

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
]

OpenPage = Callable[..., Any]


# Not for the session: while playwright runs, its event loop keeps others out of this thread.
@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        sync_playwright = None
    if sync_playwright is None or chromium is None:
        if os.environ.get("CI") == "true":
            pytest.fail("the page tests need playwright and a chromium on the path")
        pytest.skip("no playwright or no chromium")
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(
            executable_path=chromium, args=FLAGS, timeout=1000 * PATIENCE
        )
        yield made
        made.close()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("web-model"), max_position_embeddings=8192)


@pytest.fixture(scope="session")
def lm(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalLM]:
    options = {"device": "cpu", "dtype": "float32", "kv_bytes": 16 << 20}
    state = tmp_path_factory.mktemp("web-jobs")
    with invivo.load(str(model_folder), state=state, **options) as made:
        yield made


@pytest.fixture(scope="session")
def server(lm: LocalLM) -> Iterator[ServerThread]:
    with ServerThread(lm, Settings(port=0, served_name="tiny")) as running:
        yield running


@pytest.fixture
def open_page(browser: Any, server: ServerThread) -> Iterator[OpenPage]:
    """Opens the page; afterwards nothing may have been logged as an error or asked of others."""
    contexts, problems = [], []

    def make(url: str = server.url, *, width: int = 1400, height: int = 900, dark: bool = False):
        context = browser.new_context(
            viewport={"width": width, "height": height},
            color_scheme="dark" if dark else "light",
            reduced_motion="reduce",
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(1000 * PATIENCE)
        page.on("pageerror", lambda error: problems.append(f"exception: {error}"))
        page.on("console", lambda m: m.type in ("error", "warning") and problems.append(m.text))
        page.on(
            "request",
            lambda r: r.url.startswith(url) or problems.append(f"foreign request: {r.url}"),
        )
        page.goto(url)
        return page

    make.problems = problems  # type: ignore[attr-defined]
    yield make
    for context in contexts:
        context.close()
    assert problems == []
