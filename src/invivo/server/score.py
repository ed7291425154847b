"""POST /v1/score: log-probabilities of given texts (not in OpenAI's API)."""

from __future__ import annotations

import math
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.concurrency import run_in_threadpool

from invivo.lm import LM, Score, Token
from invivo.marked_prompt import MarkedPrompt
from invivo.server.admission import admit
from invivo.server.answers import ProgramAnswer, ScoreAnswer, ScoredToken, ScoreList, Usage
from invivo.server.auth import Principal, needs
from invivo.server.carried import carried_by, program_answer, reserve_passes
from invivo.server.documents import failures
from invivo.server.ownership import seen_by
from invivo.server.prompts import parts_of
from invivo.server.sampling import finite
from invivo.server.schemas import ScoreItem, ScoreRequest, SetPart
from invivo.server.services import Services, services_of
from invivo.server.streaming import until_disconnect

router = APIRouter(tags=["measure"])

_LARGEST = 1e300  # written for a perplexity that is beyond a JSON number


@router.post(
    "/v1/score",
    response_model=ScoreList,
    response_model_exclude_unset=True,
    responses=failures(),
)
async def create_scores(
    body: ScoreRequest,
    request: Request,
    principal: Annotated[Principal, Depends(needs("score"))],
) -> ScoreList:
    """Log-probability of each text, or of each text after its context."""
    return await until_disconnect(request, _score(body, services_of(request), principal))


async def _score(body: ScoreRequest, services: Services, principal: Principal) -> ScoreList:
    adapter = services.adapter_of(body.model, seen_by(principal))
    carried = carried_by(body.interventions, body.blobs, principal)
    async with admit(services, principal) as ticket:
        sizes = await run_in_threadpool(_sizes, services.lm, body.items)
        await ticket.prompt(sizes)
        items = [_item(item) for item in body.items]
        if "interventions" in carried:
            marked = await run_in_threadpool(_marked, services, items)
            await reserve_passes(services, principal, ticket, carried, marked)
        ticket.ran(sum(sizes))
        scores: list[Score] = await services.lm.ascore(
            items,
            adapter=adapter,
            salt=principal.salt(body.cache_salt),
            top=body.top,
            **carried,
        )
    total = sum(sizes)
    programs = [await program_answer(services, principal, score.program) for score in scores]
    return ScoreList(
        object="list",
        data=[_answer(i, score, programs[i]) for i, score in enumerate(scores)],
        model=body.model or services.model_name,
        usage=Usage(prompt_tokens=total, total_tokens=total),
    )


def _item(item: ScoreItem) -> Any:
    text = parts_of(item.text)
    return text if item.context is None else (parts_of(item.context), text)


def _marked(services: Services, items: list[Any]) -> list[MarkedPrompt]:
    """The items' tokens, for the account."""
    return [services.local.scored(item)[0] for item in items]


def _sizes(lm: LM, items: list[ScoreItem]) -> list[int]:
    """Tokens of each item, for the account."""
    sizes = []
    for item in items:
        size = 0
        for part in (item.context or "", item.text):
            size += _size(lm, part)
        sizes.append(size)
    return sizes


def _size(lm: LM, part: Any) -> int:
    if isinstance(part, str):
        return len(lm.tokenize(part))
    if isinstance(part, SetPart):
        return sum(_size(lm, member) for member in part.set)
    return sum(1 if isinstance(one, int) else _size(lm, one) for one in part)


def _answer(index: int, score: Score, program: ProgramAnswer | None) -> ScoreAnswer:
    perplexity = score.perplexity
    answer = ScoreAnswer(
        index=index,
        object="score",
        tokens=[_token(token) for token in score.tokens],
        logprob=finite(score.logprob) if math.isinf(score.logprob) else score.logprob,
        greedy=score.greedy,
        perplexity=perplexity if math.isfinite(perplexity) else _LARGEST,
    )
    if program is not None:
        answer.program = program
    return answer


def _token(token: Token) -> ScoredToken:
    return ScoredToken(
        id=token.id,
        token=token.text,
        logprob=finite(token.logprob),
        rank=token.rank,
        top=[_token(other) for other in token.top],
    )
