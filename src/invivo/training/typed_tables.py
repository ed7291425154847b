"""Plain tables (of TOML or JSON) to dataclasses and back, with errors that name the field."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from invivo.errors import InvalidRequest

T = TypeVar("T")
_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def read_table(kind: type[T], table: Mapping[str, Any], where: str = "") -> T:
    """An instance of the dataclass ``kind`` from a table of its fields.

    Raises:
        InvalidRequest: a field is unknown, missing or of the wrong type.
    """
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(kind)
    for name in table:
        if name not in fields:
            close = difflib.get_close_matches(name, fields, n=1)
            raise InvalidRequest(
                "is not known",
                field=where + name,
                remedy=f"Did you mean {close[0]}?" if close else f"Known: {', '.join(fields)}",
            )
    values = {}
    for name, field in fields.items():
        if name in table:
            values[name] = _read(hints[name], table[name], where + name)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise InvalidRequest("is missing", field=where + name)
    return kind(**values)


def _read(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        inner = [a for a in arguments if a is not type(None)]
        return None if value is None else _read(inner[0], value, where)
    if origin is typing.Literal:
        if value not in arguments:
            known = ", ".join(map(str, arguments))
            raise InvalidRequest("is not known", field=where, given=value, remedy=f"Known: {known}")
        return value
    if origin is tuple:
        return _read_list(arguments, value, where)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise InvalidRequest("must be a table", field=where, given=value)
        return read_table(hint, value, where + ".")  # type: ignore[arg-type]
    if origin is dict:
        if not isinstance(value, Mapping):
            raise InvalidRequest("must be a table", field=where, given=value)
        return dict(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise InvalidRequest(f"must be {_NAMES[hint]}", field=where, given=value)
    return value


def _read_list(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise InvalidRequest("must be a list", field=where, given=value)
    kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
    if len(kinds) != len(value):
        raise InvalidRequest(f"must have {len(kinds)} values", field=where, given=value)
    pairs = enumerate(zip(kinds, value, strict=True))
    return tuple(_read(kind, item, f"{where}[{i}]") for i, (kind, item) in pairs)


def flat(table: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``; lists stay whole."""
    out: dict[str, Any] = {}
    for name, value in table.items():
        if isinstance(value, Mapping):
            out |= flat(value, f"{where}{name}.")
        else:
            out[where + name] = value
    return out
