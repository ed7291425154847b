"""The page of a run shows what the findings hold."""

from __future__ import annotations

import math

import pytest
from tests.studies.toy_study import STUDY, conclude, measure, prepare

from invivo.report.draw import svg
from invivo.report.findings import Bars, Dots, Findings
from invivo.report.run_page import number, run_page, shown
from invivo.statistics import Interval


def test_everything_found_stands_on_the_page() -> None:
    settings = STUDY.quick
    records = [r for unit in prepare(settings).units for r in measure(None, settings, unit)]
    findings = conclude(settings, records)
    page = run_page(STUDY.title, STUDY.paper, findings, {"a": {"b": [1, 2]}, "c": "<x>"})
    for text in (
        "Nothing &amp; more", "Nobody 2026", "12 records &lt;of nothing&gt;.", "values are large",
        "There is nothing to say.", "<td>a\nb</td>", "<dt>a.b</dt><dd>1, 2</dd>", "&lt;x&gt;",
    ):  # fmt: skip
        assert text in page, text
    assert page.count("<svg") == 1
    assert 'data-verdict="holds"' in page


def test_cells() -> None:
    assert shown(Interval(0.5, 0.25, 0.75)) == "0.500 [0.250, 0.750]"
    assert [shown(x) for x in (None, 3, "t", 0.125)] == ["–", "3", "t", "0.125"]
    assert [number(x) for x in (0.0, 1.9e-5, -0.02, 12345.6)] == ["0", "1.9e-05", "-0.020",
                                                                 "1.2e+04"]  # fmt: skip


@pytest.mark.parametrize("n_groups", [1, 2])
def test_figures_of_every_kind_are_drawn(n_groups: int) -> None:
    estimate = Interval(0.4, 0.3, 0.5)
    groups = tuple((f"group {i}", (("one", estimate), ("two", estimate))) for i in range(n_groups))
    bands = tuple((0.2, 0.6, "band") for _ in range(n_groups))
    drawn = svg(Dots("d", "t", groups, "share (%)", zero=True, percent=True, bands=bands))
    for text in ("group 0", "one", "two", "share (%)", "band"):
        assert f">{text}<" in drawn, text
    counts = tuple((f"group {i}", (3.0, 4.0)) for i in range(n_groups))
    drawn = svg(Bars("b", "t", ("x", "y"), counts, "items", "kind"))
    for text in ("group 0", "x", "y", "items", "kind", "3", "4"):
        assert f">{text}<" in drawn, text


def test_numbers_that_are_none_become_null() -> None:
    from invivo.report.findings import Statement

    told = Findings("s", statements=[Statement("t", math.nan)]).to_dict()
    assert told["statements"][0]["figure"] is None
