"""The application: routes, limits, errors and the page over one LM."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from importlib import resources
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles
from starlette.middleware.cors import CORSMiddleware

from invivo import __version__
from invivo.lm import LM
from invivo.server import (
    adapters,
    blobs,
    chat,
    completions,
    embeddings,
    files,
    fine_tuning,
    health,
    live,
    metrics,
    models_route,
    programs,
    score,
    tokens,
    training_runs,
)
from invivo.server.admission import Gate
from invivo.server.auth import check_exposure
from invivo.server.budgets import Ledger
from invivo.server.context import RequestContext
from invivo.server.documents import install_document
from invivo.server.errors import install_error_handlers
from invivo.server.keys import KeyStore
from invivo.server.limits import BodyLimit
from invivo.server.services import Services
from invivo.server.settings import Settings

_PAGE_POLICY = (
    "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "object-src 'none'; base-uri 'none'; frame-ancestors 'none'"
)


def create_app(lm: LM, settings: Settings | None = None) -> FastAPI:
    """An ASGI application that serves ``lm``; the caller closes the LM.

    Raises:
        InvalidRequest: the settings would expose the server without any key.
    """
    settings = settings or Settings()
    keys = KeyStore(settings.database_url) if settings.keyed else None
    check_exposure(settings, keys)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None, None]:
        with tempfile.TemporaryDirectory(prefix="invivo-uploads-") as folder:
            services.uploads = Path(folder)
            yield
            services.draining = True
        if services.ledger is not None:
            services.ledger.close()
        if keys is not None:
            keys.close()

    services = Services(
        lm=lm,
        info=lm.info(),
        settings=settings,
        gate=Gate(settings.max_concurrent),
        keys=keys,
        ledger=None if keys is None else Ledger(keys),
        uploads=Path(),
    )
    app = FastAPI(
        title="invivo",
        version=__version__,
        description="One living language model: OpenAI's API and more.",
        lifespan=lifespan,
        docs_url=None,  # it would load its scripts from elsewhere
        redoc_url=None,
    )
    app.state.services = services
    app.state.registry = metrics.make_registry(services)
    for part in (
        chat,
        completions,
        embeddings,
        score,
        programs,
        blobs,
        tokens,
        models_route,
        adapters,
        files,
        fine_tuning,
        health,
        metrics,
        live,
        training_runs,
    ):
        app.include_router(part.router)
    install_error_handlers(app)
    install_document(app)
    _add_page(app)
    # The last added is the outermost.
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.allowed_origins),
            allow_methods=["*"],
            allow_headers=["*"],
        )
    app.add_middleware(
        BodyLimit,
        max_body_bytes=settings.max_body_bytes,
        uploads={
            adapters.UPLOAD_PATH: settings.max_upload_bytes,
            files.FILES_PATH: settings.max_file_bytes,
            blobs.BLOBS_PATH: settings.max_blob_bytes,
        },
    )
    app.add_middleware(RequestContext)
    return app


def _add_page(app: FastAPI) -> None:
    """The live page at / and its files under /static, where they are installed."""
    folder = Path(str(resources.files("invivo") / "web"))
    index = folder / "index.html"
    if not index.is_file():
        return

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(index, headers={"Content-Security-Policy": _PAGE_POLICY})

    app.mount("/static", StaticFiles(directory=folder), name="static")
