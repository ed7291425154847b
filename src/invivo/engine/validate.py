"""All checks of what a caller asks, in one place; every complaint names the field."""

from __future__ import annotations

import math

from invivo.engine.types import Request, SamplingParams
from invivo.errors import InvalidRequest, TooLarge

MAX_N = 128
MAX_LOGPROBS = 20
MAX_STOP = 16
MAX_STOP_LENGTH = 256  # characters of one stop string
MAX_LOGIT_BIAS = 1024
MAX_STOP_TOKEN_IDS = 256
MAX_GRAMMAR = 256 * 1024  # characters of a grammar's source
MAX_ID = 256


def validate_request(request: Request, *, vocab_size: int, max_model_len: int) -> None:
    """Check a request against the model's vocabulary and context.

    Raises:
        InvalidRequest: a field is out of range.
        TooLarge: the prompt leaves no room for a single token.
    """
    _check(0 < len(request.id) <= MAX_ID, "id", "must have 1 to 256 characters", request.id)
    _check(
        request.kind in ("generate", "score", "embed", "run"),
        "kind",
        "must be generate, score, embed or run",
        request.kind,
    )
    if request.kind == "run" and request.intervention is None:
        raise InvalidRequest("a run carries a program", field="interventions")
    _prompt(request, vocab_size, max_model_len)
    _whole(request.n, "n", 1, MAX_N)
    _check(
        request.kind == "generate" or request.n == 1, "n", "only generation takes n > 1", request.n
    )
    _whole(request.priority, "priority", -(2**31), 2**31 - 1)
    _check(isinstance(request.salt, str), "salt", "must be a text", request.salt)
    _check(request.pooling in ("mean", "last"), "pooling", "must be mean or last", request.pooling)
    if request.kind == "score":
        _whole(request.score_from, "score_from", 1, len(request.tokens) - 1)
    validate_sampling(request.params, vocab_size=vocab_size)
    asked, most = request.params.max_tokens, max_model_len - len(request.tokens)
    if request.kind == "generate" and asked is not None and asked > most:
        raise InvalidRequest(
            f"the prompt has {len(request.tokens)} tokens, so at most {most} can follow",
            field="max_tokens",
            given=asked,
            remedy="Lower max_tokens, or give None to go on until the context is full",
        )


def validate_sampling(params: SamplingParams, *, vocab_size: int) -> None:
    """Check sampling parameters; raises InvalidRequest."""
    _number(params.temperature, "temperature", 0.0, 100.0)
    _whole(params.top_k, "top_k", 0, 2**31)
    _number(params.top_p, "top_p", 0.0, 1.0)
    _check(params.top_p > 0, "top_p", "must be above 0", params.top_p)
    _number(params.min_p, "min_p", 0.0, 1.0)
    _number(params.repetition_penalty, "repetition_penalty", 0.01, 100.0)
    _number(params.presence_penalty, "presence_penalty", -2.0, 2.0)
    _number(params.frequency_penalty, "frequency_penalty", -2.0, 2.0)
    if params.seed is not None:
        _whole(params.seed, "seed", -(2**63), 2**64 - 1)
    if params.max_tokens is not None:
        _whole(params.max_tokens, "max_tokens", 1, 2**31)
    _whole(params.min_tokens, "min_tokens", 0, 2**31)
    _check(
        params.max_tokens is None or params.min_tokens <= params.max_tokens,
        "min_tokens",
        "must not exceed max_tokens",
        params.min_tokens,
    )
    if params.logprobs is not None:
        _whole(params.logprobs, "logprobs", 0, MAX_LOGPROBS)
    if params.prompt_logprobs is not None:
        _whole(params.prompt_logprobs, "prompt_logprobs", 0, MAX_LOGPROBS)
    _stops(params)
    _bias(params, vocab_size)
    if params.grammar is not None:
        _check(
            len(params.grammar.source) <= MAX_GRAMMAR,
            params.grammar.kind,
            f"must have at most {MAX_GRAMMAR} characters",
            len(params.grammar.source),
        )


def _prompt(request: Request, vocab_size: int, max_model_len: int) -> None:
    tokens = request.tokens
    needed = 2 if request.kind == "score" else 1
    if len(tokens) < needed:
        raise InvalidRequest(
            "needs at least two tokens, the first has no context"
            if needed == 2
            else "must not be empty",
            field="prompt",
            given=list(tokens),
            remedy="Give some text",
        )
    limit = max_model_len if request.kind != "generate" else max_model_len - 1
    if len(tokens) > limit:
        raise TooLarge(
            f"has {len(tokens)} tokens, the model's context holds {max_model_len}",
            field="prompt",
            given=len(tokens),
            remedy="Shorten the prompt, leaving room for at least one new token",
        )
    low, high = min(tokens), max(tokens)
    _check(
        low >= 0 and high < vocab_size,
        "prompt",
        f"token ids must lie in 0 to {vocab_size - 1}",
        low if low < 0 else high,
    )


def _stops(params: SamplingParams) -> None:
    _check(len(params.stop) <= MAX_STOP, "stop", f"takes at most {MAX_STOP}", len(params.stop))
    for text in params.stop:
        _check(isinstance(text, str) and text != "", "stop", "must not hold an empty string", text)
        _check(
            len(text) <= MAX_STOP_LENGTH,
            "stop",
            f"a stop string has at most {MAX_STOP_LENGTH} characters",
            text,
        )
    ids = params.stop_token_ids
    _check(
        len(ids) <= MAX_STOP_TOKEN_IDS,
        "stop_token_ids",
        f"takes at most {MAX_STOP_TOKEN_IDS}",
        len(ids),
    )
    for token in ids:
        _whole(token, "stop_token_ids", 0, 2**31)


def _bias(params: SamplingParams, vocab_size: int) -> None:
    _check(
        len(params.logit_bias) <= MAX_LOGIT_BIAS,
        "logit_bias",
        f"takes at most {MAX_LOGIT_BIAS} tokens",
        len(params.logit_bias),
    )
    for token, bias in params.logit_bias:
        _whole(token, "logit_bias", 0, vocab_size - 1)
        _number(bias, "logit_bias", -100.0, 100.0)


def _check(holds: bool, field: str, rule: str, given: object) -> None:
    if not holds:
        raise InvalidRequest(rule, field=field, given=given)


def _number(value: object, field: str, low: float, high: float) -> None:
    ok = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not ok or not low <= value <= high:  # type: ignore[operator]
        raise InvalidRequest(f"must be a number from {low:g} to {high:g}", field=field, given=value)


def _whole(value: object, field: str, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidRequest(
            f"must be a whole number from {low} to {high}", field=field, given=value
        )
