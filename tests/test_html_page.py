"""Pages of reports: one file, nothing fetched, no text taken for markup."""

from __future__ import annotations

from html.parser import HTMLParser

from invivo.html_page import (
    drawn,
    facts,
    heading,
    listing,
    page,
    panels,
    paragraph,
    section,
    table,
)

EVIL = "<script>alert(\"x\")</script> & 'y'"


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data


def test_texts_stay_texts_and_every_tag_is_closed():
    parts = [
        heading(EVIL, EVIL),
        facts([(EVIL, EVIL)]),
        section(EVIL, paragraph(EVIL), table(EVIL, [EVIL, "n"], [[EVIL, "1"]], note=EVIL)),
        listing({EVIL: EVIL}),
    ]
    read = Tags(page(EVIL, parts))
    assert read.open == []
    assert "script" not in read.seen
    assert read.words.count(EVIL) == 13


def test_figures_are_in_the_page_and_the_same_each_time():
    def draw():
        figure, (axes,) = panels(1, (4, 2))
        axes.plot([1, 2], [3, 4], label="line")
        axes.legend()
        return figure

    first = drawn(draw, "one")
    assert first == drawn(draw, "one")
    assert first.startswith("<svg")
    assert "currentColor" in first
    whole = page("t", [section("f", first, drawn(draw, "two"))])
    assert "http" not in whole.replace("http://www.w3.org/", "")
