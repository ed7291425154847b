"""From the keyword arguments of the LM interface to the engine's parameters."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any

from invivo.engine.types import Grammar, SamplingParams
from invivo.errors import InvalidRequest

GENERATE_TOKENS = 128  # max_tokens where nothing is said
CHAT_TOKENS = 512

_PLAIN = {f.name for f in fields(SamplingParams)} - {"grammar", "logit_bias", "stop", "max_tokens"}
_GRAMMARS = ("json_schema", "regex", "choice")
KEYWORDS = (
    _PLAIN
    | {"max_tokens", "logit_bias", "stop"}
    | {"n", "adapter", "salt", "priority", "interventions", "blobs"}
    | set(_GRAMMARS)
)


@dataclass(frozen=True, slots=True)
class Asked:
    """Keyword arguments of a generating call, sorted out.

    Attributes:
        default_length: ``max_tokens`` was not said, ``params`` holds a default that may be cut to
            what fits.
        interventions, blobs: a program of edits and captures as it was handed in, and its tensors.
    """

    params: SamplingParams
    n: int
    adapter: str | None
    salt: str
    priority: int
    default_length: bool
    interventions: Any = None
    blobs: Mapping[str, Any] | None = None


def asked_of(keywords: Mapping[str, Any], *, default_max_tokens: int) -> Asked:
    """Sort out keyword arguments; ranges are checked later, by the engine.

    Raises:
        InvalidRequest: an unknown name, or more than one constraint on the output.
    """
    for name in keywords:
        if name not in KEYWORDS:
            close = get_close_matches(name, KEYWORDS, n=1)
            raise InvalidRequest(
                "is not a parameter of generation",
                field=name,
                given=keywords[name],
                remedy=f"Did you mean {close[0]}?" if close else "See invivo.lm.Sampling",
            )
    plain = {name: keywords[name] for name in _PLAIN if name in keywords}
    if "stop_token_ids" in plain:
        plain["stop_token_ids"] = _several("stop_token_ids", plain["stop_token_ids"])
    stop = keywords.get("stop") or ()
    params = SamplingParams(
        max_tokens=keywords.get("max_tokens", default_max_tokens),
        stop=(stop,) if isinstance(stop, str) else _several("stop", stop),
        logit_bias=_bias(keywords.get("logit_bias") or {}),
        grammar=_grammar(keywords),
        **plain,
    )
    return Asked(
        params=params,
        n=keywords.get("n", 1),
        adapter=keywords.get("adapter"),
        salt=keywords.get("salt", ""),
        priority=keywords.get("priority", 0),
        default_length="max_tokens" not in keywords,
        interventions=keywords.get("interventions"),
        blobs=keywords.get("blobs"),
    )


def _several(name: str, value: Any) -> tuple[Any, ...]:
    try:
        return tuple(value or ())
    except TypeError as error:
        raise InvalidRequest("must be a list", field=name, given=value) from error


def _bias(bias: Mapping[Any, Any]) -> tuple[tuple[int, float], ...]:
    try:
        return tuple((int(token), float(value)) for token, value in bias.items())
    except (AttributeError, TypeError, ValueError) as error:
        raise InvalidRequest(
            "must map token ids to numbers", field="logit_bias", given=bias
        ) from error


def _grammar(keywords: Mapping[str, Any]) -> Grammar | None:
    given = [name for name in _GRAMMARS if keywords.get(name) not in (None, False)]
    if not given:
        return None
    if len(given) > 1:
        raise InvalidRequest(
            f"cannot go together with {given[1]}",
            field=given[0],
            remedy="Constrain the output in one way",
        )
    value = keywords[given[0]]
    if given[0] == "regex":
        return Grammar("regex", _text("regex", value))
    if given[0] == "choice":
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise InvalidRequest("must be a list of strings", field="choice", given=value)
        return Grammar("choice", _json("choice", list(value)))
    if value is True:
        return Grammar("json_schema", '{"type": "object"}')
    if isinstance(value, Mapping):
        return Grammar("json_schema", _json("json_schema", value))
    return Grammar("json_schema", _text("json_schema", value))


def _json(name: str, value: object) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"cannot be written as JSON: {error}", field=name) from error


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise InvalidRequest("must be a text", field=name, given=value)
    return value
