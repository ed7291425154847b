"""POST /v1/chat/completions."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated, Any, cast

from fastapi import APIRouter, Depends, Request
from starlette.concurrency import run_in_threadpool

from invivo.lm import Choice, Completion, Delta, Sampling
from invivo.marked_prompt import MarkedPrompt, has_sets
from invivo.server.admission import Ticket, admit
from invivo.server.answers import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    FinishReason,
    FunctionCall,
    MessageDelta,
    ToolCallAnswer,
    ToolCallDelta,
)
from invivo.server.auth import Principal, needs
from invivo.server.carried import carried_by, program_answer, reserve_passes
from invivo.server.context import request_id
from invivo.server.documents import failures, streamed
from invivo.server.messages import template_messages, template_tools
from invivo.server.ownership import seen_by
from invivo.server.sampling import finish_reason, now, sampling_of, token_logprobs, usage
from invivo.server.schemas import ChatRequest, NamedToolChoice
from invivo.server.services import Services, services_of
from invivo.server.streaming import DONE, EventStream, event, until_disconnect
from invivo.tools import ToolCall, ToolCallParser, ToolPlan, parse_tool_calls, plan_tools

router = APIRouter(tags=["generate"])


@router.post(
    "/v1/chat/completions",
    response_model=ChatCompletion,
    response_model_exclude_unset=True,
    responses=failures() | streamed("The answer; with stream = true, its chunks as events"),
)
async def create_chat_completion(
    body: ChatRequest,
    request: Request,
    principal: Annotated[Principal, Depends(needs("generate"))],
) -> Any:
    """Answers a conversation."""
    chat = _plan(body, services_of(request), principal)
    if body.stream:
        return await EventStream.open(request, _events(chat))
    return await until_disconnect(request, _answer(chat))


@dataclass(slots=True)
class _Chat:
    """A checked request, ready to run."""

    body: ChatRequest
    services: Services
    principal: Principal
    tools: ToolPlan
    sampling: Sampling
    messages: list[dict[str, Any]]
    id: str
    model: str
    created: int

    @property
    def ids(self) -> bool:
        return bool(self.body.return_token_ids)

    @property
    def fingerprint(self) -> str:
        return f"iv-{self.services.info.fingerprint[:12]}"


def _plan(body: ChatRequest, services: Services, principal: Principal) -> _Chat:
    choice = body.tool_choice
    tools = plan_tools(
        template_tools(body.tools),
        choice.model_dump() if isinstance(choice, NamedToolChoice) else choice,
    )
    sampling = sampling_of(body, body.response_format, tools.json_schema)
    if body.logprobs:
        sampling["logprobs"] = body.top_logprobs or 0
    sampling["adapter"] = services.adapter_of(body.model, seen_by(principal))
    sampling["salt"] = principal.salt(body.cache_salt)
    sampling.update(cast(Sampling, carried_by(body.interventions, body.blobs, principal)))
    return _Chat(
        body=body,
        services=services,
        principal=principal,
        tools=tools,
        sampling=sampling,
        messages=template_messages(body.messages),
        id=f"chatcmpl-{request_id()}",
        model=body.model or services.model_name,
        created=now(),
    )


def _marked(chat: _Chat) -> MarkedPrompt:
    lm = chat.services.local
    if chat.body.interventions is not None or has_sets(chat.messages):
        return lm.marked_chat(chat.messages, tools=chat.tools.render)
    text = lm.apply_chat_template(chat.messages, tools=chat.tools.render)
    return MarkedPrompt(tuple(lm.tokenize(text)))


def _max_tokens(body: ChatRequest) -> int | None:
    return body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens


async def _prompt(chat: _Chat, ticket: Ticket) -> tuple[MarkedPrompt, Sampling]:
    """The conversation as tokens, and the keywords to answer it with."""
    prompt = await run_in_threadpool(_marked, chat)
    sampling = chat.sampling.copy()
    sampling["max_tokens"] = await ticket.prompt(
        [len(prompt.ids)],
        max_tokens=_max_tokens(chat.body),
        n=chat.body.n or 1,
        fit=chat.body.fit_max_tokens,
    )
    await reserve_passes(chat.services, chat.principal, ticket, sampling, [prompt])
    ticket.ran(len(prompt.ids))
    return prompt, sampling


async def _answer(chat: _Chat) -> ChatCompletion:
    async with admit(chat.services, chat.principal) as ticket:
        prompt, sampling = await _prompt(chat, ticket)
        completion: Completion = await chat.services.local.agenerate(prompt, **sampling)
        ticket.wrote(completion.completion_tokens)
    carried = await program_answer(chat.services, chat.principal, completion.program)
    answer = ChatCompletion(
        id=chat.id,
        object="chat.completion",
        created=chat.created,
        model=chat.model,
        choices=[_choice(chat, choice) for choice in completion.choices],
        usage=usage(
            completion.prompt_tokens, completion.completion_tokens, completion.cached_tokens
        ),
        system_fingerprint=chat.fingerprint,
    )
    if carried is not None:
        answer.choices[0].program = carried
    if completion.prompt_logprobs is not None:
        answer.choices[0].prompt_logprobs = token_logprobs(completion.prompt_logprobs, ids=True)
    return answer


def _choice(chat: _Chat, choice: Choice) -> ChatChoice:
    content = choice.text
    calls: list[ToolCall] = []
    if chat.tools.names:
        content, calls = parse_tool_calls(choice.text, chat.tools.names)
    message = AnswerMessage(
        role="assistant", content=None if calls and not content else content, refusal=None
    )
    if calls:
        message.tool_calls = [
            ToolCallAnswer(
                id=_call_id(),
                type="function",
                function=FunctionCall(name=call.name, arguments=call.arguments),
            )
            for call in calls
        ]
    out = ChatChoice(
        index=choice.index,
        message=message,
        logprobs=None,
        finish_reason=_reason(choice.finish_reason, bool(calls)),
    )
    if choice.logprobs is not None:
        out.logprobs = ChatLogprobs(
            content=token_logprobs(choice.logprobs, ids=chat.ids), refusal=None
        )
    if chat.ids:
        out.text, out.token_ids = choice.text, choice.tokens
    return out


async def _events(chat: _Chat) -> AsyncGenerator[bytes, None]:
    with_usage = bool(chat.body.stream_options and chat.body.stream_options.include_usage)
    choices: dict[int, _StreamedChoice] = {}
    cached = written = 0
    async with admit(chat.services, chat.principal) as ticket:
        prompt, sampling = await _prompt(chat, ticket)
        stream = chat.services.local.astream(prompt, **sampling)
        async with aclosing(stream):
            async for delta in stream:
                ticket.wrote(len(delta.tokens))
                written += len(delta.tokens)
                cached = delta.cached_tokens
                if delta.index not in choices:
                    choices[delta.index] = _StreamedChoice(chat)
                choice = choices[delta.index].take(delta)
                if choice is not None:
                    if delta.program is not None:
                        choice.program = await program_answer(
                            chat.services, chat.principal, delta.program
                        )
                    yield event(_chunk(chat, [choice], with_usage))
    if with_usage:
        last = _chunk(chat, [], with_usage)
        last.usage = usage(len(prompt.ids), written, cached)
        yield event(last)
    yield event(DONE)


def _chunk(chat: _Chat, choices: list[ChatChunkChoice], with_usage: bool) -> ChatChunk:
    chunk = ChatChunk(
        id=chat.id,
        object="chat.completion.chunk",
        created=chat.created,
        model=chat.model,
        choices=choices,
        system_fingerprint=chat.fingerprint,
    )
    if with_usage:
        chunk.usage = None  # the API wants the field in every chunk then
    return chunk


class _StreamedChoice:
    """Turns the deltas of one choice into chunks."""

    def __init__(self, chat: _Chat) -> None:
        self._chat = chat
        self._parser = ToolCallParser(chat.tools.names) if chat.tools.names else None
        self._calls = 0
        self._opened = False

    def take(self, delta: Delta) -> ChatChunkChoice | None:
        """The chunk for ``delta``, None when there is nothing to tell yet."""
        content, calls = self._parse(delta)
        told = content or calls or delta.logprobs or delta.finish_reason or self._chat.ids
        if self._opened and not told:
            return None
        message = MessageDelta()
        if not self._opened:
            self._opened = True
            message.role, message.content = "assistant", content
        elif content:
            message.content = content
        if calls:
            message.tool_calls = [self._call(call) for call in calls]
        reason = delta.finish_reason
        chunk = ChatChunkChoice(
            index=delta.index,
            delta=message,
            logprobs=None,
            finish_reason=None if reason is None else _reason(reason, self._calls > 0),
        )
        if delta.logprobs is not None:
            chunk.logprobs = ChatLogprobs(
                content=token_logprobs(delta.logprobs, ids=self._chat.ids), refusal=None
            )
        if delta.prompt_logprobs is not None:
            chunk.prompt_logprobs = token_logprobs(delta.prompt_logprobs, ids=True)
        if self._chat.ids:
            chunk.text, chunk.token_ids = delta.text, delta.tokens
            chunk.cached_tokens = delta.cached_tokens
        return chunk

    def _parse(self, delta: Delta) -> tuple[str, list[ToolCall]]:
        if self._parser is None:
            return delta.text, []
        pieces = self._parser.feed(delta.text)
        if delta.finish_reason is not None:
            pieces += self._parser.close()
        content = "".join(piece for piece in pieces if isinstance(piece, str))
        return content, [piece for piece in pieces if isinstance(piece, ToolCall)]

    def _call(self, call: ToolCall) -> ToolCallDelta:
        made = ToolCallDelta(
            index=self._calls,
            id=_call_id(),
            type="function",
            function=FunctionCall(name=call.name, arguments=call.arguments),
        )
        self._calls += 1
        return made


def _reason(reason: str, called: bool) -> FinishReason:
    said = finish_reason(reason)
    return "tool_calls" if called and said == "stop" else said


def _call_id() -> str:
    return f"call_{secrets.token_hex(12)}"
