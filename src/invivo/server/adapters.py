"""/v1/adapters: list, load (from the server's disk or by upload) and unload adapters.

Only a JSON configuration and a safetensors file are ever taken; nothing that could hold code.
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import FileResponse
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile

from invivo.adapter_archive import ADAPTER_FILES, pack
from invivo.engine.adapter_file import write_adapter
from invivo.errors import Forbidden, InvalidRequest, InvivoError, TooLarge
from invivo.lm import AdapterInfo
from invivo.server.answers import Adapter, AdapterList, Deleted
from invivo.server.auth import Principal, needs
from invivo.server.documents import failures
from invivo.server.ownership import check_files_of
from invivo.server.schemas import ADAPTER_NAME, AdapterRequest
from invivo.server.services import Services, services_of

router = APIRouter(tags=["adapters"])

UPLOAD_PATH = "/v1/adapters/upload"
CONFIG_FILE, WEIGHTS_FILE = ADAPTER_FILES
_MAX_CONFIG_BYTES = 1 << 20
_MAX_HEADER_BYTES = 100 << 20  # the safetensors format's own bound

_UPLOAD_BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["name", "config", "weights"],
                "properties": {
                    "name": {"type": "string", "pattern": ADAPTER_NAME},
                    "config": {"type": "string", "format": "binary", "description": CONFIG_FILE},
                    "weights": {"type": "string", "format": "binary", "description": WEIGHTS_FILE},
                },
            }
        }
    },
}

_CONTENT: dict[int | str, dict[str, Any]] = {
    200: {
        "description": f"A zip file with {CONFIG_FILE} and {WEIGHTS_FILE}",
        "content": {"application/zip": {"schema": {"type": "string", "format": "binary"}}},
    }
}

Manager = Annotated[Principal, Depends(needs("adapters"))]

# Plain functions: loading takes a while, FastAPI runs them in its thread pool.


@router.get("/v1/adapters", response_model=AdapterList, responses=failures())
def list_adapters(
    request: Request, _principal: Annotated[Principal, Depends(needs())]
) -> AdapterList:
    """The loaded adapters."""
    services = services_of(request)
    loaded = services.lm.adapters()
    return AdapterList(object="list", data=[_adapter(services, one) for one in loaded])


@router.post("/v1/adapters", response_model=Adapter, responses=failures(409))
def load_adapter(body: AdapterRequest, request: Request, principal: Manager) -> Adapter:
    """Loads a folder of the server's disk (an administrator's, or on an open loopback server)."""
    services = services_of(request)
    if not principal.may("admin"):
        raise Forbidden(
            "paths on the server are for administrators",
            field="path",
            remedy="Upload the two files to /v1/adapters/upload instead",
        )
    try:
        folder = Path(body.path).expanduser()
        complete = all((folder / name).is_file() for name in (CONFIG_FILE, WEIGHTS_FILE))
    except (OSError, ValueError, RuntimeError):  # too long, a NUL, no such user
        complete = False
    if not complete:
        raise InvalidRequest(
            f"not a folder with {CONFIG_FILE} and {WEIGHTS_FILE}",
            field="path",
            given=body.path,
            remedy="Give the folder that peft's save_pretrained wrote",
        )
    return _adapter(services, _load(services, body.name, folder))


@router.post(
    UPLOAD_PATH,
    response_model=Adapter,
    responses=failures(409),
    openapi_extra={"requestBody": _UPLOAD_BODY},
)
async def upload_adapter(request: Request, _principal: Manager) -> Adapter:
    """Loads an adapter from its two files."""
    # The form is read here and not by the framework, which would take it in before the key is seen.
    async with request.form(max_files=2, max_fields=1) as form:
        return await run_in_threadpool(_load_form, services_of(request), form)


@router.get(
    "/v1/adapters/{name}/content",
    response_class=FileResponse,
    responses=failures() | _CONTENT,
)
def get_adapter_content(
    name: str, request: Request, principal: Annotated[Principal, Depends(needs())]
) -> FileResponse:
    """The files of an adapter, or of a job's checkpoint, in the peft library's format.

    For keys with the scope adapters, and for those whose job has made it.
    """
    services = services_of(request)
    check_files_of(services, principal, name)
    specs, parameters = services.local.engine.adapters.content(name)
    folder = services.uploads / f"content-{secrets.token_hex(6)}"
    try:
        config = services.local.model.config
        write_adapter(folder, specs, parameters, config, services.model_name)
        pack(folder, folder / "adapter.zip")
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return FileResponse(
        folder / "adapter.zip",
        media_type="application/zip",
        filename=f"{name.replace(':', '-')}.zip",
        background=BackgroundTask(shutil.rmtree, folder, ignore_errors=True),
    )


@router.delete("/v1/adapters/{name}", response_model=Deleted, responses=failures())
def unload_adapter(name: str, request: Request, _principal: Manager) -> Deleted:
    """Forgets an adapter; requests that run with it finish first."""
    services_of(request).lm.unload_adapter(name)
    return Deleted(name=name, object="adapter", deleted=True)


def _load_form(services: Services, form: FormData) -> Adapter:
    given = form.get("name")
    name = given if isinstance(given, str) else ""
    if not re.fullmatch(ADAPTER_NAME, name):
        raise InvalidRequest(
            "not a usable adapter name",
            field="name",
            given=name,
            remedy="Send 1 to 64 letters, digits and . _ -, beginning with a letter or digit",
        )
    settings = _config(_file(form, "config", CONFIG_FILE))
    weights = _file(form, "weights", WEIGHTS_FILE)
    _check_safetensors(weights)
    folder = services.uploads / f"{name}-{secrets.token_hex(6)}"
    folder.mkdir()
    try:
        (folder / CONFIG_FILE).write_text(json.dumps(settings))
        with (folder / WEIGHTS_FILE).open("wb") as file:
            shutil.copyfileobj(weights.file, file)
        return _adapter(services, _load(services, name, folder))
    except InvivoError as error:
        # Whoever sent the files knows them by name, and need not learn where they lie here.
        if error.given is not None and str(folder) in str(error.given):
            error.given = str(error.given).replace(f"{folder}/", "")
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _file(form: FormData, part: str, usual: str) -> UploadFile:
    given = form.get(part)
    if not isinstance(given, UploadFile):
        raise InvalidRequest(
            "this file is missing", field=part, remedy=f"Send {usual} as the form's part {part!r}"
        )
    return given


def _load(services: Services, name: str, folder: Path) -> AdapterInfo:
    try:
        return services.lm.load_adapter(name, folder)
    except InvivoError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidRequest(
            f"the adapter cannot be read: {error}",
            field="weights",
            remedy="Check that both files are as peft's save_pretrained wrote them",
        ) from error


def _config(upload: UploadFile) -> dict[str, Any]:
    text = upload.file.read(_MAX_CONFIG_BYTES + 1)
    if len(text) > _MAX_CONFIG_BYTES:
        raise TooLarge(
            f"{CONFIG_FILE} is larger than {_MAX_CONFIG_BYTES} bytes",
            field="config",
            remedy="Send the file that peft's save_pretrained wrote",
        )
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise InvalidRequest(
            "not a JSON object",
            field="config",
            given=upload.filename,
            remedy=f"Send {CONFIG_FILE} as peft's save_pretrained wrote it",
        )
    return settings


def _check_safetensors(upload: UploadFile) -> None:
    """The format begins with the length of a JSON header; a pickle or a zip does not."""
    head = upload.file.read(9)
    length = int.from_bytes(head[:8], "little")
    size = upload.size or 0
    if len(head) < 9 or head[8:] != b"{" or not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
        raise InvalidRequest(
            "not a safetensors file",
            field="weights",
            given=upload.filename,
            remedy=f"Send {WEIGHTS_FILE}; other formats are never read",
        )
    upload.file.seek(0)


def _adapter(services: Services, info: AdapterInfo) -> Adapter:
    return Adapter(
        name=info.name,
        object="adapter",
        model=f"{services.model_name}:{info.name}",
        version=info.version,
        rank=info.rank,
        running=info.running,
        n_parameters=info.n_parameters,
    )
