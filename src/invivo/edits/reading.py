"""Strict reading of JSON-able data: every error names the field at fault."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from invivo.errors import InvalidRequest

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")


class Fields:
    """One JSON object while it is read: each key is taken once, and what is left is an error."""

    __slots__ = ("data", "path", "taken")

    def __init__(self, data: object, path: str) -> None:
        if not isinstance(data, Mapping):
            raise InvalidRequest("an object is needed", field=path or "program", given=data)
        self.data = data
        self.path = path
        self.taken: list[str] = []

    def at(self, key: str) -> str:
        """The path of ``key``, for errors."""
        return f"{self.path}.{key}" if self.path else key

    def has(self, key: str) -> bool:
        return key in self.data

    def take(self, key: str, default: Any = None) -> Any:
        self.taken.append(key)
        return self.data.get(key, default)

    def need(self, key: str) -> Any:
        if key not in self.data:
            raise InvalidRequest("this is missing", field=self.at(key))
        return self.take(key)

    def done(self) -> None:
        """Raises InvalidRequest for a key that nobody took."""
        for key in self.data:
            if key not in self.taken:
                raise InvalidRequest(
                    "this key is unknown",
                    field=self.at(str(key)),
                    remedy=f"Known here: {', '.join(sorted(self.taken))}",
                )


def read_string(value: object, path: str, *, longest: int = 4096) -> str:
    if not isinstance(value, str) or not value:
        raise InvalidRequest("a text is needed", field=path, given=value)
    if len(value) > longest:
        raise InvalidRequest(f"at most {longest} characters", field=path, given=len(value))
    return value


def read_name(value: object, path: str) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise InvalidRequest(
            "a name is needed",
            field=path,
            given=value,
            remedy="Letters, digits, _ and -, at most 64, not beginning with a digit",
        )
    return value


def read_int(value: object, path: str, *, least: int | None = None, most: int | None = None) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest("a whole number is needed", field=path, given=value)
    if (least is not None and value < least) or (most is not None and value > most):
        low = "" if least is None else f"at least {least}"
        high = "" if most is None else f"at most {most}"
        wanted = " and ".join(part for part in (low, high) if part)
        raise InvalidRequest(f"{wanted} is needed", field=path, given=value)
    return value


def read_number(value: object, path: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequest("a number is needed", field=path, given=value)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise InvalidRequest("a finite number is needed", field=path, given=value)
    return number + 0.0  # -0 and 0 are one number, with one hash


def read_bool(value: object, path: str) -> bool:
    if not isinstance(value, bool):
        raise InvalidRequest("true or false is needed", field=path, given=value)
    return value


def read_choice(value: object, path: str, choices: Collection[str]) -> str:
    if not isinstance(value, str) or value not in choices:
        raise InvalidRequest("one of " + ", ".join(choices), field=path, given=value)
    return value


def read_list(value: object, path: str, *, most: int, least: int = 0) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise InvalidRequest("a list is needed", field=path, given=value)
    if not least <= len(value) <= most:
        raise InvalidRequest(
            f"{least} to {most} entries are needed", field=path, given=f"{len(value)} entries"
        )
    return list(value)


def plain_number(value: float) -> float | int:
    """The number as canonical JSON writes it: 2, not 2.0."""
    return int(value) if value.is_integer() and abs(value) < 2**53 else value


def canonical_json(data: object) -> str:
    """One text for one value: keys sorted, no blanks, no NaN, characters written out."""
    return json.dumps(
        data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
