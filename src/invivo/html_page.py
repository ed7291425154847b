"""A self-contained HTML page: text, tables, figures; light and dark, narrow and wide.

Whoever reports something (a run of a study, a training run, the demo) builds it of these pieces.
Texts are escaped here; figures are matplotlib's, as SVG whose ink is the page's own text colour.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from invivo.errors import MissingDependency

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#010203"  # in a figure: the page's text colour


def page(title: str, parts: Iterable[str], *, refresh: int | None = None) -> str:
    """The whole document.

    Args:
        title: of the browser's tab.
        parts: HTML, as the other functions here give it.
        refresh: seconds after which a browser reads it again; None: never.
    """
    again = "" if refresh is None else f'<meta http-equiv="refresh" content="{refresh}">'
    style = (files("invivo") / "html_page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"{again}<title>{escape(title)}</title><style>{style}</style></head>\n"
        f"<body>\n{chr(10).join(parts)}\n</body></html>\n"
    )


def heading(title: str, *paragraphs: str) -> str:
    return f"<h1>{escape(title)}</h1>" + "".join(paragraph(text) for text in paragraphs)


def paragraph(text: str, *, muted: bool = False) -> str:
    return f'<p class="muted">{escape(text)}</p>' if muted else f"<p>{escape(text)}</p>"


def section(title: str, *parts: str) -> str:
    """A card with a title."""
    inside = "\n".join(f'<div class="wide">{part}</div>' for part in parts)
    return f"<section><h2>{escape(title)}</h2>\n{inside}\n</section>"


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Large figures side by side: (figure, what it is)."""
    cells = "".join(f"<div><b>{escape(a)}</b>{escape(b)}</div>" for a, b in pairs)
    return f'<div class="facts">{cells}</div>'


def table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, note: str = ""
) -> str:
    """A table; the first column is text, the others stand to the right."""
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    caption = f"<caption>{escape(title)}</caption>" if title else ""
    below = paragraph(note, muted=True) if note else ""
    return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>" + below


def texts(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of longer texts, whose lines are kept."""
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<table class="texts"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def listing(entries: Mapping[str, str]) -> str:
    """Names and what stands behind them, both as text of any length."""
    inside = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in entries.items())
    return f"<dl>{inside}</dl>"


def panels(n: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """An empty figure of ``size`` inches with ``n`` panels side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, [figure.add_subplot(1, n, i + 1) for i in range(n)]


def drawn(draw: Callable[[], Figure], name: str) -> str:
    """The SVG of a figure, drawn in the page's style; the same input gives the same text.

    Args:
        draw: makes the figure; run within the style.
        name: tells the ids within this figure from those of others on the page.

    Raises:
        MissingDependency: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise MissingDependency(
            "figures need matplotlib", remedy="pip install 'invivo[study]'"
        ) from error
    style: Any = {
        "text.color": INK,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.family": "sans-serif",
        "font.size": 11,
    }
    with mpl.rc_context(style):
        written = io.StringIO()
        draw().savefig(written, format="svg", transparent=True, metadata={"Date": None})
    text = written.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    return re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
