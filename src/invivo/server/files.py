"""/v1/files: training data, uploaded, listed, read back and deleted. A key sees its own files."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import FileResponse
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile

from invivo.errors import InvalidRequest, TooLarge
from invivo.lm_jobs import FileInfo
from invivo.server.auth import Principal, needs
from invivo.server.documents import failures
from invivo.server.fine_tuning_answers import DeletedFile, File, FileList
from invivo.server.ownership import own_file, seen_by, stored_as
from invivo.server.pages import page_after
from invivo.server.services import Services, services_of

router = APIRouter(tags=["files"])

FILES_PATH = "/v1/files"
PURPOSE = "fine-tune"
_MAX_NAME = 255

_UPLOAD_BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["file", "purpose"],
                "properties": {
                    "file": {
                        "type": "string",
                        "format": "binary",
                        "description": "JSON lines with messages, text, or prompt and completion",
                    },
                    "purpose": {"type": "string", "enum": [PURPOSE]},
                },
            }
        }
    },
}
_CONTENT: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/octet-stream": {"schema": {"type": "string"}}}},
}

Tuner = Annotated[Principal, Depends(needs("finetune"))]

# Plain functions: they wait for the disk, FastAPI runs them in its thread pool.


@router.post(
    FILES_PATH,
    response_model=File,
    responses=failures(),
    openapi_extra={"requestBody": _UPLOAD_BODY},
)
async def upload_file(request: Request, principal: Tuner) -> File:
    """Takes in a file of training data. Its lines are checked when a job is made of it."""
    # The form is read here and not by the framework, which would take it in before the key is seen.
    async with request.form(max_files=1, max_fields=4) as form:
        return await run_in_threadpool(_store, services_of(request), principal, form)


@router.get(FILES_PATH, response_model=FileList, responses=failures())
def list_files(
    request: Request,
    principal: Tuner,
    after: Annotated[str | None, Query(max_length=128)] = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    purpose: Annotated[str | None, Query(max_length=64)] = None,
) -> FileList:
    """The caller's files (an administrator's view: all)."""
    found = services_of(request).jobs.files(owner=seen_by(principal))
    found = [one for one in found if purpose is None or one.purpose == purpose]
    found.sort(key=lambda one: (one.created_at, one.id), reverse=order == "desc")
    page, more = page_after(found, after, limit)
    return FileList(
        object="list",
        data=[_file(one) for one in page],
        has_more=more,
        first_id=page[0].id if page else None,
        last_id=page[-1].id if page else None,
    )


@router.get(FILES_PATH + "/{file_id}", response_model=File, responses=failures())
def get_file(file_id: str, request: Request, principal: Tuner) -> File:
    """What is known of one file."""
    return _file(own_file(services_of(request), principal, file_id))


@router.get(
    FILES_PATH + "/{file_id}/content",
    response_class=FileResponse,
    responses=failures() | _CONTENT,
)
def get_file_content(file_id: str, request: Request, principal: Tuner) -> FileResponse:
    """The file as it was uploaded."""
    services = services_of(request)
    info = own_file(services, principal, file_id)
    return FileResponse(
        services.jobs.file_path(info.id),
        media_type="application/octet-stream",
        filename=info.filename,
    )


@router.delete(FILES_PATH + "/{file_id}", response_model=DeletedFile, responses=failures(409))
def delete_file(file_id: str, request: Request, principal: Tuner) -> DeletedFile:
    """Forgets a file; refused while a job that has not ended learns from it."""
    services = services_of(request)
    info = own_file(services, principal, file_id)
    services.jobs.delete_file(info.id)
    return DeletedFile(id=info.id, object="file", deleted=True)


def _store(services: Services, principal: Principal, form: FormData) -> File:
    upload = form.get("file")
    if not isinstance(upload, UploadFile):
        raise InvalidRequest(
            "this file is missing", field="file", remedy="Send it as the form's part 'file'"
        )
    purpose = form.get("purpose")
    if purpose != PURPOSE:
        raise InvalidRequest(
            "not a purpose that files can have here",
            field="purpose",
            given=purpose if isinstance(purpose, str) else None,
            remedy=f"Send the form's part 'purpose' as {PURPOSE!r}",
        )
    for part in form:
        if part not in ("file", "purpose"):
            raise InvalidRequest(
                "this part is not known", field=part, remedy="Send 'file' and 'purpose' only"
            )
    name = upload.filename or ""
    if not 1 <= len(name) <= _MAX_NAME or not name.isprintable():
        raise InvalidRequest(
            f"a file needs a printable name of 1 to {_MAX_NAME} characters",
            field="file",
            given=name,
        )
    owner = stored_as(principal)
    _check_room(services, owner, upload.size or 0)
    return _file(services.jobs.add_file(name, upload.file, purpose=PURPOSE, owner=owner))


def _check_room(services: Services, owner: str, more: int) -> None:
    most = services.settings.max_stored_bytes
    held = sum(one.bytes for one in services.jobs.files(owner=owner))
    if held + more > most:
        raise TooLarge(
            f"your files would take more than {most} bytes",
            field="file",
            remedy="Delete some first: DELETE /v1/files/{id}",
        )


def _file(info: FileInfo) -> File:
    return File(
        id=info.id,
        object="file",
        bytes=info.bytes,
        created_at=int(info.created_at),
        filename=info.filename,
        purpose=info.purpose,
        status=info.status,
        status_details=info.status_details,
        n_lines=info.n_lines,
    )
