"""From a request to the keywords of the LM, and from its parts to what OpenAI calls them."""

from __future__ import annotations

import math
import time
from typing import cast

from invivo.errors import InvalidRequest
from invivo.lm import Sampling, Token
from invivo.server.answers import FinishReason, PromptDetails, TokenLogprob, TopLogprob, Usage
from invivo.server.schemas import (
    Generation,
    JsonObjectFormat,
    JsonSchemaFormat,
    ResponseFormat,
)

LEAST_LOGPROB = -9999.0  # what the API writes for a token that cannot occur

_SAME_NAME = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "stop",
    "min_tokens",
    "ignore_eos",
    "stop_token_ids",
    "prompt_logprobs",
    "priority",
    "n",
)


def sampling_of(
    body: Generation, response_format: ResponseFormat | None, forced: str | None = None
) -> Sampling:
    """The LM's keywords for ``body``; what was not given keeps the LM's defaults.

    Args:
        response_format: constraint on the answer in OpenAI's words.
        forced: JSON schema of a tool call that the answer must be.

    Raises:
        InvalidRequest: more than one constraint on the output.
    """
    given = {name: getattr(body, name) for name in _SAME_NAME}
    sampling = {name: value for name, value in given.items() if value is not None}
    if body.logit_bias:
        sampling["logit_bias"] = {int(token): bias for token, bias in body.logit_bias.items()}
    constraints: dict[str, tuple[str, object]] = {}
    if forced is not None:
        constraints["tool_choice"] = ("json_schema", forced)
    if isinstance(response_format, JsonObjectFormat):
        constraints["response_format"] = ("json_schema", True)
    elif isinstance(response_format, JsonSchemaFormat):
        schema = response_format.json_schema.schema_
        constraints["response_format"] = ("json_schema", True if schema is None else schema)
    if body.guided_json is not None:
        constraints["guided_json"] = ("json_schema", body.guided_json)
    if body.guided_regex is not None:
        constraints["guided_regex"] = ("regex", body.guided_regex)
    if body.guided_choice is not None:
        constraints["guided_choice"] = ("choice", body.guided_choice)
    if len(constraints) > 1:
        raise InvalidRequest(
            "the output can have one constraint only",
            field=next(iter(constraints)),
            given=sorted(constraints),
            remedy="Keep one of them",
        )
    sampling.update(constraints.values())
    return cast(Sampling, sampling)


def finish_reason(reason: str) -> FinishReason:
    """The engine's reason in OpenAI's words; a cancelled answer was cut short."""
    return "stop" if reason == "stop" else "length"


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> Usage:
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        prompt_tokens_details=PromptDetails(cached_tokens=cached_tokens),
    )


def finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB) if not math.isnan(logprob) else LEAST_LOGPROB


def token_bytes(text: str) -> list[int] | None:
    """UTF-8 of a token's text, None for a token that is only a part of a character."""
    return None if "\ufffd" in text else list(text.encode("utf-8", "replace"))


def token_logprobs(tokens: list[Token], *, ids: bool) -> list[TokenLogprob]:
    """Tokens in OpenAI's shape; with ``ids`` also their ids and ranks (extension)."""
    out = []
    for token in tokens:
        entry = TokenLogprob(
            token=token.text,
            logprob=finite(token.logprob),
            bytes=token_bytes(token.text),
            top_logprobs=[_top(other, ids) for other in token.top],
        )
        if ids:
            entry.token_id, entry.rank = token.id, token.rank
        out.append(entry)
    return out


def _top(token: Token, ids: bool) -> TopLogprob:
    entry = TopLogprob(
        token=token.text, logprob=finite(token.logprob), bytes=token_bytes(token.text)
    )
    if ids:
        entry.token_id, entry.rank = token.id, token.rank
    return entry


def now() -> int:
    """Unix seconds."""
    return int(time.time())
