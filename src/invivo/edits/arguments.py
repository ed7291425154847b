"""Reading and writing the arguments of operations, reductions and measures, as their tables say."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from invivo.edits.operations import Argument
from invivo.edits.reading import (
    Fields,
    plain_number,
    read_bool,
    read_choice,
    read_int,
    read_list,
    read_name,
    read_string,
)
from invivo.edits.selectors import Selector, read_selector, selector_to_json
from invivo.edits.site_names import SitePattern, format_site, parse_site
from invivo.edits.values import (
    Blob,
    Source,
    other_to_json,
    read_blob,
    read_other,
    read_source,
    read_value,
    source_to_json,
    value_to_json,
)
from invivo.errors import InvalidRequest

_MOST_INTS = 65_536
_MOST_TOKENS = 4_096
Arguments = dict[str, Any]


def read_arguments(table: Iterable[Argument], fields: Fields) -> Arguments:
    """The arguments that ``table`` lists, by name; optional ones that are absent get defaults."""
    found: Arguments = {}
    for argument in table:
        if not fields.has(argument.name):
            fields.take(argument.name)
            if argument.required:
                raise InvalidRequest(
                    "this argument is missing",
                    field=fields.at(argument.name),
                    remedy=argument.meaning.capitalize(),
                )
            found[argument.name] = argument.default
            continue
        value, path = fields.take(argument.name), fields.at(argument.name)
        found[argument.name] = _read(argument, value, path)
    return found


def _read(argument: Argument, value: Any, path: str) -> Any:
    match argument.kind:
        case "value":
            return read_value(value, path, argument.takes)
        case "source":
            return read_source(value, path)
        case "selector":
            return read_selector(value, path)
        case "selectors":
            listed = read_list(value, path, least=2, most=256)
            return tuple(read_selector(v, f"{path}[{i}]") for i, v in enumerate(listed))
        case "sites":
            return read_sites(value, path)
        case "run":
            return read_name(value, path)
        case "other":
            return read_other(value, path)
        case "pool":
            if isinstance(value, str):
                return read_blob(value, path)
            listed = read_list(value, path, least=1, most=64)
            return tuple(read_name(v, f"{path}[{i}]") for i, v in enumerate(listed))
        case "int":
            return read_int(value, path, least=0, most=2**31)
        case "ints":
            listed = read_list(value, path, least=1, most=_MOST_INTS)
            return tuple(read_int(v, path, least=0, most=2**31) for v in listed)
        case "text":
            return read_string(value, path, longest=200)
        case "bool":
            return read_bool(value, path)
        case "choice":
            return read_choice(value, path, argument.takes)
        case "token":
            return read_token(value, path)
        case "tokens":
            listed = read_list(value, path, least=1, most=_MOST_TOKENS)
            return tuple(read_token(v, f"{path}[{i}]") for i, v in enumerate(listed))
        case _:
            assert argument.kind == "token_sets"
            sets = [
                read_list(v, f"{path}[{i}]", least=1, most=_MOST_TOKENS)
                for i, v in enumerate(read_list(value, path, least=1, most=256))
            ]
            return tuple(tuple(read_token(t, path) for t in tokens) for tokens in sets)


def read_token(value: object, path: str) -> int | str:
    """A token by its id or by its text."""
    if isinstance(value, str):
        return read_string(value, path, longest=256)
    return read_int(value, path, least=0, most=2**31)


def read_sites(value: object, path: str) -> tuple[SitePattern, ...]:
    """One name or a list of names."""
    if isinstance(value, str):
        return (parse_site(value, path),)
    listed = read_list(value, path, least=1, most=256)
    return tuple(parse_site(v, f"{path}[{i}]") for i, v in enumerate(listed))


def sites_to_json(patterns: tuple[SitePattern, ...]) -> object:
    names = [format_site(pattern) for pattern in patterns]
    return names[0] if len(names) == 1 else names


def arguments_to_json(table: Iterable[Argument], arguments: Arguments) -> dict[str, object]:
    """The canonical form: what equals its default is left out."""
    out: dict[str, object] = {}
    for argument in table:
        value = arguments[argument.name]
        if value is None or (not argument.required and value == argument.default):
            continue
        match argument.kind:
            case "value":
                out[argument.name] = value_to_json(value)
            case "source":
                assert isinstance(value, Source)
                out[argument.name] = source_to_json(value)
            case "other":
                out[argument.name] = other_to_json(value)
            case "selector":
                assert isinstance(value, Selector)
                out[argument.name] = selector_to_json(value)
            case "selectors":
                out[argument.name] = [selector_to_json(part) for part in value]
            case "sites":
                out[argument.name] = sites_to_json(value)
            case "pool" if isinstance(value, Blob):
                out[argument.name] = value_to_json(value)
            case "pool" | "ints" | "tokens":
                out[argument.name] = list(value)
            case "token_sets":
                out[argument.name] = [list(tokens) for tokens in value]
            case _:
                out[argument.name] = plain_number(value) if isinstance(value, float) else value
    return out
