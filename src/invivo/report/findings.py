"""What came of a run, as data: statements with intervals, tables, figures.

Nothing here is drawn or printed; ``draw.py`` and ``run_page.py`` do that, and ``findings.json`` is
:func:`to_dict` of it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from invivo.statistics import Interval

Cell = str | int | float | Interval | None
Verdict = Literal["holds", "fails", "open"]  # open: the interval leaves it undecided


@dataclass(frozen=True, slots=True)
class Statement:
    """One sentence about what was asked, with the figure that carries it.

    Attributes:
        text: the claim, as a sentence.
        figure: what was measured; None where the text says all.
        verdict: of the claim; None: a figure without a claim.
        p: of the test named in the text, if there is one.
    """

    text: str
    figure: Interval | float | None = None
    verdict: Verdict | None = None
    p: float | None = None


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells; the first column names the row."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Dots:
    """Estimates with intervals, one line a row, one panel a group.

    Attributes:
        name: of the figure, short; the title says what it shows.
        groups: (panel's title, rows of (label, estimate)).
        axis: what the estimates are.
        zero: draw a line at 0.
        bands: for each group a range to shade, or None; (low, high, what it is).
    """

    name: str
    title: str
    groups: tuple[tuple[str, tuple[tuple[str, Interval], ...]], ...]
    axis: str
    zero: bool = False
    percent: bool = False
    bands: tuple[tuple[float, float, str] | None, ...] = ()
    note: str = ""


@dataclass(frozen=True, slots=True)
class Bars:
    """Counts by category, one panel a group.

    Attributes:
        groups: (panel's title, values in the order of ``categories``).
    """

    name: str
    title: str
    categories: tuple[str, ...]
    groups: tuple[tuple[str, tuple[float, ...]], ...]
    axis: str
    category_axis: str = ""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Texts:
    """Examples to read: rows of longer texts."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


Figure = Dots | Bars


@dataclass(slots=True)
class Findings:
    """Everything that a run has to tell.

    Attributes:
        summary: one or two sentences for who reads no further.
        facts: a few large figures: (figure, what it is).
        limits: what could not be asked or answered at this scale.
    """

    summary: str
    facts: list[tuple[str, str]] = field(default_factory=list)
    statements: list[Statement] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    examples: list[Texts] = field(default_factory=list)
    limits: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able data; figures say their kind, numbers that are none become null."""
        data = asdict(self)
        for figure, made in zip(self.figures, data["figures"], strict=True):
            made["kind"] = type(figure).__name__.lower()
        cleaned: dict[str, Any] = _clean(data)
        return cleaned


def _clean(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _clean(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
