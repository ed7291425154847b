"""The LM's nouns as the server's JSON and back: pure functions, used by RemoteLM."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from invivo import errors
from invivo.batches import check_messages, text_or_ids
from invivo.engine.types import AdapterInfo, Grammar, SamplingParams
from invivo.errors import InvalidRequest, InvivoError
from invivo.lm import Choice, Completion, Delta, Message, ModelInfo, Prompt, Sampling, Score, Token
from invivo.marked_prompt import MarkedPrompt, is_parts, read_parts
from invivo.sampling import CHAT_TOKENS, GENERATE_TOKENS, Asked, asked_of

JsonBody = dict[str, Any]

_DEFAULTS = SamplingParams()
_OWN_WORDS = {"max_tokens", "logprobs", "logit_bias", "grammar"}  # written in another way
_ERRORS: dict[str, type[InvivoError]] = {
    "invalid_request": errors.InvalidRequest,
    "invalid_api_key": errors.Unauthorized,
    "permission_denied": errors.Forbidden,
    "not_found": errors.NotFound,
    "conflict": errors.Conflict,
    "too_large": errors.TooLarge,
    "overloaded": errors.Overloaded,
    "unavailable": errors.Unavailable,
    "unsupported_model": errors.UnsupportedModel,
    "missing_dependency": errors.MissingDependency,
    "internal_error": errors.InvivoError,
}


def error_code(kind: type[InvivoError]) -> str:
    """What the server calls errors of this class."""
    for code, known in _ERRORS.items():
        if kind is known:
            return code
    return error_code(kind.__mro__[1])


def error_of(body: Any, status: int) -> InvivoError:
    """The typed error that an answer of ``status`` carries."""
    detail = body.get("error") if isinstance(body, dict) else None
    if not isinstance(detail, dict):
        return InvivoError(
            f"the server answered {status} without saying why",
            remedy="Check that the URL is that of an invivo server",
        )
    kind = _ERRORS.get(str(detail.get("code")), InvivoError)
    return kind(str(detail.get("message")), field=detail.get("param"), remedy=detail.get("remedy"))


# --- requests ---------------------------------------------------------------------------------


def completion_body(model: str, prompt: Prompt, sampling: Sampling) -> JsonBody:
    """Body of /v1/completions for one prompt; raises InvalidRequest for unknown keywords."""
    asked = asked_of(sampling, default_max_tokens=GENERATE_TOKENS)
    body = _generation_body(model, asked)
    body["prompt"] = prompt_body(prompt)
    if asked.params.logprobs is not None:
        body["logprobs"] = asked.params.logprobs
    return body


def prompt_body(prompt: Any) -> Any:
    """A prompt as it is sent: a text, token ids, or texts and sets.

    Raises:
        InvalidRequest: it is none of these.
    """
    if isinstance(prompt, MarkedPrompt):
        raise InvalidRequest(
            "a marked prompt belongs to a model in this process",
            field="prompt",
            remedy="Give the text, or texts and sets",
        )
    if not is_parts(prompt):
        return text_or_ids(prompt)
    return [p if isinstance(p, str) else {"set": list(p)} for p in read_parts(prompt)]


def chat_body(
    model: str,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None,
    tool_choice: str | Mapping[str, Any] | None,
    sampling: Sampling,
) -> JsonBody:
    """Body of /v1/chat/completions for one conversation."""
    check_messages(messages)
    asked = asked_of(sampling, default_max_tokens=CHAT_TOKENS)
    body = _generation_body(model, asked)
    body["messages"] = [message_body(message) for message in messages]
    if tools:
        body["tools"] = list(tools)
    if tool_choice is not None:
        body["tool_choice"] = tool_choice
    if asked.params.logprobs is not None:
        body["logprobs"], body["top_logprobs"] = True, asked.params.logprobs
    return body


def message_body(message: Message) -> JsonBody:
    """A message with the arguments of its tool calls as text, as the API wants them."""
    body = dict(message)
    if is_parts(body.get("content")):
        body["content"] = [
            {"type": "text", "text": part}
            if isinstance(part, str)
            else {"type": "set", "set": list(part)}
            for part in read_parts(body["content"], "content")
        ]
    if body.get("tool_calls"):
        body["tool_calls"] = [
            _call_body(call, number) for number, call in enumerate(body["tool_calls"])
        ]
    return body


def _call_body(call: Mapping[str, Any], number: int) -> JsonBody:
    function = dict(call["function"])
    if not isinstance(function.get("arguments"), str):
        function["arguments"] = json.dumps(function.get("arguments") or {}, ensure_ascii=False)
    return {"id": call.get("id", f"call_{number}"), "type": "function", "function": function}


def _generation_body(model: str, asked: Asked) -> JsonBody:
    """What both generating routes share; parameters at their defaults are not sent."""
    params = asked.params
    body: JsonBody = {
        "model": model if asked.adapter is None else f"{model}:{asked.adapter}",
        "max_tokens": params.max_tokens,
        "fit_max_tokens": asked.default_length,
        "return_token_ids": True,
    }
    for part in fields(SamplingParams):
        value = getattr(params, part.name)
        if part.name not in _OWN_WORDS and value != getattr(_DEFAULTS, part.name):
            body[part.name] = list(value) if isinstance(value, tuple) else value
    if params.logit_bias:
        body["logit_bias"] = {str(token): bias for token, bias in params.logit_bias}
    if params.grammar is not None:
        body |= _constraint(params.grammar)
    if asked.n != 1:
        body["n"] = asked.n
    if asked.salt:
        body["cache_salt"] = asked.salt
    if asked.priority:
        body["priority"] = asked.priority
    return body


def _constraint(grammar: Grammar) -> JsonBody:
    if grammar.kind == "regex":
        return {"guided_regex": grammar.source}
    try:
        value = json.loads(grammar.source)
    except ValueError as error:
        raise InvalidRequest(
            "not valid JSON", field=grammar.kind, given=grammar.source, remedy="Check the schema"
        ) from error
    return {"guided_json" if grammar.kind == "json_schema" else "guided_choice": value}


# --- answers ----------------------------------------------------------------------------------


def completion_of(body: JsonBody, model: str) -> Completion:
    """A completion of ``model`` from an answer of either generating route."""
    choices = body["choices"]
    usage = body["usage"]
    return Completion(
        id=body["id"],
        model=model,
        choices=[
            Choice(
                index=choice["index"],
                text=choice["text"],
                tokens=choice["token_ids"],
                finish_reason=_reason(choice["finish_reason"]),
                logprobs=_logprobs(choice.get("logprobs")),
            )
            for choice in choices
        ],
        prompt_tokens=usage["prompt_tokens"],
        completion_tokens=usage["completion_tokens"],
        cached_tokens=usage["prompt_tokens_details"]["cached_tokens"],
        prompt_logprobs=_tokens(choices[0].get("prompt_logprobs")),
    )


def delta_of(body: JsonBody) -> Delta | None:
    """A piece from a chunk of either generating route; None for the chunk with the usage."""
    if not body["choices"]:
        return None
    choice = body["choices"][0]
    reason = choice["finish_reason"]
    return Delta(
        index=choice["index"],
        text=choice["text"],
        tokens=choice["token_ids"],
        logprobs=_logprobs(choice.get("logprobs")),
        finish_reason=None if reason is None else _reason(reason),
        cached_tokens=choice["cached_tokens"],
        prompt_logprobs=_tokens(choice.get("prompt_logprobs")),
    )


def score_of(body: JsonBody) -> Score:
    return Score(
        tokens=[_scored(token) for token in body["tokens"]],
        logprob=body["logprob"],
        greedy=body["greedy"],
        perplexity=body["perplexity"],
    )


def adapter_of(body: JsonBody) -> AdapterInfo:
    return AdapterInfo(**{part.name: body[part.name] for part in fields(AdapterInfo)})


def model_of(body: JsonBody) -> ModelInfo:
    parts = [part.name for part in fields(ModelInfo) if part.name != "name"]
    return ModelInfo(name=body["id"], **{name: body[name] for name in parts})


def _reason(reason: str) -> str:
    return "stop" if reason == "tool_calls" else reason


def _logprobs(body: JsonBody | None) -> list[Token] | None:
    return None if body is None else _tokens(body["content"])


def _tokens(body: list[JsonBody] | None) -> list[Token] | None:
    return None if body is None else [_token(token) for token in body]


def _token(body: JsonBody) -> Token:
    return Token(
        id=body["token_id"],
        text=body["token"],
        logprob=body["logprob"],
        rank=body["rank"],
        top=[_token(other) for other in body.get("top_logprobs", ())],
    )


def _scored(body: JsonBody) -> Token:
    return Token(
        id=body["id"],
        text=body["token"],
        logprob=body["logprob"],
        rank=body["rank"],
        top=[_scored(other) for other in body["top"]],
    )
