"""The published JSON schema of programs, made from the tables that the parser reads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from invivo.edits.operations import MEASURES, OPERATIONS, REDUCTIONS, Argument
from invivo.edits.program import VERSION
from invivo.edits.selectors import TAKES
from invivo.edits.values import MAPS

Schema = dict[str, Any]

_VARIABLE: Schema = {"type": "string", "pattern": "^\\$[A-Za-z][A-Za-z0-9_]*$"}
_NAME = "^[A-Za-z_][A-Za-z0-9_-]{0,63}$"


def _ref(name: str) -> Schema:
    return {"$ref": f"#/$defs/{name}"}


def _any(*schemas: Schema) -> Schema:
    return {"anyOf": [*schemas, _VARIABLE]}


_BY_KIND: dict[str, Schema] = {
    "source": _any(_ref("source")),
    "selector": _ref("selector"),
    "selectors": {"type": "array", "items": _ref("selector"), "minItems": 2},
    "sites": _ref("sites"),
    "run": {"type": "string"},
    "other": {
        "anyOf": [
            {"type": "string"},
            {
                "type": "object",
                "properties": {
                    "row": {
                        "type": "object",
                        "propertyNames": {"pattern": _NAME},
                        "additionalProperties": {"type": ["number", "string"]},
                        "minProperties": 1,
                    },
                    "run": {"type": "string"},
                },
                "required": ["row"],
                "additionalProperties": False,
            },
        ]
    },
    "pool": {
        "anyOf": [
            {"type": "array", "items": {"type": "string"}, "minItems": 1},
            _ref("blob"),
        ]
    },
    "int": _any({"type": "integer", "minimum": 0}),
    "ints": {"type": "array", "items": _any({"type": "integer", "minimum": 0}), "minItems": 1},
    "bool": _any({"type": "boolean"}),
    "text": {"type": "string", "minLength": 1, "maxLength": 200},
    "token": {"type": ["string", "integer"]},
    "tokens": {"type": "array", "items": {"type": ["string", "integer"]}, "minItems": 1},
    "token_sets": {
        "type": "array",
        "items": {"type": "array", "items": {"type": ["string", "integer"]}, "minItems": 1},
        "minItems": 1,
    },
}
_VALUES: dict[str, list[Schema]] = {
    "number": [{"type": "number"}],
    "vector": [{"type": "array", "items": {"type": "number"}, "minItems": 1}, _ref("blob")],
    "matrix": [
        {"type": "array", "items": {"type": "array", "items": {"type": "number"}}, "minItems": 1},
        _ref("blob"),
    ],
    "param": [_ref("param")],
}


def _argument(argument: Argument) -> Schema:
    if argument.kind == "value":
        found = _any(*(schema for kind in argument.takes for schema in _VALUES[kind]))
    elif argument.kind == "choice":
        found = _any({"enum": list(argument.takes)})
    else:
        found = dict(_BY_KIND[argument.kind])
    return found | {"description": argument.meaning}


def _object(
    properties: dict[str, Schema], required: Iterable[str], arguments: Iterable[Argument] = ()
) -> Schema:
    arguments = list(arguments)
    needed = [*required, *(a.name for a in arguments if a.required)]
    return {
        "type": "object",
        "properties": properties | {a.name: _argument(a) for a in arguments},
        "required": needed,
        "additionalProperties": False,
    }


def json_schema() -> Schema:
    """JSON Schema (2020-12) of a program.

    It says less than the parser: ranges of indices, names that refer to something and shapes of
    vectors are found when a program meets a model.
    """
    common: dict[str, Schema] = {"run": {"type": "string"}}
    steps = []
    for operation in OPERATIONS.values():
        properties: dict[str, Schema] = {
            "at": _ref("sites"),
            "do": {"const": operation.name, "description": operation.meaning},
            "expand": {"type": "boolean"},
            **common,
        }
        if operation.positions:
            properties["pos"] = _ref("selector")
        steps.append(_object(properties, ["at", "do"], operation.arguments))
    shared: dict[str, Schema] = {
        **common,
        "pos": _ref("selector"),
        "name": {"type": "string", "maxLength": 100},
    }
    outputs = [
        _object({"measure": {"const": kind}, **shared}, ["measure"], arguments)
        for kind, arguments in MEASURES.items()
    ]
    for reduction, arguments in REDUCTIONS.items():
        properties = {
            "capture": _ref("sites"),
            "reduce": {"const": reduction},
            "when": {"enum": ["after", "before"]},
            "expand": {"type": "boolean"},
            "keep": {"type": "boolean"},
            **shared,
        }
        required = ["capture"] if reduction == "none" else ["capture", "reduce"]
        outputs.append(_object(properties, required, arguments))
    program = {
        "v": {"const": VERSION},
        "model": {"type": "string"},
        "numerics": {"enum": ["fast", "exact"]},
        "recompute": {"type": "boolean"},
        "runs": _map(_ref("run")),
        "sets": _map({"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}),
        "sel": _map(_ref("selector")),
        "params": _map(_ref("parameter")),
        "sweep": _ref("sweep"),
        "steps": {"type": "array", "items": {"anyOf": steps}},
        "out": {"type": "array", "items": {"anyOf": outputs}},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "invivo program of interventions",
        "type": "object",
        "properties": program,
        "additionalProperties": False,
        "$defs": _definitions(),
    }


def _map(values: Schema) -> Schema:
    return {
        "type": "object",
        "propertyNames": {"pattern": _NAME},
        "additionalProperties": values,
    }


def _definitions() -> dict[str, Schema]:
    whole = {"type": "integer"}
    values = {"type": "array", "items": {"type": ["number", "string"]}, "minItems": 1}
    span = {"type": "string", "pattern": "^\\d{1,6}\\.\\.\\d{1,6}$"}
    return {
        "sites": {
            "anyOf": [
                {"type": "string", "minLength": 1, "maxLength": 300},
                {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 256},
            ]
        },
        "blob": {"type": "string", "pattern": "^blob:.+"},
        "param": _object({"param": {"type": "string", "pattern": _NAME}}, ["param"]),
        "parameter": _object(
            {
                "shape": {"type": "array", "items": {"type": "integer", "minimum": 1}},
                "init": {"anyOf": [{"type": "number"}, _ref("blob")]},
            },
            [],
        ),
        "source": {
            "anyOf": [
                {"type": "string", "minLength": 1},
                _object(
                    {
                        "run": {"type": "string"},
                        "at": {"type": "string"},
                        "pos": _ref("selector"),
                        "map": {"enum": list(MAPS)},
                    },
                    ["run"],
                ),
            ]
        },
        "run": {
            "anyOf": [
                {"type": "string", "minLength": 1},
                _object(
                    {
                        "prompt": {
                            "anyOf": [
                                {"type": "string", "minLength": 1},
                                {"type": "array", "items": whole, "minItems": 1},
                            ]
                        },
                        "same": {"type": "string"},
                        "adapter": {"type": "string"},
                    },
                    [],
                ),
            ]
        },
        "sweep": {
            "anyOf": [
                _map({"anyOf": [values, span]}),
                {
                    "type": "array",
                    "items": {
                        "type": "array",
                        "prefixItems": [{"type": "string"}, {"anyOf": [values, span]}],
                        "minItems": 2,
                        "maxItems": 2,
                    },
                },
            ]
        },
        "selector": {"anyOf": [{"type": "string", "pattern": "^@|^\\$"}, *_selectors()]},
    }


def _selectors() -> list[Schema]:
    whole = _any({"type": "integer"})
    text = {"type": "string", "minLength": 1}
    one = _ref("selector")
    several = {"type": "array", "items": one, "minItems": 1, "maxItems": 64}
    true = {"const": True}
    pair = {"type": "array", "items": whole, "minItems": 2, "maxItems": 2}
    decode = {"type": "array", "prefixItems": [whole, {"type": ["integer", "null"]}]}
    kinds: dict[str, dict[str, Schema]] = {
        "index": {"index": _any({"type": "integer"}, {"type": "array", "items": whole})},
        "range": {"range": pair},
        "offset": {"offset": whole, "of": one},
        "span": {"span": text},
        "regex": {"regex": text, "group": {"type": "integer", "minimum": 0}},
        "token": {"token": {"type": ["string", "integer"]}},
        "same_token_as": {"same_token_as": one},
        "role": {"role": text},
        "group": {"group": text},
        "prompt": {"prompt": true},
        "generated": {"generated": {"anyOf": [true, decode]}},
        "all": {"all": true},
        "or": {"or": several},
        "and": {"and": several},
        "not": {"not": one},
    }
    nth = {"nth": _any({"type": "integer"}, {"const": "all"})}
    repeated = ("span", "regex", "token", "same_token_as", "role", "group")
    found = []
    for kind, properties in kinds.items():
        required = [key for key in properties if key in (kind, "of")]
        more = nth if kind in repeated else {}
        found.append(_object({**properties, **more, "take": {"enum": list(TAKES)}}, required))
    return found
