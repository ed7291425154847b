"""Selectors find the positions they name, and refuse what they cannot."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.edits.small_models import words
from tests.tiny import tiny_tokenizer

from invivo.edits.prompt_text import PromptText, prompt_of_ids, prompt_of_pieces
from invivo.edits.selectors import (
    Positions,
    Resolver,
    pair,
    positions_of,
    read_selector,
    selector_to_json,
)
from invivo.errors import InvalidRequest

TEXT = ["The", " cat", " in", " Po", "land", " and", " the", " cat", " of", " Box", " A"]
PROMPT = prompt_of_pieces(
    [(7 if t == " cat" else 100 + i, t) for i, t in enumerate(TEXT)],
    n_new=3,
    turns=(("system", 0, 2), ("user", 2, 6), ("user", 6, 11)),
    groups={"image": ((2, 4),), "block": ((0, 1), (5, 7))},
)


def find(selector: Any, prompt: PromptText = PROMPT, **named: Any) -> list[int]:
    read = {name: read_selector(value, name) for name, value in named.items()}
    return Resolver(read, prompt, "main").resolve(read_selector(selector, "pos"), "pos").indices()


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ({"index": 3}, [3]),
        ({"index": -1}, [10]),
        ({"index": [0, -2, 4]}, [0, 4, 9]),
        ({"range": [2, 5]}, [2, 3, 4]),
        ({"range": [-3, 11]}, [8, 9, 10]),
        ({"span": "Poland"}, [3, 4]),
        ({"span": "Poland", "take": "last"}, [4]),
        ({"span": "Poland", "take": "first"}, [3]),
        ({"span": "cat", "nth": 1}, [7]),
        ({"span": "cat", "nth": -1}, [7]),
        ({"span": "cat", "nth": "all"}, [1, 7]),
        ({"regex": "Box ([A-Z])", "group": 1}, [10]),
        ({"regex": "[Tt]he", "nth": "all"}, [0, 6]),
        ({"token": " cat", "nth": 0}, [1]),
        ({"token": 7, "nth": "all"}, [1, 7]),
        ({"token": "land", "take": "one"}, [4]),
        ({"same_token_as": {"index": 1}}, [7]),
        ({"same_token_as": {"index": 7}, "nth": 0}, [1]),
        ({"offset": 1, "of": {"span": "Poland"}}, [4, 5]),
        ({"offset": 2, "of": "@last"}, [12]),
        ({"role": "system"}, [0, 1]),
        ({"role": "user", "nth": -1, "take": "first"}, [6]),
        ({"group": "image"}, [2, 3]),
        ({"group": "block", "nth": "all"}, [0, 5, 6]),
        ({"generated": True}, [11, 12, 13]),
        ({"generated": [1, None]}, [12, 13]),
        ({"generated": [0, 2]}, [11, 12]),
        ({"prompt": True}, list(range(11))),
        ({"all": True}, list(range(14))),
        ("@last", [10]),
        ("@first", [0]),
        ({"or": ["@last", {"index": 0}]}, [0, 10]),
        ({"and": ["@prompt", {"not": {"range": [1, 10]}}]}, [0, 10]),
        ({"not": "@prompt"}, [11, 12, 13]),
    ],
)
def test_selectors_find_what_they_name(selector: Any, expected: list[int]) -> None:
    assert find(selector) == expected


@pytest.mark.parametrize(
    ("selector", "words_of_error"),
    [
        ({"index": 11}, "no token 11"),
        ({"index": -12}, "no token -12"),
        ({"range": [5, 5]}, "range 5 to 5"),
        ({"span": "dog"}, "does not occur"),
        ({"span": "cat"}, "occurs 2 times"),
        ({"span": "cat", "nth": 2}, "occurs 2 times"),
        ({"token": "zebra"}, "does not occur"),
        ({"same_token_as": {"index": 3}}, "does not occur"),
        ({"same_token_as": {"range": [0, 2]}}, "needs one token"),
        ({"role": "assistant"}, "does not occur"),
        ({"role": "user"}, "occurs 2 times"),
        ({"span": "Poland", "take": "one"}, "matches 2 tokens"),
        ({"offset": 9, "of": "@last"}, "leads outside"),
        ({"and": [{"index": 0}, {"index": 1}]}, "matches nothing"),
        ({"not": "@all"}, "matches nothing"),
        ({"generated": [3, 9]}, "matches nothing"),
        ("@nobody", "no selector of this name"),
    ],
)
def test_what_matches_nothing_or_too_much_is_an_error(selector: Any, words_of_error: str) -> None:
    with pytest.raises(InvalidRequest, match=words_of_error) as caught:
        find(selector)
    assert str(caught.value.field).startswith("pos")


@pytest.mark.parametrize(
    "selector",
    [
        {},
        {"index": 1, "span": "a"},
        {"index": "one"},
        {"index": True},
        {"index": 1, "nth": 0},
        {"span": ""},
        {"span": "a", "take": "some"},
        {"offset": 1},
        {"generated": [2, 1]},
        {"generated": False},
        {"regex": "(", "nth": 0},
        {"regex": "a", "group": 1},
        {"or": []},
        {"wrong": 1},
        "last",
        5,
        None,
    ],
)
def test_malformed_selectors_are_refused(selector: Any) -> None:
    with pytest.raises(InvalidRequest):
        read_selector(selector, "pos")


def test_nesting_is_bounded() -> None:
    selector: Any = {"index": 0}
    for _ in range(40):
        selector = {"not": selector}
    with pytest.raises(InvalidRequest, match="nest"):
        read_selector(selector, "pos")


def test_names_in_a_circle_are_an_error() -> None:
    with pytest.raises(InvalidRequest, match="circle: @a -> @b -> @a"):
        find("@a", a={"offset": 1, "of": "@b"}, b={"or": ["@a"]})


def test_names_of_the_program_come_before_those_that_need_no_declaration() -> None:
    assert find("@last", last={"index": 2}) == [2]


SELECTORS = st.recursive(
    st.one_of(
        st.integers(-11, 10).map(lambda i: {"index": i}),
        st.tuples(st.integers(0, 5), st.integers(6, 11)).map(lambda p: {"range": list(p)}),
        st.sampled_from(
            ["@last", "@all", "@generated", {"span": "Poland"}, {"token": 7, "nth": 1}]
        ),
    ),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map(lambda p: {"or": p}),
        st.lists(inner, min_size=1, max_size=3).map(lambda p: {"and": p}),
        inner.map(lambda p: {"not": p}),
        st.tuples(inner, st.sampled_from(["first", "last"])).map(
            lambda p: {"or": [p[0]], "take": p[1]}
        ),
    ),
    max_leaves=6,
)


def meaning(selector: Any) -> set[int]:
    """The same by plain sets."""
    leaves = {"@last": {10}, "@all": set(range(14)), "@generated": {11, 12, 13}}
    if isinstance(selector, str):
        return leaves[selector]
    if "index" in selector:
        return {selector["index"] % 11}
    if "range" in selector:
        return set(range(*selector["range"]))
    if "span" in selector:
        return {3, 4}
    if "token" in selector:
        return {7}
    if "not" in selector:
        part = meaning(selector["not"])
        found = set(range(14)) - part
        return found if part and found else set()
    parts = [meaning(p) for p in selector.get("or", selector.get("and"))]
    if not all(parts):
        return set()
    found = set.union(*parts) if "or" in selector else set.intersection(*parts)
    if "take" in selector:
        return {min(found) if selector["take"] == "first" else max(found)}
    return found


@settings(max_examples=150, deadline=None)
@given(selector=SELECTORS)
def test_algebra_is_that_of_sets(selector: Any) -> None:
    expected = meaning(selector)
    read = read_selector(selector, "pos")
    assert read_selector(selector_to_json(read), "pos") == read
    if expected:
        assert find(selector) == sorted(expected)
    else:
        with pytest.raises(InvalidRequest):
            find(selector)


@given(st.sets(st.integers(0, 40)), st.sets(st.integers(0, 40)))
def test_positions_are_sets(a: set[int], b: set[int]) -> None:
    pa, pb = positions_of(a), positions_of(b)
    assert pa.indices() == sorted(a)
    assert len(pa) == len(a)
    assert (pa | pb).indices() == sorted(a | b)
    assert pa.within(pb, 41).indices() == sorted(a & b)
    assert pa.complement(41).indices() == sorted(set(range(41)) - a)
    assert all((i in pa) == (i in a) for i in range(41))


def test_positions_pair_up_as_the_map_says() -> None:
    here, there = words(range(6)), words(range(8))
    two = Positions(((4, 6),))
    assert pair(two, None, "index", here, there, "from") == (4, 5)
    assert pair(two, None, "end", here, there, "from") == (6, 7)
    assert pair(two, positions_of([1, 3]), "selector", here, there, "from") == (1, 3)
    assert pair(two, positions_of([2]), "one", here, there, "from") == (2, 2)
    assert pair(two, None, None, here, here, "from") == (4, 5)
    with pytest.raises(InvalidRequest, match="6 and 8 tokens"):
        pair(two, None, None, here, there, "from")
    with pytest.raises(InvalidRequest, match="1 source positions for 2"):
        pair(two, positions_of([1]), "selector", here, there, "from")
    with pytest.raises(InvalidRequest, match="needs one source position"):
        pair(two, positions_of([1, 2]), "one", here, there, "from")
    with pytest.raises(InvalidRequest, match="no partner"):
        pair(positions_of([0]), None, "end", there, here, "from")


@settings(max_examples=50, deadline=None)
@given(text=st.text("the cat über 水🙂", min_size=1, max_size=30))
def test_token_texts_of_ids_add_up_to_the_text(text: str) -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode(text).ids
    prompt = prompt_of_ids(ids, lambda some: tokenizer.decode(some, skip_special_tokens=False))
    assert prompt.text == text
    assert "".join(prompt.texts) == text
    assert len(prompt.ids) == len(ids)
