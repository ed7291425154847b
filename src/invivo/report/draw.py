"""The kinds of figures that findings hold, drawn."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from invivo.html_page import INK, drawn, panels
from invivo.report.findings import Bars, Dots, Figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawn

_COLOUR = "#12a594"
_BAND = "#6a7ff0"
_ROW, _HEAD = 0.34, 1.15  # inches of a row of dots, and of a panel's title and axis


def svg(figure: Figure) -> str:
    """For a page.

    Raises:
        MissingDependency: matplotlib is not installed.
    """
    draw = partial(dots, figure) if isinstance(figure, Dots) else partial(bars, figure)
    return drawn(draw, figure.name)


def dots(figure: Dots) -> Drawn:
    """Rows from above, each an estimate with its interval."""
    n_rows = max(len(rows) for _, rows in figure.groups)
    drawing, both = panels(len(figure.groups), (9, _ROW * n_rows + _HEAD))
    scale = 100 if figure.percent else 1
    bands = figure.bands or (None,) * len(figure.groups)
    for axes, (title, rows), band in zip(both, figure.groups, bands, strict=True):
        axes.set_title(title, fontsize=11, loc="left", parse_math=False)
        if band is not None:
            low, high, what = band
            axes.axvspan(scale * low, scale * high, color=_BAND, alpha=0.15, label=what)
            if axes is both[0]:
                drawing.legend(frameon=False, fontsize=9, loc="outside lower left")
        if figure.zero:
            axes.axvline(0, color=INK, linewidth=1, linestyle=":")
        for i, (_, found) in enumerate(rows):
            axes.plot([scale * found.low, scale * found.high], [i, i], color=_COLOUR, linewidth=2.4)
            axes.plot([scale * found.value], [i], "o", color=_COLOUR, markersize=6)
        labels = [label for label, _ in rows]
        again = axes is not both[0] and labels == [label for label, _ in figure.groups[0][1]]
        axes.set_yticks(range(len(rows)), [""] * len(rows) if again else labels, parse_math=False)
        axes.set_ylim(n_rows - 0.4, -0.6)
        axes.set_xlabel(figure.axis)
        axes.grid(axis="x", alpha=0.15, color=INK)
    return drawing


def bars(figure: Bars) -> Drawn:
    """One panel a group, upright bars with their values above."""
    from matplotlib.ticker import MaxNLocator

    drawing, all_axes = panels(len(figure.groups), (9, 3.1))
    for axes, (title, values) in zip(all_axes, figure.groups, strict=True):
        axes.set_title(title, fontsize=11, loc="left", parse_math=False)
        made = axes.bar(range(len(values)), values, color=_COLOUR, width=0.7)
        axes.bar_label(made, fmt="{:,.0f}", fontsize=9, color=INK, padding=2)
        axes.set_xticks(range(len(values)), figure.categories, parse_math=False)
        axes.set_xlabel(figure.category_axis)
        axes.set_ylabel(figure.axis)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.margins(y=0.14)
    return drawing
