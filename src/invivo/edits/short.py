"""The command line's form: one edit or output a word.

    layers.12.attn.head.3.z@last=zero
    layers.3.resid.post@"Poland"=add(blob:v, 2)
    layers.9.attn.head.*.z@last=replace(cf)
    layers.*.resid.post@last?lens(top=5)
    @last?logit_diff(" Warsaw", " London")

``SITE@POSITION=OPERATION(arguments)`` changes, ``SITE@POSITION?REDUCTION(arguments)`` captures, and
without a site a measure is meant. A position is a name, a number, ``2..5``, a quoted text or a
``/pattern/``; without one it is what the JSON form takes then. ``RUN:`` in front names another run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from invivo.edits.operations import MEASURES, OPERATIONS, REDUCTIONS, Argument
from invivo.edits.program import Program, parse_program
from invivo.errors import InvalidRequest

_RUN = re.compile(r"([A-Za-z_][A-Za-z0-9_-]*):(?!\d)")
_CALL = re.compile(r"([a-z_]+)\s*(?:\((.*)\))?", re.DOTALL)
_NUMBER = re.compile(r"-?[0-9]{1,9}")
_RANGE = re.compile(r"(-?[0-9]{1,9})\.\.(-?[0-9]{1,9})")
_NAMED = re.compile(r"([a-z_]+)\s*=(.*)", re.DOTALL)


def read_short(entries: Iterable[str], *, runs: Mapping[str, Any] | None = None) -> Program:
    """The program of all ``entries`` together.

    Args:
        runs: other prompts by name, as in the JSON form.

    Raises:
        InvalidRequest: an entry is not of the form above, or what it says is wrong.
    """
    data: dict[str, Any] = {"runs": dict(runs or {}), "steps": [], "out": []}
    for number, entry in enumerate(entries):
        kind, item = _read_entry(entry, f"edit {number + 1}")
        data[kind].append(item)
    return parse_program(data)


def _read_entry(text: str, path: str) -> tuple[str, dict[str, Any]]:
    item: dict[str, Any] = {}
    rest = text.strip()
    run = _RUN.match(rest)
    if run is not None:
        item["run"] = run[1]
        rest = rest[run.end() :]
    site, rest = _cut_site(rest)
    if rest.startswith("@"):
        position, rest = _cut_position(rest[1:], path)
        item["pos"] = position
    if not rest or rest[0] not in "=?":
        raise InvalidRequest(
            "= or ? is missing",
            field=path,
            given=text,
            remedy="Write SITE@POSITION=OPERATION or SITE@POSITION?REDUCTION",
        )
    call = _CALL.fullmatch(rest[1:].strip())
    if call is None:
        raise InvalidRequest("NAME or NAME(arguments) is needed", field=path, given=rest[1:])
    name, written = call[1], call[2] or ""
    if rest[0] == "=":
        if name not in OPERATIONS:
            raise InvalidRequest(
                "there is no operation of this name",
                field=path,
                given=name,
                remedy=f"Known: {', '.join(OPERATIONS)}",
            )
        item |= {"at": site, "do": name} | _arguments(OPERATIONS[name].arguments, written, path)
        return "steps", item
    table = REDUCTIONS if site else MEASURES
    if name not in table:
        raise InvalidRequest(
            "there is no reduction of this name" if site else "there is no measure of this name",
            field=path,
            given=name,
            remedy=f"Known: {', '.join(table)}",
        )
    item |= {"capture": site, "reduce": name} if site else {"measure": name}
    return "out", item | _arguments(table[name], written, path)


def _cut_site(text: str) -> tuple[str, str]:
    """The site up to =, ? or the position's @; the @ of a set follows a dot."""
    for i, char in enumerate(text):
        if char in "=?" or (char == "@" and (i == 0 or text[i - 1] != ".")):
            return text[:i], text[i:]
    return text, ""


def _cut_position(text: str, path: str) -> tuple[object, str]:
    """A selector in JSON form, and what follows it."""
    if text.startswith('"'):
        try:
            span, end = json.JSONDecoder().raw_decode(text)
        except ValueError:
            raise InvalidRequest("the quotes do not close", field=path, given=text) from None
        return {"span": span}, text[end:]
    if text.startswith("/"):
        end = text.find("/", 1)
        if end < 0:
            raise InvalidRequest("the pattern does not close with /", field=path, given=text)
        return {"regex": text[1:end]}, text[end + 1 :]
    end = min((i for i in (text.find("="), text.find("?")) if i >= 0), default=len(text))
    word, rest = text[:end].strip(), text[end:]
    if _NUMBER.fullmatch(word):
        return {"index": int(word)}, rest
    both = _RANGE.fullmatch(word)
    if both is not None:
        return {"range": [int(both[1]), int(both[2])]}, rest
    return f"@{word}", rest


def _arguments(table: tuple[Argument, ...], written: str, path: str) -> dict[str, Any]:
    """Arguments by position or by name."""
    found: dict[str, Any] = {}
    for number, piece in enumerate(_split(written)):
        named = _NAMED.fullmatch(piece)
        if named is not None:
            found[named[1]] = _value(named[2])
            continue
        if number >= len(table):
            raise InvalidRequest(
                f"at most {len(table)} arguments", field=path, given=written.strip()
            )
        found[table[number].name] = _value(piece)
    return found


def _split(text: str) -> list[str]:
    """Pieces between commas that stand outside quotes and brackets."""
    pieces, depth, quoted, start = [], 0, False, 0
    for i, char in enumerate(text):
        if char == '"' and (i == 0 or text[i - 1] != "\\"):
            quoted = not quoted
        elif not quoted:
            depth += (char in "[{(") - (char in "]})")
            if char == "," and depth == 0:
                pieces.append(text[start:i])
                start = i + 1
    pieces.append(text[start:])
    return [piece.strip() for piece in pieces if piece.strip()]


def _value(text: str) -> Any:
    """JSON where it is JSON, else the word itself."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text.strip()
