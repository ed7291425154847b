"""/v1/blobs: tensors by the hash of their content, sent and fetched as safetensors files.

A key sees its own; another's is answered as an unknown one.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import Response
from safetensors.torch import save as save_tensors
from starlette.concurrency import run_in_threadpool

from invivo.errors import InvalidRequest, TooLarge
from invivo.programs import read_tensors
from invivo.server.answers import Blob, BlobList, Forgotten
from invivo.server.auth import Principal, needs
from invivo.server.documents import failures
from invivo.server.ownership import stored_as
from invivo.server.services import Services, services_of

router = APIRouter(tags=["look inside"])

BLOBS_PATH = "/v1/blobs"
_MOST_AT_ONCE = 64
_FILE: dict[str, Any] = {
    "required": True,
    "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
}
_CONTENT: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "A safetensors file; each tensor has its id as its name",
        "content": {"application/octet-stream": {"schema": {"type": "string"}}},
    },
}

Editor = Annotated[Principal, Depends(needs("edit"))]


@router.post(
    BLOBS_PATH,
    response_model=BlobList,
    responses=failures(),
    openapi_extra={"requestBody": _FILE},
)
async def store_blobs(
    request: Request,
    principal: Editor,
    lasting: Annotated[
        bool, Query(description="Until it is deleted; else until others need the room")
    ] = True,
) -> BlobList:
    """Takes in the tensors of a safetensors file; programs name them "blob:" and their id."""
    data = await request.body()
    return await run_in_threadpool(_store, services_of(request), principal, data, lasting)


# Plain functions: FastAPI runs them in its thread pool.


@router.get(
    BLOBS_PATH, response_model=BlobList, response_model_exclude_unset=True, responses=failures()
)
def list_blobs(request: Request, principal: Editor) -> BlobList:
    """The caller's lasting tensors."""
    sizes = services_of(request).local.programs.blob_sizes(stored_as(principal))
    data = [Blob(id=name, object="blob", bytes=size) for name, size in sizes.items()]
    return BlobList(object="list", data=data)


@router.get(BLOBS_PATH + "/{blob_ids}", response_class=Response, responses=failures() | _CONTENT)
def get_blobs(blob_ids: str, request: Request, principal: Editor) -> Response:
    """One tensor, or several: ids with commas between them."""
    names = blob_ids.split(",")
    if len(names) > _MOST_AT_ONCE:
        raise TooLarge(f"at most {_MOST_AT_ONCE} at once", field="blob_ids", given=len(names))
    programs, owner = services_of(request).local.programs, stored_as(principal)
    tensors = {name: programs.blob(name, owner, "blob_ids") for name in names}
    return Response(save_tensors(tensors), media_type="application/octet-stream")


@router.delete(BLOBS_PATH + "/{blob_id}", response_model=Forgotten, responses=failures())
def delete_blob(blob_id: str, request: Request, principal: Editor) -> Forgotten:
    """Forgets a tensor; requests that use it go on."""
    services_of(request).local.programs.forget_blob(blob_id, stored_as(principal))
    return Forgotten(id=blob_id, deleted=True)


def _store(services: Services, principal: Principal, data: bytes, lasting: bool) -> BlobList:
    programs, owner = services.local.programs, stored_as(principal)
    blobs = []
    for name, tensor in sorted(read_tensors(data, "body").items()):
        if len(name) > 128:
            raise InvalidRequest("a name has at most 128 characters", field="body", given=name)
        stored = programs.store_blob(tensor, owner, lasting=lasting)
        blobs.append(
            Blob(
                id=stored,
                object="blob",
                bytes=tensor.numel() * tensor.element_size(),
                name=name,
                shape=list(tensor.shape),
                dtype=str(tensor.dtype).removeprefix("torch."),
            )
        )
    return BlobList(object="list", data=blobs)
