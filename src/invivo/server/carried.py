"""A program that a request carries: who may, what it costs, and what comes back as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from starlette.concurrency import run_in_threadpool

from invivo.engine.types import Intervention
from invivo.errors import Forbidden, InvalidRequest, NotFound
from invivo.marked_prompt import MarkedPrompt
from invivo.program_result import Pools, ProgramResult
from invivo.programs import OwnedProgram
from invivo.server.admission import Ticket
from invivo.server.answers import ProgramAnswer
from invivo.server.auth import Principal
from invivo.server.ownership import seen_by, stored_as
from invivo.server.services import Services

_INLINE = 1 << 15  # numbers of all captures that are written out; more go into blobs


def carried_by(
    program: Any, blobs: Mapping[str, str] | None, principal: Principal
) -> dict[str, Any]:
    """The LM's keywords for a request's program; none where it carries none.

    Raises:
        Forbidden: the key lacks the scope.
        InvalidRequest: tensors without a program.
    """
    if program is None:
        if blobs:
            raise InvalidRequest(
                "tensors belong to a program", field="blobs", remedy="Give interventions too"
            )
        return {}
    check_editor(principal)
    return {"interventions": OwnedProgram(program, stored_as(principal)), "blobs": blobs}


def check_editor(principal: Principal) -> None:
    """
    Raises:
        Forbidden: the key lacks the scope.
    """
    if not principal.may("edit"):
        raise Forbidden(
            "this key lacks the scope edit",
            field="Authorization",
            remedy="Use a key with it, made by `invivo keys add NAME --scope edit`",
        )


def check_adapters(services: Services, principal: Principal, carried: Intervention) -> None:
    """Whether the principal may have all adapters that the runs of a program use.

    Raises:
        NotFound: one is not loaded, or is a checkpoint of another's job.
    """
    plans = (plan for row in carried.resolved.rows for plan in row.runs.values())
    used = {plan.adapter: plan.name for plan in plans if plan.adapter is not None}
    for adapter, run in used.items():
        try:
            services.adapter_of(f"{services.model_name}:{adapter}", seen_by(principal))
        except NotFound as error:
            raise NotFound(
                error.message,
                field=f"runs.{run}.adapter",
                given=adapter,
                remedy=error.remedy,
            ) from None


async def reserve_passes(
    services: Services,
    principal: Principal,
    ticket: Ticket,
    keywords: Mapping[str, Any],
    prompts: Sequence[MarkedPrompt],
) -> None:
    """Puts the passes of a program beside the request's own on its account.

    Raises:
        Forbidden: the budget does not cover them.
        NotFound: an adapter that it names is not there, or not for this principal.
        InvivoError: whatever is wrong with the program.
    """
    if "interventions" not in keywords or services.ledger is None:
        return
    programs = services.local.programs

    def count() -> int:
        given = programs.given(keywords["interventions"], keywords.get("blobs"))
        longest = services.info.max_model_len
        new = keywords.get("max_tokens", 0)
        tokens = 0
        for prompt in prompts:
            room = max(longest - len(prompt.ids), 1)
            n_new = room if new is None else min(new, room)
            if keywords.get("prompt_logprobs") is not None:
                prompt = replace(prompt, n_past=0)
            carried = programs.intervention(given, prompt, n_new=n_new)
            assert carried is not None
            check_adapters(services, principal, carried)
            tokens += max(programs.n_tokens(carried) - len(prompt.ids), 0)
        return tokens

    await ticket.more(await run_in_threadpool(count))


async def program_answer(
    services: Services, principal: Principal, result: ProgramResult | None
) -> ProgramAnswer | None:
    """A result as JSON; many numbers go into blobs, kept until others need the room.

    Raises:
        TooLarge: the principal keeps so much that there is no room for them.
    """
    if result is None:
        return None
    return await run_in_threadpool(written, services, principal, result)


def written(services: Services, principal: Principal, result: ProgramResult) -> ProgramAnswer:
    """:func:`program_answer` for a thread."""
    if result.n_numbers <= _INLINE:
        return ProgramAnswer(**result.to_dict())
    pools = Pools()
    answer = ProgramAnswer(**result.to_dict(pools))
    owner = stored_as(principal)
    answer.pools = {
        kind: services.local.programs.store_blob(array, owner, lasting=False)
        for kind, array in pools.arrays().items()
    }
    return answer
