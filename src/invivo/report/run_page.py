"""One self-contained HTML page of a run."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from invivo.html_page import facts, heading, listing, page, paragraph, section, table, texts
from invivo.report.draw import svg
from invivo.report.findings import Cell, Findings, Statement
from invivo.statistics import Interval

_MARKS = {"holds": "✓", "fails": "✗", "open": "?"}
_SAID = {"holds": "holds", "fails": "does not hold", "open": "open"}


def run_page(title: str, source: str, findings: Findings, manifest: Mapping[str, Any]) -> str:
    """The page.

    Args:
        source: the paper, or whatever the run follows.
        manifest: nested tables of plain values; shown as they are.

    Raises:
        MissingDependency: matplotlib is not installed.
    """
    parts = [heading(title, findings.summary), paragraph(source, muted=True)]
    if findings.facts:
        parts.append(facts(findings.facts))
    if findings.statements:
        parts.append(section("What was found", _statements(findings.statements)))
    for figure in findings.figures:
        note = [paragraph(figure.note, muted=True)] if figure.note else []
        parts.append(section(figure.title, svg(figure), *note))
    for one in findings.tables:
        rows = [[shown(cell) for cell in row] for row in one.rows]
        parts.append(section(one.title, table("", one.columns, rows, note=one.note)))
    for read in findings.examples:
        parts.append(section(read.title, texts(read.columns, read.rows)))
    if findings.limits:
        inside = "".join(f"<li>{escape(limit)}</li>" for limit in findings.limits)
        parts.append(section("What this run cannot say", f"<ul>{inside}</ul>"))
    parts.append(section("Manifest", listing(_flat(manifest))))
    return page(f"invivo: {title}", parts)


def shown(cell: Cell) -> str:
    """A cell as text; an interval as "value [low, high]"."""
    match cell:
        case None:
            return "–"
        case Interval():
            return f"{number(cell.value)} [{number(cell.low)}, {number(cell.high)}]"
        case float():
            return number(cell)
        case _:
            return str(cell)


def number(x: float) -> str:
    """Three decimals where that says something, powers of ten elsewhere."""
    if x == 0:
        return "0"
    return f"{x:.3f}" if 1e-3 <= abs(x) < 1e4 else f"{x:.1e}"


def said(statement: Statement) -> str:
    """A statement as one line of text."""
    return " · ".join([statement.text, *_figures(statement)])


def _figures(statement: Statement) -> list[str]:
    figures = [] if statement.figure is None else [shown(statement.figure)]
    return figures if statement.p is None else [*figures, f"p = {number(statement.p)}"]


def _statements(statements: list[Statement]) -> str:
    rows = ""
    for one in statements:
        mark = _MARKS[one.verdict] if one.verdict else "·"
        word = _SAID[one.verdict] if one.verdict else "measured"
        told = " · ".join(
            [escape(one.text), *(f"<span>{escape(text)}</span>" for text in _figures(one))]
        )
        rows += (
            f'<li data-verdict="{one.verdict or ""}"><b title="{word}">{mark}</b>'
            f"<div>{told}</div></li>"
        )
    return f'<ul class="statements">{rows}</ul>'


def _flat(value: Mapping[str, Any], before: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, inside in value.items():
        key = f"{before}{name}"
        if isinstance(inside, Mapping):
            flat |= _flat(inside, f"{key}.")
        elif isinstance(inside, list | tuple):
            flat[key] = ", ".join(map(str, inside))
        else:
            flat[key] = str(inside)
    return flat
