"""Prompts with sets, and with marks that selectors ask for.

A prompt may hold *sets*: pieces of text whose order must not matter (set-based prompting,
McIlroy-Young et al. 2024, arXiv 2406.06581)::

    ["Which is a colour?\\n", {"set": [" red", " seven", " oak"]}, "\\nAnswer:"]

and so may the content of a message, there also in the shape of content parts
(``{"type": "text", "text": ...}``, ``{"type": "set", "set": [...]}``). Every part is tokenised
alone. The members of a set are laid out in the order of their token ids, whatever order they were
given in: the answer is then the same to the last bit, and not only in exact arithmetic.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from invivo.errors import InvalidRequest

Range = tuple[int, int]
Tokenize = Callable[[str, bool], list[int]]  # text, whether what opens a text is added
Render = Callable[[Sequence[Mapping[str, Any]], bool], str]  # messages, whether an answer begins

_BORDER = "\ue000"  # marks places in messages while the chat template is applied
_MOST_SETS = 64
_MOST_MEMBERS = 256


@dataclass(frozen=True, slots=True)
class MarkedPrompt:
    """A prompt as token ids, and what is where in it.

    Attributes:
        sets: token ranges of the members of each set, in the order in which they were given.
        text: of the whole prompt, where it is known.
        turns: (role, first character, end) in ``text`` of the content of each message.
        n_past: leading tokens of which the request itself wants nothing; None: all but the last.
    """

    ids: tuple[int, ...]
    sets: tuple[tuple[Range, ...], ...] = ()
    text: str | None = None
    turns: tuple[tuple[str, int, int], ...] = ()
    n_past: int | None = None


Part = str | tuple[str, ...]  # a text, or the members of a set


def is_parts(prompt: Any) -> bool:
    """Whether ``prompt`` is a list of texts and sets with at least one set in it."""
    if isinstance(prompt, str | Mapping) or not isinstance(prompt, Sequence):
        return False
    return any(isinstance(part, Mapping) and "set" in part for part in prompt)


def has_sets(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the content of a message holds a set."""
    return any(is_parts(message.get("content")) for message in messages)


def read_parts(prompt: Sequence[Any], field: str = "prompt") -> list[Part]:
    """The parts of a prompt or of a message's content, checked.

    Raises:
        InvalidRequest: a part is neither a text nor a set of texts.
    """
    parts: list[Part] = []
    for i, part in enumerate(prompt):
        where = f"{field}[{i}]"
        if isinstance(part, str):
            parts.append(part)
        elif isinstance(part, Mapping) and set(part) - {"type"} == {"text"}:
            parts.append(_text(part["text"], f"{where}.text"))
        elif isinstance(part, Mapping) and set(part) - {"type"} == {"set"}:
            members = part["set"]
            if isinstance(members, str) or not isinstance(members, Sequence) or not members:
                raise InvalidRequest(
                    "a set is a list of texts", field=f"{where}.set", given=members
                )
            if len(members) > _MOST_MEMBERS:
                raise InvalidRequest(
                    f"a set has at most {_MOST_MEMBERS} members",
                    field=f"{where}.set",
                    given=len(members),
                )
            parts.append(tuple(_text(m, f"{where}.set[{k}]") for k, m in enumerate(members)))
        else:
            raise InvalidRequest(
                "a part is a text or a set",
                field=where,
                given=part,
                remedy='Write "a text" or {"set": ["one", "other"]}',
            )
    if sum(isinstance(part, tuple) for part in parts) > _MOST_SETS:
        raise InvalidRequest(f"at most {_MOST_SETS} sets", field=field)
    return parts


def mark_parts(parts: Sequence[Part], tokenize: Tokenize, field: str = "prompt") -> MarkedPrompt:
    """Tokens of texts and sets, each part tokenised alone; the first gets what opens a text.

    Raises:
        InvalidRequest: a member of a set has no tokens.
    """
    ids: list[int] = []
    sets: list[tuple[Range, ...]] = []
    for i, part in enumerate(parts):
        if isinstance(part, str):
            ids += tokenize(part, i == 0)
            continue
        if i == 0:
            ids += tokenize("", True)
        members = [tokenize(member, False) for member in part]
        for k, member in enumerate(members):
            if not member:
                raise InvalidRequest(
                    "a member of a set must not be empty", field=f"{field}[{i}].set[{k}]"
                )
        ranges: list[Range] = [(0, 0)] * len(members)
        for k in sorted(range(len(members)), key=lambda k: members[k]):
            ranges[k] = (len(ids), len(ids) + len(members[k]))
            ids += members[k]
        sets.append(tuple(ranges))
    return MarkedPrompt(tuple(ids), tuple(sets))


def mark_chat(
    messages: Sequence[Mapping[str, Any]], render: Render, tokenize: Tokenize
) -> MarkedPrompt:
    """Tokens of a conversation through its chat template, with its turns or its sets.

    Raises:
        InvalidRequest: a part of a message is neither text nor set, or the template does not write
            a set as it was given.
    """
    if not has_sets(messages):
        text = render(messages, True)
        return MarkedPrompt(tuple(tokenize(text, False)), (), text, _turns(text, messages, render))
    written: list[Mapping[str, Any]] = []
    sizes: list[int] = []
    for i, message in enumerate(messages):
        content = message.get("content")
        if is_parts(content):
            assert content is not None
            field = f"messages[{i}].content"
            parts = read_parts(content, field)
            sizes += [len(part) for part in parts if isinstance(part, tuple)]
            content = "".join(_bordered(part, field) for part in parts)
        written.append({**message, "content": content})
    pieces = render(written, True).split(_BORDER)
    if len(pieces) != 1 + sum(1 + size for size in sizes):
        raise InvalidRequest(
            "the chat template does not write the sets as they were given",
            field="messages",
            remedy="Render the conversation yourself and use generate",
        )
    laid_out: list[Part] = [pieces[0]]
    at = 1
    for size in sizes:
        laid_out += [tuple(pieces[at : at + size]), pieces[at + size]]
        at += size + 1
    # The template writes what opens a text itself.
    return mark_parts(laid_out, lambda piece, _opens: tokenize(piece, False), "messages")


def _bordered(part: Part, field: str) -> str:
    """A part with borders before, between and after the members of a set."""
    texts = (part,) if isinstance(part, str) else part
    if any(_BORDER in text for text in texts):
        raise InvalidRequest("this character cannot stand beside a set", field=field, given=_BORDER)
    return part if isinstance(part, str) else _BORDER + _BORDER.join(part) + _BORDER


def _turns(
    text: str, messages: Sequence[Mapping[str, Any]], render: Render
) -> tuple[tuple[str, int, int], ...]:
    """Where the content of each message stands in ``text``; none where the template hides it."""
    marked, roles = [], []
    for message in messages:
        content = message.get("content")
        core = content.strip() if isinstance(content, str) else ""
        if core:
            assert isinstance(content, str)
            at = content.index(core)
            # Blanks stay outside, where a template may cut them off.
            content = content[:at] + _BORDER + core + _BORDER + content[at + len(core) :]
            roles.append(str(message["role"]))
        marked.append({**message, "content": content})
    pieces = render(marked, True).split(_BORDER)
    if len(pieces) != 1 + 2 * len(roles) or "".join(pieces) != text:
        return ()
    ends = list(itertools.accumulate(len(piece) for piece in pieces))
    return tuple((role, ends[2 * k], ends[2 * k + 1]) for k, role in enumerate(roles))


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise InvalidRequest("must be a text", field=field, given=value)
    return value
