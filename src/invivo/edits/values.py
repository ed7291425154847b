"""Arguments of operations: numbers, vectors, named tensors, trainable parameters, sources."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from invivo.edits.reading import Fields, plain_number, read_choice, read_name, read_number
from invivo.edits.selectors import Selector, read_selector, selector_to_json
from invivo.errors import InvalidRequest

# Longer vectors are handed in as named tensors.
MAX_INLINE = 16_384
MAPS = ("index", "end", "selector", "one")


@dataclass(frozen=True, slots=True)
class Blob:
    """A tensor handed in beside the program, by name or by "sha256:..."; JSON: "blob:NAME"."""

    name: str


@dataclass(frozen=True, slots=True)
class Param:
    """A trainable parameter that ``Program.params`` declares; JSON: {"param": NAME}."""

    name: str


Vector = tuple[float, ...]
Matrix = tuple[Vector, ...]
Value = float | Vector | Matrix | Blob | Param


@dataclass(frozen=True, slots=True)
class Source:
    """Where a replacement comes from: a run of the same program, or a named tensor.

    Attributes:
        run: name of the run; None for a blob.
        blob: name of the tensor; None for a run.
        at: site to read, of the same shape; None reads the site that is changed.
        pos: positions in the source run; None takes those of the step.
        map: how positions pair up: "index" (the same), "end" (the same from the prompt's end),
            "selector" (first with first, ...), "one" (a single source position for all).
            None: "selector" where ``pos`` is given, else "index", prompts of equal length only.
    """

    run: str | None = None
    blob: str | None = None
    at: str | None = None
    pos: Selector | None = None
    map: str | None = None


@dataclass(frozen=True, slots=True)
class OtherRow:
    """A run of another row of the sweep.

    Attributes:
        values: variables that have other values there; all others have those of the row itself.
        run: None: the run that is measured.
    """

    values: tuple[tuple[str, float | int | str], ...]
    run: str | None = None


def read_blob(value: object, path: str) -> Blob:
    if not isinstance(value, str) or not value.startswith("blob:") or len(value) < 6:
        raise InvalidRequest(
            "a named tensor is needed", field=path, given=value, remedy='Write "blob:NAME"'
        )
    if len(value) > 200:
        raise InvalidRequest("at most 200 characters", field=path, given=len(value))
    return Blob(value.removeprefix("blob:"))


def read_value(value: object, path: str, kinds: tuple[str, ...]) -> Value:
    """A value of one of ``kinds``: "number", "vector", "matrix" (blobs too), "param"."""
    if isinstance(value, str):
        tensors = "vector" in kinds or "matrix" in kinds
        if tensors and (value.startswith("blob:") or "number" not in kinds):
            return read_blob(value, path)
    elif isinstance(value, dict):
        if "param" in kinds:
            fields = Fields(value, path)
            param = Param(read_name(fields.need("param"), fields.at("param")))
            fields.done()
            return param
    elif isinstance(value, list | tuple):
        return _read_inline(list(value), path, kinds)
    elif "number" in kinds:
        return read_number(value, path)
    raise InvalidRequest(
        f"one of {', '.join(kinds)} is needed",
        field=path,
        given=value,
        remedy='A number stands without quotes, a tensor as "blob:NAME"',
    )


def _read_inline(value: list[Any], path: str, kinds: tuple[str, ...]) -> Vector | Matrix:
    nested = bool(value) and isinstance(value[0], list | tuple)
    if ("matrix" if nested else "vector") not in kinds or not value:
        raise InvalidRequest(f"one of {', '.join(kinds)} is needed", field=path, given=value)
    rows = value if nested else [value]
    if any(not isinstance(row, list | tuple) or len(row) != len(rows[0]) for row in rows):
        raise InvalidRequest("all rows need the same length", field=path)
    if len(rows) * len(rows[0]) > MAX_INLINE:
        raise InvalidRequest(
            f"at most {MAX_INLINE} numbers", field=path, remedy="Hand the tensor in as a blob"
        )
    read = tuple(tuple(read_number(x, f"{path}[{i}]") for i, x in enumerate(row)) for row in rows)
    return read if nested else read[0]


def value_to_json(value: Value) -> object:
    match value:
        case Blob(name):
            return f"blob:{name}"
        case Param(name):
            return {"param": name}
        case tuple():
            return [value_to_json(x) for x in value]
        case _:
            return plain_number(value)


def read_source(value: object, path: str) -> Source:
    """{"run": ..., "at", "pos", "map"}, a run's name alone, or "blob:NAME"."""
    if isinstance(value, str):
        if value.startswith("blob:"):
            return Source(blob=read_blob(value, path).name)
        return Source(run=read_name(value, path))
    fields = Fields(value, path)
    source = Source(
        run=read_name(fields.need("run"), fields.at("run")),
        at=None if not fields.has("at") else str(fields.take("at")),
        pos=None if not fields.has("pos") else read_selector(fields.take("pos"), fields.at("pos")),
        map=None
        if not fields.has("map")
        else read_choice(fields.take("map"), fields.at("map"), MAPS),
    )
    for key in ("at", "pos", "map"):  # known even where absent, for the remedy of done()
        fields.take(key)
    fields.done()
    return source


def read_other(value: object, path: str) -> str | OtherRow:
    """A run's name, or {"row": {variable: value, ...}, "run"}."""
    if isinstance(value, str):
        return read_name(value, path)
    fields = Fields(value, path)
    row, run = fields.need("row"), fields.take("run")
    fields.done()
    where = fields.at("row")
    if not isinstance(row, Mapping) or not row:
        raise InvalidRequest(
            "values of the sweep's variables are needed",
            field=where,
            given=row,
            remedy='Write {"row": {"L": 0}}; variables that are left out stay as they are',
        )
    values = tuple(
        (
            read_name(name, where),
            inner
            if isinstance(inner, str)
            else plain_number(read_number(inner, f"{where}.{name}")),
        )
        for name, inner in sorted(row.items())
    )
    return OtherRow(values, None if run is None else read_name(run, fields.at("run")))


def other_to_json(other: str | OtherRow) -> object:
    if isinstance(other, str):
        return other
    out: dict[str, object] = {"row": dict(other.values)}
    if other.run is not None:
        out["run"] = other.run
    return out


def source_to_json(source: Source) -> object:
    if source.blob is not None:
        return f"blob:{source.blob}"
    out: dict[str, object] = {"run": source.run}
    if source.at is not None:
        out["at"] = source.at
    if source.pos is not None:
        out["pos"] = selector_to_json(source.pos)
    if source.map is not None:
        out["map"] = source.map
    return out
