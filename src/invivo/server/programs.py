"""/v1/run, /v1/explain and /v1/programs: programs of edits and captures.

A key sees its own stored programs; another's is answered as an unknown one.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.concurrency import run_in_threadpool

from invivo.edits.schema import json_schema
from invivo.program_result import ProgramResult
from invivo.programs import OwnedProgram
from invivo.server.admission import admit
from invivo.server.answers import (
    Explained,
    Forgotten,
    RunList,
    StoredProgram,
    StoredProgramList,
    Usage,
)
from invivo.server.auth import Principal, needs
from invivo.server.carried import check_adapters, written
from invivo.server.documents import failures
from invivo.server.messages import template_messages
from invivo.server.ownership import seen_by, stored_as
from invivo.server.prompts import parts_of, prompts_of
from invivo.server.schemas import ExplainRequest, ProgramRequest, RunRequest
from invivo.server.services import Services, services_of
from invivo.server.streaming import until_disconnect

router = APIRouter(tags=["look inside"])

Editor = Annotated[Principal, Depends(needs("edit"))]


@router.post(
    "/v1/run", response_model=RunList, response_model_exclude_unset=True, responses=failures()
)
async def run_program(body: RunRequest, request: Request, principal: Editor) -> RunList:
    """Carries out a program on each prompt; captures and measures come back, no text."""
    return await until_disconnect(request, _run(body, services_of(request), principal))


# Plain functions: FastAPI runs them in its thread pool.


@router.post("/v1/explain", response_model=Explained, responses=failures())
def explain_program(body: ExplainRequest, request: Request, principal: Editor) -> Explained:
    """What a program would do, before anything runs."""
    services = services_of(request)
    services.adapter_of(body.model, seen_by(principal))
    prompt = _prompt(body)
    owned = OwnedProgram(body.program, stored_as(principal))
    return Explained(
        object="explanation",
        explain=services.local.explain(owned, prompt, blobs=body.blobs),
    )


@router.post("/v1/programs", response_model=StoredProgram, responses=failures())
def store_program(body: ProgramRequest, request: Request, principal: Editor) -> StoredProgram:
    """Keeps a program; its hash stands for it from then on."""
    programs, owner = services_of(request).local.programs, stored_as(principal)
    name = programs.store(body.program, owner)
    return _stored(name, programs.stored_sizes(owner)[name], programs.stored(name, owner).to_dict())


@router.get(
    "/v1/programs",
    response_model=StoredProgramList,
    response_model_exclude_unset=True,
    responses=failures(),
)
def list_programs(request: Request, principal: Editor) -> StoredProgramList:
    """The caller's stored programs."""
    sizes = services_of(request).local.programs.stored_sizes(stored_as(principal))
    data = [StoredProgram(id=name, object="program", bytes=n) for name, n in sizes.items()]
    return StoredProgramList(object="list", data=data)


@router.get("/v1/programs/schema", response_model=dict[str, Any], responses=failures())
def get_schema(_principal: Annotated[Principal, Depends(needs())]) -> dict[str, Any]:
    """The JSON schema of programs."""
    return json_schema()


@router.get("/v1/programs/{program_id}", response_model=StoredProgram, responses=failures())
def get_program(program_id: str, request: Request, principal: Editor) -> StoredProgram:
    """A stored program in its canonical form."""
    programs, owner = services_of(request).local.programs, stored_as(principal)
    program = programs.stored(program_id, owner, "program_id")
    return _stored(program_id, len(program.to_json().encode()), program.to_dict())


@router.delete("/v1/programs/{program_id}", response_model=Forgotten, responses=failures())
def delete_program(program_id: str, request: Request, principal: Editor) -> Forgotten:
    """Forgets a stored program; requests that carry it go on."""
    services_of(request).local.programs.forget(program_id, stored_as(principal))
    return Forgotten(id=program_id, deleted=True)


def _stored(name: str, size: int, program: dict[str, Any]) -> StoredProgram:
    return StoredProgram(id=name, object="program", bytes=size, program=program)


def _prompt(body: ExplainRequest | RunRequest) -> Any:
    if body.messages is not None:
        return template_messages(body.messages)
    return parts_of(body.prompt)


async def _run(body: RunRequest, services: Services, principal: Principal) -> RunList:
    lm, programs = services.local, services.local.programs
    adapter = services.adapter_of(body.model, seen_by(principal))
    owned = OwnedProgram(body.program, stored_as(principal))
    async with admit(services, principal) as ticket:
        if body.messages is not None:
            marked = [await run_in_threadpool(lm.marked, template_messages(body.messages))]
        else:
            marked = (await run_in_threadpool(prompts_of, services, body.prompt)).marked
        sizes = [len(one.ids) for one in marked]
        await ticket.prompt(sizes)

        def count() -> int:
            """Tokens of all passes; what is resolved here is remembered for the run itself."""
            given = programs.given(owned, body.blobs, body.params)
            total = 0
            for one in marked:
                carried = programs.intervention(given, one)
                assert carried is not None
                check_adapters(services, principal, carried)
                total += programs.n_tokens(carried)
            return total

        total = await run_in_threadpool(count)
        await ticket.more(max(total - sum(sizes), 0))
        ticket.ran(sum(sizes))
        results: list[ProgramResult] = await lm.arun(
            owned,
            marked,
            blobs=body.blobs,
            params=body.params,
            adapter=adapter,
            salt=principal.salt(body.cache_salt),
        )
    data = [await run_in_threadpool(written, services, principal, one) for one in results]
    return RunList(
        object="list",
        data=data,
        model=body.model or services.model_name,
        usage=Usage(prompt_tokens=total, total_tokens=total),
    )
