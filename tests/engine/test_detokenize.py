"""Incremental text equals the whole text, and stop strings never leak."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.normalizers import Prepend, Replace
from tokenizers.normalizers import Sequence as Normalizers

from invivo.engine.detokenize import StopText, TextStream

BYTES = tiny_tokenizer()


@pytest.fixture
def tokenizer() -> Tokenizer:
    return BYTES


@pytest.mark.parametrize(
    "text", ["hello world", "naïve café", "日本語 テキスト", "a👩‍👩‍👧b", " two  blanks\n\n\tend "]
)
def test_pieces_add_up_to_the_text(tokenizer: Tokenizer, text: str) -> None:
    stream = TextStream(tokenizer, tokenizer.encode("the cat").ids)
    pieces = [stream.push(token) for token in tokenizer.encode(text).ids]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_of_several_tokens_comes_when_it_is_complete(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("é").ids
    assert len(ids) == 2
    stream = TextStream(tokenizer, [])
    assert [stream.push(token) for token in ids] == ["", "é"]


def test_special_tokens_have_no_text(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, [])
    special = tokenizer.token_to_id("<|im_start|>")
    ids = [*tokenizer.encode("cat").ids, special, *tokenizer.encode(" dog").ids]
    assert "".join(stream.push(token) for token in ids) == "cat dog"


def test_the_first_word_keeps_its_blank_where_the_decoder_strips_it() -> None:
    vocab = {"<unk>": 0, "▁the": 1, "▁cat": 2, "▁sat": 3}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.normalizer = Normalizers([Prepend("▁"), Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    stream = TextStream(tokenizer, [1, 2])
    assert stream.push(3) == " sat"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 295), max_size=40))
def test_any_bytes_can_be_pushed(ids: list[int]) -> None:
    tokenizer = BYTES
    stream = TextStream(tokenizer, [])
    text = "".join(stream.push(token) for token in ids)
    whole = tokenizer.decode(ids)
    # Only an unfinished character at the very end may be missing.
    assert whole.rstrip("\ufffd").startswith(text.rstrip("\ufffd"))


def split(text: str, cuts: list[int]) -> list[str]:
    borders = sorted({min(c, len(text)) for c in cuts} | {0, len(text)})
    return [text[a:b] for a, b in itertools.pairwise(borders)]


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(alphabet="ab\n", max_size=30),
    stops=st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), min_size=1, max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=10),
)
def test_the_cuts_between_pieces_do_not_matter(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    watch = StopText(tuple(stops))
    settled = ""
    match = None
    for piece in split(text, cuts):
        new, match = watch.push(piece)
        settled += new
        if match is not None:
            break
    ends = sorted((text.find(s) + len(s), text.find(s), s) for s in stops if s in text)
    if ends:
        assert match == ends[0][2]
        assert settled == text[: ends[0][1]]
        assert watch.flush() == ""
    else:
        assert match is None
        assert settled + watch.flush() == text


def test_a_stop_string_may_begin_before_it_counts() -> None:
    watch = StopText(("stop", "a"))
    assert watch.push("a st", armed=False) == ("a ", None)
    assert watch.push("op") == ("", "stop")
    whole = StopText(("stop",))
    assert whole.push("stop s", armed=False) == ("stop ", None)
    assert whole.push("et") == ("set", None)
