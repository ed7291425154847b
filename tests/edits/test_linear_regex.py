"""Patterns find what Python's own engine finds, and never take long."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from invivo.edits.linear_regex import Pattern
from invivo.errors import InvalidRequest, TooLarge

_ATOM = st.sampled_from(["a", "b", ".", "[ab]", "[^a]", r"\w", r"\s", "(a)", "(?:b|a)", "(b|)"])
_PIECE = st.tuples(_ATOM, st.sampled_from(["", "", "*", "+", "?", "*?", "+?", "{1,2}", "{2}"]))
PATTERNS = st.lists(_PIECE.map("".join), min_size=1, max_size=4).map("".join)


@settings(max_examples=200, deadline=None)
@given(pattern=PATTERNS, text=st.text("ab \n", max_size=12))
def test_matches_are_those_of_re(pattern: str, text: str) -> None:
    found = [match[0] for match in Pattern(pattern, field="p").find_all(text)]
    expected = [match.span() for match in re.finditer(pattern, text)]
    assert found[:1] == expected[:1]
    # Behind an empty match Python tries the same place again for a longer one.
    if all(end > start for start, end in expected):
        assert found == expected


@pytest.mark.parametrize(
    ("pattern", "text", "group", "expected"),
    [
        (r"Box ([A-Z])", "Box A and Box B", 1, ["A", "B"]),
        (r"^\w+", "one two", 0, ["one"]),
        (r"\w+$", "one two", 0, ["two"]),
        (r"\bt\w*", "two stop ten", 0, ["two", "ten"]),
        (r"(\d+)-(\d+)", "3-15, 7-8", 2, ["15", "8"]),
        (r"[^,]+", "a,bc", 0, ["a", "bc"]),
        (r"a|ab", "ab", 0, ["a"]),
        (r"\$5\.0", "$5.0", 0, ["$5.0"]),
    ],
)
def test_groups_and_anchors(pattern: str, text: str, group: int, expected: list[str]) -> None:
    spans = [m[group] for m in Pattern(pattern, field="p").find_all(text)]
    assert [text[a:b] for a, b in spans] == expected


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|a)*$", "(.*)*x", "a*a*a*a*a*b"])
def test_patterns_that_ruin_backtracking_are_quick(pattern: str) -> None:
    began = time.thread_time()
    list(Pattern(pattern, field="p").find_all("a" * 400))
    assert time.thread_time() - began < 10.0  # backtracking would take years


def test_work_is_bounded() -> None:
    with pytest.raises(TooLarge):
        list(Pattern("(a?){300}b", field="p").find_all("a" * 5000))
    with pytest.raises(TooLarge):
        Pattern("((a{30}){30}){30}", field="p")
    assert len(Pattern("(?:(?:){9}){1000000000}", field="p").states) == 3


@pytest.mark.parametrize(
    "pattern", ["(", "(?=a)", r"(a)\1", "(?i)a", "a{999999999999}", "(?P<x>a)(?P=x)"]
)
def test_what_does_not_fit_is_refused(pattern: str) -> None:
    with pytest.raises((InvalidRequest, TooLarge)) as caught:
        Pattern(pattern, field="sel.x.regex")
    assert caught.value.field == "sel.x.regex"
