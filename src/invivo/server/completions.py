"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Annotated, Any, cast

from fastapi import APIRouter, Depends, Request
from starlette.concurrency import run_in_threadpool

from invivo.errors import InvalidRequest
from invivo.lm import Choice, Completion, Delta, Sampling, Token
from invivo.server.admission import Ticket, admit
from invivo.server.answers import CompletionAnswer, CompletionChoice, CompletionLogprobs
from invivo.server.auth import Principal, needs
from invivo.server.carried import carried_by, program_answer, reserve_passes
from invivo.server.context import request_id
from invivo.server.documents import failures, streamed
from invivo.server.ownership import seen_by
from invivo.server.prompts import Prompts, prompts_of
from invivo.server.sampling import finish_reason, finite, now, sampling_of, token_logprobs, usage
from invivo.server.schemas import CompletionRequest
from invivo.server.services import Services, services_of
from invivo.server.streaming import DONE, EventStream, event, merged, until_disconnect

router = APIRouter(tags=["generate"])


@router.post(
    "/v1/completions",
    response_model=CompletionAnswer,
    response_model_exclude_unset=True,
    responses=failures() | streamed("The answer; with stream = true, its chunks as events"),
)
async def create_completion(
    body: CompletionRequest,
    request: Request,
    principal: Annotated[Principal, Depends(needs("generate"))],
) -> Any:
    """Continues each prompt; choices of prompt i are numbered from i * n."""
    run = _plan(body, services_of(request), principal)
    if body.stream:
        return await EventStream.open(request, _events(run))
    return await until_disconnect(request, _answer(run))


@dataclass(slots=True)
class _Run:
    """A checked request, ready to run."""

    body: CompletionRequest
    services: Services
    principal: Principal
    sampling: Sampling
    id: str
    model: str
    created: int

    @property
    def n(self) -> int:
        return self.body.n or 1

    @property
    def only_echo(self) -> bool:
        return self.body.max_tokens == 0


def _plan(body: CompletionRequest, services: Services, principal: Principal) -> _Run:
    if body.echo and body.stream:
        raise InvalidRequest(
            "the prompt cannot be echoed in a stream",
            field="echo",
            given=True,
            remedy="Leave out echo or stream",
        )
    sampling = sampling_of(body, body.response_format)
    if body.logprobs is not None:
        sampling["logprobs"] = body.logprobs
        if body.echo:
            sampling["prompt_logprobs"] = max(body.logprobs, body.prompt_logprobs or 0)
    sampling["adapter"] = services.adapter_of(body.model, seen_by(principal))
    sampling["salt"] = principal.salt(body.cache_salt)
    sampling.update(cast(Sampling, carried_by(body.interventions, body.blobs, principal)))
    return _Run(
        body=body,
        services=services,
        principal=principal,
        sampling=sampling,
        id=f"cmpl-{request_id()}",
        model=body.model or services.model_name,
        created=now(),
    )


async def _prompts(run: _Run, ticket: Ticket) -> tuple[Prompts, Sampling]:
    """The prompts as tokens, and the keywords to run them with."""
    prompts = await run_in_threadpool(prompts_of, run.services, run.body.prompt)
    # The engine needs a token to generate; one that was not asked for is thrown away.
    wanted = 1 if run.only_echo else run.body.max_tokens
    max_tokens = await ticket.prompt(
        prompts.sizes, max_tokens=wanted, n=run.n, fit=run.body.fit_max_tokens
    )
    sampling = run.sampling.copy()
    sampling["max_tokens"] = max_tokens
    await reserve_passes(run.services, run.principal, ticket, sampling, prompts.marked)
    ticket.ran(sum(prompts.sizes))
    return prompts, sampling


async def _answer(run: _Run) -> CompletionAnswer:
    async with admit(run.services, run.principal) as ticket:
        prompts, sampling = await _prompts(run, ticket)
        completions: list[Completion] = await run.services.local.agenerate(
            prompts.marked, **sampling
        )
        written = 0 if run.only_echo else sum(one.completion_tokens for one in completions)
        ticket.wrote(written)
    choices = []
    for number, completion in enumerate(completions):
        head = _echo(run, prompts, number, completion) if run.body.echo else None
        carried = await program_answer(run.services, run.principal, completion.program)
        for choice in completion.choices:
            choice.index += number * run.n
            choices.append(_choice(run, choice, head))
            if carried is not None:
                choices[-1].program = carried
        if completion.prompt_logprobs is not None and run.body.prompt_logprobs is not None:
            choices[-run.n].prompt_logprobs = token_logprobs(completion.prompt_logprobs, ids=True)
    cached = sum(completion.cached_tokens for completion in completions)
    answer = _empty(run)
    answer.choices = choices
    answer.usage = usage(sum(prompts.sizes), written, cached)
    return answer


