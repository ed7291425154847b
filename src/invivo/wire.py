"""The LM's nouns as the server's JSON and back: pure functions, used by RemoteLM."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from invivo import errors
from invivo.engine.types import AdapterInfo
from invivo.errors import InvalidRequest, InvivoError
from invivo.lm import Choice, Completion, Delta, Message, ModelInfo, Prompt, Sampling, Score, Token

JsonBody = dict[str, Any]

_SAME_NAME = frozenset(
    {
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "seed",
        "min_tokens",
        "ignore_eos",
        "prompt_logprobs",
        "n",
        "priority",
    }
)
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
    """Body of /v1/completions for one prompt."""
    body = _generation_body(model, sampling)
    body["prompt"] = prompt if isinstance(prompt, str) else list(prompt)
    body["max_tokens"] = sampling.get("max_tokens", 128)
    if sampling.get("logprobs") is not None:
        body["logprobs"] = sampling["logprobs"]
    return body


def chat_body(
    model: str,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None,
    tool_choice: str | Mapping[str, Any] | None,
    sampling: Sampling,
) -> JsonBody:
    """Body of /v1/chat/completions for one conversation."""
    body = _generation_body(model, sampling)
    body["messages"] = [message_body(message) for message in messages]
    body["max_tokens"] = sampling.get("max_tokens", 512)
    if tools:
        body["tools"] = list(tools)
    if tool_choice is not None:
        body["tool_choice"] = tool_choice
    if sampling.get("logprobs") is not None:
        body["logprobs"], body["top_logprobs"] = True, sampling["logprobs"]
    return body


def message_body(message: Message) -> JsonBody:
    """A message with the arguments of its tool calls as text, as the API wants them."""
    body = dict(message)
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


def _generation_body(model: str, sampling: Sampling) -> JsonBody:
    given: dict[str, Any] = {name: value for name, value in sampling.items() if value is not None}
    adapter = given.pop("adapter", None)
    body: JsonBody = {
        "model": model if adapter is None else f"{model}:{adapter}",
        "return_token_ids": True,
    }
    for name, value in given.items():
        if name in _SAME_NAME:
            body[name] = value
    if given.get("salt"):
        body["cache_salt"] = given["salt"]
    if given.get("stop"):
        stop = given["stop"]
        body["stop"] = stop if isinstance(stop, str) else list(stop)
    if given.get("stop_token_ids"):
        body["stop_token_ids"] = list(given["stop_token_ids"])
    if given.get("logit_bias"):
        body["logit_bias"] = {str(token): bias for token, bias in given["logit_bias"].items()}
    body.update(_constraint(given))
    known = _SAME_NAME | set(Sampling.__annotations__)
    unknown = sorted(set(given) - known)
    if unknown:
        raise InvalidRequest(
            "no such parameter",
            field=unknown[0],
            remedy=f"The parameters are {', '.join(sorted(Sampling.__annotations__))}",
        )
    return body


def _constraint(given: Mapping[str, Any]) -> JsonBody:
    body: JsonBody = {}
    schema = given.get("json_schema")
    if schema is True:
        body["response_format"] = {"type": "json_object"}
    elif isinstance(schema, str):
        try:
            body["guided_json"] = json.loads(schema)
        except ValueError as error:
            raise InvalidRequest(
                "not valid JSON", field="json_schema", given=schema, remedy="Check the schema"
            ) from error
    elif schema:
        body["guided_json"] = dict(schema)
    if "regex" in given:
        body["guided_regex"] = given["regex"]
    if "choice" in given:
        body["guided_choice"] = list(given["choice"])
    return body


# --- answers ----------------------------------------------------------------------------------


def completion_of(body: JsonBody) -> Completion:
    """A completion from an answer of either generating route."""
    choices = body["choices"]
    usage = body["usage"]
    return Completion(
        id=body["id"],
        model=body["model"],
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
