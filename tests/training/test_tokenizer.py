"""A learned tokenizer gives every text back, byte for byte, and knows how long tokens are."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.training.texts import story

from invivo.errors import Conflict, InvalidRequest
from invivo.models.load import load_tokenizer
from invivo.training.tokenizer import (
    END,
    TextTokenizer,
    copy_tokenizer,
    learn_tokenizer,
    open_tokenizer,
    token_bytes,
)

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60) | st.sampled_from(
    [END, f"a{END}b", "12345", " \n\t ", "naïve 東京 😀", story(3)]
)


@functools.cache
def learned() -> TextTokenizer:
    folder = Path(tempfile.mkdtemp()) / "tokenizer"
    learn_tokenizer([story(i) for i in range(9)], 320, folder)
    return open_tokenizer(folder)


@given(text=TEXTS)
def test_every_text_comes_back_and_its_bytes_are_counted(text: str) -> None:
    tokenizer = learned()
    (ids,) = tokenizer.encode([text])
    assert tokenizer.end_token not in ids
    assert tokenizer.tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())


def test_it_has_the_size_that_was_asked_for_and_one_special_token() -> None:
    tokenizer = learned()
    assert tokenizer.vocab_size == len(tokenizer.token_bytes) == 320
    assert tokenizer.boundary == (tokenizer.end_token,) == (0,)
    assert tokenizer.token_bytes[0] == 0
    hub = load_tokenizer(tokenizer.folder)
    assert hub.eos_token == hub.bos_token == END
    assert hub("the cat")["input_ids"] == [0, *tokenizer.encode(["the cat"])[0]]
    assert hub.decode(hub("the cat")["input_ids"], skip_special_tokens=True) == "the cat"
    digits = tokenizer.encode(["12 years 777"])[0]
    assert all(len(hub.decode([token])) == 1 for token in digits if hub.decode([token]).isdigit())


def test_learning_is_deterministic(tmp_path: Path) -> None:
    digests = set()
    for name in ("a", "b"):
        learn_tokenizer((story(i) for i in range(5)), 300, tmp_path / name)
        digests.add(open_tokenizer(tmp_path / name).digest)
    assert len(digests) == 1


def test_bytes_of_other_vocabularies() -> None:
    pieces = {"<unk>": 0, "<0x0A>": 1, "▁the": 2, "é": 3}
    added = [
        {"id": 0, "content": "<unk>", "special": True},
        {"id": 4, "content": "<word>", "special": False},
    ]
    content = {"model": {"vocab": pieces}, "added_tokens": added, "decoder": {"type": "Fuse"}}
    assert token_bytes(content).tolist() == [0, 1, 4, 2, 6]
    content["model"] = {"vocab": [[piece, -1.0] for piece in pieces]}  # a unigram model's form
    assert token_bytes(content).tolist() == [0, 1, 4, 2, 6]


def test_what_cannot_be_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="no text to learn"):
        learn_tokenizer([], 300, tmp_path / "none")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(InvalidRequest, match=r"no tokenizer\.json"):
        copy_tokenizer(str(tmp_path / "model"), tmp_path / "copy")
    with pytest.raises(Conflict):
        learn_tokenizer(["a"], 300, tmp_path / "model")
    settings = learned().folder / "tokenizer_config.json"
    copy_tokenizer(str(learned().folder), tmp_path / "endless")
    text = settings.read_text().replace('"eos_token"', '"no_token"')
    (tmp_path / "endless" / "tokenizer_config.json").write_text(text)
    with pytest.raises(InvalidRequest, match="no end token"):
        open_tokenizer(tmp_path / "endless")