@dataclass(slots=True)
class _Echo:
    """The prompt as the beginning of its answer."""

    text: str
    first: str  # text of the first token, which has no log-probability
    rest: list[Token] | None


def _echo(run: _Run, prompts: Prompts, number: int, completion: Completion) -> _Echo:
    lm = run.services.lm
    ids = prompts.marked[number].ids
    text = prompts.texts[number]
    return _Echo(
        text=lm.detokenize(ids) if text is None else text,
        first=lm.detokenize(ids[:1]),
        rest=completion.prompt_logprobs,
    )


def _choice(run: _Run, choice: Choice, head: _Echo | None) -> CompletionChoice:
    tokens = [] if run.only_echo else choice.tokens
    text = "" if run.only_echo else choice.text
    out = CompletionChoice(
        index=choice.index,
        text=(head.text if head else "") + text,
        logprobs=None,
        finish_reason="length" if run.only_echo else finish_reason(choice.finish_reason),
    )
    if choice.logprobs is not None:
        out.logprobs = _logprobs(run, [] if run.only_echo else choice.logprobs, head)
    if run.body.return_token_ids:
        out.token_ids = tokens
    return out


def _logprobs(
    run: _Run, tokens: list[Token], head: _Echo | None = None, offset: int = 0
) -> CompletionLogprobs:
    """Log-probabilities as four parallel lists; ``offset`` = characters before the first token."""
    out = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
    if head is not None and head.rest is not None:
        out.tokens.append(head.first)
        out.token_logprobs.append(None)
        out.top_logprobs.append(None)
        out.text_offset.append(offset)
        offset += len(head.first)
        tokens = head.rest + tokens
    for token in tokens:
        out.tokens.append(token.text)
        out.token_logprobs.append(finite(token.logprob))
        out.top_logprobs.append(
            {other.text: finite(other.logprob) for other in token.top} if token.top else None
        )
        out.text_offset.append(offset)
        offset += len(token.text)
    if run.body.return_token_ids:
        out.content = token_logprobs(tokens, ids=True)
    return out


async def _events(run: _Run) -> AsyncGenerator[bytes, None]:
    options = run.body.stream_options
    with_usage = bool(options and options.include_usage)
    offsets: dict[int, int] = {}
    cached: dict[int, int] = {}
    written = 0
    async with admit(run.services, run.principal) as ticket:
        prompts, sampling = await _prompts(run, ticket)
        streams = [run.services.local.astream(one, **sampling) for one in prompts.marked]

        def numbered(number: int, delta: Delta) -> Delta:
            return replace(delta, index=delta.index + number * run.n)

        async with aclosing(merged(streams, numbered)) as deltas:
            async for delta in deltas:
                ticket.wrote(len(delta.tokens))
                written += len(delta.tokens)
                cached[delta.index // run.n] = delta.cached_tokens
                choice = _piece(run, delta, offsets.get(delta.index, 0))
                offsets[delta.index] = offsets.get(delta.index, 0) + len(delta.text)
                if choice is not None:
                    if delta.program is not None:
                        choice.program = await program_answer(
                            run.services, run.principal, delta.program
                        )
                    chunk = _empty(run)
                    chunk.choices = [choice]
                    if with_usage:
                        chunk.usage = None
                    yield event(chunk)
    if with_usage:
        last = _empty(run)
        last.usage = usage(sum(prompts.sizes), written, sum(cached.values()))
        yield event(last)
    yield event(DONE)


def _piece(run: _Run, delta: Delta, offset: int) -> CompletionChoice | None:
    """The chunk for ``delta``, None when there is nothing to tell yet."""
    ids = run.body.return_token_ids
    if not (delta.text or delta.logprobs or delta.finish_reason or ids):
        return None
    reason = delta.finish_reason
    out = CompletionChoice(
        index=delta.index,
        text=delta.text,
        logprobs=None,
        finish_reason=None if reason is None else finish_reason(reason),
    )
    if delta.logprobs is not None:
        out.logprobs = _logprobs(run, delta.logprobs, offset=offset)
    if delta.prompt_logprobs is not None:
        out.prompt_logprobs = token_logprobs(delta.prompt_logprobs, ids=True)
    if ids:
        out.token_ids, out.cached_tokens = delta.tokens, delta.cached_tokens
    return out


def _empty(run: _Run) -> CompletionAnswer:
    return CompletionAnswer(
        id=run.id,
        object="text_completion",
        created=run.created,
        model=run.model,
        choices=[],
        system_fingerprint=f"iv-{run.services.info.fingerprint[:12]}",
    )
