"""What a program brought back: captures and measures as numpy arrays, with where they were read.

No torch here: the same nouns come out of an engine in this process and out of a server's JSON.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from invivo.errors import InvalidRequest, NotFound

JsonBody = dict[str, Any]
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(slots=True)
class Capture:
    """Values of one site of one layer in one run.

    Attributes:
        name: of the output in the program; its number where it has none.
        site: full name, as "layers.3.resid.post".
        layer: -1 for sites outside layers.
        heads: heads, key heads or experts, in the order of their axis; None where there are none.
        reduce: "none", "lens", ...
        positions: token indices that were read; a mean has one value for all of them.
        tokens: their texts.
        values: [positions, heads where there are any, numbers], less what ``reduce`` takes away;
            of a lens the log-probabilities [positions, top].
        ids, words: of a lens with ``top``: the tokens and their texts, shaped as ``values``.
        blob: the id under which ``values`` are kept where the program wants that ("keep"), until
            others need the room.
    """

    name: str
    run: str
    site: str
    layer: int
    heads: list[int] | None
    reduce: str
    positions: list[int]
    tokens: list[str]
    values: Array
    ids: Array | None = None
    words: Array | None = None
    blob: str | None = None

    def __repr__(self) -> str:
        extra = "" if self.reduce == "none" else f", {self.reduce}"
        return f"Capture({self.name!r}, {self.site}{extra}, {list(self.values.shape)})"


@dataclass(slots=True)
class Measure:
    """One number a position, made from the logits; ``kind`` is "logit_diff", "kl", ..."""

    name: str
    kind: str
    run: str
    positions: list[int]
    tokens: list[str]
    values: Array

    def __repr__(self) -> str:
        shown = ", ".join(f"{x:.6g}" for x in self.values[:4])
        more = ", ..." if len(self.values) > 4 else ""
        return f"Measure({self.label!r}, {shown}{more})"

    @property
    def label(self) -> str:
        """The name that the program gave, else the kind."""
        return self.kind if self.name.isdigit() else self.name


@dataclass(slots=True)
class Row:
    """One row of the sweep: the values of its variables, and what came back."""

    binding: dict[str, float | int | str]
    captures: list[Capture]
    measures: list[Measure]


@dataclass(slots=True)
class ProgramResult:
    """Everything that one program brought back from one prompt.

    Attributes:
        rows: one for each combination of the sweep's values, the last variable fastest; one row
            where there is no sweep.
        explain: what was done: resolved positions, order, passes, cost (of the first row).
        meta: hash of the program, model, fingerprint of the weights, dtype, device, versions.
    """

    rows: list[Row]
    explain: JsonBody = field(default_factory=dict)
    meta: JsonBody = field(default_factory=dict)

    def __repr__(self) -> str:
        first = self.rows[0]
        parts = [f"{n}: {len(values)} values" for n, values in self.axes.items()]
        parts += [repr(m) for m in first.measures[:3]] if len(self.rows) == 1 else []
        parts += [f"{len(first.captures)} captures"] if first.captures else []
        parts += [f"{len(first.measures)} measures"] if len(first.measures) > 3 else []
        rows = "1 row" if len(self.rows) == 1 else f"{len(self.rows)} rows"
        return f"ProgramResult({'; '.join([rows, *parts])})"

    @property
    def captures(self) -> list[Capture]:
        """Those of the first row."""
        return self.rows[0].captures

    @property
    def measures(self) -> list[Measure]:
        """Those of the first row."""
        return self.rows[0].measures

    @property
    def axes(self) -> dict[str, list[float | int | str]]:
        """The variables of the sweep with their values, in order."""
        found: dict[str, dict[float | int | str, None]] = {}
        for row in self.rows:
            for name, value in row.binding.items():
                found.setdefault(name, {})[value] = None
        return {name: list(values) for name, values in found.items()}

    def array(self, name: str) -> Array:
        """Everything under one name, over the whole sweep.

        Args:
            name: of a measure or a capture; a measure without one goes by its kind.

        Returns:
            Of a measure [each variable of the sweep ..., positions]; of captures [each variable
            ..., layers (or sites) captured, and the shape of one value].

        Raises:
            NotFound: nothing has this name.
            InvalidRequest: the captures of this name differ in shape.
        """
        sizes = [len(values) for values in self.axes.values()]
        whole = [self._of_row(row, name) for row in self.rows]
        shapes = {one.shape for one in whole}
        if len(shapes) > 1:
            raise InvalidRequest(
                "what the rows brought back differs in shape", field="name", given=name
            )
        return np.stack(whole).reshape(*sizes, *whole[0].shape)

    def _of_row(self, row: Row, name: str) -> Array:
        for measure in row.measures:
            if name in (measure.name, measure.label):
                return measure.values
        found = [c.values for c in row.captures if name in (c.name, c.site)]
        if not found:
            known = [m.label for m in row.measures]
            known += list(dict.fromkeys(c.name for c in row.captures))
            raise NotFound(
                "nothing of this name came back",
                field="name",
                given=name,
                remedy=f"There are: {', '.join(known) or 'none'}",
            )
        if len({one.shape for one in found}) > 1:
            raise InvalidRequest(
                "the captures of this name differ in shape",
                field="name",
                given=name,
                remedy="Take them one by one from .captures",
            )
        return np.stack(found)

    def table(self) -> list[JsonBody]:
        """One record a row: the variables, and every measure and single number that came back.

        A measure at several positions is a list.
        """
        records = []
        for row in self.rows:
            record: JsonBody = dict(row.binding)
            for measure in row.measures:
                key = _free(record, measure.label)
                values = [float(x) for x in measure.values]
                record[key] = values[0] if len(values) == 1 else values
            for capture in row.captures:
                if capture.values.size == 1:
                    label = capture.site if capture.name.isdigit() else capture.name
                    record[_free(record, label)] = float(capture.values.reshape(-1)[0])
            records.append(record)
        return records

    @property
    def n_numbers(self) -> int:
        """Numbers in all captures."""
        return sum(c.values.size for row in self.rows for c in row.captures)

    def to_dict(self, pools: Pools | None = None) -> JsonBody:
        """As JSON-able data; :func:`result_of` reads it back.

        Args:
            pools: takes the numbers of the captures, which are then named by their place in it;
                None: everything is written out.
        """
        return {
            "rows": [
                {
                    "binding": dict(row.binding),
                    "captures": [_capture_body(c, pools) for c in row.captures],
                    "measures": [
                        {
                            "name": m.name,
                            "kind": m.kind,
                            "run": m.run,
                            "positions": m.positions,
                            "tokens": m.tokens,
                            "values": _numbers(m.values),
                        }
                        for m in row.measures
                    ],
                }
                for row in self.rows
            ],
            "explain": self.explain,
            "meta": self.meta,
        }


class Pools:
    """Many arrays laid end to end, one flat array for each dtype."""

    def __init__(self) -> None:
        self._parts: dict[str, list[Array]] = {}
        self._sizes: dict[str, int] = {}

    def add(self, array: Array) -> int:
        """Where in the pool of its dtype ``array`` begins."""
        kind = str(array.dtype)
        offset = self._sizes.get(kind, 0)
        self._parts.setdefault(kind, []).append(array.reshape(-1))
        self._sizes[kind] = offset + array.size
        return offset

    def arrays(self) -> dict[str, Array]:
        """The pools by dtype."""
        return {kind: np.concatenate(parts) for kind, parts in self._parts.items()}


def result_of(body: JsonBody, pools: Mapping[str, Array] | None = None) -> ProgramResult:
    """A result from its JSON; ``pools`` are those of :class:`Pools` where it was written so."""
    found = pools or {}
    return ProgramResult(
        rows=[
            Row(
                binding=row["binding"],
                captures=[_capture_of(c, found) for c in row["captures"]],
                measures=[
                    Measure(
                        name=m["name"],
                        kind=m["kind"],
                        run=m["run"],
                        positions=m["positions"],
                        tokens=m["tokens"],
                        values=np.array([float(x) for x in m["values"]], dtype=np.float64),
                    )
                    for m in row["measures"]
                ],
            )
            for row in body["rows"]
        ],
        explain=body["explain"],
        meta=body["meta"],
    )


def _capture_body(capture: Capture, pools: Pools | None) -> JsonBody:
    body: JsonBody = {
        "name": capture.name,
        "run": capture.run,
        "site": capture.site,
        "layer": capture.layer,
        "heads": capture.heads,
        "reduce": capture.reduce,
        "positions": capture.positions,
        "tokens": capture.tokens,
        "values": _array_body(capture.values, pools),
    }
    if capture.ids is not None:
        body["ids"] = _array_body(capture.ids, pools)
    if capture.words is not None:
        body["words"] = [str(word) for word in capture.words.reshape(-1)]
    if capture.blob is not None:
        body["blob"] = capture.blob
    return body


def _capture_of(body: JsonBody, arrays: Mapping[str, Array]) -> Capture:
    values = _array_of(body["values"], arrays)
    words = body.get("words")
    return Capture(
        name=body["name"],
        run=body["run"],
        site=body["site"],
        layer=body["layer"],
        heads=body["heads"],
        reduce=body["reduce"],
        positions=body["positions"],
        tokens=body["tokens"],
        values=values,
        ids=None if body.get("ids") is None else _array_of(body["ids"], arrays),
        words=None if words is None else np.array(words, dtype=object).reshape(values.shape),
        blob=body.get("blob"),
    )


def _array_body(array: Array, pools: Pools | None) -> JsonBody:
    body: JsonBody = {"shape": list(array.shape), "dtype": str(array.dtype)}
    if pools is not None:
        return body | {"offset": pools.add(array)}
    return body | {"data": list(_numbers(array.reshape(-1)))}


def _array_of(body: JsonBody, arrays: Mapping[str, Array]) -> Array:
    if "offset" in body:
        start, shape = body["offset"], body["shape"]
        return arrays[body["dtype"]][start : start + math.prod(shape)].reshape(shape)
    data = [float(x) if isinstance(x, str) else x for x in body["data"]]
    return np.array(data, dtype=body["dtype"]).reshape(body["shape"])


def _numbers(array: Array) -> Sequence[float | int | str]:
    """Numbers as JSON has them; infinities and NaN, which it lacks, as "inf", "-inf", "nan"."""
    values = array.tolist()
    if array.dtype.kind != "f" or bool(np.isfinite(array).all()):
        return values  # type: ignore[no-any-return]
    return [x if math.isfinite(x) else str(x) for x in values]


def _free(record: JsonBody, key: str) -> str:
    """``key``, with a number behind where it is taken."""
    return next(name for name in _numbered(key) if name not in record)


def _numbered(key: str) -> Iterator[str]:
    yield key
    number = 2
    while True:
        yield f"{key}_{number}"
        number += 1
